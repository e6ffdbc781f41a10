"""Pure: how many changes a cluster may make. One that makes more is slowed, and nobody else."""

from collections.abc import Iterator
from itertools import islice

from clustermesh.kv import Event
from clustermesh.remote import Part

RATE = 2000.0  # events a second of one cluster
WINDOW_S = 10.0  # over which that is averaged
MAX_LATE = 300_000  # keys of one cluster that can wait; above, its newest changes are left to a new listing


class Pace:
    """What waits is the newest change of each key, so that a fast cluster costs memory for keys only."""

    def __init__(self, rate: float = RATE, window_s: float = WINDOW_S) -> None:
        self.lost = False  # something was left to a new listing
        self._rate = rate
        self._most = rate * window_s
        self._left: dict[
            str, tuple[float, float]
        ] = {}  # cluster -> events that it may still make, as of then
        self._late: dict[str, dict[tuple[Part, str], Event]] = {}
        self._where: dict[tuple[Part, str], str] = {}

    def __bool__(self) -> bool:
        """Whether something waits."""
        return bool(self._where)

    def clear(self) -> None:
        """Forget what waits: a listing says it all."""
        self._late.clear()
        self._where.clear()
        self.lost = False

    def admit(self, part: Part, event: Event, cluster: str, now: float) -> bool:
        """Whether an event is to be looked at now; `due` gives it later otherwise."""
        place = (part, event.key)
        before = self._where.get(place)
        if before is None and self._spend(cluster, 1, now):
            return True
        late = self._late.setdefault(before or cluster, {})
        if before is None and len(late) >= MAX_LATE:
            self.lost = True
            return False
        late[place] = event
        self._where[place] = before or cluster
        return False

    def due(self, now: float) -> Iterator[tuple[Part, list[Event]]]:
        """What waited and may be looked at now, oldest first."""
        for cluster, late in list(self._late.items()):
            places = list(islice(late, self._spend(cluster, len(late), now)))
            batches: dict[Part, list[Event]] = {}
            for place in places:
                batches.setdefault(place[0], []).append(late.pop(place))
                del self._where[place]
            if not late:
                del self._late[cluster]
            yield from batches.items()

    def _spend(self, cluster: str, wanted: int, now: float) -> int:
        """How many of the wanted events a cluster may make now; they are counted."""
        left, then = self._left.get(cluster, (self._most, now))
        left = min(self._most, left + (now - then) * self._rate)
        count = min(wanted, int(left))
        self._left[cluster] = left - count, now
        return count

"""`python -m daemon.flows.recorded DIRECTORY`: recorded flows of a time range as JSON lines, oldest first.

A process of its own, started by the daemon for each such question: scanning a day's flows must not hold up the
event loop. The question comes as JSON on stdin, `{since_ns, until_ns, number, whitelist, blacklist, groups}`; lines are
those of daemon/flows/lines.py. With `groups`, flows that differ in time and client port only are one line, with
`count`, `first` and `last` (to the seconds between two writes) beside `flow`. Exit status 2 for a question that cannot
be meant.
"""

import json
import struct
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bpf.layout import EVENT
from daemon.flows.decode import Event
from daemon.flows.filters import FilterError, Filters, parse_filters
from daemon.flows.lines import flow_json, line, rfc3339
from daemon.flows.scan import AT, Columns, prefilter
from daemon.flows.segments import EVENTS, KNOWN, Frame, Recalled, Stored, files, stored, unpack_known
from daemon.model.flow import Flow

FLUSH_LINES = 64
MOST_GROUPS = 100_000
# Everything but time, client port, TCP flags, length, code, hook, device and frame type.
_ASKED = ("saddr", "daddr", "dport_be", "kind", "reason", "direction", "family", "proto", "icmp_type", "verdict",
          "identity", "rule", "generation", "packet_class")  # fmt: skip
_WIDTH = {name: struct.calcsize("=" + code) for name, code in EVENT.fields}
_GROUPED = tuple(AT[name] + offset for name in _ASKED for offset in range(_WIDTH[name]))


class Group:
    """Flows that differ in nothing that policy asks about."""

    __slots__ = ("count", "first_ns", "flow", "last_ns", "started_ns")

    def __init__(self, flow: Flow, started_ns: int, first_ns: int) -> None:
        self.flow = flow
        self.started_ns = started_ns
        self.count = 0
        self.first_ns = first_ns
        self.last_ns = first_ns


def grouped(directory: Path, question: Mapping[str, Any]) -> tuple[list[Group], int]:
    """The groups of all flows that answer a question, and the flows beyond MOST_GROUPS. Raises FilterError."""
    groups: dict[bytes, Group] = {}
    beyond = 0
    for part in _parts(directory, question):
        for key, (count, index) in _counted(part).items():
            group = groups.get(key)
            if group is None:
                if len(groups) >= MOST_GROUPS:
                    beyond += count
                    continue
                flow = part.flow(index, part.columns.event(index))
                group = groups[key] = Group(flow, part.frame.started_ns, part.frame.oldest_ns)
            group.count += count
            group.last_ns = part.frame.newest_ns
    return list(groups.values()), beyond


def _counted(part: "_Part") -> dict[bytes, tuple[int, int]]:
    """How often each group occurs, and where once: the bytes of an event that policy asks about are its key."""
    columns, count = part.columns, part.frame.events
    chosen = list(part.chosen())
    keys = b"".join(columns.column(at) for at in _GROUPED)
    # A key is every count-th byte, from the event's index on: the same turn as that of the columns.
    found: dict[bytes, tuple[int, int]] = {}
    for index in chosen:
        key = keys[index::count]
        before = found.get(key)
        found[key] = (before[0] + 1, before[1]) if before else (1, index)
    return found


def matching(directory: Path, question: Mapping[str, Any]) -> Iterator[tuple[Flow, int]]:
    """The recorded flows that answer a question, with the start of the daemon that saw them. Raises FilterError."""
    for part in _parts(directory, question):
        for index in part.chosen():
            yield part.flow(index, part.columns.event(index)), part.frame.started_ns


class _Part(NamedTuple):
    """One frame that may have answers."""

    frame: Frame
    columns: Columns
    candidates: int
    filters: Filters
    recalled: Recalled
    since_ns: int
    until_ns: int

    def flow(self, index: int, event: Event) -> Flow:
        return self.recalled.flow(self.frame.number + index, event, self.frame.offset_ns)

    def chosen(self) -> Iterator[int]:
        """The indexes of the events that answer."""
        inside = self.since_ns <= self.frame.oldest_ns and self.frame.newest_ns <= self.until_ns
        everything = inside and not self.filters.whitelist and not self.filters.blacklist
        for index in self.columns.indexes(self.candidates):
            if everything:
                yield index
                continue
            event = self.columns.event(index)
            if self.since_ns <= event.time_ns + self.frame.offset_ns <= self.until_ns and self._selects(
                index, event
            ):
                yield index

    def _selects(self, index: int, event: Event) -> bool:
        return self.filters.select(event, lambda: self.flow(index, event)) is not None


def _parts(directory: Path, question: Mapping[str, Any]) -> Iterator[_Part]:
    """The frames of the time range, oldest first. Raises FilterError."""
    white, black = question.get("whitelist", []), question.get("blacklist", [])
    filters = parse_filters(white, black)
    candidates = prefilter(white)
    since, until = int(question["since_ns"]), int(question["until_ns"])
    for path in files(directory):
        try:
            frames = list(stored(path))
        except FileNotFoundError:  # it grew too old meanwhile
            continue
        wanted = [one for one in frames if _touches(one, since, until)]
        if not wanted:
            continue
        recalled = _recalled(frames)
        for one in wanted:
            payload = one.payload()
            if payload is None:
                break
            columns = Columns(payload, one.frame.events)
            yield _Part(one.frame, columns, candidates(columns), filters, recalled, since, until)


def _touches(one: Stored, since: int, until: int) -> bool:
    frame = one.frame
    return frame.kind == EVENTS and frame.newest_ns >= since and frame.oldest_ns <= until


def _recalled(frames: list[Stored]) -> Recalled:
    recalled = Recalled()
    for one in frames:
        if one.frame.kind == KNOWN and (payload := one.payload()):
            recalled.learn(unpack_known(payload))
    return recalled


def main() -> int:
    """The program."""
    question = json.load(sys.stdin)
    directory = Path(sys.argv[1])
    try:
        if question.get("groups"):
            _print_groups(*grouped(directory, question))
        else:
            _print_flows(matching(directory, question), question.get("number") or -1)
    except FilterError as error:
        print(error, file=sys.stderr)
        return 2
    except BrokenPipeError:
        pass
    return 0


def _print_flows(flows: Iterator[tuple[Flow, int]], most: int) -> None:
    pending: list[str] = []
    for shown, (flow, started_ns) in enumerate(flows, 1):
        pending.append(line(flow, started_ns))
        if shown == 1 or len(pending) >= FLUSH_LINES:  # the first at once: somebody is waiting
            sys.stdout.write("".join(pending))
            sys.stdout.flush()
            pending.clear()
        if shown == most:
            break
    sys.stdout.write("".join(pending))
    sys.stdout.flush()


def _print_groups(groups: list[Group], beyond: int) -> None:
    for one in groups:
        times = {"count": one.count, "first": rfc3339(one.first_ns), "last": rfc3339(one.last_ns)}
        print(json.dumps(times | flow_json(one.flow, one.started_ns), separators=(",", ":")))
    if beyond:
        print(json.dumps({"beyond": beyond}))
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())

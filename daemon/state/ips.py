"""Which source wins when several claim one prefix; pure."""

from collections.abc import Mapping

from daemon.model.identity import Identity
from daemon.state.tables import IpRow

# Local truth beats a file, that beats the mesh; what the store says of one address beats a node's own list.
_RANKS = (("local", 0), ("file", 1), ("mesh:", 2), ("node:", 3))


def rank(source: str) -> int:
    """The lower, the more it is believed."""
    return next((number for prefix, number in _RANKS if source.startswith(prefix)), len(_RANKS))


def winner(claims: Mapping[str, IpRow]) -> IpRow | None:
    """The row that holds, by source; None when equally believed sources name different identities.

    Nobody is right then: the address counts as one whose identity is unknown, the most restricted answer.
    """
    best = min(map(rank, claims))
    rows = [row for source, row in sorted(claims.items()) if rank(source) == best]
    named = {row.identity for row in rows if row.identity}
    if len(named) > 1:
        return None
    return next((row for row in rows if row.identity), rows[0])


def conflicts(claims: Mapping[str, IpRow]) -> tuple[tuple[str, Identity], ...]:
    """Who says what, of the sources that are believed most."""
    best = min(map(rank, claims))
    return tuple((source, row.identity) for source, row in sorted(claims.items()) if rank(source) == best)

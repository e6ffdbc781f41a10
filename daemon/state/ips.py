"""Which source wins when several claim one prefix; pure."""

from collections.abc import Mapping

from daemon.state.tables import IpRow

_RANKS = (("local", 0), ("file", 1), ("mesh:", 3), ("node:", 5))


def rank(source: str, own_cluster: str = "") -> int:
    """The lower, the more it is believed.

    Local truth beats a file, that beats the store; there this host's own cluster beats the others, and what is said of
    one address beats a node's own list.
    """
    number = next((number for prefix, number in _RANKS if source.startswith(prefix)), len(_RANKS) + 1)
    return number - 1 if own_cluster and _cluster(source) == own_cluster else number


def _cluster(source: str) -> str:
    return source.partition(":")[2].partition("/")[0]


def winner(claims: Mapping[str, IpRow], own_cluster: str = "") -> IpRow | None:
    """The row that holds, by source; None when equally believed sources name different identities.

    Nobody is right then: the address counts as one whose identity is unknown, the most restricted answer.
    An address that a cluster names twice, in a node's own list and by itself, is that node's: what a cluster publishes
    of its hosts' addresses has labels of its own, and rules for nodes match nodes only.
    """
    nodes = {_cluster(source): row for source, row in claims.items() if source.startswith("node:")}
    claims = {
        source: nodes.get(_cluster(source), row) if source.startswith("mesh:") else row
        for source, row in claims.items()
    }
    best = min(rank(source, own_cluster) for source in claims)
    rows = [row for source, row in sorted(claims.items()) if rank(source, own_cluster) == best]
    named = {row.identity for row in rows if row.identity}
    if len(named) > 1:
        return None
    return next((row for row in rows if row.identity), rows[0])

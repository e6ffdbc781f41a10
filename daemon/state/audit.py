"""What is in audit now; pure."""

from typing import NamedTuple

from daemon.state.tables import WHOLE_HOST, Tables


class Audited(NamedTuple):
    """The whole host, or some policies by title."""

    host: bool = False
    policies: frozenset[str] = frozenset()

    def covers(self, title: str) -> bool:
        """Whether denials of this policy are reported and not enforced."""
        return self.host or title in self.policies


def audited(tables: Tables) -> Audited:
    """As `tables.audit` says."""
    on = {name for name, row in tables.audit.rows.items() if row.on}
    return Audited(WHOLE_HOST in on, frozenset(on - {WHOLE_HOST}))

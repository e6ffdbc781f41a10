"""What is in audit: as the settings say, until `meshwall audit` says otherwise; that is kept over a restart."""

import json
import logging
import time
from collections.abc import Iterable
from pathlib import Path

from daemon.sources.safefiles import write_file
from daemon.state.tables import WHOLE_HOST, AuditRow, StatusRow, Tables

log = logging.getLogger(__name__)

FILE = "audit.json"


class AuditSwitch:
    """Owner of `tables.audit`."""

    def __init__(self, tables: Tables, state_dir: Path, *, host: bool, policies: Iterable[str]) -> None:
        self._tables = tables
        self._state_dir = state_dir
        now = time.time()
        self._settings = {WHOLE_HOST: AuditRow(host, now)} | {one: AuditRow(True, now) for one in policies}
        self._commands = self._kept()
        self._tables.audit.replace(self._settings | self._commands)

    def set(self, policy: str, on: bool | None) -> None:
        """Switch one policy by title, or WHOLE_HOST; None: as the settings say. OSError when it cannot be kept."""
        wanted = dict(self._commands)
        wanted.pop(policy, None)
        if on is not None:
            wanted[policy] = AuditRow(on, time.time(), by_command=True)
        rows = {name: [row.on, row.since] for name, row in wanted.items()}
        write_file(self._state_dir, FILE, json.dumps(rows) + "\n")
        self._commands = wanted
        self._tables.audit.replace(self._settings | wanted)
        self._tables.status.delete("audit")
        log.warning(
            "audit of %s: %s", policy or "the whole host", {True: "on", False: "off", None: "as set"}[on]
        )

    def _kept(self) -> dict[str, AuditRow]:
        """Of an earlier process. A file that cannot be read is none: the settings hold, and the status says so."""
        path = self._state_dir / FILE
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
            return {
                str(name): AuditRow(bool(on), float(since), by_command=True)
                for name, (on, since) in rows.items()
            }
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            text = f"{path} cannot be read, the settings hold: {error}"
            log.error("audit: %s", text)  # noqa: TRY400 - one line
            self._tables.status.put("audit", StatusRow(False, text, "repeat `meshwall audit on` or `off`"))
            return {}

"""RuleUsage: how often each rule decided and when it last did, over restarts and changes of other rules.

The data path counts by rule number, and numbers come and go. What is kept here belongs to what a rule says: its
policy, direction, peers and ports. A rule that is moved keeps its count, one that is changed begins anew.
"""

import asyncio
import json
import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

from daemon.flows.counters import read_rules
from daemon.model.rule import Policy, Rule
from daemon.state.tables import StatusRow, Tables

log = logging.getLogger(__name__)

LOOK_EVERY_S = 10.0
SAVE_EVERY_S = 300.0
FILE = "rule-usage.json"
MOST_REMEMBERED = 1 << 16  # rules, gone ones included; the longest unused are forgotten first


@dataclass(slots=True)
class Usage:
    """`since` is when counting began, `last` when a packet last met the rule (0: never). Wall clock, to 10 s."""

    packets: int = 0
    bytes: int = 0
    since: float = 0.0
    last: float = 0.0


def rule_key(rule: Rule) -> str:
    """What the rule says, in a name: equal for equal rules of a policy."""
    origin = rule.origin
    said = repr((rule.peers, rule.ports, rule.layer7_ports, rule.auth))
    return f"{origin.kind}/{origin.policy}/{origin.direction}/{origin.deny}/{sha256(said.encode()).hexdigest()[:16]}"


class RuleUsage:
    """The record. `run` is the task; `of` answers for a rule."""

    def __init__(self, tables: Tables, pins: Path, directory: Path) -> None:
        self._tables = tables
        self._pins = pins
        self._path = directory / FILE
        self._known: dict[str, Usage] = {}
        self._before: dict[tuple[int, str], tuple[int, int]] = {}  # (number, rule) -> as last read

    def of(self, rule: Rule) -> Usage | None:
        """None for a rule that was never in force while we looked."""
        return self._known.get(rule_key(rule))

    async def run(self) -> None:
        """Until cancelled; saved now and then and at the end."""
        await asyncio.to_thread(self._load)
        saved = time.monotonic()
        try:
            while True:
                await asyncio.sleep(LOOK_EVERY_S)
                await self.look(time.time())
                if time.monotonic() - saved > SAVE_EVERY_S:
                    saved = time.monotonic()
                    await asyncio.to_thread(self.save)
        finally:
            self.save()

    async def look(self, now: float) -> None:
        """Add what the data path counted since the last look."""
        numbers = self._numbers()
        hits = await asyncio.to_thread(read_rules, self._pins, list(numbers))
        if numbers != self._numbers():
            return  # numbers were given anew while we read
        before = {}
        for number, key in numbers.items():
            packets, size = hits.get(number, (0, 0))
            before[number, key] = packets, size
            usage = self._known.setdefault(key, Usage(since=now))
            old = self._before.get((number, key), (0, 0))
            if packets < old[0]:  # the number was given to this rule anew, and counts from zero
                old = (0, 0)
            if packets > old[0]:
                usage.packets += packets - old[0]
                usage.bytes += max(0, size - old[1])
                usage.last = now
        self._before = before

    def _numbers(self) -> dict[int, str]:
        """Kernel number -> rule, of the rules in force."""
        rules = {rule.origin.key: rule for rule in rules_of(self._tables.policies.rows.values())}
        return {
            number: rule_key(rules[origin.key])
            for number, origin in self._tables.rules.rows.items()
            if origin.key in rules
        }

    def save(self) -> None:
        """Write the file as a whole."""
        kept = sorted(self._known.items(), key=lambda one: -max(one[1].last, one[1].since))[:MOST_REMEMBERED]
        text = json.dumps({key: asdict(usage) for key, usage in kept})
        fresh = self._path.with_suffix(".new")
        try:
            fresh.write_text(text, encoding="utf-8")
            fresh.rename(self._path)
        except OSError as error:
            self._status(
                StatusRow(False, f"not saved: {error}", "the counts of rules begin anew at a restart")
            )
        else:
            self._status(StatusRow(True, "saved"))

    def _load(self) -> None:
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
            self._known = {str(key): Usage(**usage) for key, usage in found.items()}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, AttributeError) as error:
            log.warning("%s: %s; rules are counted anew", self._path, error)

    def _status(self, row: StatusRow) -> None:
        self._tables.status.put("rule usage", row)


def rules_of(policies: Iterable[Policy]) -> Iterator[Rule]:
    """Every rule of every policy."""
    for policy in policies:
        for spec in policy.specs:
            yield from spec.rules

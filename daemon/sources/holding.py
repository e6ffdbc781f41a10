"""What a directory of policies means, given what it meant before: bad or vanished input removes nothing.

Pure. For each file the last version without an error is kept. A file with an error contributes its good
documents, and for the rest what it said before. A directory that turns empty keeps everything until somebody
says that this is meant.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from daemon.model.problem import Problem
from daemon.model.rule import CidrGroup, Policy
from daemon.policy.ccnp import Parsed
from daemon.state.tables import PolicyKey

K = TypeVar("K")
V = TypeVar("V")

EMPTY = Parsed((), (), ())


@dataclass(frozen=True, slots=True)
class FileState:
    """One file: as it is now, and its last version without an error."""

    now: Parsed
    good: Parsed = EMPTY


@dataclass(frozen=True, slots=True)
class Held:
    """The whole directory. `waiting`: it is empty, but what it held is enforced until that is confirmed."""

    files: Mapping[str, FileState] = field(default_factory=dict)
    waiting: bool = False


@dataclass(frozen=True, slots=True)
class Effect:
    """What the tables shall hold."""

    policies: Mapping[PolicyKey, Policy]
    groups: Mapping[str, CidrGroup]
    problems: Mapping[str, tuple[Problem, ...]]  # by file; no entry for a file in order


def key_of(policy: Policy) -> PolicyKey:
    """The table key of a policy."""
    return PolicyKey(policy.kind, policy.namespace, policy.name)


def observe(held: Held, found: Mapping[str, Parsed]) -> Held:
    """The directory holds exactly these files now."""
    files = {}
    for name, parsed in found.items():
        before = held.files.get(name)
        broken = any(one.severity == "error" for one in parsed.problems)
        good = (before.good if before else EMPTY) if broken else parsed
        files[name] = FileState(parsed, good)
    fresh = Held(files)
    if held.files and not _says_anything(fresh) and (held.waiting or _says_anything(held)):
        return replace(held, waiting=True)
    return fresh


def _says_anything(held: Held) -> bool:
    return any(one.now.policies or one.good.policies for one in held.files.values())


def accept_empty(held: Held) -> Held:
    """Somebody confirms that an empty directory means: no policy."""
    return Held() if held.waiting else held


def effect(held: Held) -> Effect:
    """Files count in name order: an object that two files define is the first one's."""
    policies: dict[PolicyKey, Policy] = {}
    groups: dict[str, CidrGroup] = {}
    problems: dict[str, tuple[Problem, ...]] = {}
    for name in sorted(held.files):
        state = held.files[name]
        found = list(state.now.problems)
        broken = state.now is not state.good
        for key, policy in _kept(_policies(state.good), _policies(state.now), broken).items():
            first = policies.setdefault(key, policy)
            if first is not policy:
                found.append(_twice(policy.file, policy.line, f"{policy.kind} {policy.title}", first.file))
        for title, group in _kept(_groups(state.good), _groups(state.now), broken).items():
            if groups.setdefault(title, group) is not group:
                found += [_twice(name, 0, f"CIDR group {title}", "another file")]
        if found:
            problems[name] = tuple(found)
    return Effect(policies, groups, problems)


def _kept(good: dict[K, V], now: dict[K, V], broken: bool) -> dict[K, V]:
    """Without an error: what the file says. With one: also what it said before and does not say anew."""
    return {**good, **now} if broken else now


def _policies(parsed: Parsed) -> dict[PolicyKey, Policy]:
    return {key_of(one): one for one in parsed.policies}


def _groups(parsed: Parsed) -> dict[str, CidrGroup]:
    return {one.name: one for one in parsed.groups}


def _twice(file: str, line: int, what: str, where: str) -> Problem:
    return Problem(
        file, line, 1 if line else 0, "metadata.name", f"{what} is also defined in {where}, which counts"
    )

"""Policy in internal form: what is left of a document once it is parsed, checked and lowered."""

from dataclasses import dataclass

from daemon.model.net import Direction, Prefix


@dataclass(frozen=True, slots=True)
class CidrGroup:
    """A CiliumCIDRGroup: prefixes that policies name together."""

    name: str
    prefixes: tuple[Prefix, ...]
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RuleOrigin:
    """Where a rule number comes from; `key` is stable between compilations of an unchanged document."""

    policy: str  # name, or namespace/name
    kind: str
    direction: Direction
    deny: bool
    spec: int  # index in `specs`
    index: int  # index in the ingress/egress(Deny) list
    file: str = ""
    line: int = 0
    log: str = ""  # the policy's free-text log tag
    uid: str = ""  # metadata.uid, when there is one

    @property
    def key(self) -> tuple[str, str, int, bool, int, int]:
        return (self.kind, self.policy, int(self.direction), self.deny, self.spec, self.index)


@dataclass(frozen=True, slots=True)
class Policy:
    """One CCNP or CNP document, valid and lowered."""

    name: str
    namespace: str
    kind: str
    file: str
    line: int

"""Policy in internal form: what is left of a document once it is parsed, checked and lowered."""

from dataclasses import dataclass

from daemon.model.net import Prefix


@dataclass(frozen=True, slots=True)
class CidrGroup:
    """A CiliumCIDRGroup: prefixes that policies name together."""

    name: str
    prefixes: tuple[Prefix, ...]
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Policy:
    """One CCNP or CNP document, valid and lowered."""

    name: str
    namespace: str
    kind: str
    file: str
    line: int

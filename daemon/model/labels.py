"""Labels as `source:key=value`, and label sets in one canonical order."""

from typing import NamedTuple

RESERVED = "reserved"
K8S = "k8s"
CIDR = "cidr"
NODE = "node"
UNSPEC = "unspec"


class Label(NamedTuple):
    """One label. `reserved:` labels have the empty value; a `cidr:` label has the prefix as its key."""

    source: str
    key: str
    value: str = ""

    def __str__(self) -> str:
        return f"{self.source}:{self.key}={self.value}" if self.value else f"{self.source}:{self.key}"


LabelSet = frozenset[Label]


def parse_label(text: str) -> Label:
    """Read `source:key=value`, `source:key` or `key=value` (source `unspec`).

    `$x`, `reserved.x` and `reserved:x` are the same label, as in Cilium.
    """
    if text.startswith("$"):
        text = f"{RESERVED}:{text[1:]}"
    elif text.startswith(f"{RESERVED}.") and ":" not in text:
        text = f"{RESERVED}:{text[len(RESERVED) + 1 :]}"
    head, equals, value = text.partition("=")
    source, colon, key = head.partition(":")
    if not colon:
        source, key = UNSPEC, head
    if source == RESERVED and not key and equals:
        key, value = value, ""
    return Label(source or UNSPEC, key, value)


def parse_labels(texts: list[str] | tuple[str, ...]) -> LabelSet:
    """The label set of a list of `source:key=value` strings."""
    return frozenset(map(parse_label, texts))


def format_labels(labels: LabelSet) -> tuple[str, ...]:
    """The canonical text form, ordered by key, then source."""
    return tuple(str(label) for label in sorted(labels, key=lambda one: (one.key, one.source, one.value)))

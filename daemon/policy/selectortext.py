"""Label selectors as people type them, as in kubectl: `app=web,tier!=db,!canary,env in (dev,test)`."""

import re

from daemon.model.rule import ANY_SOURCE, LabelSelector, Op, Requirement

_PIECE = re.compile(r"\s*([^,()]*(?:\([^()]*\))?)\s*(?:,|$)")
_SET = re.compile(r"(\S+)\s+(in|notin)\s*\(([^()]*)\)")
_EQUAL = re.compile(r"([^=!\s]+)\s*(==|=|!=)\s*(\S*)")


def parse_selector(text: str) -> LabelSelector:
    """All requirements must hold; an empty text matches everything. Keys may name their source, `k8s:app`.

    Raises ValueError.
    """
    found = []
    at = 0
    while at < len(text):
        piece = _PIECE.match(text, at)
        if piece is None:
            raise ValueError(f"{text[at:]!r} is not a label selector such as app=web,!canary")
        found.append(_requirement(piece[1].strip()))
        at = piece.end()
    return LabelSelector(tuple(found))


def _requirement(text: str) -> Requirement:
    if written := _SET.fullmatch(text):
        values = tuple(sorted({one.strip() for one in written[3].split(",")}))
        return _of(written[1], Op.IN if written[2] == "in" else Op.NOT_IN, values)
    if written := _EQUAL.fullmatch(text):
        return _of(written[1], Op.NOT_IN if written[2] == "!=" else Op.IN, (written[3],))
    absent = text.startswith("!")
    key = text.removeprefix("!").strip()
    if not key or re.search(r"[\s=!()]", key):
        raise ValueError(f"{text!r} is not a requirement such as app=web, app!=web, app or !app")
    return _of(key, Op.NOT_EXISTS if absent else Op.EXISTS)


def _of(key: str, op: Op, values: tuple[str, ...] = ()) -> Requirement:
    source, colon, rest = key.partition(":")
    return Requirement(source, rest, op, values) if colon else Requirement(ANY_SOURCE, key, op, values)

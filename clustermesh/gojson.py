"""JSON as Go's encoding/json reads and writes it, because that is what the original programs use.

Reading: field names match whatever their case, unknown fields are ignored, of duplicates the last wins,
integers must be written as integers and fit their type. Strict reading refuses more: see `parse`.
"""

import base64
import binascii
import json
import re
from collections.abc import Callable, Mapping
from typing import TypeGuard, TypeVar, Union

MAX_BYTES = 64 * 1024
MAX_DEPTH = 16

T = TypeVar("T")


class Malformed(ValueError):  # noqa: N818 - it is a finding, not a fault of ours
    """A value that does not say what its key promises. `reason` is a coarse word that counters can use."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Pairs(list[tuple[str, "Json"]]):
    """An object as written: names in order, duplicates kept."""


Json = Union[None, bool, int, float, str, list["Json"], Pairs]  # noqa: UP007 - recursive

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
_TO_ESCAPE = re.compile("[<>&\u2028\u2029]")


def text(data: bytes, *, strict: bool) -> str:
    """The characters of a value. Strict: at most 64 KiB of valid UTF-8; otherwise bad bytes become U+FFFD."""
    if strict and len(data) > MAX_BYTES:
        raise Malformed("too_large", f"{len(data)} bytes, at most {MAX_BYTES} are taken")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        if strict:
            raise Malformed("not_utf8", f"byte {error.start} is not UTF-8") from error
        return data.decode(errors="replace")


def parse(source: str, *, strict: bool) -> Json:
    """The document. Strict: at most 16 levels deep, and no name twice in one object."""
    if strict and source.count("{") + source.count("[") > MAX_DEPTH and _depth(source) > MAX_DEPTH:
        raise Malformed("too_deep", f"more than {MAX_DEPTH} levels")
    try:
        value: Json = json.loads(
            source,
            object_pairs_hook=_distinct if strict else Pairs,
            parse_constant=_no_constant,
            parse_int=_integer if "-0" in source else None,
        )
    except Malformed:
        raise
    except (ValueError, RecursionError) as error:
        raise Malformed("json_syntax", f"not JSON: {error}") from error
    return value


def _distinct(pairs: list[tuple[str, Json]]) -> Pairs:
    if len({name.casefold() for name, _ in pairs}) != len(pairs):
        raise Malformed("duplicate_field", "a field is given twice")
    return Pairs(pairs)


def _no_constant(word: str) -> Json:
    raise Malformed("json_syntax", f"{word} is not JSON")


def _integer(digits: str) -> int | float:
    # Go does not read -0 as an unsigned number; a float is no integer anywhere here.
    return -0.0 if digits == "-0" else int(digits)


def _depth(source: str) -> int:
    depth = deepest = 0
    quoted = escaped = False
    for char in source:
        if quoted:
            if escaped:
                escaped = False
            elif char == "\\":
                escaped = True
            elif char == '"':
                quoted = False
        elif char == '"':
            quoted = True
        elif char in "{[":
            depth += 1
            deepest = max(deepest, depth)
        elif char in "}]":
            depth -= 1
    return deepest


# --- typed reading: each takes the parsed value and the field's name for the message


def members(value: Json, names: Mapping[str, str], where: str, nullable: frozenset[str]) -> dict[str, Json]:
    """The known members of an object, by canonical name; a null document is an object without members.

    `names` maps case-folded names to canonical ones. A null changes nothing unless the field is
    `nullable`; objects under one name are merged. That is how the original fills a struct.
    """
    if value is None:
        return {}
    found: dict[str, Json] = {}
    for written, member in expect(value, Pairs, where, "an object"):
        name = names.get(written)
        if name is None:
            folded = written.casefold()
            if len(folded) != len(written) or (name := names.get(folded)) is None:
                continue
        old = found.get(name)
        if isinstance(old, Pairs) and isinstance(member, Pairs):
            found[name] = Pairs([*old, *member])
        elif member is not None or name in nullable:
            found[name] = member
    return found


def expect(value: Json, kind: type[T], where: str, what: str) -> T:
    if not isinstance(value, kind):
        raise Malformed("json_type_or_range", f"{where}: {shown(value)} is not {what}")
    return value


def unsigned(value: Json, bits: int, where: str) -> int:
    """An integer of 0..2^bits-1; absent and null are 0."""
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << bits:
        raise Malformed(
            "json_type_or_range", f"{where}: {shown(value)} is not an integer of 0..{(1 << bits) - 1}"
        )
    return value


def signed32(value: Json, where: str) -> int:
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or not -(1 << 31) <= value < 1 << 31:
        raise Malformed("json_type_or_range", f"{where}: {shown(value)} is not a 32-bit integer")
    return value


def string(value: Json, where: str) -> str:
    if value is None:
        return ""
    return _LONE_SURROGATE.sub("\ufffd", expect(value, str, where, "a string"))


def boolean(value: Json, where: str) -> bool:
    if value is None:
        return False
    return expect(value, bool, where, "true or false")


def octets(value: Json, where: str) -> bytes | None:
    """Bytes as base64 text, or as a list of numbers, which the original also reads."""
    if value is None:
        return None
    if _is_array(value):
        return bytes(unsigned(one, 8, where) for one in value)
    try:
        written = string(value, where).replace("\r", "").replace("\n", "")
        return base64.b64decode(written.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise Malformed("json_type_or_range", f"{where}: {shown(value)} is not base64") from error


def _is_array(value: Json) -> TypeGuard[list[Json]]:
    return isinstance(value, list) and not isinstance(value, Pairs)


def array(value: Json, item: Callable[[Json, str], T], where: str) -> tuple[T, ...] | None:
    """A list, or None for null."""
    if value is None:
        return None
    if not _is_array(value):
        raise Malformed("json_type_or_range", f"{where}: {shown(value)} is not a list")
    return tuple(item(one, f"{where}[{index}]") for index, one in enumerate(value))


def mapping(value: Json, item: Callable[[Json, str], T], where: str) -> dict[str, T] | None:
    """An object with free names, or None for null."""
    if value is None:
        return None
    pairs: Pairs = expect(value, Pairs, where, "an object")
    return {_LONE_SURROGATE.sub("\ufffd", name): item(one, f"{where}.{name}") for name, one in pairs}


def shown(value: object) -> str:
    """A value as an error message may show it: short, and without control characters."""
    words = "an object" if isinstance(value, Pairs) else json.dumps(value)
    return words if len(words) <= 60 else f"{words[:60]}..."


# --- writing


def dump(value: object) -> bytes:
    """Compact, in the order given, with Go's escapes. Dicts with free names must be sorted by the caller."""
    written = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return _TO_ESCAPE.sub(lambda found: _ESCAPES[found.group()], written).encode()


def base64_text(data: bytes | None) -> str | None:
    return None if data is None else base64.b64encode(data).decode()

"""Tracked connections: list, flush, and import of those that exist when enforcement begins."""

import contextlib
import ipaddress
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bpf.features import Ticks
from bpf.layout import (
    CONFIG,
    CT4_KEY,
    CT6_KEY,
    CT_ENTRY,
    CT_ORIGIN_IN,
    CT_ORIGIN_OUT,
    LAYOUT_VERSION,
    RULE_DEFAULT_ALLOW,
    CtFlag,
    maps,
)
from bpf.syscall import PinnedMap
from daemon.model.net import Proto, packed_prefix

HALF_OPEN, ESTABLISHED = "half-open", "established"
TABLES = {
    (4, ESTABLISHED): "ct4",
    (4, HALF_OPEN): "ct4_new",
    (6, ESTABLISHED): "ct6",
    (6, HALF_OPEN): "ct6_new",
}
SEED_LIFE_S = 8000  # as long as an established connection
TCP_LISTEN = 10
_TRACKED = {"TCP": Proto.TCP, "UDP": Proto.UDP, "SCTP": Proto.SCTP}
_STATES = {1: True, 2: False, 4: True, 5: True, 8: True, 9: True, 11: True}  # /proc/net/tcp state -> answered


@dataclass(frozen=True, slots=True)
class CtRow:
    """One tracked connection. Times in seconds; `expires_s` is negative for what the next packet would not find."""

    family: int
    state: str  # HALF_OPEN until the side that opened it has answered an answer, then ESTABLISHED
    proto: int
    local: str
    local_port: int
    remote: str
    remote_port: int
    origin: str  # `out`: this host opened it
    flags: CtFlag
    rule: int
    age_s: float
    expires_s: float


@dataclass(frozen=True, slots=True)
class Socket:
    """A connected socket of this host; addresses in wire order."""

    proto: Proto
    local: bytes
    local_port: int
    remote: bytes
    remote_port: int
    answered: bool


class Conntrack:
    """The pinned connection tables of one pin directory."""

    def __init__(self, pins: Path) -> None:
        shapes = maps()
        home = pins / f"v{LAYOUT_VERSION}" / "maps"
        with contextlib.ExitStack() as undo:
            self._tables = {
                (family, state): undo.enter_context(PinnedMap.open_sized(home / name, shapes[name]))
                for (family, state), name in TABLES.items()
            }
            self._undo = undo.pop_all()
        with PinnedMap.open(home / "config", shapes["config"]) as config:
            # written by the loader, which measures it: that takes a tenth of a second
            (self._hz,) = struct.unpack_from(
                "=I", config.lookup(0) or bytes(CONFIG.size), CONFIG.offsets()["hz"]
            )

    def close(self) -> None:
        """Give up the descriptors."""
        self._undo.close()

    def __enter__(self) -> "Conntrack":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def entries(self) -> Iterator[CtRow]:
        """Every entry that has not expired, as the tables are read."""
        ticks = Ticks()
        try:
            for where, table in self._tables.items():
                for key, value in table.items():
                    row = _row(where, key, value, ticks.until, self._hz)
                    if row.expires_s >= 0:
                        yield row
        finally:
            ticks.close()

    def flush(self, wanted: Callable[[CtRow], bool] = lambda _: True) -> int:
        """Forget connections; returns how many there were. Replies to open ones are then judged anew."""
        count = 0
        ticks = Ticks()
        try:
            for where, table in self._tables.items():
                keys = [
                    key
                    for key, value in table.items()
                    if wanted(_row(where, key, value, ticks.until, self._hz))
                ]
                table.delete_batch(b"".join(keys), len(keys))
                count += len(keys)
        finally:
            ticks.close()
        return count

    def seed(self, sockets: Sequence[Socket], listening: frozenset[tuple[Proto, int]]) -> int:
        """Enter connections that exist already, so that their replies pass; what is there stays. Returns the number."""
        ticks = Ticks()
        try:
            hz, now = self._hz, ticks.now64(self._hz)
        finally:
            ticks.close()
        done = 0
        for one in sockets:
            origin = CT_ORIGIN_IN if (one.proto, one.local_port) in listening else CT_ORIGIN_OUT
            key = _key(one, origin)
            table = self._tables[4 if len(one.local) == 4 else 6, ESTABLISHED]
            if table.lookup(key) is None:
                flags = CtFlag.SEEDED | (CtFlag.SEEN_REPLY if one.answered else CtFlag(0))
                table.update(
                    key,
                    CT_ENTRY.pack(
                        expires=now + SEED_LIFE_S * hz, created=now, rule=RULE_DEFAULT_ALLOW, flags=flags
                    ),
                )
                done += 1
        return done


def sockets(proc: Path = Path("/proc/net")) -> tuple[list[Socket], frozenset[tuple[Proto, int]]]:
    """The connected TCP and UDP sockets of this network namespace, and the ports that listen."""
    found: list[Socket] = []
    listening: set[tuple[Proto, int]] = set()
    for name, proto in (("tcp", Proto.TCP), ("tcp6", Proto.TCP), ("udp", Proto.UDP), ("udp6", Proto.UDP)):
        path = proc / name
        if not path.exists():
            continue
        for line in path.read_text(encoding="ascii").splitlines()[1:]:
            fields = line.split()
            local, local_port = _endpoint(fields[1])
            remote, remote_port = _endpoint(fields[2])
            state = int(fields[3], 16)
            if (proto is Proto.TCP and state == TCP_LISTEN) or (proto is Proto.UDP and not remote_port):
                listening.add((proto, local_port))
            elif proto is Proto.UDP or state in _STATES:
                answered = proto is Proto.UDP or _STATES[state]
                found.append(Socket(proto, local, local_port, remote, remote_port, answered))
    return found, frozenset(listening)


def existing(proc: Path = Path("/proc/net")) -> tuple[list[Socket], frozenset[tuple[Proto, int]]]:
    """All that answers must reach when enforcement begins: sockets, and what the kernel masquerades as this host."""
    found, listening = sockets(proc)
    return found + masqueraded(proc), listening


def masqueraded(proc: Path = Path("/proc/net")) -> list[Socket]:
    """Connections that leave with an address of this host but belong to a pod or machine behind it.

    As the kernel's own connection tracking has them; empty where it is not loaded.
    """
    path = proc / "nf_conntrack"
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []
    return [found for line in lines if (found := _masqueraded(line)) is not None]


def _masqueraded(line: str) -> Socket | None:
    """`... tcp 6 TTL STATE src= dst= sport= dport= src= dst= sport= dport= ...`: the way out, then the way back."""
    words = line.split()
    if len(words) < 4 or words[2].upper() not in _TRACKED:
        return None
    fields: dict[str, list[str]] = {}
    for word in words[4:]:
        name, equals, value = word.partition("=")
        if equals:
            fields.setdefault(name, []).append(value)
    try:
        (sender, remote), (_, ours) = fields["src"], fields["dst"]
        ports = int(fields["dport"][1]), int(fields["sport"][1])
    except (KeyError, ValueError, IndexError):
        return None
    if ours == sender:
        return None
    local, other = (ipaddress.ip_address(one).packed for one in (ours, remote))
    return Socket(_TRACKED[words[2].upper()], local, ports[0], other, ports[1], "[UNREPLIED]" not in words)


def _endpoint(text: str) -> tuple[bytes, int]:
    """An address as /proc/net prints it: 32 bit words in host order; mapped IPv4 becomes IPv4."""
    address, _, port = text.partition(":")
    raw = b"".join(struct.pack(">I", int(address[at : at + 8], 16)) for at in range(0, len(address), 8))
    words = b"".join(raw[at : at + 4][::-1] for at in range(0, len(raw), 4))
    mapped = len(words) == 16 and words[:12] == bytes(10) + b"\xff\xff"
    return (words[12:] if mapped else words), int(port, 16)


def _key(one: Socket, origin: int) -> bytes:
    ports = {
        "local_port_be": one.local_port.to_bytes(2, "big"),
        "remote_port_be": one.remote_port.to_bytes(2, "big"),
        "proto": int(one.proto),
        "origin": origin,
    }
    if len(one.local) == 4:
        return CT4_KEY.pack(local_be=one.local, remote_be=one.remote, **ports)
    return CT6_KEY.pack(local=one.local, remote=one.remote, **ports)


def _row(where: tuple[int, str], key: bytes, value: bytes, until: Callable[[int], int], hz: int) -> CtRow:
    family, state = where
    width = 4 if family == 4 else 16
    local, remote, ports = key[:width], key[width : 2 * width], key[2 * width :]
    expires, created, rule, flags = struct.unpack(CT_ENTRY.format, value)
    return CtRow(
        family,
        state,
        ports[4],
        str(packed_prefix(local)),
        int.from_bytes(ports[0:2], "big"),
        str(packed_prefix(remote)),
        int.from_bytes(ports[2:4], "big"),
        "out" if ports[5] == CT_ORIGIN_OUT else "in",
        CtFlag(flags),
        rule,
        -until(created) / hz,
        until(expires) / hz,
    )

"""Every map and struct that kernel and user space share: defined here once.

The C declares the same structs by hand, for reading; `static_asserts()` holds each field of them to this
file at compile time, and `maps()` is the only place where maps get type, size and flags. All integers are
in native byte order and width unless the name ends in `_be` or the field is bytes.

How a packet uses the tables (IPv4; IPv6 differs only in the first step):

    slot   = ip4_blocks / ip4_hosts [remote address]       0 when nothing names it: the world
    at     = class_of[buffer, slot].ingress_at             index of a row of cells
    column = port_class[buffer, direction, protocol, port]
    cell   = cells[at + column]                            verdict << 28 | flags << 24 | rule

`buffer` is `config.generation & 1`: one word decides between the old policy and the new.
"""

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import IntEnum, IntFlag

LAYOUT_VERSION = 2  # names the pin directory; raised only when an older program could misread a row

# Slots with a fixed meaning. All others are handed out by daemon/datapath/slots.py.
SLOT_WORLD4 = 0  # an IPv4 address that no table names
SLOT_HOST = 1  # this host: every address it owns
SLOT_WORLD6 = 2  # an IPv6 address that no table names
SLOT_UNKNOWN = 3  # an address whose identity has no labels yet: only rules without peers match it
FIRST_FREE_SLOT = 4
FIXED_IDENTITIES = {SLOT_HOST: 1, SLOT_WORLD4: 2, SLOT_WORLD6: 2}  # in events; Cilium's numbers

# Rules with a fixed number; policy rules start at FIRST_RULE.
RULE_DEFAULT_DENY_INGRESS = 0
RULE_DEFAULT_DENY_EGRESS = 1
RULE_DEFAULT_ALLOW = 2
RULE_FAILSAFE = 3
RULE_LOCALHOST = 4  # this host may reach its own workloads
RULE_EXEMPT = 5  # node ports that the settings leave to the policy of what is behind them
FIRST_RULE = 16

# Entries of ip4_blocks: 256 root blocks by the first two octets, then blocks for the third and the fourth.
BLOCK_ENTRIES = 256
BLOCK_ROOTS = 256
ENTRY_POINTER = 1 << 31  # the rest is a block number, not a slot
ENTRY_HOSTS = 1 << 30  # root entries only: this /16 also has hosts in ip4_hosts, look there first
ENTRY_MASK = ENTRY_HOSTS - 1

# Index space of port_class, per direction. ICMP uses the type as port.
PORTS_TCP = 0
PORTS_UDP = 0x10000
PORTS_SCTP = 0x20000
PORTS_ICMP4 = 0x30000  # 256 types
PORTS_ICMP6 = 0x30100  # 256 types
PORTS_PROTOCOL = 0x30200  # 256 IP protocol numbers: packets without ports (later fragments, other protocols)
PORTS_END = 0x30300
PORT_BLOCK = 512  # columns per map entry
PORT_BLOCKS = -(-PORTS_END // PORT_BLOCK)  # map entries per direction and buffer
CELL_BLOCK = 256  # cells per map entry


class ConfigFlag(IntFlag):
    """Host-wide switches in config.flags."""

    DROP_NON_IP = 2  # default is pass and count
    V6_NETS = 8  # ip6_nets (/64) is in use
    V6_TRIE = 16  # ip6_prefixes (other lengths) is in use
    LOG_ALLOWED = 32  # an event for each new allowed connection
    ALL_OURS = 64  # after a boot: which addresses are this host's is not known yet, so all are


class CellVerdict(IntEnum):
    """Bits 28 to 31 of a cell. Zero is deny, so that memory nobody wrote is closed."""

    DEFAULT_DENY = 0
    ALLOW = 1
    DENY = 2
    REDIRECT = 3  # allowed here, subject to a rule of layer 7


class CellFlag(IntFlag):
    """Bits 24 to 27 of a cell; below them is the rule number."""

    AUDIT = 1  # report, do not drop
    LOG = 2  # an event for each packet, within the budget
    REJECT = 4  # tell the sender, do not be silent
    AUTH = 8


class BufferFlag(IntFlag):
    """Switches of one generation in config.buffer_flags."""

    ENFORCE_INGRESS = 1
    ENFORCE_EGRESS = 2
    AUDIT = 4  # compute and report verdicts, drop nothing by policy or parser


class Panic(IntEnum):
    """What somebody demands of every packet at once, over any policy; config.panic. The daemon never writes it."""

    NONE = 0
    OPEN = 1  # every packet passes
    FAILSAFE = 2  # both directions are enforced, and of all cells only those of RULE_FAILSAFE allow


class EventKind(IntEnum):
    """What an event in the ring buffer tells."""

    DROP = 1
    AUDIT = 2  # would have been dropped
    ALLOW = 3  # first packet of a connection that policy allows


class Hook(IntEnum):
    """Where a verdict was given."""

    XDP = 0
    TCX_INGRESS = 1
    TCX_EGRESS = 2


class PacketClass(IntEnum):
    """What the parser found; decides which questions are asked about a packet."""

    MALFORMED = 0
    TCP = 1
    UDP = 2
    SCTP = 3
    ICMP4 = 4
    ICMP6 = 5
    OTHER_L4 = 6
    FRAG_FIRST = 7
    FRAG_NONFIRST = 8
    ARP = 9
    NDP = 10
    MLD = 11
    IGMP = 12
    NON_IP = 13


class Reason(IntEnum):
    """What became of a packet and why, one number per cause: 0 to 15 pass, the rest drop."""

    FORWARDED = 0  # judged and passed
    NOT_ENFORCED = 1  # no policy in this direction
    NOT_HOST = 2  # forwarded traffic, not the host's
    REPLY = 3  # a reply to a tracked connection
    RELATED = 4  # an ICMP error about a tracked connection
    LINK = 5  # ARP, neighbour discovery, multicast listener, IGMP: keeps the link alive
    NON_IP = 6
    AUDITED = 7  # policy or parser would have dropped
    POLICY_DEFAULT = 16
    POLICY_DENY = 17
    NON_IP_REFUSED = 18
    SHORT_ETH = 32
    SHORT_VLAN = 33
    VLAN_DEPTH = 34
    SHORT_IP = 35
    IP_VERSION = 36
    BAD_IHL = 37
    BAD_TOTLEN = 38
    BAD_PLEN = 39
    JUMBOGRAM = 40
    SHORT_EXT = 41
    EXT_DEPTH = 42
    HBH_MISPLACED = 43
    ROUTING_HEADER = 44
    SOURCE_ROUTE = 45
    BAD_SRC = 46
    BAD_DST = 47
    SPOOFED_LOCAL = 48
    SHORT_L4 = 49
    BAD_DOFF = 50
    BAD_TCP_FLAGS = 51
    BAD_UDPLEN = 52
    TINY_FRAG = 53
    FRAG_TOOBIG = 54
    FRAG_L4_OVERLAP = 55
    FRAG_NO_FIRST = 56
    FRAG_DENIED = 57
    FRAG_TABLE_FULL = 58
    DUP_FRAG_HEADER = 59
    ICMP_REDIRECT = 60
    NDP_INVALID = 61


REASONS = 64  # size of the counters per direction


class CtFlag(IntFlag):
    """State of a tracked connection."""

    SEEN_REPLY = 1
    FIN_LOCAL = 2
    FIN_REMOTE = 4
    RESET = 8
    SEEDED = 16  # found in the kernel's socket table when enforcement began


CT_ORIGIN_OUT = 0  # this host opened it: inbound packets are replies
CT_ORIGIN_IN = 1


@dataclass(frozen=True)
class Struct:
    """A C struct without padding that the compiler adds: fields are (name, struct format)."""

    name: str
    fields: tuple[tuple[str, str], ...]

    @property
    def format(self) -> str:
        return "=" + "".join(code for _, code in self.fields)

    @property
    def size(self) -> int:
        return struct.calcsize(self.format)

    def offsets(self) -> dict[str, int]:
        """Byte offset of each field."""
        at, found = 0, {}
        for name, code in self.fields:
            found[name] = at
            at += struct.calcsize("=" + code)
        return found

    def pack(self, **values: object) -> bytes:
        """Bytes of one value; fields not named are zero (or zero bytes)."""
        given = [values.pop(name, b"" if code.endswith("s") else 0) for name, code in self.fields]
        if values:
            raise TypeError(f"struct {self.name} has no field {', '.join(values)}")
        return struct.pack(self.format, *given)

    def unpack(self, raw: bytes | memoryview) -> dict[str, object]:
        """Field name to value; inverse of pack."""
        return dict(zip((name for name, _ in self.fields), struct.unpack(self.format, raw), strict=True))


CONFIG = Struct(
    "config",
    (
        ("generation", "I"),  # the flip: buffer = generation & 1
        ("flags", "I"),  # ConfigFlag
        ("buffer_flags0", "I"),  # BufferFlag of generation & 1 == 0
        ("buffer_flags1", "I"),
        ("event_budget", "I"),  # events per reason, CPU and second; the rest is counted as suppressed
        ("hz", "I"),  # jiffies per second: the unit of time in ct4, ct6 and fragments; written by the loader
        ("panic", "I"),  # Panic
        # answers to denied packets per hook, CPU and second; beyond it there is silence
        ("reject_budget", "I"),
        ("panic_until", "Q"),  # jiffies; 0: until it is ended
        ("trace_cookie", "Q"),  # random; a packet that carries it is judged and leaves nothing behind
    ),
)
PEER = Struct("peer", (("slot", "I"), ("flags", "I")))
ROWS = Struct("rows", (("ingress_at", "I"), ("egress_at", "I")))
SLOT_INFO = Struct("slot_info", (("identity", "I"), ("flags", "I")))
BLOCK = Struct("ip4_block", (("entry", f"{4 * BLOCK_ENTRIES}s"),))
PORT_COLUMNS = Struct("port_columns", (("column", f"{2 * PORT_BLOCK}s"),))
CELLS = Struct("cell_block", (("cell", f"{4 * CELL_BLOCK}s"),))
IP4_KEY = Struct("ip4_key", (("address_be", "4s"),))
IP6_KEY = Struct("ip6_key", (("address", "16s"),))
NET6_KEY = Struct("net6_key", (("network", "8s"),))
PREFIX6_KEY = Struct("prefix6_key", (("length", "I"), ("address", "16s")))
CT4_KEY = Struct(
    "ct4_key",
    (
        ("local_be", "4s"),
        ("remote_be", "4s"),
        ("local_port_be", "2s"),  # ICMP: the echo identifier
        ("remote_port_be", "2s"),
        ("proto", "B"),
        ("origin", "B"),  # CT_ORIGIN_*
        ("pad", "H"),
    ),
)
CT6_KEY = Struct(
    "ct6_key",
    (
        ("local", "16s"),
        ("remote", "16s"),
        ("local_port_be", "2s"),
        ("remote_port_be", "2s"),
        ("proto", "B"),
        ("origin", "B"),
        ("pad", "H"),
    ),
)
CT_ENTRY = Struct(
    "ct_entry",
    (
        ("expires", "Q"),  # jiffies
        ("created", "Q"),  # jiffies
        ("rule", "I"),  # that allowed the first packet
        ("flags", "I"),  # CtFlag
    ),
)
FRAG_KEY = Struct(
    "frag_key", (("src", "16s"), ("dst", "16s"), ("id", "I"), ("proto", "B"), ("family", "B"), ("pad", "H"))
)
FRAG_ENTRY = Struct("frag_entry", (("expires", "Q"), ("rule", "I"), ("pass_", "I")))
HITS = Struct("hits", (("packets", "Q"), ("bytes", "Q")))
BUDGET = Struct("budget", (("window", "Q"), ("used", "Q"), ("suppressed", "Q"), ("lost", "Q")))
SOURCE_KEY = Struct("source_key", (("address", "16s"), ("family", "B"), ("pad", "3s")))
SOURCE_SHARE = Struct("source_share", (("window", "Q"), ("used", "Q")))
EVENT = Struct(
    "event",
    (
        ("time_ns", "Q"),  # CLOCK_MONOTONIC
        ("saddr", "16s"),  # IPv4: the first four bytes
        ("daddr", "16s"),
        ("sport_be", "2s"),
        ("dport_be", "2s"),
        ("kind", "B"),  # EventKind
        ("reason", "B"),  # Reason
        ("direction", "B"),  # 0 ingress, 1 egress
        ("hook", "B"),  # Hook
        ("family", "B"),  # 4, 6, 0 for frames that are not IP
        ("proto", "B"),
        ("tcp_flags", "B"),
        ("icmp_type", "B"),
        ("icmp_code", "B"),
        ("verdict", "B"),  # of the cell
        ("ethertype_be", "2s"),
        ("identity", "I"),  # of the remote side, as the data path saw it
        ("rule", "I"),
        ("ifindex", "I"),
        ("length", "I"),  # bytes of the frame
        ("generation", "I"),
        ("packet_class", "B"),  # PacketClass
        ("pad", "3s"),
    ),
)

TRACE = Struct(
    "trace",
    (
        ("event", f"{EVENT.size}s"),  # as it would have been told
        ("cell", "I"),
        ("slot", "I"),  # of the remote address
        ("passes", "B"),
        ("audited", "B"),
        ("judged", "B"),  # the cell decided
        ("opens", "B"),  # the first packet of a connection
        ("deferred", "B"),  # XDP leaves it to TCX
        ("answered", "B"),  # the sender would be told
        ("done", "B"),  # 1: this is an answer
        ("pad", "B"),
    ),
)

# one packet's work space, and its answer's; the inside is the C's own
SCRATCH = Struct("scratch", (("opaque", "192s"), ("room", "192s")))

STRUCTS = (
    CONFIG, PEER, ROWS, SLOT_INFO, BLOCK, PORT_COLUMNS, CELLS, IP4_KEY, IP6_KEY, NET6_KEY, PREFIX6_KEY,
    CT4_KEY, CT6_KEY, CT_ENTRY, FRAG_KEY, FRAG_ENTRY, HITS, BUDGET, SOURCE_KEY, SOURCE_SHARE, EVENT, TRACE,
    SCRATCH,
)  # fmt: skip


class MapKind(IntEnum):
    """Map types by their kernel numbers."""

    HASH = 1
    ARRAY = 2
    PROG_ARRAY = 3
    PERCPU_ARRAY = 6
    LRU_HASH = 9
    LPM_TRIE = 11
    RINGBUF = 27


ANSWER_SOURCES = 4_096
NO_PREALLOC = 1
MMAPABLE = 1 << 10


@dataclass(frozen=True)
class Map:
    """One kernel map. Arrays have a u32 key; the ring buffer has no key and `max_entries` bytes."""

    name: str
    kind: MapKind
    key: Struct | None
    value: Struct | None
    max_entries: int
    flags: int = 0

    @property
    def key_size(self) -> int:
        if self.kind is MapKind.RINGBUF:
            return 0
        return self.key.size if self.key else 4

    @property
    def value_size(self) -> int:
        return self.value.size if self.value else 0


@dataclass(frozen=True)
class Sizes:
    """What an operator may change about the maps."""

    slots: int = 1 << 17
    cells: int = 1 << 20  # u32 cells of both generations together
    rules: int = 1 << 14
    ip4_blocks: int = BLOCK_ROOTS + 16_384
    hosts: int = 1 << 20
    prefixes6: int = 1 << 17
    conntrack: int = 1 << 17
    half_open: int = 1 << 16
    fragments: int = 1 << 15
    events_bytes: int = 1 << 20


def maps(sizes: Sizes | None = None) -> dict[str, Map]:
    """Every map by name."""
    size = sizes or Sizes()
    listed = (
        Map("config", MapKind.ARRAY, None, CONFIG, 1, MMAPABLE),
        Map("ip4_blocks", MapKind.ARRAY, None, BLOCK, size.ip4_blocks, MMAPABLE),
        Map("ip4_hosts", MapKind.HASH, IP4_KEY, PEER, size.hosts, NO_PREALLOC),
        Map("ip6_hosts", MapKind.HASH, IP6_KEY, PEER, size.hosts, NO_PREALLOC),
        Map("ip6_nets", MapKind.HASH, NET6_KEY, PEER, size.prefixes6, NO_PREALLOC),
        Map("ip6_prefixes", MapKind.LPM_TRIE, PREFIX6_KEY, PEER, size.prefixes6, NO_PREALLOC),
        # index: buffer * slots + slot
        Map("class_of", MapKind.ARRAY, None, ROWS, 2 * size.slots, MMAPABLE),
        Map("slot_info", MapKind.ARRAY, None, SLOT_INFO, size.slots, MMAPABLE),
        # index: (buffer * 2 + direction) * PORT_BLOCKS + port index // PORT_BLOCK
        Map("port_class", MapKind.ARRAY, None, PORT_COLUMNS, 4 * PORT_BLOCKS, MMAPABLE),
        Map("cells", MapKind.ARRAY, None, CELLS, size.cells // CELL_BLOCK, MMAPABLE),
        Map("ct4", MapKind.LRU_HASH, CT4_KEY, CT_ENTRY, size.conntrack),
        Map("ct6", MapKind.LRU_HASH, CT6_KEY, CT_ENTRY, size.conntrack),
        # connections that were not seen both ways: apart, so that a flood of them cannot evict the others
        Map("ct4_new", MapKind.LRU_HASH, CT4_KEY, CT_ENTRY, size.half_open),
        Map("ct6_new", MapKind.LRU_HASH, CT6_KEY, CT_ENTRY, size.half_open),
        Map("fragments", MapKind.LRU_HASH, FRAG_KEY, FRAG_ENTRY, size.fragments),
        # first fragments that were denied: apart, so that a flood of them cannot evict the allowed ones
        Map("fragments_denied", MapKind.LRU_HASH, FRAG_KEY, FRAG_ENTRY, size.fragments),
        Map("frag_sources", MapKind.LRU_HASH, SOURCE_KEY, SOURCE_SHARE, size.fragments),
        Map("rule_hits", MapKind.PERCPU_ARRAY, None, HITS, size.rules),
        # index: direction * REASONS + reason
        Map("reasons", MapKind.PERCPU_ARRAY, None, HITS, 2 * REASONS),
        Map("budgets", MapKind.PERCPU_ARRAY, None, BUDGET, REASONS),
        # index: Hook. XDP: packets left to TCX for an answer; TCX: answers
        Map("answers", MapKind.PERCPU_ARRAY, None, BUDGET, len(Hook)),
        Map("answered", MapKind.PERCPU_ARRAY, None, HITS, 2),  # index: direction
        Map("answer_sources", MapKind.LRU_HASH, SOURCE_KEY, SOURCE_SHARE, ANSWER_SOURCES),
        Map("trace", MapKind.ARRAY, None, TRACE, 1),
        Map("scratch", MapKind.PERCPU_ARRAY, None, SCRATCH, len(Hook)),
        Map("events", MapKind.RINGBUF, None, None, size.events_bytes),
    )
    return {one.name: one for one in listed}


def static_asserts(structs: Iterable[Struct] = STRUCTS) -> str:
    """C that does not compile when a hand-written struct differs from this file."""
    lines = []
    for one in structs:
        lines.append(f'_Static_assert(sizeof(struct {one.name}) == {one.size}, "size of {one.name}");')
        lines += [
            f'_Static_assert(__builtin_offsetof(struct {one.name}, {field}) == {at}, "{one.name}.{field}");'
            for field, at in one.offsets().items()
        ]
    return "\n".join(lines) + "\n"


def constants() -> Mapping[str, int]:
    """Names that the C takes as -D, so that no number is written twice."""
    plain = {
        name: value
        for name, value in globals().items()
        if name.isupper() and isinstance(value, int) and not isinstance(value, bool)
    }
    enums: tuple[tuple[str, type[IntEnum] | type[IntFlag]], ...] = (
        ("CONFIG", ConfigFlag),
        ("BUFFER", BufferFlag),
        ("PANIC", Panic),
        ("EVENT", EventKind),
        ("HOOK", Hook),
        ("REASON", Reason),
        ("CLASS", PacketClass),
        ("CELL", CellVerdict),
        ("CELLFLAG", CellFlag),
        ("CT", CtFlag),
    )
    named = {f"{prefix}_{member.name}": int(member) for prefix, kind in enums for member in kind}
    return plain | named


def sized(**changes: int) -> Sizes:
    """Default sizes with some replaced; test set-ups use small ones."""
    return replace(Sizes(), **changes)

"""Addresses: which prefix has which slot, over all address tables, as operations. Keys are `compact` prefixes."""

from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import chain, repeat

from bpf.layout import NET6_KEY, PEER, PREFIX6_KEY, ConfigFlag, Sizes
from daemon.datapath.ip4 import Ip4
from daemon.datapath.ops import Drop, Op, Put, TableFull
from daemon.model.net import WORLD4, WORLD6, Prefix, compact, expand

HOSTS4 = 1 << 32  # smaller compact numbers are IPv4 addresses
HOSTS6 = range(compact(Prefix(6, 0, 128)), compact(Prefix(6, 0, 127)))  # IPv6 addresses
WORLDS = frozenset({compact(WORLD4), compact(WORLD6)})


class Addresses:
    """The slot of every prefix in the kernel. The two worlds are slots of their own and have no entry."""

    def __init__(self, sizes: Sizes) -> None:
        self._sizes = sizes
        self._ip4 = Ip4(sizes.ip4_blocks, sizes.hosts)
        self._hosts6: dict[int, int] = {}
        self._wide6: dict[Prefix, int] = {}
        self._tables: dict[Prefix, str] = {}  # of _wide6 -> the table that holds it
        self._deep: Counter[int] = Counter()  # /64 network -> prefixes of 65 to 127 bits in it
        self._count: Counter[str] = Counter()  # entries of the tables of _wide6
        self._lengths: Counter[tuple[int, int]] = Counter()  # family, length -> prefixes that are no hosts
        # in ip6_nets and in the trie: an earlier process died while it moved them
        self._strays: list[Prefix] = []

    def adopt(
        self,
        blocks: "array[int]",
        hosts: Mapping[str, Mapping[int, int]],
        wide: Mapping[str, Mapping[Prefix, int]],
    ) -> None:
        """Take over what an earlier process wrote: ip4_blocks, and by table the entries of the others."""
        self._ip4.adopt(blocks, hosts["ip4_hosts"])
        self._hosts6 = dict(hosts["ip6_hosts"])
        for table, rows in wide.items():
            self._wide6.update(rows)
            self._count[table] = len(rows)
            for one in rows:
                self._tables[one] = table
                self._deep[one.address >> 64] += one.length > 64
        self._strays = [one for one in wide["ip6_nets"] if one in wide["ip6_prefixes"]]
        self._tables.update(dict.fromkeys(self._strays, "ip6_prefixes"))
        self._lengths.update((one.family, one.length) for one, _ in self._ip4.prefixes())
        self._lengths.update((one.family, one.length) for one in self._wide6)

    @property
    def flags(self) -> ConfigFlag:
        """Which IPv6 tables the data path must ask."""
        nets = ConfigFlag.V6_NETS if self._count["ip6_nets"] else ConfigFlag(0)
        return nets | (ConfigFlag.V6_TRIE if self._count["ip6_prefixes"] else ConfigFlag(0))

    @property
    def used(self) -> dict[str, int]:
        """Entries in use, by map."""
        blocks, hosts = self._ip4.used
        return {"ip4_blocks": blocks, "ip4_hosts": hosts, "ip6_hosts": len(self._hosts6)} | dict(self._count)

    @property
    def retired(self) -> int:
        """Blocks that wait for a grace period."""
        return self._ip4.retired

    # --- what is there

    def get(self, prefix: Prefix) -> int | None:
        """The slot that exactly this prefix has."""
        if prefix.family == 4:
            return self._ip4.get(prefix)
        return self._hosts6.get(compact(prefix)) if prefix.is_host else self._wide6.get(prefix)

    def around(self, prefix: Prefix) -> Iterator[tuple[Prefix, int]]:
        """The prefix and the wider ones with slots of their own, the narrowest first."""
        for length in range(prefix.length, 0, -1):
            if length == prefix.length or self._lengths[prefix.family, length]:
                shift = prefix.width - length
                wider = Prefix(prefix.family, prefix.address >> shift << shift, length)
                slot = self.get(wider)
                if slot is not None:
                    yield wider, slot

    def slots(self, keys: Collection[int]) -> list[int | None]:
        """The slot that each of these prefixes has of its own."""
        if not keys or max(keys) < HOSTS4:
            return self._ip4.slots(keys)
        return [self._hosts6.get(key) if key in HOSTS6 else self.get(expand(key)) for key in keys]

    def items(self) -> Iterator[tuple[int, int]]:
        """Every prefix and its slot."""
        yield from self._ip4.hosts()
        yield from self._hosts6.items()
        for rows in (self._ip4.prefixes(), self._wide6.items()):
            for prefix, slot in rows:
                yield compact(prefix), slot

    # --- changes

    def change(self, put: Mapping[int, int], delete: Iterable[int] = ()) -> list[Op]:
        """Operations after which `put` has these slots and `delete` falls back to the next wider prefix.

        Every item must be a change. Raises TableFull or BlocksFull with nothing changed.
        """
        delete = list(delete)
        if put and not delete and max(put) < HOSTS4 and not self._strays:
            return self._ip4.change({}, put)
        hosts4: dict[int, int | None] = {}
        hosts6: dict[int, int | None] = {}
        wide4: dict[Prefix, int | None] = {}
        wide6: dict[Prefix, int | None] = {}
        for key, slot in chain(put.items(), zip(delete, repeat(None))):
            if key < HOSTS4:
                hosts4[key] = slot
            elif key in HOSTS6:
                hosts6[key] = slot
            elif key not in WORLDS:
                one = expand(key)
                (wide4 if one.family == 4 else wide6)[one] = slot
        self._check_room(hosts6, wide6)
        lengths: Counter[tuple[int, int]] = Counter()
        for one, slot in wide4.items():
            lengths[4, one.length] += (slot is not None) - (self._ip4.get(one) is not None)
        ops = self._ip4.change(wide4, hosts4)
        self._lengths.update(lengths)
        ops += [Drop("ip6_nets", _key6("ip6_nets", one)) for one in self._strays]
        self._count["ip6_nets"] -= len(self._strays)
        self._strays = []
        ops += self._change_hosts6(hosts6)
        for one, slot in wide6.items():
            if slot is not None:
                ops += self._put6(one, slot)
        for one, slot in wide6.items():
            if slot is None:
                ops.append(self._drop6(one))
        return ops

    def settle(self) -> None:
        """A grace period has passed: what was retired may be used again."""
        self._ip4.settle()

    def _check_room(self, hosts: Mapping[int, int | None], wide: Mapping[Prefix, int | None]) -> None:
        new = sum(slot is not None and one not in self._hosts6 for one, slot in hosts.items())
        free = self._sizes.hosts - len(self._hosts6)
        if new > free:
            raise TableFull("ip6_hosts", new, free)
        new = sum(slot is not None and one not in self._wide6 for one, slot in wide.items())
        free = self._sizes.prefixes6 - self._count["ip6_prefixes"] - self._count["ip6_nets"]
        if new > free:
            raise TableFull("ip6_prefixes", new, free)

    def _change_hosts6(self, hosts: Mapping[int, int | None]) -> list[Op]:
        put = {key: slot for key, slot in hosts.items() if slot is not None}
        gone = [key for key, slot in hosts.items() if slot is None]
        self._hosts6.update(put)
        for key in gone:
            del self._hosts6[key]
        ops: list[Op] = []
        if put:
            values = array("I", bytes(PEER.size * len(put)))
            values[::2] = array("I", put.values())  # struct peer: slot, flags
            ops.append(Put("ip6_hosts", _keys6(put), values.tobytes()))
        return [*ops, Drop("ip6_hosts", _keys6(gone))] if gone else ops

    def _put6(self, prefix: Prefix, slot: int) -> list[Op]:
        ops: list[Op] = []
        if prefix not in self._wide6:
            self._lengths[6, prefix.length] += 1
            if prefix.length > 64:
                ops = self._deepen(prefix.address >> 64)
        self._wide6[prefix] = slot
        return [*ops, self._put_wide6(prefix, slot)]

    def _deepen(self, network: int) -> list[Op]:
        """The first prefix longer than /64 in a /64: that /64 must not answer before the trie."""
        self._deep[network] += 1
        around = Prefix(6, network << 64, 64)
        if self._tables.get(around) != "ip6_nets":
            return []
        moved = self._put_wide6(around, self._wide6[around])
        self._count["ip6_nets"] -= 1
        return [moved, Drop("ip6_nets", _key6("ip6_nets", around))]

    def _put_wide6(self, prefix: Prefix, slot: int) -> Op:
        plain = prefix.length == 64 and not self._deep[prefix.address >> 64]
        table = "ip6_nets" if plain and self._tables.get(prefix) != "ip6_prefixes" else "ip6_prefixes"
        if self._tables.get(prefix) != table:
            self._tables[prefix] = table
            self._count[table] += 1
        return Put(table, _key6(table, prefix), PEER.pack(slot=slot))

    def _drop6(self, prefix: Prefix) -> Op:
        if prefix.length > 64:
            self._deep[prefix.address >> 64] -= 1
        del self._wide6[prefix]
        self._lengths[6, prefix.length] -= 1
        table = self._tables.pop(prefix)
        self._count[table] -= 1
        return Drop(table, _key6(table, prefix))


def _keys6(hosts: Iterable[int]) -> bytes:
    """Keys of ip6_hosts, joined."""
    first = HOSTS6.start
    return b"".join([(key - first).to_bytes(16, "big") for key in hosts])


def _key6(table: str, prefix: Prefix) -> bytes:
    if table == "ip6_nets":
        return NET6_KEY.pack(network=prefix.packed[:8])
    return PREFIX6_KEY.pack(length=prefix.length, address=prefix.packed)

"""Hostile keys and values: nothing crashes, and nothing gets through that trust refuses.

MESHWALL_FUZZ sets the number of cases; MESHWALL_SEED repeats a run.
"""

import json
import os
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from clustermesh import services, trust, wire
from clustermesh.gojson import Malformed
from clustermesh.kv import Entry, Event
from clustermesh.remote import (
    SHARED_STORE,
    Change,
    ClusterChanged,
    IdentityUpserted,
    IpUpserted,
    Mesh,
    NodeUpserted,
    Part,
)
from clustermesh.trust import Trust

CASES = int(os.environ.get("MESHWALL_FUZZ", "20000"))
SEED = int(os.environ.get("MESHWALL_SEED", "1"))
OURS = wire.parse_cidr("10.0.0.9")
NODE, PODS = wire.parse_cidr("10.0.0.8"), wire.parse_cidr("10.9.9.0/24")  # of our own cluster
CLUSTERS = {"west": 2, "north": 3}
TOKENS = [
    b"null", b"0", b"1", b"-0", b"-1", b"2", b"6", b"8", b"255", b"256", b"65537", b"131073", b"196608",
    b"4294967295", b"4294967296", b"1e9", b"16777217", b"true", b'""', b"[]", b"{}", b'"west"', b'"east"',
    b'"north"', b'"0.0.0.0"', b'"127.0.0.1"', b'"169.254.0.1"', b'"::1"', b'"fe80::1"', b'"ff02::1"',
    b'"::ffff:127.0.0.1"', b'"10.0.0.9"', b'"10.0.0.0"', b'"/w=="', b'"AAAAAA=="', b'"//8AAA=="', b'"/wD/AA=="',
    b"reserved:host=;", b"k8s:io.cilium.k8s.policy.cluster=north;", b"cidr:0.0.0.0/0=;", b"k8s:a=" + b"x" * 64 + b";",
    b"\xff", b"\x00", b"\x1b[2J", b"\\ud800", "\u2028".encode(), b'"ID":1,', b'"IP":"10.9.9.9",',
]  # fmt: skip


def golden() -> list[tuple[str, bytes]]:
    """Keys and values of the kinds that a mesh reads."""
    root = Path(__file__).parents[3]
    pairs = []
    for line in (root / "tests/vectors/mesh.jsonl").read_text().splitlines():
        case = json.loads(line)
        value = case.get("value", "")
        match case.get("kind"):
            case None:
                key = case["key"]
            case "ip":
                key = wire.ip_key(case["key"])
            case "node":
                key = f"{wire.NODES}/west/{case['key']}"
            case "identity_decode":
                key = wire.identity_key(131073)
            case "cluster_config":
                key = wire.config_key("west")
            case _:
                continue
        pairs.append((key, value.encode()))
    return pairs


def mutate(rng: random.Random, value: bytes) -> bytes:
    """One to eight changes: bytes, tokens, cuts, repeats."""
    data = bytearray(value)
    for _ in range(rng.randint(1, 8)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(6):
            case 0 if at < len(data):
                data[at] = rng.randrange(256)
            case 1:
                data[at:at] = rng.choice(TOKENS)
            case 2:
                del data[at : at + rng.randint(1, 8)]
            case 3:
                data[at:at] = data[max(0, at - 12) : at]
            case _:
                start = data.find(b":", at) + 1
                end = min(
                    (one for one in (data.find(b",", start), data.find(b"}", start)) if one > 0),
                    default=len(data),
                )
                data[start:end] = rng.choice(TOKENS)
    return bytes(data)


def mutate_key(rng: random.Random, key: str) -> str:
    match rng.randrange(4):
        case 0:
            return key + rng.choice(["/", "/..", "/0", "x", "/32", "\x00"])
        case 1:
            return key.replace("west", rng.choice(["east", "north", "south", "", "..", "West"]))
        case 2:
            head, _, _ = key.rpartition("/")
            numbers = [
                "1",
                "255",
                "256",
                "131073",
                "196608",
                "9" * 30,
                "٣",
                "10.0.0.9",
                "0.0.0.0/0",
                "10.0.0.0/7",
            ]
            return f"{head}/{rng.choice(numbers)}"
        case _:
            return key


def check(change: Change) -> None:
    """What section 7 of the trust rules refuses must not be here."""
    if isinstance(change, ClusterChanged):
        return
    first, last = wire.identity_range(CLUSTERS.get(change.cluster, 1))
    assert change.cluster in {"west", "north", "east"}
    match change:
        case IpUpserted(_, cidr, identity):
            assert identity in {trust.HEALTH, trust.REMOTE_NODE} or first <= identity <= last, change
            assert cidr != OURS, change
            if change.cluster != "east":
                assert cidr != NODE, change
                for ours in (OURS, NODE, PODS):
                    assert not trust.contains(cidr, ours), change
                    assert not trust.contains(ours, cidr), change
            assert cidr[2] >= (8 if cidr[0] == 4 else 16), change
            assert not any(trust.contains(one, cidr) for one in trust._NEVER[cidr[0]]), change
            width = 32 if cidr[0] == 4 else 128
            assert not cidr[1] & ((1 << (width - cidr[2])) - 1), change
        case IdentityUpserted(_, number, labels):
            assert first <= number <= last, change
            assert f"k8s:{wire.CLUSTER_LABEL}={change.cluster}" in labels, change
            assert not any(one.startswith(("reserved:", "cidr:")) for one in labels), change
            assert len(labels) <= 64, change
            assert all(one.isprintable() for one in labels), change
        case NodeUpserted(_, node):
            assert (node.cluster, node.cluster_id) == (change.cluster, CLUSTERS.get(change.cluster, 1)), (
                change
            )
            if change.cluster != "east":
                addresses = {wire.parse_cidr(one.ip) for one in node.addresses or ()}
                assert not addresses & {OURS, NODE}, change


def part_of(key: str) -> Part | None:
    return next((part for part in SHARED_STORE if key.startswith(part.prefix)), None)


def run(cases: int, seed: int) -> None:
    """Mutants of golden entries into a mesh that has a host, a node and pods of its own."""
    rng = random.Random(seed)  # noqa: S311 - repeatable
    mesh = Mesh(Trust("east", 1, clusters=CLUSTERS, own_addresses=frozenset({OURS})))
    configs = [
        Entry(wire.config_key(name), wire.encode_config(wire.ClusterConfig(number)), 1)
        for name, number in {"east": 1, **CLUSTERS}.items()
    ]
    pairs = [pair for pair in golden() if part_of(pair[0])]
    well_formed = hostile()
    accepted = 0
    for number in range(cases):
        if number % 500 == 0:
            list(mesh.listed(SHARED_STORE[0], configs, 0.0))
            one = own_node()
            list(mesh.applied(part_of(one[0]) or SHARED_STORE[2], [Event(*one, 1)], 0.0))
        key, value = rng.choice(pairs if number % 3 else well_formed)
        if number % 6:
            key, value = mutate_key(rng, key), mutate(rng, value)
        part = part_of(key)
        if part is None:
            continue
        event = Event(key, None if rng.random() < 0.1 else value, number + 2)
        for batch in mesh.applied(part, [event], 0.0):
            for change in batch:
                accepted += isinstance(change, IpUpserted | IdentityUpserted | NodeUpserted)
                check(change)
    assert accepted > cases / 1000, "the mutants must often be good enough to be taken"


def hostile() -> list[tuple[str, bytes]]:
    """Well-formed entries that must not be believed, and some that may: mutants of them are the most dangerous."""
    addresses = [
        "10.0.0.9", "10.0.0.8", "10.9.9.7", "10.9.9.0/25", "10.9.0.0/16", "10.0.0.0/8", "0.0.0.0/0", "10.0.0.0/7",
        "127.0.0.1", "169.254.1.1", "224.0.0.1", "255.255.255.255", "::1", "fe80::1", "ff02::1", "::/0", "fd00::/15",
        "10.1.0.1", "10.1.0.1/32", "10.1.2.0/24", "fd00::1", "fd00:1::/32",
    ]  # fmt: skip
    numbers = [1, 2, 4, 6, 7, 128, 255, 256, 65537, 131073, 196609, (1 << 24) + 131073, (2 << 24) + 1]
    pairs = []
    for text in addresses:
        for number in numbers:
            address, _, length = text.partition("/")
            mask = wire.make_mask(int(length), 128 if ":" in address else 32) if length else None
            entry = wire.IpEntry(address, mask, "192.168.5.1", number)
            pairs.append((wire.ip_key(entry.prefix), wire.encode_ip(entry)))
    odd = wire.IpEntry("10.1.0.7", wire.make_mask(24, 32), "", 131073)
    nodes = [wire.NodeAddress("InternalIP", one) for one in addresses if "/" not in one]
    for cluster, number in (("west", 2), ("north", 3), ("east", 2), ("west", 3)):
        node = wire.Node(
            "w1", cluster, tuple(nodes), cluster_id=number, ipv4_health="10.0.0.8", ipv4_ingress="10.0.0.9"
        )
        pairs += [(wire.node_key(cluster, "w1"), wire.encode_node(node))] * 10
    return [*pairs, *[(wire.ip_key(odd.prefix), wire.encode_ip(odd))] * 10]


def own_node() -> tuple[str, bytes]:
    """A node of our own cluster, with pods."""
    address = wire.NodeAddress("InternalIP", wire.ip_text(NODE[0], NODE[1]))
    pods = wire.node_cidr(f"{wire.ip_text(PODS[0], PODS[1])}/{PODS[2]}")
    node = wire.Node("e1", "east", (address,), ipv4_cidr=pods, cluster_id=1)
    return wire.node_key("east", "e1"), wire.encode_node(node)


def test_mutated_entries_never_crash_and_never_get_through() -> None:
    run(CASES, SEED)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_a_million_mutated_entries_never_crash_and_never_get_through(seed: int) -> None:
    run(100_000, 1000 + seed)


def decoders() -> list[tuple[Callable[[str, bytes], object], list[tuple[str, bytes]]]]:
    """Everything that reads what others write, with golden inputs: name in the key, value."""
    kinds: dict[str, list[tuple[str, bytes]]] = {}
    for line in (Path(__file__).parents[3] / "tests/vectors/mesh.jsonl").read_text().splitlines():
        case = json.loads(line)
        if case.get("kind"):
            kinds.setdefault(case["kind"], []).append(
                (case.get("key", ""), str(case.get("value", "")).encode())
            )
    texts = [*kinds["addrcluster"], *kinds["cluster_name"], ("", b"10.0.0.0/8"), ("", b"fd00::/16")]
    found: list[tuple[Callable[[str, bytes], object], list[tuple[str, bytes]]]] = []
    for compat in wire.Compat:
        found += [
            (lambda key, value, compat=compat: wire.decode_ip(key, value, compat).cidr, kinds["ip"]),
            (lambda key, value, compat=compat: wire.decode_node(key, value, compat), kinds["node"]),
            (lambda _, value, compat=compat: wire.decode_config(value, compat), kinds["cluster_config"]),
            (lambda _, value, compat=compat: wire.decode_identity(value, compat), kinds["identity_decode"]),
            (lambda key, value, compat=compat: services.decode_service(key, value, compat), kinds["service"]),
            (
                lambda key, value, compat=compat: services.decode_service_export(key, value, compat),
                kinds["serviceexport"],
            ),
        ]
    return [
        *found,
        (lambda _, value: wire.parse_addr_cluster(value.decode(errors="replace")), texts),
        (lambda _, value: wire.parse_cidr(value.decode(errors="replace")), texts),
        (lambda _, value: wire.decode_identity_number(value.decode(errors="replace")), [("", b"131073")]),
        (lambda _, value: wire.valid_cluster_name(value.decode(errors="replace")), texts),
    ]


def decode(cases: int, seed: int) -> None:
    rng = random.Random(seed)  # noqa: S311 - repeatable
    known = decoders()
    taken = 0
    for _ in range(cases):
        decoder, inputs = rng.choice(known)
        key, value = rng.choice(inputs)
        with suppress(Malformed):
            decoder(mutate_key(rng, key), mutate(rng, value))
            taken += 1
    assert taken > cases / 100


def test_every_decoder_gives_a_value_or_says_what_is_malformed() -> None:
    decode(CASES, SEED)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_every_decoder_does_so_a_million_times(seed: int) -> None:
    decode(100_000, 2000 + seed)

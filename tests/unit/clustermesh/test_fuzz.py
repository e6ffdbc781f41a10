"""Hostile keys and values: nothing crashes, and nothing gets through that trust refuses.

MESHWALL_FUZZ sets the number of cases; MESHWALL_SEED repeats a run.
"""

import json
import os
import random
from pathlib import Path

from clustermesh import trust, wire
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


def part_of(key: str) -> Part | None:
    return next((part for part in SHARED_STORE if key.startswith(part.prefix)), None)


def test_mutated_entries_never_crash_and_never_get_through() -> None:
    rng = random.Random(SEED)  # noqa: S311 - repeatable
    mesh = Mesh(Trust("east", 1, clusters=CLUSTERS, own_addresses=frozenset({OURS})))
    configs = [
        Entry(wire.config_key(name), wire.encode_config(wire.ClusterConfig(number)), 1)
        for name, number in {"east": 1, **CLUSTERS}.items()
    ]
    pairs = [pair for pair in golden() if part_of(pair[0])]
    accepted = 0
    for number in range(CASES):
        if number % 500 == 0:
            list(mesh.listed(SHARED_STORE[0], configs, 0.0))
        key, value = rng.choice(pairs)
        key, value = mutate_key(rng, key), mutate(rng, value)
        part = part_of(key)
        if part is None:
            continue
        event = Event(key, None if rng.random() < 0.1 else value, number + 2)
        for batch in mesh.applied(part, [event], 0.0):
            for change in batch:
                accepted += isinstance(change, IpUpserted | IdentityUpserted | NodeUpserted)
                check(change)
    assert accepted > CASES / 1000, "the mutants must often be good enough to be taken"

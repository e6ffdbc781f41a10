"""Whatever store of a change was the last one made, a packet gets the old verdict or the new one."""

import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from bpf.layout import SLOT_HOST, sized
from daemon.datapath.image import Image
from daemon.datapath.ops import Drop, Op, Store, TableFull
from daemon.model.identity import Identity, Reserved, reserved_labels
from daemon.model.labels import parse_labels
from daemon.model.net import Direction, Prefix, compact, expand, parse_prefix
from daemon.model.verdict import Verdict, unpack_cell
from daemon.policy.ccnp import parse_documents
from daemon.policy.compile import Compiled, CompileSettings, Subject, add_identities, compile_policy

_spec = importlib.util.spec_from_file_location("kernel_model", Path(__file__).with_name("kernel.py"))
assert _spec is not None
assert _spec.loader is not None
kernel_model = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kernel_model)
Kernel = kernel_model.Kernel

SIZES = sized(slots=256, cells=4096, rules=512, ip4_blocks=512, hosts=256, prefixes6=256)
HOST = Subject(Identity(1), parse_labels(["reserved:host", "k8s:zone=a"]))
WEB, DB, NEW = Identity(70001), Identity(70002), Identity(70003)
LABELS = {
    WEB: parse_labels(["k8s:app=web", "k8s:io.kubernetes.pod.namespace=prod"]),
    DB: parse_labels(["k8s:app=db", "k8s:io.kubernetes.pod.namespace=prod"]),
    NEW: parse_labels(["k8s:app=new", "k8s:io.kubernetes.pod.namespace=prod"]),
}
RESERVED = {Identity(one): reserved_labels(Identity(one)) for one in Reserved if one}
CIDRS = [
    "10.0.0.0/8",
    "10.1.0.0/16",
    "10.1.2.0/24",
    "10.1.2.3/32",
    "10.1.2.128/25",
    "0.0.0.0/0",
    "192.0.2.0/28",
]
CIDRS6 = [
    "2001:db8::/32",
    "2001:db8:1::/64",
    "2001:db8:1::/96",
    "2001:db8:1::5/128",
    "::/0",
    "2001:db8:1:2::/64",
]
OWNED = {
    parse_prefix("10.1.2.3"): WEB, parse_prefix("10.9.9.9"): DB, parse_prefix("2001:db8:1::7"): WEB,
    parse_prefix("192.0.2.1"): Identity(1), parse_prefix("10.1.3.0/24"): DB, parse_prefix("2001:db8:1::/64"): DB,
}  # fmt: skip
# Across the edge of a /25 that policy may name.
CROWD = [parse_prefix(f"10.1.2.{at}") for at in range(120, 136)]
PROBES = [
    parse_prefix(one)
    for one in (
        "10.1.2.121", "10.1.2.131",
        "10.0.0.1", "10.1.0.1", "10.1.2.1", "10.1.2.3", "10.1.2.200", "10.1.3.4", "10.9.9.9", "8.8.8.8", "192.0.2.1",
        "192.0.2.5", "192.0.2.77", "2001:db8::1", "2001:db8:1::5", "2001:db8:1::7", "2001:db8:1:0:1::1", "2a00::1",
        "2001:db8:1:2::9",
    )
]  # fmt: skip
ROOTS = {one.address >> 16 for one in PROBES if one.family == 4}
UNSHRUNK = {"deadline": None, "phases": (Phase.explicit, Phase.generate)}  # shrinking takes minutes here
PORTS = [(6, 443), (17, 25), (47, -1)]


def claim(image: Image, put: Mapping[Prefix, Identity | None], delete: Iterable[Prefix] = ()) -> list[Op]:
    """As operations of one entry each."""
    ops = image.claim({compact(one): who for one, who in put.items()}, [compact(one) for one in delete])
    return list(kernel_model.singles(ops))


def switch(image: Image, tables: Compiled) -> list[Op]:
    return list(kernel_model.singles(image.switch(tables)))


def owned_prefixes(image: Image) -> list[Prefix]:
    return [expand(one) for one in image.owned()]


def crowds() -> st.SearchStrategy[dict[Prefix, Identity]]:
    """So many hosts of one /24 that it is a block, or not."""
    return st.builds(lambda count: dict.fromkeys(CROWD[-count:], WEB), st.integers(1, len(CROWD)))


def rules() -> st.SearchStrategy[dict[str, object]]:
    peer = st.one_of(
        st.lists(st.sampled_from(CIDRS + CIDRS6), min_size=1, max_size=3, unique=True).map(
            lambda c: {"fromCIDR": c}
        ),
        st.sampled_from(["web", "db", "new"]).map(
            lambda app: {"fromEndpoints": [{"matchLabels": {"app": app}}]}
        ),
        st.sampled_from(["world", "host", "all"]).map(lambda entity: {"fromEntities": [entity]}),
    )
    ports = st.sampled_from(
        [{}, {"toPorts": [{"ports": [{"port": "443", "protocol": "TCP"}]}]},
         {"toPorts": [{"ports": [{"port": "20", "endPort": 30, "protocol": "ANY"}]}]}]
    )  # fmt: skip
    return st.builds(lambda one, two: {**one, **two}, peer, ports)


def documents() -> st.SearchStrategy[list[dict[str, object]]]:
    return st.lists(
        st.fixed_dictionaries({"ingress": st.lists(rules(), min_size=1, max_size=3)},
                              optional={"ingressDeny": st.lists(rules(), min_size=1, max_size=2)}),
        max_size=3,
    )  # fmt: skip


def compiled(specs: list[dict[str, object]], previous: Compiled | None = None) -> Compiled:
    import json

    text = "\n---\n".join(
        json.dumps({"apiVersion": "cilium.io/v2", "kind": "CiliumClusterwideNetworkPolicy",
                    "metadata": {"name": f"p{at}"}, "spec": {"nodeSelector": {}, **spec}})
        for at, spec in enumerate(specs)
    )  # fmt: skip
    parsed = parse_documents(text, "test.yaml")
    assert not parsed.problems, parsed.problems
    known = RESERVED | {WEB: LABELS[WEB], DB: LABELS[DB]} | {HOST.identity: HOST.labels}
    return compile_policy(parsed.policies, {}, HOST, known, CompileSettings(), previous=previous)


def meaning(
    tables: Compiled, owned: dict[Prefix, Identity | None], peer: Prefix, proto: int, port: int
) -> Verdict | None:
    """The verdict by the tables themselves: longest prefix of who owns what and of what policy names."""
    if not tables.ingress.enforced:
        return None
    rows = tables.rows_of_address(peer)
    best = max((one for one in tables.prefixes if one.contains(peer)), key=lambda one: one.length)
    owners = [one for one in owned if one.contains(peer) and one.length >= best.length]
    if owners:
        who = owned[max(owners, key=lambda one: one.length)]
        rows = tables.unknown if who is None else tables.rows_of(who)
    return unpack_cell(tables.ingress.cell(rows.ingress, proto, port))[0]


def everything(
    tables: Compiled, owned: dict[Prefix, Identity | None]
) -> dict[tuple[Prefix, int, int], Verdict | None]:
    return {(peer, *one): meaning(tables, owned, peer, *one) for peer in PROBES for one in PORTS}


def elsewhere(op: Op) -> bool:
    """A root entry of a /16 that no probe is in: a wide prefix stores hundreds of them, which nothing here reads."""
    return (
        isinstance(op, Store)
        and op.table == "ip4_blocks"
        and len(op.data) == 4
        and op.offset // 4 not in ROOTS
    )


def read(kernel: Kernel, generation: int) -> dict[tuple[Prefix, int, int], Verdict | None]:
    return {
        (peer, *one): kernel.verdict(generation, Direction.INGRESS, peer, *one)
        for peer in PROBES
        for one in PORTS
    }


@settings(max_examples=50, **UNSHRUNK)
@given(crowds(), st.lists(documents(), min_size=2, max_size=4))
def test_every_store_of_a_policy_switch_leaves_the_old_verdicts_or_the_new_ones(crowd, history):
    kernel, image = Kernel(SIZES), Image(SIZES)
    owned = crowd | OWNED
    kernel.run(claim(image, owned))
    before: dict[tuple[Prefix, int, int], Verdict | None] | None = None
    for specs in history:
        tables = compiled(specs)
        after = everything(tables, owned)
        generation = image.generation
        for op in switch(image, tables):
            kernel.make(op)
            if elsewhere(op):
                continue
            flipped = kernel.config("generation") != generation
            if flipped:
                assert read(kernel, generation + 1) == after
            elif before is not None:
                assert read(kernel, generation) == before
        before = after
    assert {expand(one) for one, _ in image.addresses.items()} <= {*owned, *tables.prefixes}


SINGLE = st.sampled_from([parse_prefix(c) for c in CIDRS[1:5]] + PROBES).map(lambda one: [one])
GROUPS = st.builds(lambda first, count: CROWD[first : first + count], st.integers(0, 4), st.integers(1, 16))


@settings(max_examples=60, **UNSHRUNK)
@given(documents(), crowds(), st.lists(st.tuples(st.one_of(GROUPS, SINGLE),
       st.sampled_from([WEB, DB, HOST.identity, None, "gone"])), max_size=12))  # fmt: skip
def test_addresses_that_come_move_and_go_get_the_verdicts_of_their_owner(specs, crowd, moves):
    kernel, image = Kernel(SIZES), Image(SIZES)
    owned: dict[Prefix, Identity | None] = crowd | OWNED
    kernel.run(claim(image, owned))
    tables = compiled(specs)
    kernel.run(switch(image, tables))
    for prefixes, who in moves:
        before = everything(tables, owned)
        if who == "gone":
            for one in prefixes:
                owned.pop(one, None)
            ops = claim(image, {}, prefixes)
        else:
            owned |= dict.fromkeys(prefixes, who)
            ops = claim(image, dict.fromkeys(prefixes, who))
        after = everything(tables, owned)
        for op in ops:
            kernel.make(op)
            if elsewhere(op):
                continue
            now = read(kernel, image.generation)
            assert all(now[one] in (before[one], after[one]) for one in now)
        assert read(kernel, image.generation) == after
        assert set(owned_prefixes(image)) == owned.keys()


@settings(max_examples=30, **UNSHRUNK)
@given(documents(), crowds(), st.lists(st.tuples(GROUPS, st.sampled_from([WEB, DB, "gone"])), min_size=1, max_size=6),
       st.integers(0, 40))  # fmt: skip
def test_hosts_between_hash_and_block_survive_the_death_of_the_process(specs, crowd, moves, stop):
    kernel, image = Kernel(SIZES), Image(SIZES)
    owned: dict[Prefix, Identity | None] = crowd | OWNED
    tables = compiled(specs)
    kernel.run(claim(image, owned))
    kernel.run(switch(image, tables))
    for prefixes, who in moves:
        old = dict(owned)
        gone = prefixes if who == "gone" else []
        put = {} if gone else dict.fromkeys(prefixes, who)
        owned = {one: by for one, by in (owned | put).items() if one not in gone}
        kernel.run(claim(image, put, gone)[:stop])
        before, after = everything(tables, old), everything(tables, owned)
        image = Image(SIZES)
        image.adopt(kernel_model.leftover(kernel))
        left = [one for one in owned_prefixes(image) if one not in owned]
        # What was painted around an address is known again only with the first switch: it must not go before.
        for op in (*claim(image, owned), *switch(image, tables), *claim(image, {}, left)):
            now = read(kernel, kernel.config("generation"))
            assert all(now[one] in (before[one], after[one]) for one in now)
            kernel.make(op)
        assert read(kernel, image.generation) == after


def test_a_host_of_a_crowded_network_is_one_store():
    image = Image(SIZES)
    image.switch(compiled([]))
    in_hash = claim(image, dict.fromkeys(CROWD[:11], WEB))
    assert {getattr(op, "table", "") for op in in_hash} >= {"ip4_hosts"}
    claim(image, {CROWD[11]: WEB})
    for put, delete in (({CROWD[12]: WEB}, []), ({CROWD[12]: None}, []), ({}, [CROWD[12]])):
        (op,) = claim(image, put, delete)
        assert isinstance(op, Store)
        assert (op.table, len(op.data)) == ("ip4_blocks", 4)


def test_a_network_that_lost_most_of_its_hosts_goes_back_to_the_hash():
    kernel, image = Kernel(SIZES), Image(SIZES)
    kernel.run(image.switch(compiled([])))
    blocks = image.addresses.used["ip4_blocks"]
    kernel.run(claim(image, dict.fromkeys(CROWD, WEB)))
    assert not kernel.tables["ip4_hosts"]
    kernel.run(claim(image, {}, CROWD[6:]))
    assert not kernel.tables["ip4_hosts"]
    kernel.run(claim(image, {}, CROWD[5:6]))
    assert len(kernel.tables["ip4_hosts"]) == 5
    kernel.run(claim(image, {}, CROWD[:5]))
    image.addresses.settle()
    assert image.addresses.used["ip4_blocks"] == blocks


def test_hosts_take_at_most_half_of_the_blocks():
    sizes = sized(slots=256, cells=4096, ip4_blocks=256 + 300, hosts=4096)
    kernel, image = Kernel(sizes), Image(sizes)
    hosts = [parse_prefix(f"10.0.{at}.{octet}") for at in range(160) for octet in range(14)]
    kernel.run(claim(image, dict.fromkeys(hosts, WEB)))
    assert image.addresses.used["ip4_blocks"] in range(256 + 148, 256 + 151)
    assert len(kernel.tables["ip4_hosts"]) == image.addresses.used["ip4_hosts"] > 0
    assert {kernel.slot(one) for one in hosts} == {kernel.slot(hosts[0])} != {0}


@settings(max_examples=50, **UNSHRUNK)
@given(documents(), documents())
def test_a_new_process_takes_over_what_the_old_one_left(first, second):
    kernel, image = Kernel(SIZES), Image(SIZES)
    kernel.run(claim(image, OWNED))
    tables = compiled(first)
    kernel.run(switch(image, tables))
    before = everything(tables, dict(OWNED))
    heir = Image(SIZES)
    heir.adopt(kernel_model.leftover(kernel))
    after = everything(compiled(second), dict(OWNED))
    claims = claim(heir, OWNED, [one for one in owned_prefixes(heir) if one not in OWNED])
    for op in claims:
        kernel.make(op)
        assert read(kernel, image.generation) == before
    for op in switch(heir, compiled(second)):
        kernel.make(op)
        if elsewhere(op):
            continue
        now = kernel.config("generation")
        assert read(kernel, now) == (before if now == image.generation else after)


def test_an_identity_that_appears_needs_no_switch():
    kernel, image = Kernel(SIZES), Image(SIZES)
    address = parse_prefix("10.20.0.1")
    tables = compiled([{"ingress": [{"fromEndpoints": [{"matchLabels": {"app": "new"}}]}]}])
    kernel.run(image.switch(tables))
    kernel.run(claim(image, {address: NEW}))
    generation = image.generation
    assert kernel.verdict(generation, Direction.INGRESS, address, 6, 443) is Verdict.DEFAULT_DENY
    ops = image.identities(add_identities(tables, {NEW: LABELS[NEW]}, ()), [NEW])
    assert ops is not None
    kernel.run(ops)
    assert image.generation == generation
    assert kernel.verdict(generation, Direction.INGRESS, address, 6, 443) is Verdict.ALLOW


def test_a_policy_that_does_not_fit_is_refused_whole():
    image, kernel = Image(sized(slots=256, cells=64, ip4_blocks=512)), Kernel(SIZES)
    image.switch(compiled([{"ingress": [{"fromCIDR": ["10.0.0.0/8"]}]}]))
    many = [{"ingress": [{"fromCIDR": [f"10.{at}.0.0/16"], "toPorts": [{"ports": [{"port": str(at + 1)}]}]}
                         for at in range(40)]}]  # fmt: skip
    generation, slots = image.generation, dict(image.addresses.items())
    with pytest.raises(TableFull, match=r"cells: \d+ entries needed"):
        image.switch(compiled(many))
    assert (image.generation, dict(image.addresses.items())) == (generation, slots)
    assert kernel.config("generation") == 0


def test_unchanged_rules_keep_their_numbers():
    image = Image(SIZES)
    one = {"ingress": [{"fromCIDR": ["10.0.0.0/8"]}]}
    two = {"ingress": [{"fromCIDR": ["192.0.2.0/28"]}]}
    image.switch(compiled([one, two]))
    before = dict(image.numbers)
    image.switch(compiled([one, two, one]))
    assert {key: image.numbers[key] for key in before} == before


def test_no_two_rules_have_one_number_nor_one_that_packets_may_still_report():
    image = Image(SIZES)
    one = {"ingress": [{"fromCIDR": ["10.0.0.0/8"]}, {"fromCIDR": ["10.1.0.0/16"]}]}
    image.switch(compiled([one]))
    before = dict(image.numbers)
    image.switch(compiled([one, one]))
    fresh = [number for key, number in image.numbers.items() if key not in before]
    assert fresh
    assert set(fresh).isdisjoint(before.values())
    assert len(set(image.numbers.values())) == len(image.numbers)


def test_own_addresses_are_found_without_the_hash():
    kernel, image = Kernel(SIZES), Image(SIZES)
    kernel.run(image.switch(compiled([])))
    one, other = parse_prefix("192.0.2.1"), parse_prefix("192.0.2.77")
    kernel.run(claim(image, {other: WEB}))
    assert kernel.tables["ip4_hosts"]
    kernel.run(claim(image, {one: HOST.identity}))
    assert not kernel.tables["ip4_hosts"]
    assert kernel.slot(one) == SLOT_HOST
    kernel.run(claim(image, {}, [one]))
    assert list(kernel.tables["ip4_hosts"]) == [other.packed]


def test_a_host_that_a_dead_process_left_in_hash_and_block_is_in_the_block_only():
    kernel, image = Kernel(SIZES), Image(SIZES)
    kernel.run(image.switch(compiled([])))
    kernel.run(claim(image, dict.fromkeys(CROWD[:11], WEB)))
    kernel.run([op for op in claim(image, {CROWD[11]: WEB}) if not isinstance(op, Drop)])
    assert len(kernel.tables["ip4_hosts"]) == 11
    heir = Image(SIZES)
    heir.adopt(kernel_model.leftover(kernel))
    kernel.run(claim(heir, {CROWD[0]: DB}))
    assert not kernel.tables["ip4_hosts"]
    assert kernel.slot(CROWD[0]) == heir.addresses.get(CROWD[0]) != kernel.slot(CROWD[1])
    assert kernel.slot(CROWD[1]) == heir.addresses.get(CROWD[1])

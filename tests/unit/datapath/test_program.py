"""Who owns which address: from claims in the tables to the image, in pieces."""

import importlib.util
from pathlib import Path

import pytest

from bpf.attach import XdpMode
from bpf.layout import SLOT_HOST, SLOT_UNKNOWN, sized
from daemon.datapath import program as program_module
from daemon.datapath.devices import Devices
from daemon.datapath.image import Image
from daemon.datapath.program import Program, ProgramSettings, _Work
from daemon.model.identity import Identity
from daemon.model.labels import parse_labels
from daemon.model.net import compact, parse_prefix
from daemon.policy.compile import CompileSettings, Subject
from daemon.state.audit import audited
from daemon.state.tables import IpKey, IpRow, NodeKey, NodeRow, Tables

_spec = importlib.util.spec_from_file_location("kernel_model", Path(__file__).with_name("kernel.py"))
assert _spec is not None
assert _spec.loader is not None
kernel_model = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kernel_model)

SIZES = sized(slots=256, cells=4096, rules=512, ip4_blocks=512, hosts=8, prefixes6=256)
SUBJECT = Subject(Identity(1), parse_labels(["reserved:host"]))
WEB, DB = Identity(70001), Identity(70002)


class Bench:
    """A Program without a kernel: what it applies goes to the model."""

    def __init__(self, tmp_path: Path) -> None:
        self.tables = Tables()
        settings = ProgramSettings(tmp_path, CompileSettings(cluster_name="east"), SIZES)
        self.program = Program(self.tables, settings, Devices(self.tables, tmp_path, (), XdpMode.OFF))
        self.program._image = Image(SIZES)
        self.kernel = kernel_model.Kernel(SIZES)

    def say(self, source: str, identity: Identity, *prefixes: str) -> None:
        for one in prefixes:
            self.tables.ips.put(IpKey(parse_prefix(one), source), IpRow(identity))

    def forget(self, source: str, *prefixes: str) -> None:
        for one in prefixes:
            self.tables.ips.delete(IpKey(parse_prefix(one), source))

    def settle(self, *prefixes: str, own: tuple[str, ...] = ()) -> None:
        dirty = {compact(parse_prefix(one)) for one in prefixes} or None
        mine = frozenset(compact(parse_prefix(one)) for one in own)
        work = _Work((), {}, SUBJECT, False, {}, {}, dirty, mine, audited(self.tables))
        self.program._claim_all(work, self.kernel.run)

    def owner(self, address: str) -> Identity | None:
        image = self.program._image
        slot = image.addresses.get(parse_prefix(address))
        assert slot is None or slot == self.kernel.slot(parse_prefix(address))
        return None if slot is None else image._owner_of[slot]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_an_address_belongs_to_whom_the_most_trusted_source_says(bench):
    bench.say("mesh:west", WEB, "10.0.0.1", "10.0.0.2", "10.0.0.3")
    bench.say("local", DB, "10.0.0.2")
    bench.settle(own=("10.0.0.3",))
    assert [bench.owner(f"10.0.0.{at}") for at in (1, 2, 3)] == [WEB, DB, Identity(1)]
    assert bench.program._image.addresses.get(parse_prefix("10.0.0.3")) == SLOT_HOST


def test_an_address_that_two_clusters_claim_is_a_conflict_until_one_gives_way(bench):
    bench.say("mesh:west", WEB, "10.0.0.1")
    bench.say("mesh:north", DB, "10.0.0.1")
    bench.settle()
    assert bench.program._image.addresses.get(parse_prefix("10.0.0.1")) == SLOT_UNKNOWN
    assert bench.program.conflicts == {compact(parse_prefix("10.0.0.1"))}
    bench.forget("mesh:north", "10.0.0.1")
    bench.settle("10.0.0.1")
    assert bench.owner("10.0.0.1") == WEB
    assert not bench.program.conflicts


def test_a_nodes_address_is_its_own_unless_a_file_says_more(bench):
    key = NodeKey("west", "w1")
    bench.tables.nodes.put(
        key, NodeRow((("InternalIP", parse_prefix("10.0.0.9")),), frozenset(), Identity(6), "mesh:west")
    )
    bench.program._take_nodes([key])
    bench.settle()
    assert bench.owner("10.0.0.9") == Identity(6)
    bench.say("file", WEB, "10.0.0.9")
    bench.settle("10.0.0.9")
    assert bench.owner("10.0.0.9") == WEB
    bench.forget("file", "10.0.0.9")
    bench.settle("10.0.0.9")
    assert bench.owner("10.0.0.9") == Identity(6)
    bench.tables.nodes.delete(key)
    bench.program._take_nodes([key])
    bench.settle("10.0.0.9")
    assert bench.owner("10.0.0.9") is None


def test_what_an_earlier_process_left_and_nobody_claims_goes_with_the_first_pass(bench):
    bench.say("mesh:west", WEB, "10.0.0.1", "10.0.0.2")
    bench.settle()
    bench.program._image = Image(SIZES)
    bench.program._image.adopt(kernel_model.leftover(bench.kernel))
    bench.forget("mesh:west", "10.0.0.1")
    bench.settle()
    assert (bench.owner("10.0.0.1"), bench.owner("10.0.0.2")) == (None, WEB)


def test_addresses_that_do_not_fit_wait_and_the_others_do_not(bench, monkeypatch):
    monkeypatch.setattr(program_module, "PIECE", 3)
    crowd = [f"10.{at}.0.1" for at in range(10)]
    bench.say("mesh:west", WEB, *crowd)
    bench.settle(own=("192.0.2.1",))
    known = [one for one in crowd if bench.owner(one) == WEB]
    assert len(known) == SIZES.hosts
    assert bench.owner("192.0.2.1") == Identity(1)
    bench.forget("mesh:west", *known[:4])
    bench.settle(*known[:4])
    assert len([one for one in crowd if bench.owner(one)]) == SIZES.hosts - 4
    bench.program._unfit_due = 0.0
    bench.settle(*known[:1])
    assert {one for one in crowd if bench.owner(one)} == {*crowd} - {*known[:4]}
    assert not bench.program._unfit

"""Devices that come and change, and programs that others take away: followed by a real meshwalld."""

import contextlib
import os
import select
import shutil
import socket
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bpf import attach, layout
from bpf.features import returns
from bpf.syscall import (
    XDP_NATIVE,
    AttachType,
    ProgType,
    link_create,
    link_detach,
    link_update,
    obj_get,
    prog_load,
    prog_query,
)
from daemon.datapath.image import Image
from daemon.datapath.maps import KernelMaps
from daemon.model.net import parse_prefix

pytestmark = pytest.mark.kernel

OPEN, CLOSED = 7000, 7001
POLICY = f"""
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {{name: base}}
spec:
  nodeSelector: {{}}
  ingress: [{{toPorts: [{{ports: [{{port: "{OPEN}", protocol: UDP}}]}}]}}]
"""
NOTICED_WITHIN_S = 1.0
MARGIN_S = 2.0  # other work on this machine


@pytest.fixture(scope="module")
def node(machine):
    machine.enforce(POLICY)
    machine.until(lambda: filtered(machine, machine.device))
    return machine


def filtered(node, device: str) -> bool:
    """Are our programs on it, as the kernel lists them?"""
    with node.inside():
        try:
            index = socket.if_nametoindex(device)
            return all(prog_query(index, one) for one in (AttachType.TCX_INGRESS, AttachType.TCX_EGRESS))
        except OSError:
            return False


def is_own(node, address: str) -> bool:
    """Do the kernel's tables know it as ours?"""
    sizes = layout.sized(**node.sizes)
    known, image = KernelMaps(node.home / "bpf", sizes), Image(sizes)
    try:
        image.adopt(known.leftover())
    finally:
        known.close()
    return image.addresses.get(parse_prefix(address)) == layout.SLOT_HOST


def delivered(node, port: int, target: str = "", source: str = "") -> bool:
    """Does a datagram of the peer arrive? The neighbour's address is asked for once a second."""
    with (
        node.bound(node.us, target or node.node, port) as end,
        node.bound(node.peer, source or node.other, 0) as mine,
    ):
        mine.sendto(b"x", end.getsockname())
        return bool(node.received(end, 1.3 if port == OPEN else 0.1))


def how(node, device: str) -> str:
    row = node.status()["parts"].get(f"device:{device}")
    return f"{row['text']} {row['hint']}" if row else ""


def tampered(node) -> dict[str, int]:
    row = node.status()["parts"].get("tampering")
    return row["details"]["counts"] if row else {}


def test_what_a_new_device_receives_is_filtered_within_the_bound(node):
    """The gap is measured from the `ip link` that brings the device up, with a sender that never stops."""
    gaps = []
    for at in range(5):
        device, ours, theirs = f"mwd{at + 1}", f"10.97.{at}.1", f"10.97.{at}.2"
        node.plug(device, None, None)
        node.ip("-n", node.peer, "addr", "add", f"{theirs}/24", "dev", device)
        node.ip("-n", node.peer, "link", "set", device, "up")
        node.ip("-n", node.us, "addr", "add", f"{ours}/24", "dev", device)
        started = time.monotonic()
        node.ip("-n", node.us, "link", "set", device, "up")
        gaps.append(max(last_delivery(node, ours, theirs) - started, 0))
        assert filtered(node, device)
        node.ip("-n", node.us, "link", "delete", device)
    print(
        f"denied datagrams after `ip link set up`: last one after {1000 * statistics.median(gaps):.1f} ms (median), "
        f"{1000 * max(gaps):.1f} ms (worst of {len(gaps)}); 0: none was delivered"
    )
    assert max(gaps) < 0.1 + MARGIN_S


def last_delivery(node, ours: str, theirs: str) -> float:
    """When the last denied datagram arrived; -inf if none did, though allowed ones did for a while."""
    last = float("-inf")
    with (
        node.bound(node.us, ours, CLOSED) as closed,
        node.bound(node.us, ours, OPEN) as allowed,
        node.bound(node.peer, theirs, 0) as mine,
    ):
        mine.setblocking(False)
        stop = threading.Event()

        def send() -> None:
            while not stop.wait(0.0005):
                with contextlib.suppress(BlockingIOError):  # waiting for the neighbour's address
                    mine.sendto(b"x", (ours, CLOSED))
                    mine.sendto(b"x", (ours, OPEN))

        sender = threading.Thread(target=send)
        sender.start()
        arrived, deadline = 0, time.monotonic() + 5
        while arrived < 200 and time.monotonic() < deadline:
            for one in select.select([closed, allowed], [], [], 0.1)[0]:
                one.recv(16)
                arrived += one is allowed
                last = time.monotonic() if one is closed else last
        stop.set()
        sender.join()
    assert arrived == 200
    return last


def test_a_device_that_is_filtered_before_it_is_up_never_delivers_a_denied_datagram(node):
    node.plug("mwd1", None, None)
    node.until(lambda: filtered(node, "mwd1"))
    node.ip("-n", node.peer, "addr", "add", "10.97.0.2/24", "dev", "mwd1")
    node.ip("-n", node.peer, "link", "set", "mwd1", "up")
    node.ip("-n", node.us, "addr", "add", "10.97.0.1/24", "dev", "mwd1")
    node.until(lambda: is_own(node, "10.97.0.1"))
    node.ip("-n", node.us, "link", "set", "mwd1", "up")
    assert last_delivery(node, "10.97.0.1", "10.97.0.2") == float("-inf")
    node.ip("-n", node.us, "link", "delete", "mwd1")


def test_names_and_sizes_change_without_a_gap_and_a_name_that_is_not_wanted_ends_the_filter(node):
    node.plug("mwd1", ("10.97.0.1", "fd97::1"), ("10.97.0.2", "fd97::2"))
    node.until(lambda: filtered(node, "mwd1"))
    node.until(lambda: "XDP native" in how(node, "mwd1"))
    node.ip("-n", node.us, "link", "set", "mwd1", "mtu", "9000")
    node.ip("-n", node.us, "link", "set", "mwd1", "name", "mwd2")
    node.until(lambda: "XDP native" in how(node, "mwd2") and not how(node, "mwd1"))
    assert not delivered(node, CLOSED, "10.97.0.1", "10.97.0.2")
    node.ip("-n", node.us, "link", "set", "mwd2", "name", "mwx2")
    node.until(lambda: not filtered(node, "mwx2"))
    assert delivered(node, CLOSED, "10.97.0.1", "10.97.0.2")
    node.ip("-n", node.us, "link", "set", "mwx2", "name", "mwd1")
    node.until(lambda: filtered(node, "mwd1"))
    assert not delivered(node, CLOSED, "10.97.0.1", "10.97.0.2")
    node.ip("-n", node.us, "link", "delete", "mwd1")
    node.until(lambda: not list((node.pins / "links").glob(f"{node.index() + 1}-*")))
    assert not tampered(node)


def test_a_device_that_moves_to_another_namespace_is_let_go_and_caught_again_when_it_returns(node):
    away = f"{node.us}x"
    node.ip("netns", "add", away)
    try:
        node.plug("mwd1", ("10.97.0.1", "fd97::1"), ("10.97.0.2", "fd97::2"))
        node.until(lambda: filtered(node, "mwd1"))
        node.ip("-n", node.us, "link", "set", "mwd1", "netns", away)
        with node.inside(away):
            index = socket.if_nametoindex("mwd1")
            node.until(lambda: not prog_query(index, AttachType.TCX_INGRESS))
        node.ip("-n", away, "link", "set", "mwd1", "netns", node.us)
        node.until(lambda: filtered(node, "mwd1"))
        node.ip("-n", node.us, "link", "delete", "mwd1")
    finally:
        node.ip("netns", "delete", away)


def test_a_bridge_is_filtered_instead_of_its_ports_and_others_frames_pass_it(node):
    """The port's own frames go to the bridge; what the bridge passes on is not this host's."""
    far = f"{node.us}y"
    node.ip("netns", "add", far)
    try:
        node.plug("mwd1", None, None)
        node.until(lambda: filtered(node, "mwd1"))
        node.ip("-n", node.us, "link", "add", "mwdbr", "type", "bridge")
        node.ip("-n", node.us, "link", "add", "mwv1", "type", "veth", "peer", "name", "mwv1", "netns", far)
        for port in ("mwd1", "mwv1"):
            node.ip("-n", node.us, "link", "set", port, "master", "mwdbr", "up")
        node.ip("-n", node.us, "addr", "add", "10.97.0.1/24", "dev", "mwdbr")
        node.ip("-n", node.us, "link", "set", "mwdbr", "up")
        for name, device, address in ((node.peer, "mwd1", "10.97.0.2"), (far, "mwv1", "10.97.0.3")):
            node.ip("-n", name, "addr", "add", f"{address}/24", "dev", device)
            node.ip("-n", name, "link", "set", device, "up")
        node.until(lambda: filtered(node, "mwdbr") and not filtered(node, "mwd1"))
        assert not delivered(node, CLOSED, "10.97.0.1", "10.97.0.2")
        assert delivered(node, OPEN, "10.97.0.1", "10.97.0.2")
        with node.bound(far, "10.97.0.3", CLOSED) as end, node.bound(node.peer, "10.97.0.2", 0) as mine:
            mine.sendto(b"x", ("10.97.0.3", CLOSED))
            assert node.received(end, 0.5) == [b"x"]
        node.ip("-n", node.us, "link", "set", "mwd1", "nomaster")
        node.until(lambda: filtered(node, "mwd1"))
    finally:
        node.ip("netns", "delete", far)
        for device in ("mwd1", "mwdbr"):
            node.ip("-n", node.us, "link", "delete", device)


def test_a_macvlan_is_left_to_the_device_below_which_judges_its_packets(node):
    node.ip(
        "-n",
        node.us,
        "link",
        "add",
        "link",
        node.device,
        "name",
        "mwdmac",
        "type",
        "macvlan",
        "mode",
        "bridge",
    )
    node.ip("-n", node.us, "addr", "add", "10.96.0.7/24", "dev", "mwdmac")
    node.ip("-n", node.us, "link", "set", "mwdmac", "up")
    time.sleep(0.2)
    assert not filtered(node, "mwdmac")
    assert not delivered(node, CLOSED, "10.96.0.7")
    assert delivered(node, OPEN, "10.96.0.7")
    node.ip("-n", node.us, "link", "delete", "mwdmac")


# Tampering


def detach_link(node, hook: str) -> None:
    link = obj_get(next((node.pins / "links").glob(f"{node.index()}-{hook}*")))
    link_detach(link)
    os.close(link)


def replace_program(node, hook: str) -> None:
    link = obj_get(node.pins / "links" / f"{node.index()}-{hook}")
    other = prog_load(ProgType.SCHED_CLS, "mwforeign", returns(0))
    link_update(link, other)
    os.close(link)
    os.close(other)


def remove_links(node) -> None:
    for path in (node.pins / "links").iterdir():
        path.unlink()


def remove_everything(node) -> None:
    shutil.rmtree(node.pins)


@pytest.mark.parametrize(
    ("what", "counted"),
    [
        (lambda node: detach_link(node, "ingress"), "ingress"),
        (lambda node: detach_link(node, "egress"), "egress"),
        (lambda node: detach_link(node, "xdp"), "xdp"),
        (lambda node: replace_program(node, "ingress"), "ingress"),
        (remove_links, "pin"),
        (remove_everything, "pin"),
    ],
    ids=["ingress detached", "egress detached", "XDP detached", "replaced", "links unpinned", "all unpinned"],
)
def test_what_others_take_away_is_back_within_a_second_and_told(
    node, what: Callable[..., None], counted: str
):
    before = tampered(node).get(counted, 0)
    assert attached(node)
    what(node)
    started = time.monotonic()
    node.until(lambda: attached(node), NOTICED_WITHIN_S + MARGIN_S)
    print(f"put back after {1000 * (time.monotonic() - started):.0f} ms")
    assert not delivered(node, CLOSED)
    assert delivered(node, OPEN)
    node.until(lambda: tampered(node).get(counted, 0) > before)
    assert "tampering: " in node.log()
    assert any(one["part"] == "tampering" for one in node.status()["warnings"])


def attached(node) -> bool:
    """Everything of ours in place, by the kernel's word."""
    try:
        with node.inside():
            found = attach.status(node.home / "bpf", node.index())
    except OSError:
        return False
    return (found.ingress, found.egress, found.xdp) == (True, True, "native")


def test_links_that_lose_their_pins_filter_on_until_they_have_them_back(node):
    with node.bound(node.us, node.node, CLOSED) as end, node.bound(node.peer, node.other, 0) as mine:
        remove_links(node)
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline:
            mine.sendto(b"x", end.getsockname())
            time.sleep(0.001)
        assert not node.received(end)
    assert attached(node)


def test_a_foreign_xdp_program_stays_and_ours_comes_back_when_it_goes(node):
    detach_link(node, "xdp")
    foreign = prog_load(ProgType.XDP, "mwforeign", returns(2))
    with node.inside():
        deadline = time.monotonic() + 5
        while True:  # who comes first; ours is back soon
            try:
                link = link_create(foreign, node.index(), AttachType.XDP, XDP_NATIVE)
                break
            except OSError:
                assert time.monotonic() < deadline
                detach_link(node, "xdp")
    node.until(lambda: "another program owns XDP" in how(node, node.device))
    assert not delivered(node, CLOSED)
    assert delivered(node, OPEN)
    os.close(link)
    os.close(foreign)
    node.until(lambda: attached(node), NOTICED_WITHIN_S + MARGIN_S)
    node.until(lambda: "XDP native" in how(node, node.device))


def test_a_program_in_front_of_ours_is_told(node):
    foreign = prog_load(ProgType.SCHED_CLS, "mwforeign", returns(-1))
    with node.inside():
        link = link_create(foreign, node.index(), AttachType.TCX_INGRESS, 1 << 3)
    node.until(lambda: "runs before ours" in how(node, node.device))
    os.close(link)
    os.close(foreign)
    node.until(lambda: "runs before ours" not in how(node, node.device))


@pytest.mark.slow
def test_looking_costs_an_idle_daemon_almost_nothing(node):
    """Printed, not judged: other work on the machine makes it worse."""
    before = cpu_s(node.daemon.pid)
    time.sleep(2)
    print(f"idle daemon: {100 * (cpu_s(node.daemon.pid) - before) / 2:.2f}% of a CPU")


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_metrics_count_tampering(node):
    assert 'meshwall_tampering_total{what="ingress"}' in node.get("/metrics")[1]

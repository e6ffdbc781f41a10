"""The loader and attach.py on real devices, in namespaces of their own, with real packets."""

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import select
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from bpf import attach, clsact, features, frames, layout, loader
from bpf.attach import XdpMode
from bpf.features import MissingFeatureError, instruction, returns
from bpf.layout import (
    CELLS,
    CONFIG,
    HITS,
    PEER,
    PORT_BLOCK,
    PORT_BLOCKS,
    PORT_COLUMNS,
    ROWS,
    BufferFlag,
    Reason,
)
from bpf.syscall import (
    XDP_NATIVE,
    AttachType,
    PinnedMap,
    ProgType,
    link_create,
    link_info,
    obj_get,
    prog_info,
    prog_load,
    prog_query,
)

pytestmark = pytest.mark.kernel

REPOSITORY = Path(__file__).parents[2]
SMALL = layout.sized(
    slots=1024,
    cells=1 << 14,
    rules=1024,
    ip4_blocks=512,
    hosts=1024,
    prefixes6=1024,
    conntrack=1024,
    fragments=256,
)
SIZES = json.dumps({name: getattr(SMALL, name) for name in SMALL.__dataclass_fields__})
US, PEER_ADDRESS = "192.0.2.1", "192.0.2.2"
US6, PEER6 = "2001:db8::1", "2001:db8::2"
DEVICE, PEER_DEVICE = "mwus", "mwpeer"
ALLOWED, DENIED = 7000, 7001
SIOCGIFHWADDR = 0x8927
SOL_PACKET, PACKET_VNET_HDR, VNET_HEADER = 263, 15, 10
TUNSETIFF, TUNSETLINK, IFF_TUN, ARPHRD_IEEE80211 = 0x400454CA, 0x400454CD, 1, 801
_libc = ctypes.CDLL(None, use_errno=True)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@contextlib.contextmanager
def inside(namespace: str) -> Iterator[None]:
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    there = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    try:
        assert _libc.setns(there, 0) == 0
        yield
    finally:
        _libc.setns(before, 0)
        os.close(there)
        os.close(before)


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


@dataclass(frozen=True)
class Cable:
    """Us and a peer, each in a namespace, with a veth pair between them, and a bpffs for our pins."""

    us: str
    peer: str
    pins: Path

    @property
    def ifindex(self) -> int:
        with inside(self.us):
            return socket.if_nametoindex(DEVICE)

    def load(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            "-m",
            "bpf.loader",
            "--pins",
            str(self.pins),
            "--sizes",
            SIZES,
            "--json",
            *words,
        ]
        return subprocess.run(
            ["nsenter", f"--net=/run/netns/{self.us}", *command],
            capture_output=True, text=True, check=check, cwd=REPOSITORY,
        )  # fmt: skip

    def plug(self) -> None:
        """The device that is filtered, at the end of a new cable."""
        ip(
            "-n",
            self.us,
            "link",
            "add",
            DEVICE,
            "type",
            "veth",
            "peer",
            "name",
            PEER_DEVICE,
            "netns",
            self.peer,
        )
        ip("-n", self.us, "addr", "add", f"{US}/24", "dev", DEVICE)
        ip("-n", self.peer, "addr", "add", f"{PEER_ADDRESS}/24", "dev", PEER_DEVICE)
        ip("-n", self.us, "link", "set", DEVICE, "up")
        ip("-n", self.peer, "link", "set", PEER_DEVICE, "up")

    def attach(self, mode: XdpMode) -> attach.Attachment:
        with inside(self.us):
            return attach.attach(self.pins, socket.if_nametoindex(DEVICE), mode)

    def map(self, name: str) -> PinnedMap:
        return PinnedMap.open(attach.home(self.pins) / "maps" / name, layout.maps(SMALL)[name])

    def allow_one_port(self) -> None:
        """Ingress policy for everybody: UDP and TCP to ALLOWED pass, all else is denied."""
        with self.map("port_class") as ports:
            for index in (layout.PORTS_UDP + ALLOWED, layout.PORTS_TCP + ALLOWED):
                columns = bytearray(PORT_COLUMNS.size)
                columns[index % PORT_BLOCK * 2] = 1
                ports.update(2 * PORT_BLOCKS + index // PORT_BLOCK, bytes(columns))
        with self.map("cells") as cells:
            cells.update(
                0, CELLS.pack(cell=(0).to_bytes(4, "little") + (1 << 28 | 16).to_bytes(4, sys.byteorder))
            )
        with self.map("class_of") as classes:
            classes.update(SMALL.slots + layout.SLOT_WORLD4, ROWS.pack())
            classes.update(SMALL.slots + layout.SLOT_WORLD6, ROWS.pack())
        with self.map("ip6_hosts") as hosts:
            hosts.update(socket.inet_pton(socket.AF_INET6, US6), PEER.pack(slot=layout.SLOT_HOST))
        with self.map("ip4_hosts") as hosts, self.map("ip4_blocks") as blocks:
            hosts.update(socket.inet_aton(US), PEER.pack(slot=layout.SLOT_HOST))
            root = bytearray(layout.BLOCK.size)
            root[0:4] = layout.ENTRY_HOSTS.to_bytes(4, sys.byteorder)
            blocks.update(192, bytes(root))
        with self.map("config") as config:
            values = dict(CONFIG.unpack(config.lookup(0) or b""))
            values |= {"generation": 1, "buffer_flags1": BufferFlag.ENFORCE_INGRESS}
            config.update(0, CONFIG.pack(**values))

    def counted(self, reason: Reason) -> int:
        with self.map("reasons") as reasons:
            return sum(int(str(HITS.unpack(raw)["packets"])) for raw in reasons.lookup_percpu(reason))

    def listen(self, port: int, address: str = US) -> socket.socket:
        with inside(self.us):
            server = socket.socket(family_of(address), socket.SOCK_DGRAM)
            server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
            server.bind((address, port))
        server.setblocking(False)
        return server

    def client(self, address: str = PEER_ADDRESS) -> socket.socket:
        with inside(self.peer):
            client = socket.socket(family_of(address), socket.SOCK_DGRAM)
            client.bind((address, 0))
        return client


def mac_of(device: str) -> bytes:
    with socket.socket() as handle:
        return fcntl.ioctl(handle, SIOCGIFHWADDR, struct.pack("16s24x", device.encode()))[18:24]


def waiting(server: socket.socket) -> int:
    """Datagrams that have arrived; the pause is for what is still on its way."""
    time.sleep(0.05)
    count = 0
    with contextlib.suppress(BlockingIOError):
        while server.recv(64):
            count += 1
    return count


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cable]:
    if os.geteuid():
        pytest.skip("needs root")
    made = Cable(f"mwldu{os.getpid()}", f"mwldp{os.getpid()}", tmp_path_factory.mktemp("bpffs") / "pins")
    made.pins.mkdir()
    try:
        for name in (made.us, made.peer):
            ip("netns", "add", name)
        made.plug()
        subprocess.run(["mount", "-t", "bpf", "bpf", made.pins], check=True)
        answer = json.loads(made.load().stdout)
        assert answer["maps"] == {"adopted": 0, "created": len(layout.maps())}
        made.allow_one_port()
        yield made
    finally:
        subprocess.run(["umount", "-l", made.pins], check=False)
        for name in (made.us, made.peer):
            subprocess.run(["ip", "netns", "del", name], check=False)


@pytest.fixture
def cable(loaded: Cable) -> Iterator[Cable]:
    """Programs are pinned, one port is open, nothing is attached."""
    yield loaded
    with inside(loaded.us):
        for index in attach.attached_devices(loaded.pins):
            attach.detach(loaded.pins, index)


@pytest.mark.parametrize("mode", [XdpMode.NATIVE, XdpMode.GENERIC, XdpMode.OFF])
def test_real_packets_are_filtered_and_each_is_judged_once(cable: Cable, mode: XdpMode) -> None:
    assert cable.attach(mode) == attach.Attachment(cable.ifindex, True, True, mode.value, "tcx")
    with cable.listen(ALLOWED) as allowed, cable.listen(DENIED) as denied, cable.client() as client:
        client.sendto(b"first", (US, ALLOWED))  # and the ARP before it
        assert waiting(allowed) == 1
        before = cable.counted(Reason.FORWARDED), cable.counted(Reason.POLICY_DEFAULT)
        for _ in range(20):
            client.sendto(b"x", (US, ALLOWED))
            client.sendto(b"x", (US, DENIED))
        assert (waiting(allowed), waiting(denied)) == (20, 0)
    after = cable.counted(Reason.FORWARDED), cable.counted(Reason.POLICY_DEFAULT)
    assert (after[0] - before[0], after[1] - before[1]) == (20, 20)


def test_a_second_run_adopts_the_maps_and_updates_the_links_in_place(cable: Cable) -> None:
    def link_ids() -> dict[str, int]:
        found = {}
        for path in (attach.home(cable.pins) / "links").iterdir():
            fd = obj_get(path)
            found[path.name] = link_info(fd).id
            os.close(fd)
        return found

    cable.attach(XdpMode.NATIVE)
    ids = link_ids()
    answer = json.loads(cable.load("--device", DEVICE).stdout)
    assert answer["maps"] == {"adopted": len(layout.maps()), "created": 0}
    assert answer["devices"][DEVICE]["xdp"] == "native"
    assert link_ids() == ids
    with inside(cable.us):
        assert attach.status(cable.pins, cable.ifindex).xdp == "native"
    with cable.listen(ALLOWED) as allowed, cable.listen(DENIED) as denied, cable.client() as client:
        client.sendto(b"x", (US, ALLOWED))
        client.sendto(b"x", (US, DENIED))
        assert (waiting(allowed), waiting(denied)) == (1, 0)


def test_programs_are_verified_again_only_when_they_or_their_maps_are_others(
    cable: Cable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def adopted() -> bool:
        answer = json.loads(cable.load().stdout)
        return bool(answer["programs_adopted"])

    monkeypatch.setenv("CACHE_DIRECTORY", str(tmp_path))
    assert not adopted()  # compiled for the first time
    assert adopted()
    home = attach.home(cable.pins)
    (home / "maps" / "fragments").unlink()
    assert not adopted()
    assert adopted()
    (home / "progs" / "xdp").unlink()
    (home / "progs" / "tcx_egress_l3").rename(home / "progs" / "xdp")
    assert not adopted()
    assert adopted()
    (home / "progs" / "tcx_egress").unlink()
    assert not adopted()


def test_swapping_programs_under_traffic_leaks_and_cuts_nothing(cable: Cable) -> None:
    cable.attach(XdpMode.NATIVE)
    index, sent = cable.ifindex, 0
    with cable.listen(ALLOWED) as allowed, cable.listen(DENIED) as denied, cable.client() as client:
        arrived = leaked = 0
        with inside(cable.us):
            for _ in range(50):
                for _ in range(20):
                    client.sendto(b"x", (US, DENIED))
                    client.sendto(b"x", (US, ALLOWED))
                    sent += 1
                attach.attach(cable.pins, index, XdpMode.NATIVE)
                for _ in range(20):
                    client.sendto(b"x", (US, DENIED))
                    client.sendto(b"x", (US, ALLOWED))
                    sent += 1
        arrived, leaked = waiting(allowed), waiting(denied)
    assert (arrived, leaked) == (sent, 0)


def test_a_foreign_xdp_program_stays_and_tcx_does_the_work_alone(cable: Cable) -> None:
    foreign = prog_load(ProgType.XDP, "foreign", returns(2))
    with inside(cable.us):
        link = link_create(foreign, cable.ifindex, AttachType.XDP, XDP_NATIVE)
    try:
        device = cable.attach(XdpMode.AUTO)
        assert (device.ingress, device.xdp) == (True, "off")
        assert "another program owns XDP" in device.note
        assert link_info(link).ifindex == cable.ifindex
        with cable.listen(DENIED) as denied, cable.client() as client:
            client.sendto(b"x", (US, DENIED))
            assert waiting(denied) == 0
    finally:
        os.close(link)
        os.close(foreign)


def test_programs_of_others_on_tcx_keep_running_after_our_accept(cable: Cable) -> None:
    cable.attach(XdpMode.OFF)
    foreign = prog_load(ProgType.SCHED_CLS, "foreign", returns(-1))
    with inside(cable.us):
        link = link_create(foreign, cable.ifindex, AttachType.TCX_INGRESS)
        assert len(prog_query(cable.ifindex, AttachType.TCX_INGRESS)) == 2
        attach.detach(cable.pins, cable.ifindex)
        assert len(prog_query(cable.ifindex, AttachType.TCX_INGRESS)) == 1
    os.close(link)
    os.close(foreign)


def set_mtu(cable: Cable, mtu: int) -> None:
    ip("-n", cable.us, "link", "set", DEVICE, "mtu", str(mtu))
    ip("-n", cable.peer, "link", "set", PEER_DEVICE, "mtu", str(mtu))


def test_a_program_that_accepts_everything_does_not_come_before_ours(cable: Cable) -> None:
    foreign = prog_load(ProgType.SCHED_CLS, "foreign", returns(0))
    with inside(cable.us):
        link = link_create(foreign, cable.ifindex, AttachType.TCX_INGRESS)
    cable.attach(XdpMode.OFF)
    with cable.listen(DENIED) as denied, cable.client() as client:
        client.sendto(b"x", (US, DENIED))
        assert waiting(denied) == 0
    os.close(link)
    os.close(foreign)


@pytest.mark.parametrize("mode", [XdpMode.NATIVE, XdpMode.OFF])
def test_ipv6_finds_its_neighbours_while_everything_else_is_denied(cable: Cable, mode: XdpMode) -> None:
    cable.attach(mode)
    addresses = ((cable.us, DEVICE, US6), (cable.peer, PEER_DEVICE, PEER6))
    for namespace, device, address in addresses:
        ip("-n", namespace, "addr", "add", f"{address}/64", "dev", device, "nodad")
    try:
        with (
            cable.listen(ALLOWED, US6) as allowed,
            cable.listen(DENIED, US6) as denied,
            cable.client(PEER6) as client,
        ):
            client.sendto(b"x", (US6, ALLOWED))
            client.sendto(b"x", (US6, DENIED))
            select.select([allowed], [], [], 2)  # finding the neighbour takes its time on a busy machine
            assert (waiting(allowed), waiting(denied)) == (1, 0)
    finally:
        for namespace, device, address in addresses:
            ip("-n", namespace, "addr", "del", f"{address}/64", "dev", device)


def test_the_host_hears_its_own_multicast(cable: Cable) -> None:
    cable.attach(XdpMode.NATIVE)
    looks_like_ipv6 = "134.221.0.1"  # without its link header, the copy has 86dd where an ethertype would be
    ip("-n", cable.us, "addr", "add", f"{looks_like_ipv6}/24", "dev", DEVICE)
    group = socket.inet_aton("239.1.2.3") + socket.inet_aton(looks_like_ipv6)
    try:
        with inside(cable.us):
            hearer = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            hearer.bind(("239.1.2.3", DENIED))
            hearer.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
            hearer.setblocking(False)
            speaker = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            speaker.bind((looks_like_ipv6, 0))
            speaker.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(looks_like_ipv6))
        with hearer, speaker:
            speaker.sendto(b"x", ("239.1.2.3", DENIED))
            assert waiting(hearer) == 1
    finally:
        ip("-n", cable.us, "addr", "del", f"{looks_like_ipv6}/24", "dev", DEVICE)


def test_a_device_with_another_link_header_is_refused_by_name(cable: Cable) -> None:
    if not Path("/dev/net/tun").exists():
        pytest.skip("this kernel has no tun devices")
    with inside(cable.us), Path("/dev/net/tun").open("r+b", buffering=0) as tun:
        fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", b"mwtun", IFF_TUN))
        fcntl.ioctl(tun, TUNSETLINK, ARPHRD_IEEE80211)
        with pytest.raises(OSError, match=r"device mwtun is neither Ethernet nor bare IP \(type 801\)"):
            attach.attach(cable.pins, socket.if_nametoindex("mwtun"), XdpMode.OFF)


def test_native_xdp_works_on_jumbo_frames(cable: Cable) -> None:
    set_mtu(cable, 9000)
    assert cable.attach(XdpMode.NATIVE).xdp == "native"
    with cable.listen(ALLOWED) as allowed, cable.listen(DENIED) as denied, cable.client() as client:
        client.sendto(bytes(8900), (US, ALLOWED))
        client.sendto(bytes(8900), (US, DENIED))
        assert (waiting(allowed), waiting(denied)) == (1, 0)
    set_mtu(cable, 1500)


def test_fragments_of_a_datagram_are_judged_by_its_ports(cable: Cable) -> None:
    cable.attach(XdpMode.NATIVE)
    with cable.listen(ALLOWED) as allowed, cable.listen(DENIED) as denied, cable.client() as client:
        client.sendto(bytes(8000), (US, ALLOWED))
        client.sendto(bytes(8000), (US, DENIED))
        assert (waiting(allowed), waiting(denied)) == (1, 0)
    assert cable.counted(Reason.FRAG_DENIED) >= 1


def raw_udp(cable: Cable, port: int, payload: bytes, *, tag: int | None = None, linear: bool = True) -> None:
    """Send a datagram as a frame; not linear: the receiver finds 14 bytes in the buffer's head, the rest in pages."""
    with inside(cable.us):
        mac = mac_of(DEVICE)
    frame = bytearray(
        frames.ip(
            PEER_ADDRESS,
            US,
            17,
            frames.udp_datagram(5000, port, payload),
            mac=mac,
            vlans=() if tag is None else (tag,),
        )
    )
    at = 14 if tag is None else 18
    total = sum(int.from_bytes(frame[at + word : at + word + 2], "big") for word in range(0, 20, 2))
    frame[at + 10 : at + 12] = (~((total & 0xFFFF) + (total >> 16)) & 0xFFFF).to_bytes(2, "big")
    with inside(cable.peer):
        wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        wire.bind((PEER_DEVICE, 0))
    with wire:
        if not linear:
            wire.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        wire.send((b"" if linear else bytes(VNET_HEADER)) + frame)


@pytest.mark.parametrize("mode", [XdpMode.NATIVE, XdpMode.GENERIC, XdpMode.OFF])
def test_a_priority_tag_does_not_carry_packets_past_policy(cable: Cable, mode: XdpMode) -> None:
    cable.attach(mode)
    with cable.listen(ALLOWED) as allowed, cable.listen(DENIED) as denied:
        raw_udp(cable, ALLOWED, b"x", tag=0)
        raw_udp(cable, DENIED, b"x", tag=0)
        assert (waiting(allowed), waiting(denied)) == (1, 0)


@pytest.mark.parametrize("mode", [XdpMode.NATIVE, XdpMode.OFF])
def test_headers_outside_the_head_of_the_buffer_are_fetched(cable: Cable, mode: XdpMode) -> None:
    set_mtu(cable, 9000)
    cable.attach(mode)
    with cable.listen(ALLOWED) as allowed, cable.listen(DENIED) as denied:
        raw_udp(cable, ALLOWED, bytes(6000), linear=False)
        raw_udp(cable, DENIED, bytes(6000), linear=False)
        assert (waiting(allowed), waiting(denied)) == (1, 0)
    set_mtu(cable, 1500)


@pytest.mark.parametrize("mode", [XdpMode.NATIVE, XdpMode.OFF])
def test_tcp_flows_both_ways_through_offloads(cable: Cable, mode: XdpMode) -> None:
    cable.attach(mode)
    for server_in, client_in, address in ((cable.us, cable.peer, US), (cable.peer, cable.us, PEER_ADDRESS)):
        with inside(server_in):
            server = socket.create_server((address, ALLOWED))
        with inside(client_in):
            client = socket.create_connection((address, ALLOWED), timeout=3)
        taken, _ = server.accept()
        with server, client, taken:
            for sender, receiver in ((client, taken), (taken, client)):
                sent = threading.Thread(target=sender.sendall, args=(bytes(4_000_000),))
                sent.start()
                left = 4_000_000
                receiver.settimeout(3)
                while left:
                    left -= len(receiver.recv(1 << 20))
                sent.join()


def test_a_denied_tcp_connection_is_never_accepted(cable: Cable) -> None:
    cable.attach(XdpMode.NATIVE)
    with inside(cable.us):
        server = socket.create_server((US, DENIED))
    with server, inside(cable.peer), pytest.raises(TimeoutError):
        socket.create_connection((US, DENIED), timeout=0.5)


def test_clsact_filters_give_the_same_verdicts(cable: Cable) -> None:
    progs = attach.home(cable.pins) / "progs"
    ingress, egress = obj_get(progs / "tcx_ingress"), obj_get(progs / "tcx_egress")
    with inside(cable.us):
        clsact.attach(cable.ifindex, ingress, egress)
        clsact.attach(cable.ifindex, ingress, egress)  # replaces itself
        assert clsact.status(cable.ifindex) == (prog_info(ingress).id, prog_info(egress).id)
    with cable.listen(ALLOWED) as allowed, cable.listen(DENIED) as denied, cable.client() as client:
        client.sendto(b"x", (US, ALLOWED))
        client.sendto(b"x", (US, DENIED))
        assert (waiting(allowed), waiting(denied)) == (1, 0)
        with inside(cable.us):
            clsact.detach(cable.ifindex)
            assert clsact.status(cable.ifindex) == (0, 0)
        client.sendto(b"x", (US, DENIED))
        assert waiting(denied) == 1
    os.close(ingress)
    os.close(egress)


def test_without_tcx_attach_falls_back_to_clsact_and_remembers_the_device(
    cable: Cable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attach, "has_tcx", lambda: False)
    assert cable.attach(XdpMode.NATIVE) == attach.Attachment(cable.ifindex, True, True, "native", "clsact")
    with inside(cable.us):
        assert attach.status(cable.pins, cable.ifindex).by == "clsact"
        assert attach.attached_devices(cable.pins) == [cable.ifindex]
    with cable.listen(ALLOWED) as allowed, cable.listen(DENIED) as denied, cable.client() as client:
        client.sendto(b"x", (US, ALLOWED))
        client.sendto(b"x", (US, DENIED))
        assert (waiting(allowed), waiting(denied)) == (1, 0)
    with inside(cable.us):
        attach.detach(cable.pins, cable.ifindex)
        assert clsact.status(cable.ifindex) == (0, 0)
        assert clsact.status(9_999) == (0, 0)
        assert attach.attached_devices(cable.pins) == []


def test_a_device_that_comes_back_under_its_old_index_gets_new_links(cable: Cable) -> None:
    cable.attach(XdpMode.NATIVE)
    index = cable.ifindex
    ip("-n", cable.us, "link", "del", DEVICE)
    with inside(cable.us):
        assert attach.attached_devices(cable.pins) == [index]
        assert not attach.status(cable.pins, index).ingress
    ip(
        "-n",
        cable.us,
        "link",
        "add",
        "mwagain",
        "index",
        str(index),
        "type",
        "veth",
        "peer",
        "name",
        "mwother",
    )
    with inside(cable.us):
        assert attach.attach(cable.pins, index, XdpMode.NATIVE).xdp == "native"
        assert attach.status(cable.pins, index) == attach.Attachment(index, True, True, "native", "tcx")
        attach.detach(cable.pins, index)
        assert attach.attached_devices(cable.pins) == []
    ip("-n", cable.us, "link", "del", "mwother")
    cable.plug()


def test_wrong_input_is_one_clear_line_and_changes_nothing(cable: Cable) -> None:
    failed = cable.load("--device", "nosuch0", check=False)
    assert failed.returncode == 1
    assert failed.stderr.strip() == f"bpf loader: no network device nosuch0; this namespace has lo, {DEVICE}"
    cable.attach(XdpMode.NATIVE)
    other = json.dumps({**json.loads(SIZES), "hosts": 99})
    failed = cable.load("--sizes", other, "--device", DEVICE, check=False)
    assert failed.returncode == 1
    assert failed.stderr.count("\n") == 1
    assert "ip4_hosts: max_entries 1024, expected 99" in failed.stderr
    with inside(cable.us):
        assert attach.status(cable.pins, cable.ifindex).ingress
    assert "hosts, values whole numbers" not in cable.load("--sizes", '{"host": 1}', check=False).stdout


@pytest.mark.parametrize(
    "broken", [instruction(0x95), returns(1)], ids=["refused by the verifier", "drops everything"]
)
def test_programs_that_fail_leave_the_old_ones_in_charge(
    cable: Cable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, broken: bytes
) -> None:
    cable.attach(XdpMode.NATIVE)
    monkeypatch.setenv("CACHE_DIRECTORY", str(tmp_path))
    monkeypatch.setattr(loader, "compile_programs", lambda text: dict.fromkeys(loader.PROGRAMS, broken))
    with inside(cable.us), pytest.raises((OSError, loader.LoaderError)):
        loader.load(cable.pins, [DEVICE], XdpMode.NATIVE, SMALL)
    with inside(cable.us):
        assert attach.status(cable.pins, cable.ifindex).xdp == "native"
    with cable.listen(ALLOWED) as allowed, cable.listen(DENIED) as denied, cable.client() as client:
        client.sendto(b"x", (US, ALLOWED))
        client.sendto(b"x", (US, DENIED))
        assert (waiting(allowed), waiting(denied)) == (1, 0)


def test_the_loader_does_not_touch_the_generation(cable: Cable) -> None:
    with cable.map("config") as config:
        before = config.lookup(0)
        loader.prepare_config(config, hz=int(str(CONFIG.unpack(before or b"")["hz"])))
        assert config.lookup(0) == before


def test_without_privileges_the_loader_names_what_it_needs(tmp_path: Path) -> None:
    if os.geteuid() or shutil.which("setpriv") is None:
        pytest.skip("needs root and setpriv")
    dropped = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all", "--no-new-privs"]
    command = [*dropped, sys.executable, "-m", "bpf.loader", "--pins", str(tmp_path)]
    failed = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert failed.returncode == 1
    assert failed.stderr.strip() == (
        "bpf loader: loading BPF programs needs root, or CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON"
    )


def test_a_missing_kernel_feature_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid():
        pytest.skip("needs root")
    real = PinnedMap.create

    def without_ring_buffers(spec: layout.Map, path: Path | None = None) -> PinnedMap:
        if spec.kind is layout.MapKind.RINGBUF:
            raise OSError(errno.EINVAL, "BPF_MAP_CREATE p: Invalid argument")
        return real(spec, path)

    monkeypatch.setattr(features.PinnedMap, "create", without_ring_buffers)
    with pytest.raises(MissingFeatureError, match=r"no BPF ring buffers \(Linux 5.8 or later has\)"):
        features.probe()


def test_a_program_that_the_verifier_refuses_is_reported_with_its_last_lines() -> None:
    if os.geteuid():
        pytest.skip("needs root")
    with pytest.raises(OSError, match=r"BPF_PROG_LOAD broken: .*\n(.*\n)*.*R0"):
        prog_load(ProgType.XDP, "broken", instruction(0x95))

"""The loaded programs by BPF_PROG_TEST_RUN: verdicts, connections, fragments, counters and events."""

import os
import struct
import time
from collections.abc import Iterator

import pytest

from bpf import features, frames
from bpf.frames import ACK, FIN, RST, SYN
from bpf.layout import (
    CONFIG,
    CT4_KEY,
    CT_ENTRY,
    CT_ORIGIN_OUT,
    PORTS_ICMP4,
    PORTS_PROTOCOL,
    PORTS_TCP,
    PORTS_UDP,
    RULE_FAILSAFE,
    SLOT_HOST,
    SLOT_WORLD4,
    BufferFlag,
    CellFlag,
    CellVerdict,
    ConfigFlag,
    EventKind,
    Hook,
    PacketClass,
    Panic,
    Reason,
)
from bpf.model import Direction, Policy
from bpf.run import Rig
from bpf.syscall import prog_test_run

pytestmark = pytest.mark.kernel

US, US6 = "192.0.2.1", "2001:db8:a::1"
FRIEND, FRIEND6 = "198.51.100.7", "2001:db8:b::7"
STRANGER, STRANGER6 = "203.0.113.9", "2001:db8:c::9"
KUBELET = 10250
ALLOW = CellVerdict.ALLOW << 28 | 16
DENY = CellVerdict.DENY << 28 | 17
INGRESS_HOOKS = [Hook.XDP, Hook.TCX_INGRESS]
FRIENDS = 5
FAMILIES = [(US, FRIEND, STRANGER), (US6, FRIEND6, STRANGER6)]


def raw(address: str) -> bytes:
    import ipaddress

    return ipaddress.ip_address(address).packed


ADDRESSES = {raw(US): SLOT_HOST, raw(US6): SLOT_HOST, raw(FRIEND): FRIENDS, raw(FRIEND6): FRIENDS}
ONLY_KUBELET = Policy(
    ADDRESSES,
    rows={
        (Direction.INGRESS, FRIENDS): (
            (KUBELET, KUBELET, ALLOW),
            (80, 80, DENY),
            (PORTS_UDP + 53, PORTS_UDP + 53, ALLOW),
        )
    },
    default={Direction.EGRESS: ALLOW},
    enforced=BufferFlag.ENFORCE_INGRESS,
)
SENDS_NOTHING = Policy(
    ADDRESSES,
    rows={(Direction.EGRESS, FRIENDS): ((443, 443, ALLOW),)},
    default={Direction.INGRESS: ALLOW},
)


@pytest.fixture(scope="module")
def loaded() -> Iterator[Rig]:
    if os.geteuid():
        pytest.skip("loading BPF needs root")
    with Rig() as rig:
        yield rig


@pytest.fixture
def rig(loaded: Rig) -> Rig:
    loaded.forget()
    loaded.install(ONLY_KUBELET)
    loaded.events()
    return loaded


@pytest.mark.parametrize("hook", INGRESS_HOOKS)
@pytest.mark.parametrize(("us", "friend", "stranger"), FAMILIES)
def test_only_a_friend_reaches_the_kubelet(rig: Rig, hook: Hook, us: str, friend: str, stranger: str) -> None:
    assert rig.run(hook, frames.tcp(friend, us, 40000, KUBELET)).passes
    assert not rig.run(hook, frames.tcp(stranger, us, 40000, KUBELET)).passes
    assert not rig.run(hook, frames.tcp(friend, us, 40000, KUBELET + 1)).passes
    assert not rig.run(hook, frames.udp(friend, us, 40000, KUBELET)).passes


@pytest.mark.parametrize("hook", INGRESS_HOOKS)
def test_a_prefix_gives_its_slot_to_addresses_and_a_longer_one_takes_them_back(rig: Rig, hook: Hook) -> None:
    prefixes = {
        (raw("10.0.0.0"), 8): FRIENDS,
        (raw("10.1.0.0"), 16): 0,
        (raw("10.1.2.0"), 24): FRIENDS,
        (raw("10.1.2.128"), 25): 0,
        (raw("2001:db8::"), 32): FRIENDS,
        (raw("2001:db8:0:1::"), 64): 2,
        (raw("2001:db8:0:2::"), 64): 2,
        (raw("2001:db8:0:2:1::"), 80): FRIENDS,
    }
    rig.install(Policy(ADDRESSES, prefixes, ONLY_KUBELET.rows, enforced=BufferFlag.ENFORCE_INGRESS))

    def reaches(address: str) -> bool:
        return rig.run(hook, frames.tcp(address, US if "." in address else US6, 1, KUBELET)).passes

    assert [reaches(f"10.{rest}") for rest in ("9.9.9", "1.9.9", "1.2.9", "1.2.200")] == [
        True,
        False,
        True,
        False,
    ]
    assert [reaches(f"2001:db8:0:{rest}") for rest in ("7::1", "1::1", "2::1", "2:1::1")] == [
        True,
        False,
        False,
        True,
    ]


def test_prefixes_of_other_lengths_than_64_work_alone(rig: Rig) -> None:
    prefixes = {(raw("2001:db8:77::"), 48): FRIENDS}
    rig.install(Policy(ADDRESSES, prefixes, ONLY_KUBELET.rows, enforced=BufferFlag.ENFORCE_INGRESS))
    assert rig.run(Hook.XDP, frames.tcp("2001:db8:77:5::1", US6, 1, KUBELET)).passes


@pytest.mark.parametrize("hook", INGRESS_HOOKS)
def test_reserved_addresses_as_source_are_dropped_whatever_policy_says(rig: Rig, hook: Hook) -> None:
    rig.install(Policy(ADDRESSES, default={Direction.INGRESS: ALLOW}, enforced=BufferFlag.ENFORCE_INGRESS))
    for source in ("127.0.0.1", "0.0.0.1", "224.0.0.1", "255.255.255.255", US):
        assert not rig.run(hook, frames.udp(source, US, 1, 2)).passes, source
    for source in ("::1", "::", "ff02::1", "::ffff:10.0.0.1", US6):
        assert not rig.run(hook, frames.udp(source, US6, 1, 2)).passes, source
    assert rig.run(hook, frames.udp("240.0.0.1", US, 1, 2)).passes


@pytest.mark.parametrize("hook", INGRESS_HOOKS)
@pytest.mark.parametrize(("us", "friend", "stranger"), FAMILIES)
def test_traffic_that_is_only_forwarded_passes(
    rig: Rig, hook: Hook, us: str, friend: str, stranger: str
) -> None:
    elsewhere = "10.9.9.9" if "." in us else "2001:db8:9::9"
    assert rig.run(hook, frames.tcp(stranger, elsewhere, 40000, KUBELET)).passes
    multicast = "224.0.0.251" if "." in us else "ff02::fb"
    assert not rig.run(hook, frames.udp(stranger, multicast, 5353, 5353)).passes
    in_a_broadcast_frame = frames.ip(stranger, elsewhere, 17, frames.udp_datagram(1, 2), mac=frames.TO_ALL)
    assert not rig.run(hook, in_a_broadcast_frame).passes


@pytest.mark.parametrize("hook", INGRESS_HOOKS)
@pytest.mark.parametrize(("us", "friend", "stranger"), FAMILIES)
def test_answers_to_what_we_opened_pass_and_nothing_else_does(
    rig: Rig, hook: Hook, us: str, friend: str, stranger: str
) -> None:
    assert not rig.run(hook, frames.tcp(stranger, us, 443, 50000, SYN | ACK)).passes
    assert rig.run(Hook.TCX_EGRESS, frames.tcp(us, stranger, 50000, 443)).passes
    assert rig.run(hook, frames.tcp(stranger, us, 443, 50000, SYN | ACK)).passes
    assert rig.run(hook, frames.tcp(stranger, us, 443, 50000, ACK)).passes
    assert not rig.run(hook, frames.tcp(stranger, us, 443, 50000, SYN)).passes
    assert not rig.run(hook, frames.tcp(stranger, us, 444, 50000, ACK)).passes
    assert not rig.run(hook, frames.udp(stranger, us, 443, 50000)).passes


@pytest.mark.parametrize("hook", INGRESS_HOOKS)
@pytest.mark.parametrize(("us", "friend", "stranger"), FAMILIES)
def test_udp_answers_and_echo_replies_pass(rig: Rig, hook: Hook, us: str, friend: str, stranger: str) -> None:
    request, reply = (8, 0) if "." in us else (128, 129)
    rig.run(Hook.TCX_EGRESS, frames.udp(us, stranger, 50000, 53))
    rig.run(Hook.TCX_EGRESS, frames.icmp(us, stranger, request, identifier=77))
    assert rig.run(hook, frames.udp(stranger, us, 53, 50000)).passes
    assert rig.run(hook, frames.icmp(stranger, us, reply, identifier=77)).passes
    assert not rig.run(hook, frames.icmp(stranger, us, reply, identifier=78)).passes
    assert not rig.run(hook, frames.icmp(stranger, us, request, identifier=77)).passes


def test_a_rule_that_goes_away_cuts_the_connection_it_let_in(rig: Rig) -> None:
    assert rig.run(Hook.TCX_INGRESS, frames.tcp(FRIEND, US, 40000, KUBELET)).passes
    rig.run(Hook.TCX_EGRESS, frames.tcp(US, FRIEND, KUBELET, 40000, SYN | ACK))
    rig.run(Hook.TCX_EGRESS, frames.udp(US, FRIEND, 53, 40000))  # the answer to an allowed question
    rig.install(Policy(ADDRESSES, enforced=BufferFlag.ENFORCE_INGRESS))
    assert not rig.run(Hook.TCX_INGRESS, frames.tcp(FRIEND, US, 40000, KUBELET, ACK)).passes
    assert not rig.run(Hook.TCX_INGRESS, frames.udp(FRIEND, US, 40000, 53)).passes


def test_our_answers_do_not_reopen_what_a_rule_has_closed(rig: Rig) -> None:
    question, answer = frames.udp(FRIEND, US, 40000, 53), frames.udp(US, FRIEND, 53, 40000)
    lets_in = {(Direction.INGRESS, FRIENDS): ((PORTS_UDP + 53, PORTS_UDP + 53, ALLOW),)}
    rig.install(Policy(ADDRESSES, rows=lets_in))
    assert rig.run(Hook.TCX_INGRESS, question).passes
    assert rig.run(Hook.TCX_EGRESS, answer).passes
    rig.install(Policy(ADDRESSES, default={Direction.EGRESS: ALLOW}))
    assert rig.run(Hook.TCX_EGRESS, answer).passes
    assert not rig.run(Hook.TCX_INGRESS, question).passes


def test_denied_packets_leave_no_state_behind(rig: Rig) -> None:
    for port in range(100):
        rig.run(Hook.TCX_INGRESS, frames.tcp(STRANGER, US, port, 22))
        rig.run(Hook.XDP, frames.udp(STRANGER, US, port, 22))
    assert states(rig) == (0, 0)


@pytest.mark.parametrize(("us", "friend", "stranger"), FAMILIES)
def test_under_egress_policy_we_answer_whom_we_let_in(rig: Rig, us: str, friend: str, stranger: str) -> None:
    rig.install(SENDS_NOTHING)
    assert not rig.run(Hook.TCX_EGRESS, frames.tcp(us, stranger, 22, 40000, SYN | ACK)).passes
    assert rig.run(Hook.TCX_INGRESS, frames.tcp(stranger, us, 40000, 22)).passes
    assert rig.run(Hook.TCX_EGRESS, frames.tcp(us, stranger, 22, 40000, SYN | ACK)).passes
    assert not rig.run(Hook.TCX_EGRESS, frames.tcp(us, stranger, 22, 40000, SYN)).passes
    assert rig.run(Hook.TCX_EGRESS, frames.tcp(us, friend, 50000, 443)).passes


def test_forwarded_connections_take_no_room_among_ours(rig: Rig) -> None:
    rig.install(SENDS_NOTHING)
    passing_by = frames.tcp(STRANGER, "10.9.9.9", 40000, 22)
    assert rig.run(Hook.TCX_INGRESS, passing_by).passes
    assert rig.run(Hook.XDP, passing_by).marked
    assert states(rig) == (0, 0)


def test_xdp_leaves_the_first_packet_of_a_connection_to_the_hook_that_keeps_its_state(rig: Rig) -> None:
    rig.install(SENDS_NOTHING)
    opening = frames.tcp(STRANGER, US, 40000, 22)
    assert not rig.run(Hook.XDP, opening).marked
    rig.run(Hook.TCX_INGRESS, opening)
    assert rig.run(Hook.XDP, frames.tcp(STRANGER, US, 40000, 22, ACK)).marked


def test_a_frame_for_another_mac_address_makes_no_state(rig: Rig) -> None:
    rig.install(SENDS_NOTHING)
    rig.run(Hook.TCX_INGRESS, frames.ip(STRANGER, US, 6, frames.tcp_segment(1, 22), mac=b"\x02\0\0\0\0\x09"))
    assert states(rig) == (0, 0)


def test_what_we_forward_passes_and_masqueraded_connections_get_their_answers(rig: Rig) -> None:
    pod = "10.244.0.9"
    assert rig.run(Hook.TCX_EGRESS, frames.tcp(pod, STRANGER, 50001, 443), forwarded=True).passes
    assert states(rig) == (0, 0)
    assert rig.run(Hook.TCX_EGRESS, frames.tcp(US, STRANGER, 50001, 443), forwarded=True).passes
    assert rig.run(Hook.XDP, frames.tcp(STRANGER, US, 443, 50001, SYN | ACK)).passes


@pytest.mark.parametrize("hook", INGRESS_HOOKS)
@pytest.mark.parametrize(("us", "friend", "stranger"), FAMILIES)
def test_icmp_errors_pass_only_about_what_we_sent(
    rig: Rig, hook: Hook, us: str, friend: str, stranger: str
) -> None:
    kind, code = (3, 1) if "." in us else (1, 0)
    ours = frames.tcp(us, friend, 50000, 443, ACK)
    assert not rig.run(hook, frames.icmp_error(stranger, us, kind, code, ours)).passes
    rig.run(Hook.TCX_EGRESS, frames.tcp(us, friend, 50000, 443))
    assert rig.run(hook, frames.icmp_error(stranger, us, kind, code, ours)).passes
    theirs = frames.tcp(friend, us, 443, 50000, ACK)
    assert not rig.run(hook, frames.icmp_error(stranger, us, kind, code, theirs)).passes


def test_an_icmp_error_about_a_later_fragment_names_no_ports(rig: Rig) -> None:
    ours = frames.tcp(US, FRIEND, 50000, 443)
    rig.run(Hook.TCX_EGRESS, ours)
    later = frames.ip(US, FRIEND, 6, frames.tcp_segment(50000, 443), identification=1, fragment=64)
    assert rig.run(Hook.XDP, frames.icmp_error(STRANGER, US, 3, 1, ours)).passes
    assert not rig.run(Hook.XDP, frames.icmp_error(STRANGER, US, 3, 1, later)).passes


def test_an_icmp_error_must_go_to_the_address_that_the_quoted_packet_came_from(rig: Rig) -> None:
    second = "192.0.2.3"
    rig.install(Policy({**ADDRESSES, raw(second): SLOT_HOST}, default={Direction.EGRESS: ALLOW}))
    ours = frames.tcp(second, FRIEND, 50000, 443)
    rig.run(Hook.TCX_EGRESS, ours)
    assert rig.run(Hook.XDP, frames.icmp_error(STRANGER, second, 3, 1, ours)).passes
    assert not rig.run(Hook.XDP, frames.icmp_error(STRANGER, US, 3, 1, ours)).passes


@pytest.mark.parametrize(("us", "friend", "stranger"), FAMILIES)
def test_an_icmp_error_passes_where_the_answer_would(rig: Rig, us: str, friend: str, stranger: str) -> None:
    kind, code = (3, 3) if "." in us else (1, 4)
    ours = frames.udp(us, friend, 53, 40000)  # friends may send to port 53, so this made no entry
    rig.run(Hook.TCX_EGRESS, ours)
    assert rig.run(Hook.XDP, frames.icmp_error(friend, us, kind, code, ours)).passes
    assert not rig.run(
        Hook.XDP, frames.icmp_error(friend, us, kind, code, frames.udp(us, friend, 54, 1))
    ).passes
    assert not rig.run(
        Hook.XDP, frames.icmp_error(friend, us, kind, code, frames.udp(us, stranger, 53, 1))
    ).passes


@pytest.mark.parametrize("hook", INGRESS_HOOKS)
@pytest.mark.parametrize(("us", "friend", "stranger"), FAMILIES)
def test_packet_too_big_arrives_for_connections_that_policy_lets_in(
    rig: Rig, hook: Hook, us: str, friend: str, stranger: str
) -> None:
    kind, code = (3, 4) if "." in us else (2, 0)
    answer = frames.tcp(us, friend, KUBELET, 40000, ACK)
    other = frames.tcp(us, friend, 22, 40000, ACK)
    assert rig.run(hook, frames.icmp_error(stranger, us, kind, code, answer)).passes
    assert not rig.run(hook, frames.icmp_error(stranger, us, kind, code, other)).passes


@pytest.mark.parametrize("hook", INGRESS_HOOKS)
@pytest.mark.parametrize(("us", "friend", "stranger"), FAMILIES)
def test_later_fragments_share_the_fate_of_the_first(
    rig: Rig, hook: Hook, us: str, friend: str, stranger: str
) -> None:
    def fragments(dport: int, identification: int) -> list[bytes]:
        head = frames.udp_datagram(40000, dport, bytes(56))
        first = frames.ip(friend, us, 17, head, identification=identification, fragment=1)
        return [
            first,
            frames.ip(friend, us, 17, b"\x27\x0a" * 32, identification=identification, fragment=64),
        ]

    assert [rig.run(hook, frame).passes for frame in fragments(53, 1)] == [True, True]
    assert [rig.run(hook, frame).passes for frame in fragments(54, 2)] == [False, False]
    assert not rig.run(hook, fragments(53, 3)[1]).passes
    assert not rig.run(hook, fragments(53, 2)[0]).passes, "one denied first fragment denies the datagram"
    rig.run(hook, fragments(54, 1)[0])
    assert not rig.run(hook, fragments(53, 1)[1]).passes


def test_denied_first_fragments_cannot_push_out_allowed_ones(rig: Rig) -> None:
    first = frames.ip(FRIEND, US, 17, frames.udp_datagram(1, 53, bytes(56)), identification=1, fragment=1)
    rest = frames.ip(FRIEND, US, 17, bytes(64), identification=1, fragment=64)
    rig.run(Hook.XDP, first)
    denied = frames.udp_datagram(1, 54, bytes(56))
    for number in range(12_000):
        frame = frames.ip(f"203.0.{number >> 8}.{number & 255}", US, 17, denied, identification=7, fragment=1)
        rig.run(Hook.XDP, frame)
    assert rig.run(Hook.XDP, rest).passes


@pytest.mark.parametrize("hook", INGRESS_HOOKS)
def test_vlan_tags_do_not_hide_a_packet_from_policy(rig: Rig, hook: Hook) -> None:
    for vlans in ((0,), (5,), (5, 6)):
        allowed = frames.ip(FRIEND, US, 6, frames.tcp_segment(1, KUBELET), vlans=vlans)
        denied = frames.ip(STRANGER, US, 6, frames.tcp_segment(1, KUBELET), vlans=vlans)
        assert (rig.run(hook, allowed).passes, rig.run(hook, denied).passes) == (True, False), vlans
    assert not rig.run(hook, frames.ip(FRIEND, US, 6, frames.tcp_segment(1, KUBELET), vlans=(5, 6, 7))).passes


@pytest.mark.parametrize("hook", INGRESS_HOOKS)
@pytest.mark.parametrize("count", [1, 8, 9])
def test_eight_extension_headers_are_walked_and_a_ninth_is_refused(rig: Rig, hook: Hook, count: int) -> None:
    chain = b"".join(bytes([60, 0]) + bytes(6) for _ in range(count - 1)) + bytes([6, 0]) + bytes(6)
    allowed = frames.ip(FRIEND6, US6, 60, chain + frames.tcp_segment(1, KUBELET))
    denied = frames.ip(FRIEND6, US6, 60, chain + frames.tcp_segment(1, 22))
    assert (rig.run(hook, allowed).passes, rig.run(hook, denied).passes) == (count <= 8, False)


@pytest.mark.parametrize("hook", INGRESS_HOOKS)
def test_options_do_not_shift_the_ports_that_policy_sees(rig: Rig, hook: Hook) -> None:
    looks_allowed = struct.pack(">HH", 1, KUBELET) * 2
    head = struct.pack(">BBHHHBBH", 0x47, 0, 48, 0, 0, 64, 6, 0) + raw(FRIEND) + raw(US)
    assert not rig.run(hook, frames.ethernet(head + looks_allowed + frames.tcp_segment(1, 22), 0x0800)).passes
    assert rig.run(
        hook, frames.ethernet(head + looks_allowed + frames.tcp_segment(1, KUBELET), 0x0800)
    ).passes


@pytest.mark.parametrize("hook", INGRESS_HOOKS)
@pytest.mark.parametrize("option", [131, 137])
def test_a_sender_may_not_choose_the_route(rig: Rig, hook: Hook, option: int) -> None:
    route = bytes([1, option, 7, 4]) + raw(STRANGER)
    head = struct.pack(">BBHHHBBH", 0x47, 0, 48, 0, 0, 64, 6, 0) + raw(FRIEND) + raw(US)
    outcome = rig.run(hook, frames.ethernet(head + route + frames.tcp_segment(1, KUBELET), 0x0800))
    assert not outcome.passes


def test_protocols_without_ports_and_icmp_types_have_their_own_columns(rig: Rig) -> None:
    vrrp, echo = PORTS_PROTOCOL + 112, PORTS_ICMP4 + 8
    rows = {(Direction.INGRESS, FRIENDS): ((vrrp, vrrp, ALLOW), (echo, echo, ALLOW))}
    rig.install(Policy(ADDRESSES, rows=rows, enforced=BufferFlag.ENFORCE_INGRESS))
    assert rig.run(Hook.XDP, frames.ip(FRIEND, US, 112, bytes(8))).passes
    assert not rig.run(Hook.XDP, frames.ip(FRIEND, US, 47, bytes(8))).passes
    assert rig.run(Hook.XDP, frames.icmp(FRIEND, US, 8)).passes
    assert not rig.run(Hook.XDP, frames.icmp(FRIEND, US, 13)).passes


@pytest.mark.parametrize("hook", list(Hook))
def test_audit_mode_drops_nothing_and_tells_what_it_would_have_dropped(rig: Rig, hook: Hook) -> None:
    rig.install(Policy(ADDRESSES, enforced=BufferFlag(7)))
    outgoing = hook is Hook.TCX_EGRESS
    denied = frames.tcp(US, STRANGER, 1, 2) if outgoing else frames.tcp(STRANGER, US, 1, 2)
    assert rig.run(hook, denied).passes
    assert rig.run(hook, denied[:40]).passes
    told = [(event["kind"], event["reason"]) for event in rig.events()]
    assert told == [(EventKind.AUDIT, Reason.POLICY_DEFAULT), (EventKind.AUDIT, Reason.BAD_TOTLEN)]


def test_one_policy_in_audit_mode_lets_only_its_own_denials_through(rig: Rig) -> None:
    audited = CellFlag.AUDIT << 24 | DENY
    rows = {(Direction.INGRESS, FRIENDS): ((22, 22, audited), (23, 23, DENY))}
    rig.install(Policy(ADDRESSES, rows=rows, enforced=BufferFlag.ENFORCE_INGRESS))
    assert rig.run(Hook.XDP, frames.tcp(FRIEND, US, 1, 22)).passes
    assert not rig.run(Hook.XDP, frames.tcp(FRIEND, US, 1, 23)).passes


@pytest.mark.parametrize("hook", list(Hook))
def test_nothing_is_dropped_without_policy_or_when_opened(rig: Rig, hook: Hook) -> None:
    denied = frames.tcp(STRANGER, US, 1, 2)
    rig.install(Policy(ADDRESSES, panic=Panic.OPEN))
    assert rig.run(hook, denied).passes
    rig.install(Policy(ADDRESSES, enforced=BufferFlag(0)))
    assert rig.run(hook, denied).passes
    assert rig.run(hook, denied[:40]).passes


@pytest.mark.parametrize("hook", list(Hook))
def test_in_a_failsafe_panic_only_cells_of_the_failsafe_list_pass_whatever_is_enforced(
    rig: Rig, hook: Hook
) -> None:
    outgoing = hook is Hook.TCX_EGRESS
    side = Direction.EGRESS if outgoing else Direction.INGRESS
    rows = {
        (side, SLOT_WORLD4): (
            (22, 22, CellVerdict.ALLOW << 28 | RULE_FAILSAFE),
            (80, 80, ALLOW),
            (81, 81, CellFlag.AUDIT << 24),
        )
    }

    def passes(port: int) -> bool:
        source, target = (US, STRANGER) if outgoing else (STRANGER, US)
        return rig.run(hook, frames.tcp(source, target, 1, port)).passes

    for enforced in (BufferFlag(0), BufferFlag(3), BufferFlag(7)):
        rig.install(Policy(ADDRESSES, rows=rows, enforced=enforced, panic=Panic.FAILSAFE))
        assert [passes(port) for port in (22, 80, 81, 82)] == [True, False, False, False]


def test_a_panic_ends_by_itself_when_its_time_has_come(rig: Rig) -> None:
    denied = frames.tcp(STRANGER, US, 1, 2)
    rig.install(Policy(ADDRESSES, panic=Panic.OPEN))
    config = rig.maps["config"]
    values = CONFIG.unpack(config.lookup(0) or b"")
    ticks = features.Ticks()
    now = ticks.now64(rig.hz)
    ticks.close()
    config.update(0, CONFIG.pack(**values | {"panic_until": now + rig.hz // 2}))
    assert rig.run(Hook.XDP, denied).passes
    time.sleep(0.7)
    assert not rig.run(Hook.XDP, denied).passes


def test_the_generation_decides_between_two_complete_policies(rig: Rig) -> None:
    packet = frames.tcp(FRIEND, US, 1, KUBELET)
    config = rig.maps["config"]
    rig.install(ONLY_KUBELET)
    allowing = config.lookup(0)
    rig.install(Policy(ADDRESSES, enforced=BufferFlag.ENFORCE_INGRESS))
    denying = config.lookup(0)
    assert allowing is not None
    assert denying is not None
    assert not rig.run(Hook.XDP, packet).passes
    config.update(0, allowing)
    assert rig.run(Hook.XDP, packet).passes


def test_an_event_tells_everything_about_a_drop(rig: Rig) -> None:
    rig.run(Hook.XDP, frames.tcp(FRIEND6, US6, 40000, 80))
    (event,) = rig.events()
    assert event["saddr"] == raw(FRIEND6)
    assert event["daddr"] == raw(US6)
    wanted = {
        "sport_be": struct.pack(">H", 40000),
        "dport_be": struct.pack(">H", 80),
        "kind": EventKind.DROP,
        "reason": Reason.POLICY_DENY,
        "direction": Direction.INGRESS,
        "hook": Hook.XDP,
        "family": 6,
        "proto": 6,
        "tcp_flags": SYN,
        "verdict": CellVerdict.DENY,
        "identity": 1_000 + FRIENDS,
        "rule": 17,
        "length": 74,
        "packet_class": PacketClass.TCP,
    }
    assert {name: event[name] for name in wanted} == wanted


def test_rules_and_reasons_count_packets(rig: Rig) -> None:
    before, hits = rig.reasons(Direction.INGRESS), rig.rule_packets(16)
    for _ in range(3):
        rig.run(Hook.XDP, frames.tcp(FRIEND, US, 1, KUBELET))
    rig.run(Hook.TCX_INGRESS, frames.tcp(STRANGER, US, 1, KUBELET))
    after = rig.reasons(Direction.INGRESS)
    assert rig.rule_packets(16) - hits == 3
    assert after[Reason.FORWARDED] - before.get(Reason.FORWARDED, 0) == 3
    assert after[Reason.POLICY_DEFAULT] - before.get(Reason.POLICY_DEFAULT, 0) == 1


def suppressed(rig: Rig, reason: Reason) -> int:
    return sum(struct.unpack("=4Q", raw)[2] for raw in rig.maps["budgets"].lookup_percpu(reason))


def test_events_stop_at_the_budget_and_the_rest_is_counted(rig: Rig) -> None:
    rig.install(ONLY_KUBELET, event_budget=10)
    before = suppressed(rig, Reason.POLICY_DENY)
    for _ in range(100):
        rig.run(Hook.XDP, frames.tcp(FRIEND, US, 1, 80))
    told = len(rig.events())
    assert told <= 40, "10 for each CPU and second that the run touched"
    assert told + suppressed(rig, Reason.POLICY_DENY) - before == 100


def test_new_connections_are_told_when_asked_for(rig: Rig) -> None:
    rig.install(Policy(**{**vars(ONLY_KUBELET), "flags": ConfigFlag.LOG_ALLOWED}))
    rig.run(Hook.XDP, frames.tcp(FRIEND, US, 1, KUBELET))
    rig.run(Hook.XDP, frames.tcp(FRIEND, US, 1, KUBELET, ACK))
    rig.run(Hook.TCX_EGRESS, frames.udp(US, STRANGER, 5, 53))
    rig.run(Hook.TCX_EGRESS, frames.udp(US, STRANGER, 5, 53))
    told = [(event["kind"], event["direction"], event["proto"]) for event in rig.events()]
    assert told == [(EventKind.ALLOW, 0, 6), (EventKind.ALLOW, 1, 17)]


def ct_entry(rig: Rig) -> dict[str, int]:
    ((key, value),) = [*rig.maps["ct4"].items(), *rig.maps["ct4_new"].items()]
    assert CT4_KEY.unpack(key)["origin"] == CT_ORIGIN_OUT
    return {name: int(str(number)) for name, number in CT_ENTRY.unpack(value).items()}


def seconds_left(rig: Rig) -> float:
    from bpf.features import Ticks

    ticks = Ticks()
    try:
        return ticks.until(ct_entry(rig)["expires"]) / rig.hz
    finally:
        ticks.close()


def test_a_connection_lives_as_long_as_its_state_deserves(rig: Rig) -> None:
    def sends(flags: int) -> None:
        rig.run(Hook.TCX_EGRESS, frames.tcp(US, STRANGER, 50000, 443, flags))

    def gets(flags: int) -> None:
        rig.run(Hook.XDP, frames.tcp(STRANGER, US, 443, 50000, flags))

    sends(SYN)
    assert seconds_left(rig) == pytest.approx(60, abs=2)
    gets(SYN | ACK)
    assert seconds_left(rig) == pytest.approx(60, abs=2), "still half open"
    sends(ACK)
    assert seconds_left(rig) == pytest.approx(8000, abs=2)
    gets(RST)
    assert seconds_left(rig) == pytest.approx(60, abs=2)
    sends(ACK)
    assert seconds_left(rig) == pytest.approx(8000, abs=2), (
        "a forged reset does not end a connection that goes on"
    )
    sends(FIN | ACK)
    gets(FIN | ACK)
    assert seconds_left(rig) == pytest.approx(10, abs=2)
    sends(SYN)
    assert seconds_left(rig) == pytest.approx(60, abs=2), "the same ports again"


def test_an_expired_entry_lets_nothing_in(rig: Rig) -> None:
    rig.run(Hook.TCX_EGRESS, frames.tcp(US, STRANGER, 50000, 443))
    ((key, value),) = rig.maps["ct4_new"].items()
    entry = CT_ENTRY.unpack(value)
    rig.maps["ct4_new"].update(key, CT_ENTRY.pack(**{**entry, "expires": int(str(entry["created"])) - 1}))
    assert not rig.run(Hook.XDP, frames.tcp(STRANGER, US, 443, 50000, SYN | ACK)).passes


def test_an_entry_is_not_written_for_each_packet(rig: Rig) -> None:
    rig.run(Hook.TCX_EGRESS, frames.udp(US, STRANGER, 50000, 53))
    rig.run(Hook.XDP, frames.udp(STRANGER, US, 53, 50000))
    expires = ct_entry(rig)["expires"]
    import time

    time.sleep(0.05)
    rig.run(Hook.XDP, frames.udp(STRANGER, US, 53, 50000))
    assert ct_entry(rig)["expires"] == expires


def test_a_program_that_passes_tells_tcx_and_one_that_drops_need_not(rig: Rig) -> None:
    assert rig.run(Hook.XDP, frames.tcp(FRIEND, US, 1, KUBELET)).marked
    assert not rig.run(Hook.XDP, frames.tcp(STRANGER, US, 1, KUBELET)).marked


def test_a_super_packet_beyond_64_kib_is_judged_and_counted_as_its_segments(rig: Rig) -> None:
    frame = bytearray(frames.tcp(FRIEND, US, 1, KUBELET, ACK))
    frame[16:18] = bytes(2)  # the kernel writes 0 for a length that does not fit
    assert not rig.run(Hook.TCX_INGRESS, bytes(frame)).passes
    before = rig.reasons(Direction.INGRESS).get(Reason.FORWARDED, 0)
    assert rig.run(Hook.TCX_INGRESS, bytes(frame), segments=3).passes
    assert rig.reasons(Direction.INGRESS)[Reason.FORWARDED] - before == 3


def test_tcp_ports_are_not_udp_ports(rig: Rig) -> None:
    assert PORTS_TCP + 53 not in range(PORTS_UDP, PORTS_UDP + 65536)
    assert not rig.run(Hook.XDP, frames.tcp(FRIEND, US, 1, 53)).passes


# Connections that are still being opened have a table of their own.


def states(rig: Rig) -> tuple[int, int]:
    """Entries that are half open, and established."""
    half_open = len(list(rig.maps["ct4_new"].items())) + len(list(rig.maps["ct6_new"].items()))
    return half_open, len(list(rig.maps["ct4"].items())) + len(list(rig.maps["ct6"].items()))


@pytest.mark.parametrize(("us", "friend", "stranger"), FAMILIES)
def test_a_connection_of_ours_is_established_when_we_answer_the_answer(
    rig: Rig, us: str, friend: str, stranger: str
) -> None:
    rig.run(Hook.TCX_EGRESS, frames.tcp(us, stranger, 50000, 443))
    assert states(rig) == (1, 0)
    assert rig.run(Hook.XDP, frames.tcp(stranger, us, 443, 50000, SYN | ACK)).passes
    assert states(rig) == (1, 0)
    rig.run(Hook.TCX_EGRESS, frames.tcp(us, stranger, 50000, 443, ACK))
    assert states(rig) == (0, 1)
    assert rig.run(Hook.XDP, frames.tcp(stranger, us, 443, 50000, ACK)).passes
    assert states(rig) == (0, 1)


def test_our_answer_to_a_forged_opening_does_not_establish_it(rig: Rig) -> None:
    rig.install(SENDS_NOTHING)
    for _ in range(3):
        rig.run(Hook.TCX_INGRESS, frames.tcp(STRANGER, US, 40000, 22))
        assert rig.run(Hook.TCX_EGRESS, frames.tcp(US, STRANGER, 22, 40000, SYN | ACK)).passes
    assert states(rig) == (1, 0)
    rig.run(Hook.TCX_INGRESS, frames.tcp(STRANGER, US, 40000, 22, RST))
    assert states(rig) == (1, 0)


@pytest.mark.parametrize("hook", INGRESS_HOOKS)
def test_who_answers_our_answer_is_established_by_either_hook(rig: Rig, hook: Hook) -> None:
    rig.install(SENDS_NOTHING)
    rig.run(Hook.TCX_INGRESS, frames.tcp(STRANGER, US, 40000, 22))
    rig.run(Hook.TCX_EGRESS, frames.tcp(US, STRANGER, 22, 40000, SYN | ACK))
    rig.run(hook, frames.tcp(STRANGER, US, 40000, 22, ACK))
    assert states(rig) == (0, 1)
    assert rig.run(Hook.TCX_EGRESS, frames.tcp(US, STRANGER, 22, 40000, ACK)).passes


def test_a_question_with_one_answer_stays_half_open_and_a_conversation_does_not(rig: Rig) -> None:
    rig.run(Hook.TCX_EGRESS, frames.udp(US, STRANGER, 50000, 53))
    rig.run(Hook.XDP, frames.udp(STRANGER, US, 53, 50000))
    assert states(rig) == (1, 0)
    rig.run(Hook.TCX_EGRESS, frames.udp(US, STRANGER, 50000, 53))
    assert states(rig) == (0, 1)


def test_a_flood_of_openings_evicts_no_established_connection(rig: Rig) -> None:
    """1,000 conversations, then twice as many forged sources as the table of half-open ones holds."""
    rig.install(SENDS_NOTHING)
    for number in range(1_000):
        port = 10_000 + number
        rig.run(Hook.TCX_INGRESS, frames.tcp(FRIEND, US, port, 22))
        rig.run(Hook.TCX_EGRESS, frames.tcp(US, FRIEND, 22, port, SYN | ACK))
        rig.run(Hook.TCX_INGRESS, frames.tcp(FRIEND, US, port, 22, ACK))
    assert states(rig) == (0, 1_000)
    flood(rig, 2 * rig.sizes.half_open)
    lost = sum(
        not rig.run(Hook.TCX_EGRESS, frames.tcp(US, FRIEND, 22, 10_000 + number, ACK)).passes
        for number in range(1_000)
    )
    assert lost == 0
    assert states(rig)[1] == 1_000


@pytest.mark.slow
def test_a_million_forged_openings_and_our_answers_evict_nothing(rig: Rig) -> None:
    rig.install(SENDS_NOTHING)
    for number in range(1_000):
        port = 10_000 + number
        rig.run(Hook.TCX_INGRESS, frames.tcp(FRIEND, US, port, 22))
        rig.run(Hook.TCX_EGRESS, frames.tcp(US, FRIEND, 22, port, SYN | ACK))
        rig.run(Hook.TCX_INGRESS, frames.tcp(FRIEND, US, port, 22, ACK))
    flood(rig, 1_000_000, answered=True)
    lost = sum(
        not rig.run(Hook.TCX_EGRESS, frames.tcp(US, FRIEND, 22, 10_000 + number, ACK)).passes
        for number in range(1_000)
    )
    assert lost == 0


def flood(rig: Rig, count: int, *, answered: bool = False) -> None:
    """Openings from `count` different sources that all exist for the policy; the n-th source is 11.0.0.0 + n."""
    opening = bytearray(frames.tcp("11.0.0.0", US, 40_000, 22))
    answer = bytearray(frames.tcp(US, "11.0.0.0", 22, 40_000, SYN | ACK))
    program, replies = rig.loaded.fds["tcx_ingress"], rig.loaded.fds["tcx_egress"]
    for number in range(count):
        source = (0x0B00_0000 + number).to_bytes(4, "big")
        opening[26:30] = source
        prog_test_run(program, bytes(opening))
        if answered:
            answer[30:34] = source
            prog_test_run(replies, bytes(answer))


# Fragments: one sender has a share of the table.


def first_fragment(source: str, number: int) -> bytes:
    return frames.ip(
        source, US, 17, frames.udp_datagram(40_000, 53, bytes(16)), identification=number, fragment=1
    )


def test_one_sender_of_fragments_cannot_push_out_those_of_others(rig: Rig) -> None:
    share = rig.sizes.fragments // 16
    assert rig.run(Hook.XDP, first_fragment("198.51.100.7", 7)).passes
    rig.install(Policy(ADDRESSES, default={Direction.INGRESS: ALLOW}))
    passed = sum(rig.run(Hook.XDP, first_fragment(STRANGER, number)).passes for number in range(3 * share))
    assert passed == share
    assert rig.reasons(Direction.INGRESS)[Reason.FRAG_TABLE_FULL] >= 2 * share
    assert rig.run(Hook.XDP, first_fragment(STRANGER, 0)).passes, "a datagram that has its place"
    assert rig.run(Hook.XDP, first_fragment(FRIEND, 8)).passes, "another sender"
    later = frames.ip(FRIEND, US, 17, bytes(16), identification=7, fragment=24)
    assert rig.run(Hook.XDP, later).passes, "what came before the flood"


def test_what_this_host_sends_in_fragments_has_no_share_to_exceed(rig: Rig) -> None:
    rig.install(Policy(ADDRESSES, default={Direction.EGRESS: ALLOW}))
    share = rig.sizes.fragments // 16
    for number in range(2 * share):
        datagram = frames.udp_datagram(53, 40_000, bytes(16))
        sent = frames.ip(US, STRANGER, 17, datagram, identification=number, fragment=1)
        assert rig.run(Hook.TCX_EGRESS, sent).passes, number


def test_a_trace_knows_that_a_sender_of_fragments_has_had_its_share(rig: Rig) -> None:
    rig.install(Policy(ADDRESSES, default={Direction.INGRESS: ALLOW}))
    share = rig.sizes.fragments // 16
    for number in range(share):
        assert rig.run(Hook.XDP, first_fragment(STRANGER, number)).passes
    before = contents(rig)
    for number, reason in ((share, Reason.FRAG_TABLE_FULL), (0, Reason.FORWARDED)):
        found = rig.trace(Hook.XDP, first_fragment(STRANGER, number))
        assert found.event is not None
        assert found.event["reason"] == reason
    assert contents(rig) == before


# A traced packet leaves nothing behind.


def contents(rig: Rig) -> dict[str, list[tuple[bytes, bytes]]]:
    volatile = ("trace", "scratch", "events")
    return {name: sorted(one.items()) for name, one in rig.maps.items() if name not in volatile}


TRACED = [
    (Hook.XDP, frames.tcp(STRANGER, US, 40000, 22)),
    (Hook.XDP, frames.tcp(FRIEND, US, 40000, KUBELET)),
    (Hook.TCX_INGRESS, frames.tcp(STRANGER, US, 40000, 22)),
    (Hook.TCX_INGRESS, frames.udp(FRIEND6, US6, 40000, 53)),
    (Hook.TCX_EGRESS, frames.tcp(US, STRANGER, 50000, 443)),
    (Hook.TCX_EGRESS, frames.udp(US, STRANGER, 50000, 53)),
    (
        Hook.TCX_INGRESS,
        frames.ip(FRIEND, US, 17, frames.udp_datagram(1, 53, bytes(16)), identification=9, fragment=1),
    ),
    (
        Hook.XDP,
        frames.ip(STRANGER, US, 17, frames.udp_datagram(1, 53, bytes(16)), identification=9, fragment=1),
    ),
]


@pytest.mark.parametrize(("hook", "frame"), TRACED)
@pytest.mark.parametrize("policy", [ONLY_KUBELET, SENDS_NOTHING])
def test_a_traced_packet_changes_no_map_and_has_the_verdict_of_a_real_one(
    rig: Rig, hook: Hook, frame: bytes, policy: Policy
) -> None:
    rig.install(policy)
    before = contents(rig)
    found = rig.trace(hook, frame)
    assert contents(rig) == before
    assert rig.events() == []
    assert found.outcome is not None
    real = rig.run(hook, frame)
    assert found.passes == real.passes == bool(found.outcome["passes"])
    if hook is Hook.XDP:
        assert bool(found.outcome["deferred"]) == (real.passes and not real.marked)


def test_a_trace_names_class_tuple_identity_and_rule(rig: Rig) -> None:
    event = rig.trace(Hook.XDP, frames.tcp(FRIEND, US, 40000, 80)).event
    assert event is not None
    assert (event["packet_class"], event["reason"]) == (PacketClass.TCP, Reason.POLICY_DENY)
    assert (event["rule"], event["identity"]) == (17, 1_000 + FRIENDS)
    assert (event["saddr"][:4], event["dport_be"]) == (raw(FRIEND), (80).to_bytes(2, "big"))
    assert event["kind"] == EventKind.DROP


def test_a_known_connection_is_known_to_a_trace_and_not_refreshed(rig: Rig) -> None:
    rig.run(Hook.TCX_EGRESS, frames.tcp(US, STRANGER, 50000, 443))
    before = contents(rig)
    found = rig.trace(Hook.XDP, frames.tcp(STRANGER, US, 443, 50000, SYN | ACK))
    assert found.event is not None
    assert found.event["reason"] == Reason.REPLY
    assert contents(rig) == before
    assert rig.trace(Hook.XDP, frames.tcp(STRANGER, US, 443, 50001, SYN | ACK)).passes is False


def test_without_the_cookie_nothing_is_dry(rig: Rig) -> None:
    before = contents(rig)
    rig.run(Hook.XDP, frames.tcp(STRANGER, US, 40000, 22))
    assert contents(rig) != before

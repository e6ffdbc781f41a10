"""Connections that exist when enforcement begins, as the kernel lists them."""

import ipaddress

import pytest

from daemon.datapath.conntrack import Socket, masqueraded
from daemon.model.net import Proto

OUT = "ipv4     2 tcp      6 431999 ESTABLISHED "
UNANSWERED = "ipv6     10 udp      17 29 src=fd95::2 dst=fd96::2 sport=5 dport=53 [UNREPLIED] "
BACK = " [ASSURED] mark=0 zone=0 use=2"


def packed(text: str) -> bytes:
    return ipaddress.ip_address(text).packed


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (
            OUT + "src=10.95.0.2 dst=10.96.0.2 sport=40000 dport=443 src=10.96.0.2 dst=10.96.0.1 sport=443 dport=1024"
            + BACK,
            Socket(Proto.TCP, packed("10.96.0.1"), 1024, packed("10.96.0.2"), 443, True),
        ),
        (
            UNANSWERED + "src=fd96::2 dst=fd96::1 sport=53 dport=6 mark=0 use=2",
            Socket(Proto.UDP, packed("fd96::1"), 6, packed("fd96::2"), 53, False),
        ),
        (  # not translated: forwarded as it is, or the host's own
            OUT + "src=10.95.0.2 dst=10.96.0.2 sport=40000 dport=443 src=10.96.0.2 dst=10.95.0.2 sport=443 dport=40000",
            None,
        ),
        (  # to a node port: only the destination is another one
            OUT + "src=10.96.0.2 dst=10.96.0.1 sport=5 dport=30080 src=10.95.0.2 dst=10.96.0.2 sport=8080 dport=5",
            None,
        ),
        ("ipv4     2 icmp     1 29 src=10.95.0.2 dst=10.96.0.2 type=8 code=0 id=7 src=10.96.0.2 dst=10.96.0.1", None),
        ("ipv4     2 tcp      6 431999 ESTABLISHED src=10.95.0.2 dst=1", None),
        ("", None),
    ],
)  # fmt: skip
def test_what_is_masqueraded_is_told_by_the_way_back(tmp_path, line, found):
    (tmp_path / "nf_conntrack").write_text(f"{line}\n")
    assert masqueraded(tmp_path) == ([found] if found else [])


def test_without_the_kernels_tracking_there_is_nothing(tmp_path):
    assert masqueraded(tmp_path) == []

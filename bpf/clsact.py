"""Programs on devices before Linux 6.6: clsact filters by netlink, which survive their creator too."""

from bpf.syscall import prog_info

INGRESS_PARENT = 0xFFFFFFF2
EGRESS_PARENT = 0xFFFFFFF3
PRIORITY = 0x4D57  # fixed, so that a replace finds what an earlier run put there
HANDLE = 1
ETH_P_ALL = 0x0003
INGRESS_NAME = "meshwall_ingress"
EGRESS_NAME = "meshwall_egress"
EEXIST = 17


def attach(ifindex: int, ingress_fd: int, egress_fd: int) -> None:
    """Put or replace both filters; OSError when the kernel refuses."""
    from pyroute2 import IPRoute, NetlinkError  # noqa: PLC0415 - only hosts without TCX pay for it

    with IPRoute() as netlink:
        try:
            netlink.tc("add", "clsact", ifindex)
        except NetlinkError as error:
            if error.code != EEXIST:
                raise OSError(error.code, f"clsact on device {ifindex}: {error}") from error
        for parent, fd, name in (
            (INGRESS_PARENT, ingress_fd, INGRESS_NAME),
            (EGRESS_PARENT, egress_fd, EGRESS_NAME),
        ):
            try:
                netlink.tc(
                    "replace-filter",
                    "bpf",
                    ifindex,
                    handle=HANDLE,
                    fd=fd,
                    name=f"{name}-{prog_info(fd).id}",  # pyroute2 does not read a filter's program back
                    parent=parent,
                    prio=PRIORITY,
                    protocol=ETH_P_ALL,
                    classid=1,
                    direct_action=True,
                )
            except NetlinkError as error:
                raise OSError(error.code, f"filter {name} on device {ifindex}: {error}") from error


def detach(ifindex: int) -> None:
    """Remove our two filters and nothing else: the clsact qdisc may carry those of others."""
    from pyroute2 import IPRoute, NetlinkError  # noqa: PLC0415

    with IPRoute() as netlink:
        for parent in (INGRESS_PARENT, EGRESS_PARENT):
            try:
                netlink.tc(
                    "del-filter",
                    "bpf",
                    ifindex,
                    handle=HANDLE,
                    parent=parent,
                    prio=PRIORITY,
                    protocol=ETH_P_ALL,
                )
            except NetlinkError:
                continue  # not there


def status(ifindex: int) -> tuple[int, int]:
    """Ids of the programs in our place on ingress and on egress; 0: there is none."""
    from pyroute2 import IPRoute, NetlinkError  # noqa: PLC0415

    def program(netlink: "IPRoute", parent: int, name: str) -> int:
        filters = [
            one for one in netlink.get_filters(ifindex, parent=parent) if one["info"] >> 16 == PRIORITY
        ]
        found = [one.get_attr("TCA_OPTIONS") for one in filters]
        names = [str(one.get_attr("TCA_BPF_NAME")).partition("-") for one in found if one is not None]
        return next((int(number) for known, _, number in names if known == name and number.isdecimal()), 0)

    with IPRoute() as netlink:
        try:
            return program(netlink, INGRESS_PARENT, INGRESS_NAME), program(
                netlink, EGRESS_PARENT, EGRESS_NAME
            )
        except NetlinkError:
            return 0, 0  # no such device, or no qdisc on it

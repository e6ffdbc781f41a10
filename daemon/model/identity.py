"""Security identities: numbers, reserved names, and the ranges that clusters own."""

from enum import IntEnum
from typing import NewType

from daemon.model.labels import RESERVED, Label, LabelSet

Identity = NewType("Identity", int)
ClusterId = NewType("ClusterId", int)


class Reserved(IntEnum):
    """Cluster-independent identities, numbered as in Cilium."""

    UNKNOWN = 0
    HOST = 1
    WORLD = 2
    UNMANAGED = 3
    HEALTH = 4
    INIT = 5
    REMOTE_NODE = 6
    KUBE_APISERVER = 7
    INGRESS = 8
    WORLD_IPV4 = 9
    WORLD_IPV6 = 10


LOCAL_SCOPE = 0x0100_0000  # numbers of this host only: CIDR and FQDN identities
REMOTE_NODE_SCOPE = 0x0200_0000


def reserved_name(identity: Identity) -> str | None:
    """`remote-node` for 6 and so on; None for numbers without a built-in name."""
    try:
        return Reserved(identity).name.lower().replace("_", "-")
    except ValueError:
        return None


def reserved_labels(identity: Identity) -> LabelSet:
    """The labels of a reserved identity; empty for any other number."""
    name = reserved_name(identity)
    if name is None:
        return frozenset()
    labels = {Label(RESERVED, name)}
    if int(identity) == Reserved.KUBE_APISERVER:
        labels.add(Label(RESERVED, "remote-node"))
    return frozenset(labels)

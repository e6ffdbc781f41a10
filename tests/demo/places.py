"""Who is where in the demo: names, addresses and identities, nothing that does anything."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

BASE = Path("/run/mwdemo")
NETWORK = "mwdemo-net"  # the bridge that joins all hosts; etcd lives here too
ETCD = "http://10.77.0.1:2379"
CLUSTERS = {"alpha": 1, "beta": 2}
KUBELET, NODE_EXPORTER, SSH = 10250, 9100, 22


class Pair(NamedTuple):
    """One IPv4 and one IPv6 address."""

    v4: str
    v6: str


@dataclass(frozen=True)
class Host:
    """One machine: a namespace on the bridge and, if it has pods, a second one behind it."""

    name: str
    cluster: str
    address: Pair
    pods_v4: str = ""  # routed to this host
    pods_v6: str = ""

    @property
    def namespace(self) -> str:
        return f"mwdemo-{self.name}"

    @property
    def pod_namespace(self) -> str:
        return f"mwdemo-{self.name}-pods"

    @property
    def directory(self) -> Path:
        return BASE / self.name

    @property
    def socket(self) -> Path:
        return self.directory / "run" / "meshwall.sock"


@dataclass(frozen=True)
class Pod:
    """An address behind a host, with the identity that its labels have in the mesh."""

    name: str
    host: Host
    address: Pair
    identity: int
    namespace: str
    service_account: str
    app: str

    @property
    def labels(self) -> tuple[str, ...]:
        return (
            f"k8s:app={self.app}",
            f"k8s:io.cilium.k8s.policy.serviceaccount={self.service_account}",
            f"k8s:io.kubernetes.pod.namespace={self.namespace}",
        )


A1 = Host("a1", "alpha", Pair("10.77.0.11", "fd77::11"))
A2 = Host("a2", "alpha", Pair("10.77.0.12", "fd77::12"), "10.1.2.0/24", "fd77:1:2::/64")
B1 = Host("b1", "beta", Pair("10.77.0.21", "fd77::21"), "10.2.1.0/24", "fd77:2:1::/64")
HOSTS = (A1, A2, B1)


def _metrics_server(name: str, host: Host, address: Pair, identity: int) -> Pod:
    return Pod(name, host, address, identity, "my-metrics-namespace", "metrics-server", name)


# Identities carry their cluster: the number divided by 65536 is the cluster's id.
PODS = (
    _metrics_server("metrics-server", A2, Pair("10.1.2.10", "fd77:1:2::10"), 65536 + 4321),
    Pod("web", A2, Pair("10.1.2.20", "fd77:1:2::20"), 65536 + 4322, "shop", "default", "web"),
    _metrics_server("metrics-server", B1, Pair("10.2.1.10", "fd77:2:1::10"), 131072 + 1234),
    Pod("web", B1, Pair("10.2.1.20", "fd77:2:1::20"), 131072 + 1235, "shop", "default", "web"),
)
# Its address answers from the start; nobody in the mesh has heard of it until the demo says so.
NEWCOMER = _metrics_server("metrics-server-canary", B1, Pair("10.2.1.30", "fd77:2:1::30"), 131072 + 1300)

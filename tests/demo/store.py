"""What the two clusters write into the shared etcd, in the original key layout.

    store.py fill                     cluster configurations, nodes, identities and addresses of the demo
    store.py add IDENTITY ADDRESS...  the newcomer's labels under IDENTITY, and these addresses
    store.py remove ADDRESS...        forget these addresses
    store.py beat                     refresh the heartbeat for ever, as a cluster's owner does

Run inside the namespace that reaches the etcd. `add` and `remove` print the moment (monotonic clock, seconds)
just before the first write.
"""

import asyncio
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime

from places import CLUSTERS, ETCD, HOSTS, NEWCOMER, PODS, Host, Pod

from clustermesh import wire
from clustermesh.etcd import EtcdKV
from clustermesh.kv import KVError
from clustermesh.settings import EtcdSettings


def node_of(host: Host) -> wire.Node:
    addresses = tuple(wire.NodeAddress("InternalIP", text) for text in host.address)
    return wire.Node(
        name=host.name,
        cluster=host.cluster,
        addresses=addresses,
        ipv4_cidr=wire.node_cidr(host.pods_v4) if host.pods_v4 else None,
        ipv6_cidr=wire.node_cidr(host.pods_v6) if host.pods_v6 else None,
        cluster_id=CLUSTERS[host.cluster],
        source="custom-resource",
        labels={"kubernetes.io/hostname": host.name},
        identity=6,  # remote-node
    )


async def put_pod(kv: EtcdKV, pod: Pod, identity: int, addresses: tuple[str, ...]) -> None:
    labels = wire.encode_identity(pod.labels, pod.host.cluster)
    await kv.put(wire.identity_key(identity), labels)
    # As the node that runs it would: identities that nobody refers to are collected after a while.
    reference = wire.identity_value_key(labels.decode(), pod.host.address.v4)
    await kv.put(reference, str(identity).encode())
    for address in addresses:
        entry = wire.ip_entry(address, identity, pod.host.address.v4, pod.namespace, pod.name)
        await kv.put(wire.ip_key(entry.prefix), wire.encode_ip(entry))


async def beat_once(kv: EtcdKV) -> None:
    now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    await kv.put(wire.HEARTBEAT, now.encode())


async def fill(kv: EtcdKV) -> None:
    """Configuration first, then entries, then one marker per kind: the order that readers rely on."""
    await beat_once(kv)
    for name, number in CLUSTERS.items():
        config = wire.ClusterConfig(id=number, synced_canaries=True, max_clusters=255)
        await kv.put(wire.config_key(name), wire.encode_config(config))
    for host in HOSTS:
        await kv.put(wire.node_key(host.cluster, host.name), wire.encode_node(node_of(host)))
    for pod in PODS:
        await put_pod(kv, pod, pod.identity, pod.address)
    for name in CLUSTERS:
        for resource in (wire.NODES, wire.IDENTITIES, wire.IPS):
            await kv.put(wire.canary_key(name, resource), b"2026-01-01T00:00:00Z")


async def beat(kv: EtcdKV) -> None:
    while True:
        with suppress(KVError):  # the demo stops the etcd on purpose
            await beat_once(kv)
        await asyncio.sleep(30)


async def run(arguments: list[str]) -> None:
    kv = EtcdKV(EtcdSettings((ETCD,), insecure_transport=True))
    try:
        match arguments:
            case ["fill"]:
                await fill(kv)
            case ["add", identity, *addresses]:
                print(time.monotonic(), flush=True)
                await put_pod(kv, NEWCOMER, int(identity), tuple(addresses))
            case ["remove", *addresses]:
                print(time.monotonic(), flush=True)
                for address in addresses:
                    await kv.delete(wire.ip_key(address))
            case ["beat"]:
                await beat(kv)
            case _:
                sys.exit(__doc__)
    finally:
        await kv.close()


if __name__ == "__main__":
    asyncio.run(run(sys.argv[1:]))

"""Pure: which etcd users a cluster needs, and what each may do; least rights, as prefixes with their slash.

Identities and addresses do not name their cluster in their keys, so in a store that several clusters share a
writer can write those of all; readers check what they say (trust.py). One etcd per cluster has no such gap.
"""

import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from clustermesh import wire

Access = Literal["read", "readwrite"]


@dataclass(frozen=True, slots=True)
class Right:
    """One permission. `end` is empty for a single key, else the first key after the range."""

    access: Access
    key: str
    end: str = ""


@dataclass(frozen=True, slots=True)
class Role:
    """A role and the users that have it; users come with a certificate and have no password."""

    name: str
    rights: tuple[Right, ...]
    users: tuple[str, ...]


def under(access: Access, prefix: str) -> Right:
    """Everything below a prefix, which ends with its slash."""
    return Right(access, prefix, prefix[:-1] + chr(ord(prefix[-1]) + 1))


_HEARTBEAT_READ = under("read", wire.HEARTBEAT)


def reader(cluster: str, users: Iterable[str]) -> Role:
    """For other clusters, which read what this one says: the rights of the original's role `remote`."""
    rights = (
        _HEARTBEAT_READ,
        Right("read", wire.config_key(cluster)),
        under("read", f"{wire.SYNCED}{cluster}/"),
        under("read", "cilium/state/"),
    )
    return Role(f"{cluster}-reader", rights, tuple(users))


def writer(cluster: str, users: Iterable[str]) -> Role:
    """For the cluster's own hosts: write what is theirs, and nothing else."""
    resources = (wire.NODES, wire.SERVICES, wire.SERVICE_EXPORTS)
    rights = (
        under("readwrite", wire.HEARTBEAT),
        Right("readwrite", wire.config_key(cluster)),
        under("readwrite", f"{wire.SYNCED}{cluster}/"),
        under("readwrite", f"{wire.IDENTITIES}/"),
        under("readwrite", f"{wire.IPS}/{wire.ADDRESS_SPACE}/"),
        *(under("readwrite", f"{one}/{cluster}/") for one in resources),
        Right("readwrite", wire.collector_key(cluster)),
    )
    return Role(f"{cluster}-writer", rights, tuple(users))


def member(cluster: str, users: Iterable[str]) -> Role:
    """For hosts of the store, whichever cluster's: read what all of it say."""
    prefixes = ("cilium/state/", "cilium/cache/", wire.CLUSTER_CONFIG, wire.SYNCED)
    rights = (_HEARTBEAT_READ, *(under("read", one) for one in prefixes))
    return Role(f"{cluster}-member", rights, tuple(users))


def commands(roles: Sequence[Role], etcdctl: str = "etcdctl") -> Iterator[str]:
    """The same for a shell, one command each."""
    for role in roles:
        yield f"{etcdctl} role add {shlex.quote(role.name)}"
        for one in role.rights:
            words = [role.name, one.access, one.key, *([one.end] if one.end else [])]
            yield f"{etcdctl} role grant-permission {shlex.join(words)}"
    for user in dict.fromkeys(user for role in roles for user in role.users):
        yield f"{etcdctl} user add --no-password {shlex.quote(user)}"
    for role in roles:
        for user in role.users:
            yield f"{etcdctl} user grant-role {shlex.join([user, role.name])}"


def remote_file(endpoints: Sequence[str], ca: str, cert: str, key: str) -> str:
    """The file of a remote cluster, in the original's format."""
    lines = ["endpoints:", *(f"- {one}" for one in endpoints)]
    given = (("trusted-ca-file", ca), ("cert-file", cert), ("key-file", key))
    return "\n".join([*lines, *(f"{name}: {path}" for name, path in given if path)]) + "\n"

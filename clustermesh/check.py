"""What is wrong with a store, or with what clusters say in it, and what to do about it. Writes nothing.

Rights to write are tried with transactions whose condition never holds: a store refuses them just the same.
"""

import asyncio
import contextlib
import os
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum

from clustermesh import certs, wire
from clustermesh.etcd import EtcdKV
from clustermesh.gojson import Malformed
from clustermesh.kv import Compare, Denied, KVError, Put
from clustermesh.settings import EtcdSettings, split_endpoint
from clustermesh.trust import Trust, version_warning
from clustermesh.wire import ClusterConfig

EXPIRES_SOON_S = 14 * 86_400
HEARTBEAT_LATE_S = 120.0  # then readers connect anew, again and again
SKEW_S = 10.0
_NEVER = 1 << 62  # a version that no key has
_POLICY = {"nodes": wire.NODES, "identities": wire.IDENTITIES, "addresses": wire.IPS}
_SERVICES = {"services": wire.SERVICES, "service exports": wire.SERVICE_EXPORTS}
_CACHED = {
    wire.NODES: wire.CACHE_NODES, wire.IDENTITIES: wire.CACHE_IDENTITIES, wire.IPS: wire.CACHE_IPS,
    wire.SERVICES: wire.CACHE_SERVICES, wire.SERVICE_EXPORTS: wire.CACHE_SERVICE_EXPORTS,
}  # fmt: skip


class Severity(Enum):
    """`ok` findings say what was looked at and is fine."""

    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. `where`: an endpoint, a key, a cluster. `fix` is empty for what is fine."""

    severity: Severity
    store: str
    where: str
    text: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Look:
    """A store, and what it is for. `only`: it is read for this cluster; `writes`: this host publishes in it.

    `expected`: clusters that must be in it. `node`: this host's name in its cluster.
    """

    name: str
    settings: EtcdSettings
    trust: Trust
    only: str = ""
    writes: bool = False
    node: str = ""
    expected: tuple[str, ...] = ()
    taken: dict[int, str] = field(default_factory=dict)  # id -> cluster, of all stores


class _Findings:
    """Findings of one store, in order."""

    def __init__(self, store: str) -> None:
        self.all: list[Finding] = []
        self._store = store

    def ok(self, where: str, text: str) -> None:
        self.all.append(Finding(Severity.OK, self._store, where, text))

    def warn(self, where: str, text: str, fix: str) -> None:
        self.all.append(Finding(Severity.WARNING, self._store, where, text, fix))

    def fail(self, where: str, text: str, fix: str) -> None:
        self.all.append(Finding(Severity.ERROR, self._store, where, text, fix))


async def diagnose(look: Look, clock: Callable[[], float] = time.time) -> list[Finding]:
    """Everything that can be said about a store, worst things not first but in the order of the way there."""
    found = _Findings(look.name)
    _own_files(look.settings, found, clock())
    reached = [await _endpoint(look.settings, one, found, clock()) for one in look.settings.endpoints]
    if not any(reached):
        return found.all
    kv = EtcdKV(look.settings)
    try:
        if await _server(kv, found):
            await _heartbeat(kv, found, clock())
            configs = await _clusters(kv, look, found)
            for cluster, config in configs.items():
                await _markers(kv, cluster, config, found)
            await _rights(kv, look, found)
            await _own_node(kv, look, found)
    finally:
        await kv.close()
    return found.all


# -- the way there


def _own_files(settings: EtcdSettings, found: _Findings, now: float) -> None:
    for option, path in (("ca", settings.ca), ("cert", settings.cert)):
        if not path:
            continue
        try:
            _dates(certs.validity_of_file(path), f"etcd.{option}", f"{path}", found, now)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            found.fail(f"etcd.{option}", f"{path}: {reason}", "put a PEM certificate there")


def _dates(validity: certs.Validity, where: str, what: str, found: _Findings, now: float) -> None:
    begins, ends = validity.begins.timestamp(), validity.ends.timestamp()
    until = validity.ends.strftime("%Y-%m-%d %H:%M UTC")
    if now > ends:
        found.fail(where, f"{what} expired at {until}", "issue a new certificate")
    elif now < begins:
        since = validity.begins.strftime("%Y-%m-%d %H:%M UTC")
        found.fail(where, f"{what} is good from {since} on", "set the clock of this host, or wait")
    elif ends - now < EXPIRES_SOON_S:
        found.warn(where, f"{what} expires at {until}", "issue a new certificate before that")
    else:
        found.ok(where, f"{what} is good until {until}")


async def _endpoint(settings: EtcdSettings, endpoint: str, found: _Findings, now: float) -> bool:
    """Whether an endpoint can be talked to, as far as TCP and TLS go."""
    tls, host, port = split_endpoint(endpoint)
    try:
        async with _connected(host, port, None, settings):
            pass
    except TimeoutError:
        found.fail(
            endpoint, f"no answer within {settings.timeout_s:g} s", "look at firewalls and the address"
        )
        return False
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        found.fail(endpoint, f"cannot be reached: {reason}", "check the endpoint, and whether etcd runs")
        return False
    if not tls:
        found.ok(endpoint, "reached, without TLS")
        return True
    with contextlib.suppress(OSError, TimeoutError, ValueError):
        blind = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        blind.check_hostname, blind.verify_mode = False, ssl.CERT_NONE
        async with _connected(host, port, blind, settings) as seen:
            if der := seen.getpeercert(binary_form=True):
                _dates(certs.validity(der), endpoint, "the server's certificate", found, now)
    return await _verified(settings, endpoint, host, port, found)


async def _verified(settings: EtcdSettings, endpoint: str, host: str, port: int, found: _Findings) -> bool:
    name = settings.server_name or host
    try:
        context = ssl.create_default_context(cafile=settings.ca or None)
        if settings.cert:
            context.load_cert_chain(settings.cert, settings.key)
        async with _connected(host, port, context, settings, name):
            found.ok(endpoint, f"reached, TLS, the server is {name}")
            return True
    except ssl.SSLCertVerificationError as error:
        _verification(error, endpoint, name, settings, found)
    except (ssl.SSLError, OSError, TimeoutError) as error:
        reason = (
            getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error) or "no answer"
        )
        fix = "check that the endpoint speaks TLS, and that etcd.cert and etcd.key are a pair"
        found.fail(endpoint, f"TLS fails: {reason}", fix)
    return False


def _verification(
    error: ssl.SSLCertVerificationError, endpoint: str, name: str, settings: EtcdSettings, found: _Findings
) -> None:
    match error.verify_code:
        case 9 | 10:
            return  # the dates are told already
        case 62 | 64:
            text = f"the server's certificate is not for {name}"
            found.fail(endpoint, text, "set etcd.server_name to a name in it, or issue one with this name")
        case _:
            ca = settings.ca or "the CAs of this system"
            text = f"the server's certificate is not signed by {ca}: {error.verify_message}"
            found.fail(endpoint, text, "set etcd.ca to the CA that signed it, with the whole chain")


@contextlib.asynccontextmanager
async def _connected(
    host: str, port: int, context: ssl.SSLContext | None, settings: EtcdSettings, name: str = ""
) -> AsyncIterator[ssl.SSLObject]:
    async with asyncio.timeout(settings.timeout_s):
        expected = (name or host) if context else None
        _, writer = await asyncio.open_connection(host, port, ssl=context, server_hostname=expected)
    try:
        yield writer.get_extra_info("ssl_object")
    finally:
        writer.close()


# -- the store


async def _server(kv: EtcdKV, found: _Findings) -> bool:
    """Whether the store answers us as a whole."""
    try:
        alarms = await kv.alarms()
    except Denied as error:
        found.fail("credentials", str(error), "use a user that the store knows: meshwall mesh invite")
        return False
    except KVError as error:
        found.fail("etcd", str(error), "see the endpoints above")
        return False
    for one in alarms:
        fix = (
            "compact and defragment, then: etcdctl alarm disarm"
            if "NOSPACE" in one
            else "see the log of etcd"
        )
        found.fail(kv.endpoint, f"alarm: {one}", fix)
    if warning := version_warning(kv.version):
        found.warn(kv.endpoint, warning, "update etcd")
    else:
        found.ok(kv.endpoint, f"etcd {kv.version}")
    return True


async def _heartbeat(kv: EtcdKV, found: _Findings, now: float) -> None:
    fix = "is the cluster's writer running? (meshwalld with publish, or the clustermesh-apiserver)"
    try:
        entry = await kv.get(wire.HEARTBEAT)
    except Denied as error:
        found.fail(
            wire.HEARTBEAT, str(error), "the role lacks this key: meshwall mesh invite prints all it needs"
        )
        return
    except KVError as error:
        found.fail(
            "quorum", f"{error}", "most members of etcd must run and see each other: etcdctl endpoint health"
        )
        return
    if entry is None:
        found.fail(wire.HEARTBEAT, "nobody writes a heartbeat", fix)
        return
    try:
        age = now - datetime.fromisoformat(entry.value.decode()).astimezone(UTC).timestamp()
    except (ValueError, UnicodeDecodeError):
        found.warn(wire.HEARTBEAT, f"is not a time: {entry.value[:40]!r}", fix)
        return
    if age > HEARTBEAT_LATE_S:
        text = f"is {age:.0f} s old, expected 60 at most"
        found.fail(wire.HEARTBEAT, text, f"{fix} If it is, set the clocks: one of them is wrong")
    elif age < -SKEW_S:
        text = f"comes from the future, {-age:.0f} s ahead of our clock"
        found.warn(wire.HEARTBEAT, text, "set the clocks (NTP) of this host and of the writer")
    else:
        found.ok(wire.HEARTBEAT, f"{max(age, 0):.0f} s old")


# -- clusters


async def _clusters(kv: EtcdKV, look: Look, found: _Findings) -> dict[str, ClusterConfig]:
    """The configurations that are usable."""
    try:
        said = await _configs(kv, look)
    except KVError as error:
        found.fail(wire.CLUSTER_CONFIG, str(error), "the role may not read this: meshwall mesh invite")
        return {}
    good: dict[str, ClusterConfig] = {}
    for cluster, value in said.items():
        key = wire.config_key(cluster)
        try:
            config = wire.decode_config(value, look.trust.compat)
            look.trust.check_config(cluster, config, look.taken)
        except Malformed as error:
            found.fail(key, f"{cluster}: {error}", _config_fix(error.reason))
            continue
        look.taken[config.id] = cluster
        good[cluster] = config
        found.ok(key, f"cluster {cluster}, id {config.id}" + (", mirrored" if config.cached else ""))
    for cluster in look.expected:
        if cluster not in said:
            text = f"{cluster} has no configuration here"
            found.fail(
                wire.config_key(cluster), text, "is this its store, its name right, and its writer running?"
            )
    return good


async def _configs(kv: EtcdKV, look: Look) -> dict[str, bytes]:
    if look.only:
        entry = await kv.get(wire.config_key(look.only))
        return {look.only: entry.value} if entry else {}
    found = {}
    for one in (await kv.list(wire.CLUSTER_CONFIG)).entries:
        name = one.key.removeprefix(wire.CLUSTER_CONFIG)
        if wire.valid_cluster_name(name):
            found[name] = one.value
    return found


def _config_fix(reason: str) -> str:
    fixes = {
        "cluster_id_taken": "two clusters have one id: give one of them another, and restart its writers",
        "cluster_not_expected": "add it to `clusters`, if it is wanted",
        "cluster_id_mismatch": "correct `clusters` or `cluster_id` here, or the id there",
    }
    if reason in fixes:
        return fixes[reason]
    return "id and max-connected-clusters must fit in all clusters: correct them there, or max_connected_clusters here"


async def _markers(kv: EtcdKV, cluster: str, config: ClusterConfig, found: _Findings) -> None:
    """Whether a cluster has said that its entries are complete."""
    if not config.synced_canaries:
        return
    missing = {}
    for name, resource in (_POLICY | _SERVICES).items():
        key = wire.canary_key(cluster, _CACHED[resource] if config.cached else resource)
        try:
            if await kv.get(key) is None:
                missing[name] = key
        except KVError as error:
            found.fail(key, str(error), "the role may not read this: meshwall mesh invite")
            return
    fix = "its writer has not finished, or cannot write: look at its log, or meshwall status there"
    for name, key in missing.items():
        add = found.fail if name in _POLICY else found.warn
        add(key, f"missing: the {name} of {cluster} are not read", fix)
    if not missing:
        found.ok(f"{wire.SYNCED}{cluster}/", "all synced markers are there")


# -- rights


async def _rights(kv: EtcdKV, look: Look, found: _Findings) -> None:
    own, denied = look.trust.own_cluster, []
    for key in _readable(look):
        try:
            await kv.get(key)
        except Denied:
            denied.append(key)
    if denied:
        found.fail(
            ", ".join(denied), "may not be read", "meshwall mesh invite prints the rights that are needed"
        )
    else:
        found.ok("rights", "everything that is needed may be read")
    others = (look.only,) if look.only else tuple(one for one in look.expected if one != own)
    if look.writes:
        missing = [key for key in _ours(look) if not await _may_write(kv, key)]
        if missing:
            text = f"may not be written: {', '.join(missing)}"
            found.fail("rights", text, f"meshwall mesh invite --cluster {own}: this host needs {own}-writer")
    keys = [wire.config_key(one) for one in others or ("other",)]
    if not look.writes:
        keys += [f"{wire.IPS}/{wire.ADDRESS_SPACE}/192.0.2.1", f"{wire.IDENTITY_MASTERS}1"]
    open_keys = [key for key in keys if await _may_write(kv, key)]
    if open_keys:
        text = f"these credentials may write {', '.join(open_keys)}, and need not"
        fix = "turn users on (etcdctl auth enable) with least rights: meshwall mesh invite"
        found.warn("rights", text, fix)


def _readable(look: Look) -> Iterator[str]:
    if look.only:
        yield wire.canary_key(look.only, wire.NODES)
        for resource in (wire.NODES, wire.SERVICES, wire.SERVICE_EXPORTS):
            yield f"{resource}/{look.only}/"
    else:
        for resource in (wire.NODES, wire.SERVICES, wire.SERVICE_EXPORTS):
            yield f"{resource}/"
        yield wire.SYNCED
    yield wire.IDENTITY_MASTERS
    yield f"{wire.IPS}/{wire.ADDRESS_SPACE}/"


def _ours(look: Look) -> Iterator[str]:
    own = look.trust.own_cluster
    yield wire.HEARTBEAT
    yield wire.config_key(own)
    yield wire.canary_key(own, wire.NODES)
    yield wire.node_key(own, look.node)
    yield wire.service_key(own, "default", "x")
    yield f"{wire.IPS}/{wire.ADDRESS_SPACE}/192.0.2.1"
    yield f"{wire.IDENTITY_MASTERS}1"


async def _may_write(kv: EtcdKV, key: str) -> bool:
    try:
        await kv.commit((Compare(key, "version", _NEVER),), (Put(key, b""),))
    except Denied:
        return False
    return True


async def _own_node(kv: EtcdKV, look: Look, found: _Findings) -> None:
    if not look.writes:
        return
    key = wire.node_key(look.trust.own_cluster, look.node)
    with contextlib.suppress(KVError):
        if await kv.get(key) is None:
            found.warn(
                key,
                "this host is not published",
                "is meshwalld running? see `this host` in: meshwall mesh status",
            )


def verdict(findings: Sequence[Finding]) -> Mapping[Severity, int]:
    """How many there are of each kind."""
    return {kind: sum(1 for one in findings if one.severity is kind) for kind in Severity}

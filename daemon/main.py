"""`meshwalld`: the composition root. Settings -> tables -> tasks; signals, the service manager, exit codes.

Exit status: 0 asked to stop, 1 could not go on, 2 bad settings, 3 missing privileges or kernel features.
Whatever the end, what the kernel enforces stays.
"""

import argparse
import asyncio
import contextlib
import fcntl
import gc
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import uvloop
from aiohttp import web

from bpf.attach import XdpMode
from bpf.features import MissingFeatureError, probe
from bpf.layout import Sizes
from clustermesh.kv import KV, MemoryKV
from clustermesh.publish import Member
from clustermesh.settings import DEFAULT_PORT, EtcdSettings
from daemon.api import app, audit, changes, flows, mesh, metrics, report, resources, services, status, subject
from daemon.api.hubble import HubbleApi, HubbleSettings
from daemon.config import Config, ConfigError, Etcd, FailsafeEntry, load
from daemon.datapath.devices import Devices
from daemon.datapath.keeper import Keeper
from daemon.datapath.links import keep_compiled
from daemon.datapath.program import Program, ProgramSettings
from daemon.datapath.watch import Watch
from daemon.flows.pipeline import FlowPipeline
from daemon.flows.record import Recorder, RecordSettings
from daemon.flows.usage import RuleUsage
from daemon.model.net import Direction, Proto, parse_prefix
from daemon.policy.ccnp import LanguageSettings
from daemon.policy.compile import CompileSettings, Failsafe
from daemon.runtime import memory
from daemon.runtime.auditlog import AuditLog
from daemon.runtime.loopwatch import LoopWatch
from daemon.runtime.notify import Notify, watchdog_s
from daemon.runtime.tasks import Tasks, Work
from daemon.sources import meshdir
from daemon.sources.audit import AuditSwitch
from daemon.sources.files import PolicyFiles
from daemon.sources.host import HostSource
from daemon.sources.mesh import Arrival, MeshSource, Shared
from daemon.sources.meshdir import MeshDirectory
from daemon.sources.publisher import MeshPublisher
from daemon.sources.services import GROUP as SERVICES
from daemon.sources.services import ServiceFiles
from daemon.sources.static import IdentitiesFile
from daemon.sources.workloads import GROUP as WORKLOADS
from daemon.sources.workloads import WorkloadFiles
from daemon.state.audit import audited
from daemon.state.tables import StatusRow, Tables

log = logging.getLogger("meshwalld")

OK, FAILED, BAD_SETTINGS, MISSING = 0, 1, 2, 3
READY_WITHIN_S = 20.0  # then the service counts as started, degraded or not: the boot must go on
THREADS = 4  # each costs memory of its own
CAP_NET_ADMIN, CAP_SYS_ADMIN, CAP_PERFMON, CAP_BPF = 12, 21, 38, 39
NEEDED = {"CAP_NET_ADMIN": CAP_NET_ADMIN, "CAP_PERFMON": CAP_PERFMON, "CAP_BPF": CAP_BPF}
_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
FOREIGN_MARKS = ("daemon.py", "pidfile.py")  # of python-daemon, which also installs a package `daemon`


class StartError(Exception):
    """The daemon cannot start; the text is one line for a person."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


# What the settings mean to the parts


def failsafes(config: Config) -> tuple[Failsafe, ...]:
    """The configured list, and the way to the store: the daemon must not cut what it recovers by."""
    found = [_failsafe(one) for one in config.failsafes]
    ports = set(etcd_settings(config.etcd).ports) if config.etcd else set()
    if config.clusters_dir:
        ports |= {DEFAULT_PORT, *meshdir.ports(config.clusters_dir)}
    found += [Failsafe(Direction.EGRESS, Proto.TCP, port) for port in sorted(ports)]
    return tuple(dict.fromkeys(found))


def _failsafe(entry: FailsafeEntry) -> Failsafe:
    return Failsafe(
        Direction[entry.direction.upper()],
        Proto[entry.protocol],
        entry.port,
        tuple(map(parse_prefix, entry.cidrs)),
    )


def compile_settings(config: Config) -> CompileSettings:
    """What the compiler has to know."""
    return CompileSettings(
        mode=config.enforcement,
        cluster_name=config.cluster_name,
        default_local_cluster=config.default_local_cluster,
        node_selector_labels=config.node_selector_labels,
        failsafe=failsafes(config),
        exempt_ports=config.node_ports.exempt,
        reject=config.denied == "reject",
    )


def program_settings(config: Config) -> ProgramSettings:
    """What the data path has to know."""
    return ProgramSettings(
        pins=config.pins,
        compile=compile_settings(config),
        sizes=sizes(config),
    )


def sizes(config: Config) -> Sizes:
    """Map sizes as the loader takes them."""
    return Sizes(**config.map_sizes.model_dump())


def store(config: Config) -> KV:
    """The shared etcd, or the embedded store."""
    return MemoryKV() if config.etcd is None else connect(etcd_settings(config.etcd))


def etcd_settings(etcd: Etcd) -> EtcdSettings:
    """How the shared etcd is reached."""
    return EtcdSettings(**etcd.model_dump())


def connect(settings: EtcdSettings) -> KV:
    """A client of an etcd, which connects when it is used."""
    from clustermesh.etcd import EtcdKV  # noqa: PLC0415 - 20 MiB of gRPC that not everyone needs

    return EtcdKV(settings)


def record_settings(config: Config) -> RecordSettings:
    """Where and how much of the flows is kept."""
    record = config.record
    return RecordSettings(
        config.state_dir / "flows", record.max_mib << 20, record.max_age_h * 3600, record.rate
    )


def hubble_settings(config: Config) -> HubbleSettings:
    """The sockets of the Hubble API; gRPC's own lies beside the control socket."""
    hubble = config.hubble
    return HubbleSettings(
        config.run_dir / "hubble.sock",
        config.run_dir / "hubble-grpc.sock",
        config.socket_group,
        hubble.listen,
        hubble.cert,
        hubble.key,
        hubble.client_ca,
    )


def failsafe_text(one: Failsafe) -> str:
    """`ingress TCP/22`, and from where if that is narrowed."""
    peers = f" {', '.join(prefix.cidr for prefix in one.prefixes)}" if one.prefixes else ""
    return f"{one.direction} {one.proto.name}/{one.port}{peers}"


# The daemon


class Daemon:
    """All parts, wired. `run` returns when it is asked to stop."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.tables = Tables()
        self._notify = Notify()
        self._tasks = Tasks(self._task_state)
        self._watch = LoopWatch(self._notify.alive, (watchdog_s() or 3.0) / 3)
        self._stop = asyncio.Event()
        self._kv = store(config)
        self._shared = Shared(
            Arrival(self.tables), stores=etcd_settings(config.etcd).hosts if config.etcd else ()
        )
        self._mesh = self._mesh_source("etcd" if config.etcd else "embedded store (no etcd)", self._kv)
        self._publisher = self._mesh_publisher()
        self._remotes = self._mesh_files(config.clusters_dir) if config.clusters_dir else None
        self._files = PolicyFiles(
            self.tables,
            config.policy_dir,
            config.state_dir,
            language=LanguageSettings(
                node_selector_labels=config.node_selector_labels, allow_unenforced=config.allow_unenforced
            ),
            owner_check=config.policy_owner_check,
        )
        self._host = HostSource(
            self.tables,
            name=config.node_name,
            cluster=config.cluster_name,
            cluster_id=config.cluster_id,
            labels=config.node_labels,
            node_file=config.node_file,
            owner_check=config.policy_owner_check,
        )
        self._audit = AuditSwitch(
            self.tables, config.state_dir, host=config.audit, policies=config.audit_policies
        )
        self._devices = Devices(self.tables, config.pins, config.devices, XdpMode(config.xdp))
        self._program = Program(self.tables, program_settings(config), self._devices)
        self._usage = RuleUsage(self.tables, config.pins, config.state_dir)
        self._tables_watch = Watch(self.tables, config.pins, sizes(config), self._program.pressure)
        self._pipeline = FlowPipeline(self.tables, config.pins, capacity=config.flows)
        self._audit_log = AuditLog(config.state_dir / "audit", config.audit_log_days)
        self._api = app.Api(config.socket, config.socket_group, self._routes(), self._audit_log)

    async def run(self) -> int:
        """Until SIGTERM or SIGINT. Tasks that die are started again; the loop itself must not fail."""
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(THREADS, "worker"))
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, self.reload)
        for name, work in self._work():
            self._tasks.start(name, work)
        await self._stop.wait()
        log.info("asked to stop; enforcement stays in place (`meshwall cleanup` removes it)")
        self._notify.stopping()
        await self._tasks.stop()
        await self._kv.close()
        return OK

    def reload(self) -> None:
        """SIGHUP: read everything outside the settings again."""
        log.info("reading policies, node file and identities again")
        self._notify.reloading()
        self._tasks.once("reload", self._reload)

    async def _reload(self) -> None:
        try:
            self._host.reread()
            await self._files.look()
        finally:
            self._notify.ready(self._summary())

    def _work(self) -> Iterator[tuple[str, Work]]:
        yield "loop watch", self._watch.run
        yield "service status", self._tell_manager
        yield "api", self._api.run
        if self.config.hubble.enabled:
            yield "hubble", HubbleApi(hubble_settings(self.config), self._pipeline, self.tables).run
        yield "host", self._host.run
        yield "policy files", self._files.run
        yield from self._mesh_work()
        keeper = Keeper(self.tables, self.config.state_dir, self._program.passed, self._program.save)
        yield "last good state", keeper.run
        yield "rule usage", self._usage.run
        changed = changes.PolicyChanges(self.tables, lambda: self._program.settings.compile, self._audit_log)
        yield "audit log", changed.run
        yield "flows", self._pipeline.run
        if self.config.record.enabled:
            yield "record", Recorder(record_settings(self.config), self._pipeline, self.tables).run
        yield "devices", self._devices.run
        yield "watch", self._tables_watch.run
        yield "own addresses", self._program.follow_own
        yield "data path", self._program.run

    def _mesh_work(self) -> Iterator[tuple[str, Work]]:
        config = self.config
        most = config.max_connected_clusters
        yield "mesh", self._mesh.run
        if self._remotes is not None:
            yield "mesh files", self._remotes.run
        if config.etcd is None:
            file = IdentitiesFile(
                config.identities_file,
                self._kv,
                self.tables,
                cluster_name=config.cluster_name,
                cluster_id=config.cluster_id,
                clusters=config.clusters,
                max_clusters=most,
            )
            yield "identities file", file.run
        if self._publisher is not None:
            workloads = WorkloadFiles(
                self.tables,
                self._publisher.publisher,
                config.workloads_dir,
                config.state_dir,
                cluster=config.cluster_name,
                owner_check=config.policy_owner_check,
            )
            self._publisher.on_numbers(workloads.numbers_changed)
            yield "workload files", workloads.run
            yield "mesh publish", self._publisher.run
        services = ServiceFiles(
            self.tables,
            self._publisher.publisher if self._publisher is not None else None,
            config.services_dir,
            config.state_dir,
            cluster=config.cluster_name,
            cluster_id=config.cluster_id,
            announce=config.etcd is not None,
            owner_check=config.policy_owner_check,
        )
        yield "service files", services.run

    def _mesh_publisher(self) -> MeshPublisher | None:
        """The writer of the store: workloads, and in a shared one also this host and its cluster."""
        config = self.config
        if config.etcd is not None and not (config.publish and config.cluster_id):
            return None
        member = Member(
            config.cluster_name,
            config.cluster_id,
            config.node_name,
            config.max_connected_clusters,
            announce=config.etcd is not None,
        )
        return MeshPublisher(
            self.tables,
            self._kv,
            member,
            state_dir=config.state_dir,
            boot_id=_boot_id(),
            expect=(WORKLOADS, SERVICES),
        )

    def _mesh_source(self, name: str, kv: KV, only: str = "") -> MeshSource:
        """The source of a store: the shared one, or that of one cluster."""
        config = self.config
        persistent = bool(only or config.etcd)
        return MeshSource(
            self.tables,
            kv,
            cluster_name=config.cluster_name,
            cluster_id=config.cluster_id,
            clusters=config.clusters,
            max_clusters=config.max_connected_clusters,
            prefixes=config.cluster_prefixes,
            protected=config.protected_prefixes,
            only=only,
            name=name,
            shared=self._shared,
            keep=config.state_dir / "mesh" / (only or "_shared") if persistent else None,
            stale_after_s=config.remote_stale_after,
        )

    def _mesh_files(self, directory: Path) -> MeshDirectory:
        return MeshDirectory(
            self.tables,
            directory,
            own_cluster=self.config.cluster_name,
            shared=self._shared,
            build=lambda name, kv: self._mesh_source(f"the etcd of {name}", kv, name),
            connect=connect,
            took_over=self._mesh.leave,
            gave_back=self._mesh.follower.list_again,
            owner_check=self.config.policy_owner_check,
        )

    async def _accept_deletions(self, cluster: str) -> int:
        """Believe what a cluster deleted and is held; how many keys."""
        held = await self._mesh.accept(cluster)
        return held + (await self._remotes.accept(cluster) if self._remotes else 0)

    def _routes(self) -> Iterator[web.RouteDef]:
        config = self.config
        glance = status.StatusSource(
            tables=self.tables,
            pins=config.pins,
            failsafe=[failsafe_text(one) for one in failsafes(config)],
            stalls=self._watch.stalls,
            mode=config.enforcement,
        )
        yield from status.routes(glance)
        users = self._publisher.users if self._publisher else None
        yield from resources.routes(self.tables, config.pins, self._files.accept_empty, users)
        yield from audit.routes(self.tables, self._audit.set)
        yield from mesh.routes(self.tables, self._accept_deletions)
        yield from services.routes(self.tables, config.cluster_name)
        yield from report.routes(self.tables, self._usage)
        yield from changes.routes(self._audit_log)
        yield from subject.routes(
            self.tables,
            lambda: replace(compile_settings(config), audit_policies=audited(self.tables).policies),
        )
        kept = record_settings(config).directory if config.record.enabled else None
        yield from flows.routes(self._pipeline, kept)
        yield from metrics.routes(self._pipeline, self.tables, self._watch.stalls)

    # -- what others see of us

    def _task_state(self, name: str, reason: str | None) -> None:
        key = f"task:{name}"
        if reason is None:
            self.tables.status.delete(key)
        else:
            hint = "it is started again by itself; the journal of meshwalld has the details"
            self.tables.status.put(key, StatusRow(ok=False, text=reason, hint=hint))

    async def _tell_manager(self) -> None:
        """READY once the data path says something, then the state in one line whenever it changes."""
        await self._api.listening.wait()
        wake = asyncio.Event()
        reader = self.tables.status.reader(wake)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(READY_WITHIN_S):
                while not self._settled():
                    await wake.wait()
                    wake.clear()
        gc.collect()  # what starting up left: 16 MiB of map copies among it
        told = self._summary()
        self._notify.ready(told)
        log.info("ready: %s", told)
        memory.trim()
        while True:
            await wake.wait()
            wake.clear()
            reader.take()
            if (text := self._summary()) != told:
                told = text
                self._notify.status(text)
            await asyncio.sleep(1)

    def _settled(self) -> bool:
        row = self.tables.status.get("datapath")
        return row is not None and row.ok

    def _summary(self) -> str:
        row = self.tables.status.get("datapath")
        wrong = sorted(name for name, one in self.tables.status.rows.items() if not one.ok)
        text = row.text if row else "starting"
        policies = f"{len(self.tables.policies)} policies"
        return f"{text}; {policies}" + (f"; look at: {', '.join(wrong)}" if wrong else "")


def _boot_id() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ""


# Before the first task


def check_privileges() -> None:
    """Raises StartError (3) with what is missing and how to get it."""
    effective = 0
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("CapEff:"):
            effective = int(line.split()[1], 16)
    missing = [
        name
        for name, bit in NEEDED.items()
        if not effective >> bit & 1 and (bit == CAP_NET_ADMIN or not effective >> CAP_SYS_ADMIN & 1)
    ]
    if missing:
        text = f"missing privileges: {', '.join(missing)}; run as root or by the meshwalld unit"
        raise StartError(MISSING, text)


def check_kernel() -> None:
    """Raises StartError (3) naming the feature that the kernel lacks."""
    try:
        probe()
    except (MissingFeatureError, OSError) as error:
        raise StartError(MISSING, f"this kernel or container cannot run the data path: {error}") from None


def foreign_package(own: Path, search: Sequence[str]) -> Path | None:
    """Another distribution's `daemon` mixed into our package, or found before it on the path."""
    for name in FOREIGN_MARKS:
        if (own / name).exists():
            return own / name
    for entry in search:
        where = Path(entry or ".").resolve()
        if where == own.parent:
            return None
        for other in (where / "daemon" / "__init__.py", where / "daemon.py"):
            if other.exists():
                return other
    return None


def check_packages() -> None:
    """Raises StartError when another `daemon` package is in the way."""
    other = foreign_package(Path(__file__).resolve().parent, sys.path)
    if other:
        text = f"another package `daemon` is in the way: {other}; install meshwall into an environment of its own"
        raise StartError(BAD_SETTINGS, text)


@contextlib.contextmanager
def only_one(run_dir: Path) -> Iterator[None]:
    """Two daemons on one run directory would undo each other's work. Raises StartError."""
    path = run_dir / "meshwalld.lock"
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StartError(FAILED, f"{path}: {error.strerror}") from None
    with os.fdopen(handle, "r+", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            who = file.read().strip() or "unknown"
            raise StartError(FAILED, f"another meshwalld (pid {who}) runs with {run_dir}") from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def prepare_directories(config: Config) -> None:
    """Raises StartError naming the directory that cannot be made."""
    try:
        app.prepare_directory(config.run_dir, config.socket_group)
        config.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        keep_compiled(config.state_dir)
    except OSError as error:
        raise StartError(FAILED, f"{error.filename}: {error.strerror}") from None


def start_logging(level: str) -> None:
    """To stderr: with priorities for the journal, with times for people."""
    handler = logging.StreamHandler()
    if os.environ.get("JOURNAL_STREAM"):
        handler.setFormatter(_JournalFormatter("%(name)s: %(message)s"))
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler])


class _JournalFormatter(logging.Formatter):
    """Prefixes every line with its syslog priority."""

    def format(self, record: logging.LogRecord) -> str:
        prefix = f"<{_PRIORITIES.get(record.levelno, 6)}>"
        return "\n".join(prefix + line for line in super().format(record).splitlines())


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="meshwalld",
        description="Host firewall and cluster mesh. Stopping it leaves enforcement in place.",
        epilog="Settings: /etc/meshwall/meshwall.yaml and MESHWALL_*; see docs/configuration.md.",
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="settings (default /etc/meshwall/meshwall.yaml)"
    )
    parser.add_argument(
        "--check-config", action="store_true", help="read the settings, say what is wrong, and end"
    )
    parser.add_argument("--version", action="version", version=f"meshwalld {status.program_version()}")
    return parser.parse_args(argv)


async def _serve(config: Config) -> int:
    return await Daemon(config).run()


def main(argv: Sequence[str] | None = None) -> int:
    """The program `meshwalld`."""
    options = _arguments(argv)
    try:
        check_packages()
        config = load(options.config)
        if options.check_config:
            return OK
        start_logging(config.log_level)
        check_privileges()
        check_kernel()
        prepare_directories(config)
        with only_one(config.run_dir):
            memory.keep_small()
            gc.freeze()  # modules are never garbage
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                return runner.run(_serve(config))
    except ConfigError as error:
        print("\n".join(f"meshwalld: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return BAD_SETTINGS
    except StartError as error:
        print(f"meshwalld: {error}", file=sys.stderr)
        return error.code


if __name__ == "__main__":
    sys.exit(main())

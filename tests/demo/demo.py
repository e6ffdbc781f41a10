"""`./dev demo`: the kubelet rule on two clusters of namespaces, with real connections. Exit 0: all held.

./dev demo           show it, clean up
./dev demo --keep    show it, leave it up, print commands to try
./dev demo --down    remove what --keep (or a crash) left
"""

import argparse
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, NoReturn

import world
from places import (
    A1,
    A2,
    B1,
    BASE,
    HOSTS,
    KUBELET,
    NETWORK,
    NEWCOMER,
    NODE_EXPORTER,
    PODS,
    SSH,
    Host,
    Pair,
    Pod,
)
from world import DemoError

from bpf import features

POLICY = "host-firewall-allow-metrics-server-to-kubelet"
PATIENCE_S = 1.5  # for a connection: beyond the first retransmission of a SYN
PORT_NAMES = {KUBELET: "kubelet", NODE_EXPORTER: "node-exporter", SSH: "ssh"}

Seen = dict[tuple[str, int], str]  # caller and port -> what became of its connections


class Caller(NamedTuple):
    """Somebody who connects to a1."""

    name: str
    who: str
    namespace: str
    address: Pair
    metrics_server: bool


class Check(NamedTuple):
    """One expectation of the final table."""

    what: str
    expected: str
    seen: str

    @property
    def held(self) -> bool:
        return self.expected == self.seen


def host_caller(host: Host) -> Caller:
    return Caller(f"{host.cluster} host {host.name}", "remote-node", host.namespace, host.address, False)


def pod_caller(pod: Pod) -> Caller:
    metrics_server = pod.service_account == "metrics-server"
    return Caller(
        f"{pod.host.cluster} {pod.name}",
        str(pod.identity),
        pod.host.pod_namespace,
        pod.address,
        metrics_server,
    )


CALLERS = (host_caller(A2), *map(pod_caller, PODS[:2]), host_caller(B1), *map(pod_caller, PODS[2:]))


# --- showing


class Paint:
    """Colours where a person looks, plain text elsewhere."""

    on = sys.stdout.isatty() and "NO_COLOR" not in os.environ

    @classmethod
    def text(cls, code: str, text: str) -> str:
        return f"\033[{code}m{text}\033[0m" if cls.on else text

    @classmethod
    def verdict(cls, text: str, width: int = 0) -> str:
        code = {"passes": "32", "dropped": "31"}.get(text, "33")
        return cls.text(code, text.ljust(width))


def head(text: str) -> None:
    print(f"\n{Paint.text('1', '== ' + text)}", flush=True)


def say(text: str) -> None:
    print(text, flush=True)


def show_table(seen: Seen) -> None:
    ports = "".join(f"{PORT_NAMES[port] + ' ' + str(port):<22}" for port in world.PORTS)
    say(f"   {'FROM':<24}{'IDENTITY':<14}{ports.rstrip()}")
    for caller in CALLERS:
        cells = "".join(Paint.verdict(seen[caller.name, port], 22) for port in world.PORTS)
        say(f"   {caller.name:<24}{caller.who:<14}{cells.rstrip()}")


# --- looking


def outcome(caller: Caller, port: int) -> str:
    """What becomes of a connection in each family; one word if both agree."""
    words = []
    for source, target in zip(caller.address, A1.address, strict=True):
        try:
            through = world.connected(caller.namespace, source, target, port, PATIENCE_S)
        except OSError as error:
            words.append(error.strerror or str(error))
        else:
            words.append("passes" if through else "dropped")
    return words[0] if words[0] == words[1] else f"v4 {words[0]}, v6 {words[1]}"


def look() -> Seen:
    """Everybody connects to everything, at once."""
    pairs = [(caller, port) for caller in CALLERS for port in world.PORTS]
    with ThreadPoolExecutor(len(pairs)) as pool:
        found = pool.map(lambda pair: outcome(*pair), pairs)
    return {(caller.name, port): text for (caller, port), text in zip(pairs, found, strict=True)}


def wanted(caller: Caller, port: int) -> str:
    """What the policy says: metrics-server to the kubelet, and ssh as a failsafe port."""
    return "passes" if port == SSH or (port == KUBELET and caller.metrics_server) else "dropped"


def asked(host: Host, *arguments: str) -> Any:
    """Decoded JSON of a command, None when it failed."""
    done = world.meshwall(host, *arguments, "-o", "json")
    try:
        return json.loads(done.stdout) if done.returncode == 0 else None
    except ValueError:
        return None


def knows_everyone(host: Host) -> bool:
    """Is it in charge of its device, and has it read all pods from the etcd?"""
    status = asked(host, "status")
    if not status or not status["enforcement"]["ok"] or not all(one["ok"] for one in status["devices"]):
        return False
    listed = json.dumps(asked(host, "ipcache", "list"))
    return all(address in listed for pod in PODS for address in pod.address)


def until_ready(host: Host) -> None:
    what = f"meshwalld on {host.name} to know all pods"
    world.wait_for(what, f"meshwalld-{host.name}", lambda: knows_everyone(host), 60)


def first_time(through: bool, pod: Pod) -> float:
    """The moment (monotonic clock) from which a pod gets through to the kubelet, or no longer does."""
    source, target = pod.address.v4, A1.address.v4
    deadline = time.monotonic() + 10
    while (started := time.monotonic()) < deadline:
        if world.connected(pod.host.pod_namespace, source, target, KUBELET, 0.05) is through:
            return time.monotonic() if through else started
    return float("inf")


# --- the story


def preflight() -> None:
    if os.geteuid() != 0:
        raise DemoError("the demo needs root")
    for tool in ("etcd", "ip", "nsenter", "umount"):
        if not shutil.which(tool):
            raise DemoError(f"{tool} is not installed; ./dev demo installs it")
    try:
        found = features.probe()
    except (OSError, features.MissingFeatureError) as error:
        raise DemoError(f"this kernel or container refuses BPF: {error}") from error
    say(f"   kernel {os.uname().release}: BPF works, {'TCX' if found.tcx else 'no TCX, clsact is used'}")


def build() -> None:
    head("Two clusters on this machine")
    say("   alpha: hosts a1 and a2; beta: host b1. Each host is a network namespace, all on one bridge;")
    say("   pods live behind a2 and b1. A real etcd is shared by both clusters.")
    preflight()
    if world.leftovers():
        say("   removing what an earlier demo left")
        world.teardown()
    world.build()
    world.serve()
    world.etcd_start()
    world.store("fill")
    world.start("heartbeat", world.store_arguments("beat"))
    say("   namespaces, etcd and the listening ports of a1 are up; identities and addresses are in etcd")
    for host in HOSTS:
        world.daemon_start(host)
    for host in HOSTS:
        until_ready(host)
    say("   one meshwalld per host is up and has read the mesh")


def apply_policy() -> None:
    """As an administrator would: a file appears in the directory."""
    target = A1.directory / "policies.d" / "kubelet.yaml"
    text = (world.HERE / "policy.yaml").read_text(encoding="utf-8")
    partial = target.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    renamed = time.monotonic()
    partial.rename(target)
    say("\n".join(f"   | {line}" for line in text.splitlines()))
    took = first_time(False, PODS[1]) - renamed
    if took > 10:
        raise DemoError(f"the policy is not in force after 10 s\n{world.log_tail(f'meshwalld-{A1.name}')}")
    say(f"   in force {took * 1000:.0f} ms after the file appeared")


def drops() -> Check:
    """Do the reported drops say who, by which labels, and because of what?"""
    done = world.meshwall(A1, "observe", "--verdict", "DROPPED", "--last", "4")
    say("\n".join(f"   {line}" for line in (done.stdout + done.stderr).splitlines()))
    reported = world.meshwall(A1, "observe", "--verdict", "DROPPED", "--last", "500", "-o", "json").stdout
    flows = [json.loads(line) for line in reported.splitlines() if line.startswith("{")]
    rows = {row.identity: row for row in map(drop_row, flows)}  # the newest of each identity
    say("\n   The newest drop of each identity, from -o json:")
    for row in rows.values():
        say(f"   {row.identity}  {', '.join(row.labels)}")
        say(f"      port {row.port}: {row.rule}; restricted by {', '.join(row.policies)}")
    row = rows.get(PODS[3].identity, DropRow(0, (), 0, "", ()))
    complete = set(PODS[3].labels) <= set(row.labels) and POLICY in row.policies and row.rule
    what = "drops of beta web are reported with identity, labels, policy and rule"
    return Check(what, "yes", "yes" if complete else f"no ({len(flows)} drops)")


class DropRow(NamedTuple):
    """What one reported drop says."""

    identity: int
    labels: tuple[str, ...]
    port: int
    rule: str
    policies: tuple[str, ...]


def drop_row(line: dict[str, Any]) -> DropRow:
    flow, ours = line.get("flow", {}), line.get("meshwall", {})
    source = flow.get("source", {})
    return DropRow(
        source.get("identity", 0),
        tuple(source.get("labels", ())),
        flow.get("l4", {}).get("TCP", {}).get("destination_port", 0),
        ours.get("rule_name", ""),
        tuple(ours.get("restricted_by", ())),
    )


def newcomer() -> list[Check]:
    """An identity appears in etcd, and later its address leaves; nobody tells a1."""
    source, target = NEWCOMER.address.v4, A1.address.v4
    if world.connected(NEWCOMER.host.pod_namespace, source, target, KUBELET, 0.3):
        raise DemoError(f"{source} got through before the mesh knew it")
    say(f"   {source} is unknown to the mesh: dropped. Now beta writes to etcd:")
    add = ["add", str(NEWCOMER.identity), *NEWCOMER.address]
    opened = changed_after(lambda: world.store(*add), True)
    say(f"   identity {NEWCOMER.identity}, {NEWCOMER.labels[1]}")
    say(f"   address {source}: through {opened * 1000:.0f} ms after the write, unattended")
    closed = changed_after(lambda: world.store("remove", *NEWCOMER.address), False)
    say(f"   its address is deleted from etcd: dropped again {closed * 1000:.0f} ms later")
    return [
        Check("a new identity in etcd has access within 1 s, unattended", "yes", in_time(opened)),
        Check("an address deleted from etcd loses it within 1 s", "yes", in_time(closed)),
    ]


def changed_after(write: Callable[[], float], through: bool) -> float:
    """Seconds from a write into etcd to its effect on the newcomer's connections."""
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        changed = first_time(through, NEWCOMER)
        return changed - writing.result()


def in_time(seconds: float) -> str:
    return "yes" if seconds <= 1 else f"no ({seconds:.1f} s)"


def outgoing() -> str:
    """a1's own connection to the etcd port: replies must pass the policy."""
    try:
        world.reach_store(A1.namespace)
    except OSError as error:
        return error.strerror or "timed out"
    return "passes"


def story() -> bool:
    """Everything in order; did every expectation hold?"""
    build()
    checks: list[Check] = []
    phases: dict[str, Seen] = {}

    head("Before: no policy, everybody reaches a1")
    phases["before"] = look()
    show_table(phases["before"])

    head("The policy, dropped into a1's policies.d")
    apply_policy()
    phases["policy"] = look()
    show_table(phases["policy"])
    checks.append(Check("a1 itself still reaches the etcd (replies pass)", "passes", outgoing()))

    head("What was dropped: meshwall observe --verdict DROPPED")
    checks.append(drops())

    head("A new identity appears in the mesh")
    checks += newcomer()

    head("etcd is stopped: nothing changes")
    world.stop("etcd")
    phases["no etcd"] = look()
    show_table(phases["no etcd"])

    head("meshwalld of a1 is killed (-9): nothing changes")
    world.stop(f"meshwalld-{A1.name}", signal.SIGKILL)
    phases["no daemon"] = look()
    show_table(phases["no daemon"])

    return summary(phases, checks)


def summary(phases: dict[str, Seen], checks: Sequence[Check]) -> bool:
    """The final table, without colour."""
    head("Expected and seen")
    held = True
    say(f"   {'FROM':<24}{'PORT':<8}" + "".join(f"{name:<11}" for name in phases) + f"{'EXPECTED':<20}HELD")
    for caller in CALLERS:
        for port in world.PORTS:
            then = wanted(caller, port)
            expected = ["passes"] + [then] * (len(phases) - 1)
            seen = [found[caller.name, port] for found in phases.values()]
            held &= seen == expected
            cells = "".join(f"{text:<11}" for text in seen)
            answer = "yes" if seen == expected else "NO"
            say(f"   {caller.name:<24}{port:<8}{cells}{'passes, then ' + then:<20} {answer}".rstrip())
    for check in checks:
        held &= check.held
        say(f"   {check.what:<72}{check.expected:<8}{check.seen:<10}{'yes' if check.held else 'NO'}")
    say("\nEvery expectation held." if held else "\nNOT every expectation held.")
    return held


def back_to_work() -> None:
    """For --keep: etcd and the killed daemon run again."""
    world.etcd_start()
    world.daemon_start(A1)
    until_ready(A1)


def print_commands() -> None:
    enter = f"nsenter --net=/run/netns/{PODS[3].host.pod_namespace}"
    program = ".venv/bin/meshwall"
    socket = f"--socket {A1.socket}"
    store = f"nsenter --net=/run/netns/{NETWORK} .venv/bin/python tests/demo/store.py"
    newcomer_address, web = NEWCOMER.address.v4, PODS[3].address.v4
    say(
        f"""
It is still up. To try:

  {program} status {socket}
  {program} policy list {socket}
  {program} ipcache list {socket}
  {program} observe -f {socket}                              # and in another terminal:
  {enter} bash -c 'exec 3<>/dev/tcp/{A1.address.v4}/{KUBELET}'       # from {web} or the other addresses
  {store} add {NEWCOMER.identity} {newcomer_address}   # a new pod; `remove {newcomer_address}` takes it away
  $EDITOR {A1.directory}/policies.d/kubelet.yaml        # a saved change is in force at once
  ls {BASE}/log                                   # what the daemons say

  ./dev demo --down                                     # removes everything"""
    )


# --- the command


def interrupted(number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt(signal.Signals(number).name)


def clean_up() -> None:
    for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(one, signal.SIG_IGN)  # a second Ctrl-C must not leave half of it
    world.teardown()


def show(keep: bool) -> int:
    """Run the story; exit status 0 held, 1 not held, 2 it could not be shown, 130 interrupted."""
    status = 2
    try:
        status = 0 if story() else 1
        if keep:
            back_to_work()
            print_commands()
    except (DemoError, OSError) as error:
        print(f"\ndemo: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("\ndemo: interrupted, cleaning up", file=sys.stderr)
        status, keep = 130, False
    finally:
        if not keep or status == 2:
            clean_up()
    return status


def main() -> int:
    parser = argparse.ArgumentParser(prog="./dev demo", description=(__doc__ or "").partition("\n")[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--keep", action="store_true", help="leave it up and print commands to try")
    what.add_argument("--down", action="store_true", help="remove what an earlier demo left")
    arguments = parser.parse_args()
    for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # SIGINT too: it may be ignored by inheritance
        signal.signal(one, interrupted)
    try:
        with world.lock():
            if arguments.down:
                clean_up()
                return 0
            return show(arguments.keep)
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

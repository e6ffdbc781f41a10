"""Policy compiler figures: full compile, one identity, one policy, a large CIDR group, against the naive walk.

Run as `python tests/bench/policy.py [--json]`; exit status 1 when a limit is missed.
"""

import argparse
import gc
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from daemon.model.identity import Identity, reserved_labels
from daemon.model.labels import Label, LabelSet
from daemon.model.net import Direction
from daemon.model.rule import LabelSelector, Policy, PortRange, Rule
from daemon.policy.ccnp import parse_cidr_list, parse_documents
from daemon.policy.compile import CompileSettings, Subject, add_identities, compile_policy
from daemon.policy.matching import matches

HOST = Subject(Identity(1), frozenset({Label("reserved", "host"), Label("k8s", "zone", "z1")}))
NAMESPACE = "io.kubernetes.pod.namespace"
PORTS = (22, 53, 80, 179, 443, 2379, 2380, 4240, 5432, 6443, 8080, 8443, 9090, 9100, 9443, 10250, 10256)


def identities(count: int) -> dict[Identity, LabelSet]:
    """Reserved ones and pods of 4 clusters, 100 namespaces and 1,000 applications, each with labels of its own."""
    found = {Identity(number): reserved_labels(Identity(number)) for number in range(1, 11)}
    for at in range(count - len(found)):
        app = at * 7919 % 1000
        texts = {
            NAMESPACE: f"ns-{app % 100}",
            "io.cilium.k8s.policy.cluster": f"c{at % 4}",
            "io.cilium.k8s.policy.serviceaccount": f"sa-{app % 250}",
            "app": f"app-{app}",
            "tier": ("web", "data", "batch")[app % 3],
            "team": f"team-{app % 40}",
            "pod-template-hash": f"{at:x}",
        }
        found[Identity(65_536 + at)] = frozenset(Label("k8s", key, value) for key, value in texts.items())
    return found


def document(at: int) -> str:
    """One policy; eight shapes in turn: selectors by application, team and account, entities, prefixes, denies."""
    port, first = PORTS[at % len(PORTS)], 20_000 + at % 50 * 100
    values, not_web = f"app-{at % 997}, app-{at % 991}", "{key: tier, operator: NotIn, values: [web]}"
    peers = (
        f'fromEndpoints: [{{matchLabels: {{app: app-{at % 1000}, "k8s:{NAMESPACE}": ns-{at % 100}}}}}]',
        f"fromEndpoints: [{{matchLabels: {{team: team-{at % 40}}}}}]",
        f"fromEndpoints: [{{matchLabels: {{io.cilium.k8s.policy.serviceaccount: sa-{at % 250}}}}}]",
        f"fromCIDRSet: [{{cidr: 10.{at % 250}.0.0/16, except: [10.{at % 250}.7.0/24]}}]",
        f"fromEndpoints: [{{matchExpressions: [{{key: app, operator: In, values: [{values}]}}]}}]",
        f"fromCIDR: [192.0.{at % 250}.0/24, 2001:db8:{at:x}::/48]",
        "fromEntities: [remote-node]",
        f"fromEndpoints: [{{matchLabels: {{app: app-{at % 500}}}, matchExpressions: [{not_web}]}}]",
    )
    deny = "Deny" if at % 9 == 8 else ""
    return f"""apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {{name: p{at}}}
spec:
  nodeSelector: {{}}
  ingress{deny}:
  - {peers[at % len(peers)]}
    toPorts:
    - ports: [{{port: "{port}", protocol: TCP}}, {{port: "{first}", endPort: {first + 50}, protocol: UDP}}]
"""


def measured(work: Callable[[], object], rounds: int = 5) -> float:
    """Best of some rounds in seconds of processor time: the machine is shared."""
    best = float("inf")
    for _ in range(rounds):
        gc.collect()
        started = time.process_time()
        work()
        best = min(best, time.process_time() - started)
    return best


def resident_mb() -> float:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Figure(NamedTuple):
    """One measurement with its limit."""

    name: str
    value: float
    unit: str
    limit: float

    @property
    def good(self) -> bool:
        return self.value <= self.limit


def naive_walk(policies: list[Policy], labels: LabelSet, proto: int, port: int) -> str:
    """The baseline: every rule of every policy asked about one packet, as an iptables-like list would."""
    verdict = "deny"
    for policy in policies:
        for spec in policy.specs:
            for rule in spec.rules:
                if rule.direction is not Direction.INGRESS or not _asks_for(rule, proto, port):
                    continue
                if any(isinstance(one, LabelSelector) and matches(one, labels) for one in rule.peers or ()):
                    if rule.deny:
                        return "deny"
                    verdict = "allow"
    return verdict


def _asks_for(rule: Rule, proto: int, port: int) -> bool:
    return rule.ports is None or any(
        isinstance(one, PortRange) and one.proto == proto and one.first <= port <= one.last
        for one in rule.ports
    )


def full_compile(count: int = 65_535, policies: int = 1_000) -> list[Figure]:
    """Compile from scratch, one identity, one policy, and one look-up against the naive walk."""
    parsed = [parse_documents(document(at), f"p{at}.yaml").policies[0] for at in range(policies)]
    universe = identities(count)
    before = resident_mb()
    settings = CompileSettings()
    compiled = compile_policy(parsed, {}, HOST, universe, settings)
    memory = resident_mb()
    scratch = measured(lambda: compile_policy(parsed, {}, HOST, universe, settings), 3)

    changed = [*parsed, parse_documents(document(policies), "more.yaml").policies[0]]
    changed_again = [*changed, parse_documents(document(policies + 3), "more.yaml").policies[0]]
    steps = iter([changed, changed_again, parsed] * 4)
    one_policy = measured(
        lambda: compile_policy(next(steps), {}, HOST, universe, settings, previous=compiled), 9
    )

    numbers = iter(range(1_000_000, 2_000_000))
    templates = list(universe.values())[20:]
    tables = compiled
    rounds = 2_000
    started = time.process_time()
    for at in range(rounds):
        tables = add_identities(tables, {Identity(next(numbers)): templates[at * 31 % len(templates)]}, [])
    one_identity = (time.process_time() - started) / rounds

    sample = list(universe)[:: len(universe) // 50]
    naive = measured(lambda: [naive_walk(parsed, universe[one], 6, 10250) for one in sample], 3) / len(sample)
    matrix, rows = compiled.ingress, compiled.identities
    look_up = measured(lambda: [matrix.cell(rows[one].ingress, 6, 10250) for one in sample * 100], 3) / 5_000
    cells = len(matrix.rows) * matrix.columns.count
    print(
        f"{len(universe)} identities, {len(parsed)} policies: {len(matrix.rows)} rows x {matrix.columns.count} columns"
        f" = {cells} cells; identities and policies alone {before:.0f} MB; naive walk {naive * 1e6:.0f} us a packet,"
        f" table {look_up * 1e6:.2f} us ({naive / look_up:.0f} times), both in Python"
    )
    return [
        Figure("full compile", scratch, "s", 1.5),
        Figure("resident after compile", memory, "MB", 350),
        Figure("one identity", one_identity * 1e3, "ms", 0.3),
        Figure("one policy", one_policy * 1e3, "ms", 30),
    ]


def large_group(count: int = 1_000_000) -> list[Figure]:
    """A list of prefixes read, compiled and kept."""
    text = "\n".join(f"{11 + (at >> 16)}.{at >> 8 & 255}.{at & 255}.7" for at in range(count))
    policy = parse_documents(
        """apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: blocked}
spec:
  nodeSelector: {}
  enableDefaultDeny: {ingress: false}
  ingressDeny:
  - fromCIDRSet: [{cidrGroupRef: blocked}]
""",
        "blocked.yaml",
    ).policies
    started = time.process_time()
    groups = {one.name: one for one in parse_cidr_list(text, "blocked.cidrs").groups}
    loaded = time.process_time() - started
    tables = compile_policy(policy, groups, HOST, {}, CompileSettings())
    took = time.process_time() - started
    print(
        f"{len(groups['blocked'].prefixes)} prefixes: read in {loaded:.1f} s, {len(tables.prefixes)} prefixes in "
        f"{len(tables.groups)} groups, {len(tables.ingress.rows)} rows"
    )
    return [
        Figure("group of 1,000,000 prefixes", took, "s", 15),
        Figure("resident with the group", resident_mb(), "MB", 500),
        Figure("groups for it", len(tables.groups), "", 4),
    ]


def main() -> int:
    """Each part in a process of its own, so that peaks of memory are its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="figures as JSON")
    parser.add_argument("--part", choices=["compile", "group"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        figures = full_compile() if options.part == "compile" else large_group()
        print(json.dumps([[*one, one.good] for one in figures]))
        return 0
    found = []
    for part in ("compile", "group"):
        command = [sys.executable, __file__, "--part", part]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        if not options.json:
            print("\n".join(output[:-1]))
        found += json.loads(output[-1])
    if options.json:
        print(
            json.dumps(
                [dict(zip(("name", "value", "unit", "limit", "good"), one, strict=True)) for one in found]
            )
        )
    else:
        for name, value, unit, limit, good in found:
            print(f"{name:28} {value:10.3f} {unit:3} limit {limit:g} {'ok' if good else 'MISSED'}")
    return 0 if all(one[-1] for one in found) else 1


if __name__ == "__main__":
    sys.exit(main())

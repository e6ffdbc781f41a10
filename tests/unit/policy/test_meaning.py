"""The tables say what the language says: against a slow, order-free reading of documents, on generated policies.

The oracle below reads plain documents (dicts) and label texts; it shares nothing with the compiler but numbers.
"""

# ruff: noqa: E501, PLR0917, S311, SIM102
import ipaddress
import json
import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from daemon.model.identity import Identity
from daemon.model.labels import parse_labels
from daemon.model.net import Direction, Prefix, parse_prefix
from daemon.model.rule import CidrGroup
from daemon.model.verdict import CellFlag, Verdict, unpack_cell
from daemon.policy.ccnp import LanguageSettings, parse_documents
from daemon.policy.compile import Compiled, CompileSettings, Subject, add_identities, compile_policy
from daemon.policy.diff import PolicySet, differences
from daemon.policy.explain import Peer, Query, explain
from daemon.policy.tables import PORTLESS

Doc = dict[str, Any]
PROTOS = {"TCP": 6, "UDP": 17, "SCTP": 132, "ICMP": 1, "ICMPv6": 58, "GRE": 47}
NAMED = {"http": (("TCP", 80),), "dns": (("UDP", 53), ("TCP", 53))}
GROUPS = {"office": ["10.1.0.0/16", "203.0.113.7/32"], "empty": []}
CLUSTER = "alpha"
NS = "io.kubernetes.pod.namespace"
CL = "io.cilium.k8s.policy.cluster"


# The oracle


def has(labels: list[str], key: str) -> list[str]:
    """The values that a selector key finds."""
    if key.startswith("reserved."):
        key = "reserved:" + key[9:]
    source, colon, rest = key.partition(":")
    source, rest = (source, rest) if colon else ("any", key)
    if source == "cidr":
        want = ipaddress.ip_network(rest)
        nets = [ipaddress.ip_network(one.split(":", 1)[1]) for one in labels if one.startswith("cidr:")]
        return [""] if any(net.version == want.version and net.subnet_of(want) for net in nets) else []
    found = []
    for one in labels:
        head, _, value = one.partition("=")
        label_source, _, label_key = head.partition(":")
        if label_key == rest and source in ("any", label_source):
            found.append(value)
    return found


def selected(selector: Doc, labels: list[str]) -> bool:
    for key, value in selector.get("matchLabels", {}).items():
        if value not in has(labels, key):
            return False
    for one in selector.get("matchExpressions", ()):
        values, found = one.get("values", []), has(labels, one["key"])
        holds = {
            "In": any(value in values for value in found),
            "NotIn": not any(value in values for value in found),
            "Exists": bool(found),
            "DoesNotExist": not found,
        }
        if not holds[one["operator"]]:
            return False
    return True


def keys_of(selector: Doc) -> list[str]:
    return [*selector.get("matchLabels", {}), *(one["key"] for one in selector.get("matchExpressions", ()))]


def endpoint_selected(selector: Doc, labels: list[str], namespace: str, local: bool) -> bool:
    keys = keys_of(selector)
    if not selected(selector, labels):
        return False
    if any(key.startswith(("reserved:", "reserved.", "$")) for key in keys):
        return True
    plain = [key.removeprefix("k8s:").removeprefix("any:") for key in keys]
    if NS not in plain:
        if not namespace:
            if not has(labels, f"k8s:{NS}"):
                return False
        elif not any(key.startswith("io.cilium.k8s.namespace.labels.") for key in plain):
            if namespace not in has(labels, f"k8s:{NS}"):
                return False
    return not local or CL in plain or CLUSTER in has(labels, f"k8s:{CL}")


ENTITY = {
    "world": ["reserved:world", "reserved:world-ipv4", "reserved:world-ipv6"],
    "cluster": [
        f"reserved:{one}"
        for one in ("host", "remote-node", "init", "ingress", "health", "unmanaged", "kube-apiserver")
    ],
    "none": [],
}


def cidr_selected(entry: Doc, peer: Doc) -> bool:
    if "cidrGroupRef" in entry:
        return any(
            cidr_selected({"cidr": one, "except": entry.get("except", [])}, peer)
            for one in GROUPS.get(entry["cidrGroupRef"], [])
        )
    net = ipaddress.ip_network(entry["cidr"], strict=False)
    excepts = [ipaddress.ip_network(one, strict=False) for one in entry.get("except", ())]
    if "address" in peer:
        address = ipaddress.ip_address(peer["address"])
        return (
            address.version == net.version
            and address in net
            and not any(address.version == one.version and address in one for one in excepts)
        )
    if net.prefixlen == 0 and not excepts:
        return f"reserved:world-ipv{net.version}" in peer["labels"]
    for one in peer["labels"]:
        if one.startswith("cidr:"):
            mine = ipaddress.ip_network(one[5:])
            if mine.version == net.version and mine.subnet_of(net):
                if not any(mine.version == other.version and mine.overlaps(other) for other in excepts):
                    return True
    return False


def peer_selected(field: str, entries: list[Any], peer: Doc, namespace: str, local: bool) -> bool:
    labels = peer.get("labels", [])
    if "address" in peer:
        labels = [f"reserved:world-ipv{ipaddress.ip_address(peer['address']).version}"]
    kind = field.removeprefix("from").removeprefix("to")
    if kind == "Endpoints":
        return any(endpoint_selected(one, labels, namespace, local) for one in entries)
    if kind == "Entities":
        return any(
            one == "all"
            or (peer.get("known") and any(label in labels for label in ENTITY.get(one, [f"reserved:{one}"])))
            or (one == "cluster" and CLUSTER in has(labels, f"k8s:{CL}"))
            for one in entries
        )
    if kind == "CIDR":
        return any(cidr_selected({"cidr": one}, peer) for one in entries)
    if kind == "CIDRSet":
        return any(cidr_selected(one, peer) for one in entries)
    assert kind == "Nodes"
    return "reserved:remote-node" in labels and any(selected(one, labels) for one in entries)


def ports_matched(element: Doc, proto: str, port: int) -> bool:
    blocks, icmps = element.get("toPorts", []), element.get("icmps", [])
    if not blocks and not icmps:
        return True
    for block in blocks:
        for one in block.get("ports", []):
            allowed = ("TCP", "UDP", "SCTP") if one.get("protocol", "ANY") == "ANY" else (one["protocol"],)
            if proto not in allowed:
                continue
            text, end = one["port"], one.get("endPort", 0)
            if not text.isdigit():
                if (proto, port) in NAMED.get(text.lower(), ()):
                    return True
                continue
            first = int(text)
            first, last = (0, 65535) if first == 0 and not end else (first, max(first, end))
            if (first == 0 and last == 65535) or (port != PORTLESS and first <= port <= last):
                return True
    for block in icmps:
        for one in block.get("fields", []):
            family = "ICMPv6" if one.get("family", "IPv4") == "IPv6" else "ICMP"
            if family == proto and int(one["type"]) == port:
                return True
    return False


def element_matches(element: Doc, peer: Doc, proto: str, port: int, namespace: str, local: bool) -> bool:
    fields = [one for one in element if one.startswith(("from", "to")) and one != "toPorts"]
    if any(element[one] == [] for one in fields):
        return False
    if not fields and not element.get("toPorts") and not element.get("icmps"):
        return False
    if not ports_matched(element, proto, port):
        return False
    if not fields or any(element[one] == ["all"] or "all" in element[one] for one in fields):
        return True
    if not peer["known"]:
        return False
    return all(peer_selected(one, element[one], peer, namespace, local) for one in fields)


def oracle(case: Doc, direction: str, peer: Doc, proto: str, port: int) -> str:
    """`allow` or `deny`, straight from the documents."""
    if case["mode"] == "never":
        return "allow"
    enforced = default_deny = case["mode"] == "always"
    allowed = False
    for document in case["policies"]:
        namespace = document["metadata"].get("namespace", "")
        for spec in [*([document["spec"]] if "spec" in document else []), *document.get("specs", [])]:
            if not subject_selected(spec, namespace, case["subject"]):
                continue
            lists = spec.get(direction, []), spec.get(f"{direction}Deny", [])
            if not any(lists):
                continue
            enforced = True
            if spec.get("enableDefaultDeny", {}).get(direction, True):
                default_deny = True
            local = case["local"]
            if any(element_matches(one, peer, proto, port, namespace, local) for one in lists[1]):
                return "deny"
            allowed = allowed or any(
                element_matches(one, peer, proto, port, namespace, local) for one in lists[0]
            )
    if direction == "ingress" and not is_host(case) and peer.get("labels", [])[:1] == ["reserved:host"]:
        return "allow"  # this host reaches its own workloads
    return "allow" if not enforced or allowed or not default_deny else "deny"


def is_host(case: Doc) -> bool:
    return "reserved:host" in case["subject"]


def subject_selected(spec: Doc, namespace: str, labels: list[str]) -> bool:
    if "reserved:host" in labels:
        return "nodeSelector" in spec and selected(spec["nodeSelector"], labels)
    if "endpointSelector" not in spec or (namespace and namespace not in has(labels, f"k8s:{NS}")):
        return False
    return selected(spec["endpointSelector"], labels)


# Generated cases


PREFIXES = [
    "10.0.0.0/8",
    "10.1.0.0/16",
    "10.1.2.0/24",
    "10.1.2.3/32",
    "192.168.0.0/16",
    "0.0.0.0/0",
    "::/0",
    "2001:db8::/32",
    "203.0.113.0/24",
]
ADDRESSES = [
    "10.0.0.1",
    "10.1.0.1",
    "10.1.2.1",
    "10.1.2.3",
    "192.168.3.4",
    "8.8.8.8",
    "2001:db8::1",
    "2001:db9::1",
    "203.0.113.7",
]
PORTS = ["0", "22", "24", "53", "80", "443", "10250", "http", "dns", "nope"]
PACKETS = [("TCP", 22), ("TCP", 23), ("TCP", 24), ("TCP", 80), ("TCP", 443), ("TCP", 10250), ("TCP", 10260), ("UDP", 53), ("UDP", 80), ("SCTP", 22), ("SCTP", 0), ("TCP", 0), ("TCP", 65535), ("ICMP", 8), ("ICMP", 0), ("ICMPv6", 128), ("TCP", PORTLESS), ("GRE", PORTLESS)]  # fmt: skip


def identities() -> dict[int, Doc]:
    """Reserved ones, pods of two clusters, nodes with labels, outside prefixes and an API server outside."""
    found: dict[int, list[str]] = {
        1: ["reserved:host", "k8s:zone=a"], 3: ["reserved:unmanaged"], 4: ["reserved:health"], 5: ["reserved:init"],
        6: ["reserved:remote-node"], 7: ["reserved:kube-apiserver", "reserved:remote-node"], 8: ["reserved:ingress"],
        9: ["reserved:world-ipv4"], 10: ["reserved:world-ipv6"],
        1 << 24: ["cidr:10.1.0.0/16", "reserved:world-ipv4"], (1 << 24) + 1: ["cidr:10.1.2.3/32", "reserved:world-ipv4"],
        (1 << 24) + 2: ["cidr:203.0.113.7/32", "reserved:world-ipv4", "reserved:kube-apiserver"],
        2 << 24: ["reserved:remote-node", "node:zone=a", "node:role="], (2 << 24) + 1: ["reserved:remote-node", "node:zone=b"],
        (2 << 24) + 2: ["reserved:remote-node", "node:zone=b", "cidr:10.1.2.9/32"],
    }  # fmt: skip
    number = 70_000
    for cluster in (CLUSTER, "beta"):
        for namespace in ("prod", "dev"):
            for app in ("web", "db", None):
                labels = [f"k8s:{NS}={namespace}", f"k8s:{CL}={cluster}"]
                labels += [f"k8s:app={app}"] if app else ["container:app=web"]
                labels += ["k8s:tier="] if app == "db" else []
                found[number] = labels
                number += 1
    return {key: {"labels": value, "known": True} for key, value in found.items()}


IDENTITIES = identities()
PEERS = [*IDENTITIES.values(), {"labels": [], "known": False}]


class Maker:
    """Builds documents from choices of a Random, so that hypothesis can shrink them."""

    def __init__(self, rnd: random.Random) -> None:
        self.rnd = rnd

    def some(self, options: list[Any], most: int = 2, least: int = 1) -> list[Any]:
        return [self.rnd.choice(options) for _ in range(self.rnd.randint(least, most))]

    def selector(self, keys: list[tuple[str, list[str]]]) -> Doc:
        made: Doc = {}
        for _ in range(self.rnd.randint(0, 2)):
            key, values = self.rnd.choice(keys)
            if self.rnd.random() < 0.5:
                made.setdefault("matchLabels", {})[key] = self.rnd.choice(values)
            else:
                operator = self.rnd.choice(["In", "NotIn", "Exists", "DoesNotExist"])
                one: Doc = {"key": key, "operator": operator}
                if operator in ("In", "NotIn"):
                    one["values"] = sorted(set(self.some(values)))
                made.setdefault("matchExpressions", []).append(one)
        plain = [key.removeprefix("any:") for key in made.get("matchLabels", {})]
        if len(plain) != len(set(plain)):
            del made["matchLabels"]
        return made

    def peers(self, word: str) -> Doc:
        kind = self.rnd.randrange(9)
        endpoint = [("app", ["web", "db"]), ("k8s:app", ["web", "db"]), (f"k8s:{NS}", ["prod", "dev"]), ("tier", [""]),
                    (CL, [CLUSTER, "beta"]), ("reserved:host", [""]), ("reserved.health", [""]), ("container:app", ["web"])]  # fmt: skip
        if kind <= 2:
            return {f"{word}Endpoints": [self.selector(endpoint) for _ in range(self.rnd.randint(0, 2))]}
        if kind == 3:
            return {
                f"{word}Entities": self.some(
                    ["all", "world", "cluster", "host", "remote-node", "kube-apiserver", "health", "none"],
                    least=0,
                )
            }
        if kind == 4:
            return {f"{word}CIDR": self.some(PREFIXES, least=0)}
        if kind <= 6:
            return {f"{word}CIDRSet": [self.cidr_entry() for _ in range(self.rnd.randint(0, 2))]}
        if kind == 7:
            return {
                f"{word}Nodes": [
                    self.selector([("zone", ["a", "b"]), ("node:role", [""]), ("k8s:zone", ["a"])])
                ]
            }
        return {}

    def cidr_entry(self) -> Doc:
        if self.rnd.random() < 0.3:
            made: Doc = {"cidrGroupRef": self.rnd.choice(["office", "empty", "missing"])}
            return made | ({"except": ["10.1.2.0/24"]} if self.rnd.random() < 0.5 else {})
        cidr = self.rnd.choice(PREFIXES)
        whole = parse_prefix(cidr)
        inside = [one for one in PREFIXES if whole.contains(parse_prefix(one))]
        return {"cidr": cidr} | ({"except": self.some(inside)} if inside and self.rnd.random() < 0.6 else {})

    def ports(self) -> Doc:
        kind = self.rnd.randrange(6)
        if kind == 0:
            return {
                "icmps": [
                    {
                        "fields": self.some(
                            [{"type": 8}, {"type": "0"}, {"family": "IPv6", "type": 128}], least=0
                        )
                    }
                ]
            }
        if kind <= 3:
            return {
                "toPorts": [
                    {"ports": [self.port() for _ in range(self.rnd.randint(0, 2))]}
                    for _ in range(self.rnd.randint(0, 2))
                ]
            }
        return {}

    def port(self) -> Doc:
        made: Doc = {"port": self.rnd.choice(PORTS)}
        if self.rnd.random() < 0.8:
            made["protocol"] = self.rnd.choice(["TCP", "UDP", "SCTP", "ANY"])
        if made["port"].isdigit() and self.rnd.random() < 0.4:
            made["endPort"] = self.rnd.choice([0, 23, 80, 10255, 65535])
        return made

    def spec(self, host: bool) -> Doc:
        made: Doc = {
            "nodeSelector": self.rnd.choice(
                [{}, {}, {"matchLabels": {"zone": "a"}}, {"matchLabels": {"zone": "b"}}]
            )
        }
        if self.rnd.random() < 0.15:
            host = not host  # a rule of the other kind never applies
        if not host:
            selector = made.pop("nodeSelector")
            made["endpointSelector"] = (
                {} if not selector else {"matchLabels": {"app": self.rnd.choice(["web", "db"])}}
            )
        for name in ("ingress", "ingressDeny", "egress", "egressDeny"):
            if self.rnd.random() < 0.5:
                word = "from" if name.startswith("in") else "to"
                made[name] = [self.peers(word) | self.ports() for _ in range(self.rnd.randint(1, 3))]
        if not any(made.get(name) for name in ("ingress", "ingressDeny", "egress", "egressDeny")):
            made["ingress"] = [{}]
        if self.rnd.random() < 0.4:
            made["enableDefaultDeny"] = {
                "ingress": self.rnd.random() < 0.5,
                "egress": self.rnd.random() < 0.5,
            }
        return made

    def case(self) -> Doc:
        host = self.rnd.random() < 0.6
        policies = []
        for at in range(self.rnd.randint(1, 3)):
            kind, metadata = "CiliumClusterwideNetworkPolicy", {"name": f"p{at}"}
            if not host and self.rnd.random() < 0.5:
                kind, metadata = (
                    "CiliumNetworkPolicy",
                    {"name": f"p{at}", "namespace": self.rnd.choice(["prod", "prod", "dev"])},
                )
            mine = host or kind == "CiliumNetworkPolicy"
            document: Doc = {"apiVersion": "cilium.io/v2", "kind": kind, "metadata": metadata}
            specs = [self.spec(host) for _ in range(self.rnd.randint(1, 2))]
            if kind == "CiliumNetworkPolicy":
                specs = [{"endpointSelector": {}} | one for one in specs]
                for one in specs:
                    one.pop("nodeSelector", None)
            document |= {"spec": specs[0]} if self.rnd.random() < 0.7 and mine else {"specs": specs}
            policies.append(document)
        mode = self.rnd.choice(["default"] * 8 + ["always", "never"])
        pod = [f"k8s:{NS}=prod", f"k8s:{CL}={CLUSTER}", "k8s:app=web"]
        labels = ["reserved:host", "k8s:zone=a"] if host else pod
        return {"policies": policies, "mode": mode, "local": self.rnd.random() < 0.3, "subject": labels}


def parsed(case: Doc) -> tuple[Any, ...]:
    text = "\n".join("---\n" + json.dumps(one) for one in case["policies"])
    found = parse_documents(text, "case.yaml", LanguageSettings(allow_unenforced=True))
    assert not found.problems, found.problems
    return found.policies


def compile_settings(case: Doc) -> CompileSettings:
    named = {name: tuple((PROTOS[proto], port) for proto, port in ports) for name, ports in NAMED.items()}
    return CompileSettings(
        case["mode"], cluster_name=CLUSTER, default_local_cluster=case["local"], named_ports=named
    )


def subject(case: Doc) -> Subject:
    return Subject(Identity(1 if is_host(case) else 77_777), parse_labels(case["subject"]))


def cidr_groups() -> dict[str, CidrGroup]:
    return {name: CidrGroup(name, tuple(map(parse_prefix, prefixes))) for name, prefixes in GROUPS.items()}


def label_sets() -> dict[Identity, Any]:
    return {Identity(number): parse_labels(one["labels"]) for number, one in IDENTITIES.items()}


def compiled(case: Doc, **more: Any) -> Compiled:
    return compile_policy(
        parsed(case), cidr_groups(), subject(case), label_sets(), compile_settings(case), **more
    )


def verdict(tables: Compiled, direction: str, rows: tuple[int, int], proto: str, port: int) -> str:
    way = Direction[direction.upper()]
    cell = tables.matrix(way).cell(rows[way], PROTOS[proto], port)
    return "allow" if unpack_cell(cell)[0] in (Verdict.ALLOW, Verdict.REDIRECT) else "deny"


def host(address: str) -> Prefix:
    return parse_prefix(address)


def check_case(case: Doc) -> int:
    """Compare everything there is to ask; returns how many answers were compared."""
    tables = compiled(case)
    count = 0
    asked = [(tables.rows_of(Identity(number)), one) for number, one in IDENTITIES.items()]
    asked.append((tables.unknown, PEERS[-1]))
    asked += [(tables.rows_of_address(host(one)), {"address": one, "known": True}) for one in ADDRESSES]
    for rows, peer in asked:
        for direction in ("ingress", "egress"):
            for proto, port in PACKETS:
                expected = oracle(case, direction, peer, proto, port)
                assert verdict(tables, direction, rows, proto, port) == expected, (
                    case,
                    direction,
                    peer,
                    proto,
                    port,
                )
                count += 1
    return count


randoms = st.randoms(use_true_random=False)
quick = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@quick
@given(randoms)
def test_the_tables_say_what_reading_the_documents_says(rnd):
    assert check_case(Maker(rnd).case())


@pytest.mark.slow
def test_the_tables_say_what_reading_the_documents_says_at_length():
    maker = Maker(random.Random(20_261_123))
    triples = 0
    while triples < 500_000:
        triples += check_case(maker.case())


@quick
@given(randoms)
def test_order_of_policies_and_identities_never_matters(rnd):
    case = Maker(rnd).case()
    policies, labels = list(parsed(case)), list(label_sets().items())
    first = compile_policy(policies, cidr_groups(), subject(case), dict(labels), compile_settings(case))
    rnd.shuffle(policies)
    rnd.shuffle(labels)
    second = compile_policy(policies, cidr_groups(), subject(case), dict(labels), compile_settings(case))
    assert first == second


@quick
@given(randoms)
def test_identities_that_come_and_go_end_in_the_same_meaning_and_move_no_row(rnd):
    case = Maker(rnd).case()
    labels = list(label_sets().items())
    rnd.shuffle(labels)
    cut = rnd.randrange(len(labels))
    tables = compile_policy(
        parsed(case), cidr_groups(), subject(case), dict(labels[:cut]), compile_settings(case)
    )
    for identity, one in labels[cut:]:
        before = tables
        gone = [rnd.choice(labels)[0]] if rnd.random() < 0.3 else []
        tables = add_identities(tables, {identity: one}, gone)
        for old, new in ((before.ingress, tables.ingress), (before.egress, tables.egress)):
            assert new.rows[: len(old.rows)] == old.rows
            assert new.columns == old.columns
    left = {identity: one for identity, one in labels if identity in tables.identities}
    scratch = compile_policy(parsed(case), cidr_groups(), subject(case), left, compile_settings(case))
    assert len(tables.identities) == len(scratch.identities) == len(list(tables.identities))
    for identity in left:
        for way in Direction:
            ours = tables.matrix(way).rows[tables.identities[identity][way]]
            assert ours == scratch.matrix(way).rows[scratch.identities[identity][way]]


@quick
@given(randoms)
def test_an_index_lent_by_earlier_tables_changes_nothing(rnd):
    maker = Maker(rnd)
    previous = compiled(maker.case())
    for _ in range(3):
        case = maker.case()
        lent = compiled(case, previous=previous)
        assert lent == compiled(case)
        previous = add_identities(lent, {Identity(99): parse_labels(["k8s:app=new"])}, [Identity(70_001)])


@quick
@given(randoms)
def test_explain_names_the_verdict_of_the_tables_and_a_rule_that_matches(rnd):
    case = Maker(rnd).case()
    tables = compiled(case)
    number, peer = rnd.choice(list(IDENTITIES.items()))
    proto, port = rnd.choice(PACKETS)
    for way in Direction:
        asked = Query(way, Peer(Identity(number), parse_labels(peer["labels"])), PROTOS[proto], port)
        found = explain(tables, asked)
        assert found.word == oracle(case, str(way), peer, proto, port)
        if found.rule is not None:
            assert found.rule in found.matching
            assert found.rule.deny == (found.word == "deny")
        if found.verdict is Verdict.DEFAULT_DENY and case["mode"] == "default":
            assert found.restricted_by


@quick
@given(randoms, st.sampled_from(ADDRESSES))
def test_explain_says_the_same_of_an_address(rnd, address):
    case = Maker(rnd).case()
    tables = compiled(case)
    proto, port = rnd.choice(PACKETS)
    for way in Direction:
        found = explain(tables, Query(way, Peer(address=host(address)), PROTOS[proto], port))
        assert found.word == oracle(case, str(way), {"address": address, "known": True}, proto, port)


@settings(quick, max_examples=40)
@given(randoms)
def test_no_difference_means_that_no_answer_differs(rnd):
    maker = Maker(rnd)
    old, new = maker.case(), maker.case()
    new |= {name: old[name] for name in ("mode", "local", "subject")}
    copied = rnd.random() < 0.5
    if copied:
        new["policies"] = json.loads(json.dumps(old["policies"]))
        new["policies"][0]["metadata"]["name"] = "renamed"
        rnd.shuffle(new["policies"])
    groups = cidr_groups()
    found = differences(
        PolicySet(parsed(old), groups), PolicySet(parsed(new), groups), subject(old), compile_settings(old)
    )
    assert found.complete
    peers = [one for one in PEERS if not any(label.startswith("cidr:") for label in one["labels"])]
    peers += [{"address": one, "known": True} for one in ADDRESSES]
    differs = any(
        oracle(old, way, one, *packet) != oracle(new, way, one, *packet)
        for way in ("ingress", "egress")
        for one in peers
        for packet in PACKETS
    )
    if differs:
        assert found.changes
    if copied:
        assert not found.changes


@quick
@given(randoms)
def test_an_audited_policy_neither_opens_nor_closes(rnd):
    case = Maker(rnd).case()
    audited = frozenset({parsed(case)[0].title})
    rest = case | {"policies": case["policies"][1:]}
    how = compile_settings(case)
    how = CompileSettings(
        how.mode,
        cluster_name=CLUSTER,
        default_local_cluster=case["local"],
        named_ports=how.named_ports,
        audit_policies=audited,
    )
    tables = compile_policy(parsed(case), cidr_groups(), subject(case), label_sets(), how)
    for number, peer in IDENTITIES.items():
        for way in Direction:
            for proto, port in PACKETS:
                cell = tables.matrix(way).cell(tables.rows_of(Identity(number))[way], PROTOS[proto], port)
                kind, _, flags = unpack_cell(cell)
                passes = kind in (Verdict.ALLOW, Verdict.REDIRECT) or bool(flags & CellFlag.AUDIT)
                assert passes == (oracle(rest, str(way), peer, proto, port) == "allow")

"""Filters in the form of Hubble's FlowFilter (field names as in its JSON), with a few fields of our own.

A flow is shown when some whitelist entry matches (or there is none) and no blacklist entry does. Within an
entry all fields must match; within a field any of its values. Fields that the event itself can answer are
asked first; the flow is built only for what is left.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from ipaddress import ip_address, ip_network

from bpf.layout import EventKind
from daemon.flows.decode import REASON_NAMES, Event, drop_reason, meaning
from daemon.model.flow import TCP_FLAGS, DropReason, Endpoint, Flow, FlowVerdict
from daemon.model.labels import UNSPEC, parse_label
from daemon.model.net import Direction, Proto

EventTest = Callable[[Event], bool]
FlowTest = Callable[[Flow], bool]


class FilterError(ValueError):
    """A filter that cannot be meant; the text names the field, the value and what is expected."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One FlowFilter."""

    events: tuple[EventTest, ...]
    flows: tuple[FlowTest, ...]

    def matches(self, event: Event, flow: Callable[[], Flow]) -> bool:
        """Whether the event, or if need be its flow, passes every test."""
        return all(test(event) for test in self.events) and all(test(flow()) for test in self.flows)


@dataclass(frozen=True, slots=True)
class Filters:
    """What to show."""

    whitelist: tuple[Entry, ...] = ()
    blacklist: tuple[Entry, ...] = ()

    def select(self, event: Event, build: Callable[[], Flow]) -> Flow | None:
        """The flow if it is to be shown. `build` is called at most once, and only if it is needed."""
        if not self.whitelist and not self.blacklist:
            return build()
        built: list[Flow] = []

        def flow() -> Flow:
            if not built:
                built.append(build())
            return built[0]

        if self.whitelist and not any(entry.matches(event, flow) for entry in self.whitelist):
            return None
        if any(entry.matches(event, flow) for entry in self.blacklist):
            return None
        return flow()


def parse_filters(whitelist: object, blacklist: object) -> Filters:
    """Filters from decoded JSON: two lists of objects. FilterError names what is wrong."""
    return Filters(_entries("whitelist", whitelist), _entries("blacklist", blacklist))


def _entries(name: str, listed: object) -> tuple[Entry, ...]:
    if not isinstance(listed, list):
        raise FilterError(f"{name}: expected a list of filters, got {type(listed).__name__}")
    return tuple(_entry(f"{name}[{at}]", one) for at, one in enumerate(listed))


def _entry(where: str, spec: object) -> Entry:
    if not isinstance(spec, dict):
        raise FilterError(f"{where}: expected an object of filter fields, got {type(spec).__name__}")
    events: list[EventTest] = []
    flows: list[FlowTest] = []
    for field, values in spec.items():
        try:
            if field in EVENT_FIELDS:
                events.append(EVENT_FIELDS[field](_values(values)))
            elif field in FLOW_FIELDS:
                flows.append(FLOW_FIELDS[field](_values(values)))
            else:
                known = ", ".join(sorted({*EVENT_FIELDS, *FLOW_FIELDS}))
                raise FilterError(f"not a filter that a host firewall has; known are {known}")
        except ValueError as error:
            raise FilterError(f"{where}.{field}: {error}") from None
    return Entry(tuple(events), tuple(flows))


def _values(values: object) -> list[object]:
    found = values if isinstance(values, list) else [values]
    if not found:
        raise FilterError("expected at least one value")
    return found


def _texts(values: Sequence[object]) -> list[str]:
    for value in values:
        if not isinstance(value, str):
            raise FilterError(f"expected text, got {value!r}")
    return [str(value) for value in values]


def _number(value: object, first: int, last: int) -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not first <= value <= last:
        raise FilterError(f"expected a number from {first} to {last}, got {value!r}")
    return value


def _member(value: object, kind: type[IntEnum]) -> int:
    """A member by name in any case, or by number."""
    name = str(value).upper().replace("-", "_")
    if name in kind.__members__:
        return kind[name].value
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise FilterError(f"expected one of {', '.join(kind.__members__)}, got {value!r}")


# Fields of the event itself.


def _addresses(pick: Callable[[Event], bytes]) -> Callable[[Sequence[object]], EventTest]:
    def build(values: Sequence[object]) -> EventTest:
        exact: set[tuple[int, bytes]] = set()
        networks: list[tuple[int, int, int]] = []
        for text in _texts(values):
            if "/" in text:
                network = ip_network(text, strict=False)
                shift = network.max_prefixlen - network.prefixlen
                networks.append((network.version, shift, int(network.network_address) >> shift))
            else:
                address = ip_address(text)
                exact.add((address.version, address.packed))

        def test(event: Event) -> bool:
            family = event.family
            if not family:
                return False
            packed = pick(event)[: 4 if family == 4 else 16]
            if (family, packed) in exact:
                return True
            number = int.from_bytes(packed, "big")
            return any(version == family and number >> shift == value for version, shift, value in networks)

        return test

    return build


def _ports(pick: Callable[[Event], bytes]) -> Callable[[Sequence[object]], EventTest]:
    def build(values: Sequence[object]) -> EventTest:
        wanted = {_number(value, 0, 65535).to_bytes(2, "big") for value in values}
        protocols = (Proto.TCP, Proto.UDP, Proto.SCTP)
        return lambda event: event.proto in protocols and pick(event) in wanted

    return build


def _identities(values: Sequence[object], remote_when: Direction) -> EventTest:
    wanted = {_number(value, 0, 2**32 - 1) for value in values}

    def test(event: Event) -> bool:
        return (event.identity if event.direction == remote_when else 1) in wanted

    return test


def _verdicts(values: Sequence[object]) -> EventTest:
    wanted = {_member(value, FlowVerdict) for value in values}
    return lambda event: meaning(event.kind, event.reason, event.verdict).verdict in wanted


def _drop_reasons(values: Sequence[object]) -> EventTest:
    """Hubble's names and numbers, or ours (`bad-ihl`)."""
    ours = {name: number for number, name in REASON_NAMES.items()}
    reasons = {ours[text] for value in values if (text := str(value).lower().replace("_", "-")) in ours}
    # POLICY_DENY is both: ours means the same, and Hubble's name must not widen it.
    rest = [value for value in values if str(value).lower().replace("_", "-") not in ours]
    drops = {_member(value, DropReason) for value in rest}

    def test(event: Event) -> bool:
        return event.kind == EventKind.DROP and (
            event.reason in reasons or drop_reason(event.reason) in drops
        )

    return test


def _directions(values: Sequence[object]) -> EventTest:
    wanted = {_member(value, Direction) for value in values}
    return lambda event: event.direction in wanted


_PROTOCOLS = {
    "tcp": (Proto.TCP,),
    "udp": (Proto.UDP,),
    "sctp": (Proto.SCTP,),
    "icmp": (Proto.ICMP, Proto.ICMPV6),
    "icmpv4": (Proto.ICMP,),
    "icmpv6": (Proto.ICMPV6,),
}


def _protocols(values: Sequence[object]) -> EventTest:
    wanted: set[int] = set()
    for value in _texts(values):
        if value.lower() not in _PROTOCOLS:
            raise FilterError(f"unknown protocol {value!r}, expected one of {', '.join(_PROTOCOLS)}")
        wanted.update(_PROTOCOLS[value.lower()])
    return lambda event: event.family != 0 and event.proto in wanted


def _versions(values: Sequence[object]) -> EventTest:
    names = {"IPV4": 4, "IPV6": 6, "IP_NOT_USED": 0, "1": 4, "2": 6, "0": 0}
    for value in values:
        if str(value).upper() not in names:
            raise FilterError(f"expected IPv4 or IPv6, got {value!r}")
    wanted = {names[str(value).upper()] for value in values}
    return lambda event: event.family in wanted


def _tcp_flags(values: Sequence[object]) -> EventTest:
    """Each value is an object `{"SYN": true}`; a flow may have more flags than are asked for."""
    bits = dict(TCP_FLAGS)
    masks = []
    for value in values:
        if not isinstance(value, Mapping) or not value or not set(value) <= set(bits):
            raise FilterError(
                f'expected an object such as {{"SYN": true}} of {", ".join(bits)}, got {value!r}'
            )
        masks.append(sum(bits[name] for name, wanted in value.items() if wanted))
    return lambda event: event.proto == Proto.TCP and any(event.tcp_flags & mask == mask for mask in masks)


def _event_types(values: Sequence[object]) -> EventTest:
    """Each value is an object `{"type": 1, "match_sub_type": true, "sub_type": 133}`; type 0 is any."""
    wanted: list[tuple[int, int | None]] = []
    for value in values:
        if not isinstance(value, Mapping) or not set(value) <= {"type", "match_sub_type", "sub_type"}:
            raise FilterError(f"expected an object of type, match_sub_type, sub_type, got {value!r}")
        sub = _number(value.get("sub_type", 0), 0, 255) if value.get("match_sub_type") else None
        wanted.append((_number(value.get("type", 0), 0, 255), sub))

    def test(event: Event) -> bool:
        kind, sub = (1, int(drop_reason(event.reason))) if event.kind == EventKind.DROP else (5, 0)
        return any(one in (0, kind) and (two is None or two == sub) for one, two in wanted)

    return test


def _reply(values: Sequence[object]) -> EventTest:
    """Nothing that we report is a reply: events tell of first packets, and a drop counts as no reply."""
    if not all(isinstance(value, bool) for value in values):
        raise FilterError(f"expected true or false, got {values!r}")
    wanted = False in values
    return lambda _: wanted


def _equal(pick: Callable[[Event], int]) -> Callable[[Sequence[object]], EventTest]:
    def build(values: Sequence[object]) -> EventTest:
        wanted = {_number(value, 0, 2**32 - 1) for value in values}
        return lambda event: pick(event) in wanted

    return build


# What flows of a host firewall never have: layer 7, translated addresses, services, traces.
_NEVER_SET = ("source_ip_xlated", "source_service", "destination_service", "dns_query", "http_status_code",
              "http_method", "http_path", "http_url", "http_header", "trace_id")  # fmt: skip


def _never(_: Sequence[object]) -> EventTest:
    return lambda _: False


EVENT_FIELDS: dict[str, Callable[[Sequence[object]], EventTest]] = {
    "source_ip": _addresses(lambda event: event.saddr),
    "destination_ip": _addresses(lambda event: event.daddr),
    "source_port": _ports(lambda event: event.sport_be),
    "destination_port": _ports(lambda event: event.dport_be),
    "source_identity": lambda values: _identities(values, Direction.INGRESS),
    "destination_identity": lambda values: _identities(values, Direction.EGRESS),
    "verdict": _verdicts,
    "drop_reason_desc": _drop_reasons,
    "traffic_direction": _directions,
    "protocol": _protocols,
    "ip_version": _versions,
    "tcp_flags": _tcp_flags,
    "event_type": _event_types,
    "reply": _reply,
    "generation": _equal(lambda event: event.generation),  # ours
    **dict.fromkeys(_NEVER_SET, _never),
}


# Fields that need the flow.


def _source(flow: Flow) -> Endpoint:
    return flow.source


def _destination(flow: Flow) -> Endpoint:
    return flow.destination


def _pods(side: Callable[[Flow], Endpoint]) -> Callable[[Sequence[object]], FlowTest]:
    """`ns/prefix`, `ns/`, `/prefix`; without a slash the namespace is `default`."""

    def build(values: Sequence[object]) -> FlowTest:
        pairs = [tuple(text.split("/", 1)) if "/" in text else ("default", text) for text in _texts(values)]

        def test(flow: Flow) -> bool:
            one = side(flow)
            if not one.namespace and not one.pod:
                return False
            return any(space in ("", one.namespace) and one.pod.startswith(name) for space, name in pairs)

        return test

    return build


def _names(side: Callable[[Flow], Endpoint]) -> Callable[[Sequence[object]], FlowTest]:
    def build(values: Sequence[object]) -> FlowTest:
        patterns = [_wildcard(text.lower()) for text in _texts(values)]
        return lambda flow: any(fits(side(flow).node.lower()) for fits in patterns)

    return build


def _wildcard(text: str) -> Callable[[str], bool]:
    """A pattern in which `*` is any text. Not a regular expression: many stars must not take many seconds."""
    if not re.fullmatch(r"[-.*_0-9a-z]*", text):
        raise FilterError(f"{text!r}: expected letters, digits, `-`, `.` and `*`")
    first, *others = text.split("*")
    if not others:
        return lambda name: name == text
    *middle, last = others

    def fits(name: str) -> bool:
        at, end = len(first), len(name) - len(last)
        if at > end or not name.startswith(first) or not name.endswith(last):
            return False
        for part in middle:
            at = name.find(part, at, end) + len(part)
            if at < len(part):
                return False
        return True

    return fits


def _node_names(values: Sequence[object]) -> FlowTest:
    """`cluster/node` patterns; an empty part is any, no slash is any cluster."""
    patterns = []
    for text in _texts(values):
        cluster, _, node = text.lower().removesuffix(".").rpartition("/")
        patterns.append((_wildcard(cluster or "*"), _wildcard(node or "*")))

    def test(flow: Flow) -> bool:
        cluster, node = (flow.cluster or "default").lower(), flow.node.lower()
        return any(one(cluster) and two(node) for one, two in patterns)

    return test


def _labels(side: Callable[[Flow], Endpoint]) -> Callable[[Sequence[object]], FlowTest]:
    def build(values: Sequence[object]) -> FlowTest:
        selectors = [_selector(text) for text in _texts(values)]
        return lambda flow: any(all(test(side(flow).labels) for test in one) for one in selectors)

    return build


_parsed = lru_cache(maxsize=4096)(parse_label)
LabelTest = Callable[[tuple[str, ...]], bool]
_KEY = r"[-._/:@0-9A-Za-z$]+"
_REQUIREMENT = re.compile(
    rf"\s*(?:(?P<no>!)\s*(?P<absent>{_KEY})"
    rf"|(?P<key>{_KEY})\s*(?:(?P<set>notin|in)\s*\((?P<values>[^()]*)\)|(?P<op>==|=|!=)\s*(?P<value>[^,()\s]*))?)"
    r"\s*(?:,|$)"
)


def _selector(text: str) -> tuple[LabelTest, ...]:
    """A Kubernetes label selector: `k8s:app=web,tier in (a, b),!old`. A key without source matches any."""
    tests: list[LabelTest] = []
    at = 0
    while at < len(text) or not tests:
        found = _REQUIREMENT.match(text, at)
        if found is None or found.end() == at:
            raise FilterError(f"{text!r} at column {at + 1}: expected `key=value`, `key in (a, b)` or `!key`")
        at = found.end()
        tests.append(_requirement(found))
    return tuple(tests)


def _requirement(found: re.Match[str]) -> LabelTest:
    if found["absent"]:
        key, values, negated = found["absent"], None, True
    else:
        key = found["key"]
        values = {one.strip() for one in found["values"].split(",")} if found["set"] else None
        if found["op"]:
            values = {found["value"]}
        negated = found["set"] == "notin" or found["op"] == "!="
    wanted = parse_label(key)

    def test(labels: tuple[str, ...]) -> bool:
        for text in labels:
            label = _parsed(text)
            same = label.key == wanted.key and wanted.source in (UNSPEC, "any", label.source)
            if same and (values is None or label.value in values):
                return not negated
        return negated

    return test


def _interfaces(values: Sequence[object]) -> FlowTest:
    """Each value is an object `{"name": "eth0"}` or `{"index": 2}`."""
    wanted: list[tuple[int, str]] = []
    for value in values:
        if not isinstance(value, Mapping) or not value or not set(value) <= {"index", "name"}:
            raise FilterError(f"expected an object of index and name, got {value!r}")
        wanted.append((_number(value.get("index", 0), 0, 2**31), str(value.get("name", ""))))
    return lambda flow: any(
        index in (0, flow.ifindex) and name in ("", flow.interface) for index, name in wanted
    )


def _policies(values: Sequence[object]) -> FlowTest:
    """Policies by name or namespace/name; a default deny belongs to the policies that restrict."""
    wanted = set(_texts(values))
    return lambda flow: (
        (flow.origin is not None and flow.origin.policy in wanted) or not wanted.isdisjoint(flow.restricting)
    )


def _rules(values: Sequence[object]) -> FlowTest:
    """Rules by number in the kernel, or as flows show them: `ingress[0]`, `default-deny-ingress`."""
    wanted = {str(value) for value in values}
    return lambda flow: flow.rule is not None and (str(flow.rule) in wanted or flow.rule_name in wanted)


def _workloads(side: Callable[[Flow], Endpoint]) -> Callable[[Sequence[object]], FlowTest]:
    """Each value is an object `{"name": "a1", "kind": "Node"}`; hosts are the only workloads."""

    def build(values: Sequence[object]) -> FlowTest:
        wanted: list[tuple[str, str]] = []
        for value in values:
            if not isinstance(value, Mapping) or not set(value) <= {"name", "kind"}:
                raise FilterError(f"expected an object of name and kind, got {value!r}")
            wanted.append((str(value.get("name", "")), str(value.get("kind", ""))))
        return lambda flow: any(
            bool(side(flow).node) and name in ("", side(flow).node) and kind in ("", "Node")
            for name, kind in wanted
        )

    return build


def _clusters(side: Callable[[Flow], Endpoint]) -> Callable[[Sequence[object]], FlowTest]:
    def build(values: Sequence[object]) -> FlowTest:
        wanted = set(_texts(values))
        return lambda flow: side(flow).cluster in wanted

    return build


def _node_labels(values: Sequence[object]) -> FlowTest:
    """Selectors over the labels of the host that saw the flow."""
    selectors = [_selector(text) for text in _texts(values)]

    def test(flow: Flow) -> bool:
        labels = flow.destination.labels if flow.destination.local else flow.source.labels
        return any(all(one(labels) for one in selector) for selector in selectors)

    return test


FLOW_FIELDS: dict[str, Callable[[Sequence[object]], FlowTest]] = {
    "source_pod": _pods(_source),
    "destination_pod": _pods(_destination),
    "source_fqdn": _names(_source),
    "destination_fqdn": _names(_destination),
    "source_label": _labels(_source),
    "destination_label": _labels(_destination),
    "source_workload": _workloads(_source),
    "destination_workload": _workloads(_destination),
    "source_cluster_name": _clusters(_source),
    "destination_cluster_name": _clusters(_destination),
    "node_name": _node_names,
    "node_labels": _node_labels,
    "interface": _interfaces,
    "policy": _policies,  # ours
    "rule": _rules,  # ours
}

"""/v1/policies, identities, ips, ct: what the tables and the kernel hold, row by row."""

import asyncio
import heapq
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from aiohttp import web

from bpf.syscall import LayoutMismatch
from daemon.api.app import ApiError, Json, stream_rows
from daemon.datapath.conntrack import ESTABLISHED, HALF_OPEN, Conntrack, CtRow
from daemon.model.flow import rule_name
from daemon.model.identity import Identity, Reserved, reserved_labels, reserved_name
from daemon.model.labels import LabelSet, format_labels, parse_labels
from daemon.model.net import Direction, Prefix, expand, parse_prefix, proto_name
from daemon.model.problem import Problem
from daemon.model.rule import LabelSelector, NamedPort, Policy, PortMatch, Rule
from daemon.policy.compile import HOST, Subject, selects
from daemon.policy.matching import matches
from daemon.policy.selectortext import parse_selector
from daemon.state.audit import Audited, audited
from daemon.state.tables import IpKey, IpRow, Tables

MAX_LISTED_CT = 1_000_000
PIECE = 20_000


def routes(
    tables: Tables,
    pins: Path,
    accept_empty: Callable[[], Awaitable[bool]],
    users: Callable[[], Awaitable[Mapping[int, Sequence[str]]]] | None = None,
) -> list[web.RouteDef]:
    """The handlers. users: the nodes that refer to each allocated identity; raises OSError."""

    async def policies(_: web.Request) -> web.StreamResponse:
        return web.json_response(policies_json(tables, audited(tables)))

    async def policy(request: web.Request) -> web.StreamResponse:
        return web.json_response(policy_json(tables, audited(tables), request.match_info["name"]))

    async def empty(_: web.Request) -> web.StreamResponse:
        return web.json_response({"accepted": await accept_empty()})

    async def identities(request: web.Request) -> web.StreamResponse:
        wanted = filter_of(request)
        rows = identity_rows(tables, request.query.get("label", ""), wanted)
        if "nodes" in request.query:
            rows = with_nodes(rows, await _asked(users))
        return await stream_rows(request, {}, "identities", rows)

    async def identity(request: web.Request) -> web.StreamResponse:
        number = request.match_info["number"]
        return web.json_response(await asyncio.to_thread(identity_json, tables, number))

    async def ips(request: web.Request) -> web.StreamResponse:
        wanted = _prefix(request.query.get("address", ""))
        number = _number(request.query.get("identity", ""))
        found = await asyncio.to_thread(ip_prefixes, tables, wanted, number)
        return await stream_rows(request, {}, "ips", ip_rows(tables, found, number, filter_of(request)))

    async def rule(request: web.Request) -> web.StreamResponse:
        return web.json_response(rule_origin_json(tables, request.match_info["number"]))

    async def ct(request: web.Request) -> web.StreamResponse:
        rows = await asyncio.to_thread(_connections, pins)
        return await stream_rows(request, {}, "connections", map(ct_json, rows))

    async def flush(request: web.Request) -> web.StreamResponse:
        wanted = connections_of(request.query)
        return web.json_response({"flushed": await asyncio.to_thread(_flush, pins, wanted)})

    return [
        web.get("/v1/policies", policies),
        web.get("/v1/policies/{name:.+}", policy),
        web.post("/v1/policies/accept-empty", empty),
        web.get("/v1/identities", identities),
        web.get("/v1/identities/{number}", identity),
        web.get("/v1/ips", ips),
        web.get("/v1/rules/{number}", rule),
        web.get("/v1/ct", ct),
        web.delete("/v1/ct", flush),
    ]


# Policies


def policies_json(tables: Tables, audit: Audited) -> Json:
    """`policies` by name; `problems`: what is wrong with documents, and with files that were not read."""
    found = [_policy(tables, audit, one) for _, one in sorted(tables.policies.rows.items())]
    problems = [problem_json(one) for _, row in sorted(tables.problems.rows.items()) for one in row]
    return {"policies": found, "problems": problems}


def policy_json(tables: Tables, audit: Audited, name: str) -> Json:
    """One policy by name or namespace/name."""
    for one in tables.policies.rows.values():
        if one.title == name:
            return _policy(tables, audit, one) | {
                "rules": [rule_json(rule) for spec in one.specs for rule in spec.rules]
            }
    raise ApiError(404, f"no policy {name!r}; `meshwall policy list` has the names")


def _policy(tables: Tables, audit: Audited, policy: Policy) -> Json:
    state, reason = policy_state(tables, audit, policy)
    return {
        "name": policy.title,
        "kind": policy.kind,
        "state": state,
        "reason": reason,
        "directions": _directions(policy),
        "rules": sum(len(spec.rules) for spec in policy.specs),
        "file": policy.file,
        "line": policy.line,
    }


def _directions(policy: Policy) -> list[str]:
    return [str(one) for one in Direction if any(spec.restricts[one] for spec in policy.specs)]


def policy_state(tables: Tables, audit: Audited, policy: Policy) -> tuple[str, str]:
    """(state, reason): `enforced`, `audit`, `selects nothing` or `waiting`."""
    host = tables.host.get("host")
    if host is None:
        return "waiting", "the labels of this host are not known yet"
    if not any(selects(spec, Subject(HOST, host.labels)) for spec in policy.specs):
        return "selects nothing", "no nodeSelector of it matches the labels of this host"
    if audit.covers(policy.title):
        return "audit", "denials are reported, not enforced"
    datapath = tables.status.get("datapath")
    if datapath is None or not datapath.ok:
        return "waiting", datapath.text if datapath else "the data path is not ready yet"
    return "enforced", ""


def rule_json(rule: Rule) -> Json:
    """A rule as people read it: `peers` None is anybody, `ports` None everything."""
    origin = rule.origin
    kind = "Deny" if origin.deny else ""
    return {
        "name": f"{origin.direction}{kind}[{origin.index}]",
        "line": origin.line,
        "action": "deny" if origin.deny else "allow",
        "direction": str(origin.direction),
        "peers": None if rule.peers is None else [str(one) for one in rule.peers],
        "ports": None if rule.ports is None else [_port(one) for one in (*rule.ports, *rule.layer7_ports)],
    }


def _port(port: PortMatch) -> str:
    """`10250/TCP`, `80-90/UDP`, `TCP` for all of a protocol, `https/TCP` by name."""
    if isinstance(port, NamedPort):
        return f"{port.name}/{','.join(map(proto_name, port.protocols))}"
    if port.whole:
        return proto_name(port.proto)
    numbers = f"{port.first}-{port.last}" if port.first != port.last else str(port.first)
    return f"{numbers}/{proto_name(port.proto)}"


def problem_json(one: Problem) -> Json:
    """A finding, with its text in one line."""
    return {
        "file": one.file,
        "line": one.line,
        "column": one.column,
        "field": one.field,
        "severity": one.severity,
        "message": one.message,
    }


# Identities and addresses


class Filter(NamedTuple):
    """Which rows are asked for: those of a source, and with labels that a selector matches."""

    source: str = ""  # `local`, or all that begin with `mesh:` when it is `mesh`
    selector: LabelSelector = LabelSelector(())

    def by_source(self, source: str) -> bool:
        """Whether the rows of a source are asked for."""
        return self.source in {"", source, source.partition(":")[0]}

    def by_labels(self, labels: LabelSet) -> bool:
        """Whether the rows with these labels are."""
        return matches(self.selector, labels)


def filter_of(request: web.Request) -> Filter:
    """`source`, `cluster` (short for `source=mesh:<cluster>`) and `selector` of a query."""
    cluster = request.query.get("cluster", "")
    try:
        selector = parse_selector(request.query.get("selector", ""))
    except ValueError as error:
        raise ApiError(400, f"selector: {error}") from None
    return Filter(f"mesh:{cluster}" if cluster else request.query.get("source", ""), selector)


def identity_rows(tables: Tables, label: str = "", wanted: Filter = Filter()) -> Iterator[Json]:  # noqa: B008
    """Every identity in number order, reserved ones included; only those with `label` if it is given."""
    fixed = {Identity(one) for one in Reserved if one}
    for number in sorted(fixed | tables.identities.rows.keys()):
        row = _identity(tables, number)
        if row is None or (label and label not in row["labels"]) or not wanted.by_source(row["source"]):
            continue
        if not wanted.selector.requirements or wanted.by_labels(parse_labels(row["labels"])):
            yield row


def with_nodes(rows: Iterable[Json], users: Mapping[int, Sequence[str]]) -> Iterator[Json]:
    """Allocated identities only: those that nodes refer to, with the names of the nodes."""
    for row in rows:
        if nodes := users.get(row["id"]):
            yield row | {"nodes": sorted(nodes)}


async def _asked(
    users: Callable[[], Awaitable[Mapping[int, Sequence[str]]]] | None,
) -> Mapping[int, Sequence[str]]:
    if users is None:
        raise ApiError(400, "this host allocates no identities: that needs cluster_id and publish")
    try:
        return await users()
    except OSError as error:
        raise ApiError(503, f"the store does not say who uses which identity: {error}") from None


def _identity(tables: Tables, number: Identity) -> Json | None:
    row = tables.identities.get(number)
    if row is not None:
        return {"id": number, "labels": list(format_labels(row.labels)), "source": row.source}
    if reserved_name(number) is None:
        return None
    return {"id": number, "labels": list(format_labels(reserved_labels(number))), "source": "reserved"}


def identity_json(tables: Tables, text: str) -> Json:
    """One identity by number or reserved name, with the addresses that are known for it."""
    names = {reserved_name(Identity(one)): Identity(one) for one in Reserved}
    number = names.get(text) if text in names else _number(text)
    found = _identity(tables, number) if number is not None else None
    if number is None or found is None:
        raise ApiError(404, f"no identity {text!r} is known")
    return found | {"ips": list(ip_rows(tables, ip_prefixes(tables, None, number), number))}


def ip_prefixes(tables: Tables, within: Prefix | None, identity: Identity | None) -> Iterator[int]:
    """Claimed prefixes in address order; those that cover or lie within a prefix, or of one identity.

    For a thread: a million of them take seconds. They are sorted in pieces, because a sort lets nobody else run.
    """
    claims = tables.ips.claims
    found = tables.ips.prefixes()
    if identity is not None:
        found = [one for one in found if any(row.identity == identity for row in claims(one))]
    if within is not None:
        found = [one for one in found if _overlap(expand(one), within)]
    pieces = [sorted(found[at : at + PIECE], key=_place) for at in range(0, len(found), PIECE)]
    return heapq.merge(*pieces, key=_place)


def _overlap(one: Prefix, other: Prefix) -> bool:
    return one.contains(other) or other.contains(one)


def _place(key: int) -> int:
    """Where a `compact` prefix is listed: by family, address and length."""
    prefix = expand(key)
    return (prefix.family == 6) << 136 | prefix.address << 8 | prefix.length


def rule_origin_json(tables: Tables, text: str) -> Json:
    """Where the rule with this number of the generation in force comes from."""
    number = int(text) if text.isascii() and text.isdigit() else -1
    origin = tables.rules.get(number)
    if origin is None:
        raise ApiError(404, f"no rule {text!r} is in force")
    return {
        "number": number,
        "name": rule_name(number, origin),
        "policy": origin.policy,
        "kind": origin.kind,
        "file": origin.file,
        "line": origin.line,
    }


def ip_rows(
    tables: Tables,
    prefixes: Iterable[int],
    identity: Identity | None,
    wanted: Filter = Filter(),  # noqa: B008
) -> Iterator[Json]:
    """Every claim to these prefixes, or those of one identity."""
    for one in prefixes:
        for row in sorted(tables.ips.claims(one), key=lambda row: row.source):
            if wanted.by_source(row.source) and identity in (None, row.identity):
                yield _ip(IpKey(expand(one), row.source), row)


def _ip(key: IpKey, row: IpRow) -> Json:
    return {
        "cidr": key.prefix.cidr,
        "identity": row.identity,
        "source": key.source,
        "name": row.name,
        "namespace": row.namespace,
        "node": row.node,
    }


def _prefix(text: str) -> Prefix | None:
    if not text:
        return None
    try:
        return parse_prefix(text)
    except ValueError as error:
        raise ApiError(400, f"address: {error}") from None


def _number(text: str) -> Identity | None:
    if not text:
        return None
    if not (text.isascii() and text.isdigit()):
        raise ApiError(400, f"identity: {text!r} is not a number")
    return Identity(int(text))


# Connections


def _connections(pins: Path) -> list[CtRow]:
    with _opened(pins) as table:
        rows = []
        for row in table.entries():
            rows.append(row)
            if len(rows) > MAX_LISTED_CT:
                break
        return rows


def _flush(pins: Path, wanted: Callable[[CtRow], bool]) -> int:
    with _opened(pins) as table:
        return table.flush(wanted)


def connections_of(query: Mapping[str, str]) -> Callable[[CtRow], bool]:
    """Those with `address` (or in that prefix) and `port` at either end, in `state`; empty or missing means any."""
    if unknown := set(query) - {"address", "port", "state"}:  # must not forget more than was meant
        raise ApiError(400, f"{min(unknown)}: expected address, port or state")
    within, port, state = _prefix(query.get("address", "")), query.get("port", ""), query.get("state", "")
    if port and not (port.isascii() and port.isdigit() and int(port) < 1 << 16):
        raise ApiError(400, f"port: {port!r}: expected a number to 65535")
    if state and state not in (HALF_OPEN, ESTABLISHED):
        raise ApiError(400, f"state: {state!r}: expected {HALF_OPEN} or {ESTABLISHED}")

    def wanted(row: CtRow) -> bool:
        return (
            (within is None or any(within.contains(parse_prefix(one)) for one in (row.local, row.remote)))
            and (not port or int(port) in (row.local_port, row.remote_port))
            and state in ("", row.state)
        )

    return wanted


def _opened(pins: Path) -> Conntrack:
    try:
        return Conntrack(pins)
    except FileNotFoundError:
        raise ApiError(503, "there is no data path yet: `meshwall status` says why") from None
    except (OSError, LayoutMismatch) as error:
        raise ApiError(503, f"the connection table cannot be opened: {error}") from None


def ct_json(row: CtRow) -> Json:
    """One connection; times in seconds."""
    return {
        "protocol": proto_name(row.proto),
        "state": row.state,
        "local": row.local,
        "local_port": row.local_port,
        "remote": row.remote,
        "remote_port": row.remote_port,
        "origin": row.origin,
        "flags": [one.name for one in type(row.flags) if one in row.flags],
        "rule": row.rule,
        "age_s": round(row.age_s, 1),
        "expires_s": round(row.expires_s, 1),
    }

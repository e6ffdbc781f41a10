"""The workloads of this host, from files: their labels get an identity, their addresses are told to everybody.

    name: web-0
    namespace: prod
    labels: {app: web}                          # with the source `k8s`, as a pod's
    serviceAccount: web                         # optional
    namespaceLabels: {team: shop}               # optional, of the namespace
    addresses: [10.1.0.5, "fd00:1::5", 10.1.2.0/24]

Several documents in a file are several workloads. Rows have the source `local`: `identities` and `ips`, and with a
store the same stands there.
"""

import asyncio
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from clustermesh import wire
from clustermesh.gojson import Malformed
from clustermesh.publish import Address, Publisher
from clustermesh.trust import Trust
from clustermesh.wire import Cidr
from daemon.model.identity import Identity
from daemon.model.labels import Label, parse_labels
from daemon.model.net import Prefix
from daemon.model.problem import Problem
from daemon.policy.document import Node, read_documents, shown
from daemon.policy.reader import Reader
from daemon.sources.documents import DocumentFiles
from daemon.state.tables import LOCAL, IdentityRow, IpKey, IpRow, StatusRow, Tables

log = logging.getLogger(__name__)

GROUP = "workloads"
MAX_ADDRESSES = 8_192  # of all workloads of a host: each round looks at all of them
AT_ONCE = 500  # of them between two turns of others
SETTLE_S = 0.02  # numbers that come this close together are one look
_FIELDS = ("name", "namespace", "labels", "serviceAccount", "namespaceLabels", "addresses")
_MAX_LABELS, _MAX_KEY, _MAX_VALUE = 60, 317, 63  # what receivers take; the rest is for labels that are added
_NAMESPACE_LABELS = "io.cilium.k8s.namespace.labels."


@dataclass(frozen=True, slots=True)
class Workload:
    """One workload. `labels`: the canonical string of its whole label set."""

    name: str
    namespace: str
    labels: str
    addresses: tuple[str, ...]
    file: str
    line: int


def parse_workloads(text: str, file: str, cluster: str) -> tuple[tuple[Workload, ...], tuple[Problem, ...]]:
    """The workloads of a file; with a problem there may be fewer, or none. Never raises."""
    reader = Reader(file)
    found: list[Workload] = []
    for document in read_documents(text, file):
        if isinstance(document, Problem):
            reader.problems.append(document)
        elif document.kind != "null":
            found += _workload(reader, document, cluster)
    return tuple(found), tuple(reader.problems)


def _workload(reader: Reader, root: Node, cluster: str) -> Iterator[Workload]:
    before = len(reader.problems)
    fields = reader.mapping(root, "", _FIELDS, ("name", "namespace", "labels", "addresses"))
    name = _plain(reader, fields.get("name"), "name", 253)
    namespace = _plain(reader, fields.get("namespace"), "namespace", 63)
    labels = _labels(reader, fields.get("labels"), "labels")
    account = _plain(reader, fields.get("serviceAccount"), "serviceAccount", 253)
    of_namespace = _labels(reader, fields.get("namespaceLabels"), "namespaceLabels")
    addresses = [
        _address(reader, node, path) for node, path in reader.items(fields.get("addresses"), "addresses")
    ]
    if len(reader.problems) > before:
        return
    whole = {**labels, wire.NAMESPACE_LABEL: namespace}
    whole |= {f"{_NAMESPACE_LABELS}{key}": value for key, value in of_namespace.items()}
    if account:
        whole[wire.SERVICE_ACCOUNT_LABEL] = account
    if len(whole) > _MAX_LABELS:
        reader.fail(root, "labels", f"{len(whole)} labels in all, at most {_MAX_LABELS} are taken by others")
        return
    canonical = wire.encode_identity([f"k8s:{key}={value}" for key, value in whole.items()], cluster)
    yield Workload(name, namespace, canonical.decode(), tuple(addresses), reader.file, root.line)


def _plain(reader: Reader, node: Node | None, path: str, most: int) -> str:
    """A name as Kubernetes has them: it becomes a label value and part of what is shown."""
    text = reader.text(node, path)
    if node is not None and node.kind == "string" and not _is_name(text, most):
        reader.fail(
            node, path, f"{shown(text)} is not a name: letters, digits, `-`, `_`, `.`, {most} at most"
        )
    return text


def _is_name(text: str, most: int) -> bool:
    rest = text.replace("-", "").replace("_", "").replace(".", "")
    return (
        len(text) <= most and rest.isascii() and rest.isalnum() and text[0].isalnum() and text[-1].isalnum()
    )


def _labels(reader: Reader, node: Node | None, path: str) -> dict[str, str]:
    if node is None or not reader.expect(node, path, "mapping"):
        return {}
    found = {}
    for key, value in node.fields.items():
        where = f"{path}.{key}"
        text = reader.text(value, where)
        if fault := _label_fault(key, text):
            reader.fail(node.keys[key], where, fault)
        found[key] = text
    return found


def _label_fault(key: str, value: str) -> str:
    """Why a label cannot be; empty if it can."""
    if key.startswith(("io.cilium.", "io.kubernetes.")):
        return (
            "is a label that is added; namespace, serviceAccount and namespaceLabels have fields of their own"
        )
    if not key or len(key) > _MAX_KEY or not all(map(_is_label_part, key.split("/"))) or key.count("/") > 1:
        return f"{shown(key)} is not a label key: letters, digits, `-`, `_`, `.`, after at most one `prefix/`"
    if value and not _is_name(value, _MAX_VALUE):
        return f"{shown(value)} is not a label value: letters, digits, `-`, `_`, `.`, {_MAX_VALUE} at most"
    return ""


def _is_label_part(text: str) -> bool:
    return bool(text) and _is_name(text, 253)


def _address(reader: Reader, node: Node, path: str) -> str:
    """Canonical text of an address or prefix that others take from us."""
    text = reader.text(node, path)
    if not text:
        return ""
    try:
        entry = wire.ip_entry(text, 0)
        Trust("").check_prefix("", entry.cidr)
    except Malformed as error:
        reader.fail(node, path, str(error))
        return ""
    return entry.prefix


class WorkloadFiles:
    """Keeps rows and store equal to a directory of workloads. `run` is the task."""

    def __init__(
        self,
        tables: Tables,
        publisher: Publisher,
        directory: Path,
        state_dir: Path,
        *,
        cluster: str,
        owner_check: bool = True,
    ) -> None:
        self._tables = tables
        self._publisher = publisher
        self._cluster = cluster
        self._identities: dict[Identity, IdentityRow] = {}  # rows of ours
        self._ips: dict[IpKey, IpRow] = {}
        self._workloads: Mapping[str, Sequence[Workload]] = {}
        self._claimed: Mapping[Cidr, Address] = {}
        self._wake = asyncio.Event()
        self._problems: tuple[str, ...] = ()
        self._files = DocumentFiles(
            tables,
            directory,
            state_dir / "last-good-workloads",
            name="workload files",
            parse=lambda text, file: parse_workloads(text, file, cluster),
            changed=self._take,
            owner_check=owner_check,
        )

    async def run(self) -> None:
        """For ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._files.run())
            while True:
                await self._wake.wait()
                await asyncio.sleep(SETTLE_S)
                self._wake.clear()
                await self._rows()

    def numbers_changed(self) -> None:
        """Some label set may have got another number."""
        self._wake.set()

    def _take(self, files: Mapping[str, Sequence[Workload]]) -> None:
        self._workloads = files
        self._claimed, self._problems = claims([one for name in sorted(files) for one in files[name]])
        self._publisher.want(GROUP, addresses=tuple(self._claimed.values()))
        self._wake.set()

    async def _rows(self) -> None:
        """What is known of our workloads here, be the store within reach or not."""
        claimed, numbers = self._claimed, self._publisher.allocator.known
        tables = self._tables
        identities: dict[Identity, IdentityRow] = {}
        ips: dict[IpKey, IpRow] = {}
        for index, (cidr, one) in enumerate(claimed.items()):
            if index % AT_ONCE == AT_ONCE - 1:
                await asyncio.sleep(0)
            if one.labels not in numbers:
                continue
            number = Identity(numbers[one.labels])
            if number not in identities:
                identities[number] = IdentityRow(_label_set(one.labels), LOCAL)
                tables.identities.put(number, identities[number])
            key = IpKey(Prefix(*cidr), LOCAL)
            ips[key] = IpRow(number, one.pod, one.namespace)
            if self._ips.get(key) != ips[key]:
                tables.ips.put(key, ips[key])
        for key in self._ips.keys() - ips.keys():
            tables.ips.delete(key)
        for number in self._identities.keys() - identities.keys():
            self._hand_over(number)
        self._identities, self._ips = identities, ips
        self._status(len(claimed), sum(1 for one in claimed.values() if one.labels not in numbers))

    def _hand_over(self, number: Identity) -> None:
        """Nobody here uses an identity any more; others of our cluster may, as long as the store has it."""
        row = self._identities[number]
        if number in self._publisher.allocator.present:
            self._tables.identities.put(number, IdentityRow(row.labels, f"mesh:{self._cluster}"))
        else:
            self._tables.identities.delete(number)

    def _status(self, addresses: int, waiting: int) -> None:
        count = sum(map(len, self._workloads.values()))
        text = f"{count} workloads with {addresses} addresses"
        hint = ""
        if waiting:
            text = f"{text}, {waiting} of them without identity yet"
            hint = "see `mesh publish` for why the store gives no number"
        if self._problems:
            text = f"{text}; {self._problems[0]}"
        ok = not (waiting or self._problems)
        details = {"workloads": count, "addresses": addresses, "problems": list(self._problems)}
        self._tables.status.put("workloads", StatusRow(ok, text, hint, details=details))


def claims(workloads: Sequence[Workload]) -> tuple[dict[Cidr, Address], tuple[str, ...]]:
    """Address range -> what to publish, and what is wrong between workloads. Who comes first has an address."""
    found: dict[Cidr, Address] = {}
    owners: dict[Cidr, Workload] = {}
    problems = []
    for one in workloads:
        for prefix in one.addresses:
            cidr = wire.parse_cidr(prefix)
            first = owners.setdefault(cidr, one)
            if first is not one and first.labels != one.labels:
                problems.append(
                    f"{one.file} line {one.line}: {prefix} belongs to {first.name} ({first.file} line {first.line})"
                )
            elif len(found) >= MAX_ADDRESSES and cidr not in found:
                problems.append(
                    f"{one.file} line {one.line}: more than {MAX_ADDRESSES} addresses on this host"
                )
            else:
                found.setdefault(cidr, Address(prefix, one.labels, one.namespace, one.name))
    return found, tuple(problems)


def _label_set(canonical: str) -> frozenset[Label]:
    return parse_labels([str(label) for label in wire.decode_identity(canonical.encode())])

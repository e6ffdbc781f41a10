"""`meshwall mesh check`: asks every store of the settings itself, without the daemon."""

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from daemon.cli.client import Json, output_option, printable, show

if TYPE_CHECKING:
    from clustermesh.check import Finding, Look
    from daemon.config import Config

_DESCRIPTION = """\
looks at every etcd that the settings name, from this host and with this host's credentials: the network, TLS,
rights, cluster configurations, markers, heartbeats and clocks, versions. Writes nothing, needs no daemon.
Exit status: 0 nothing is broken (there may be warnings), 1 something is, 2 the settings cannot be read.
"""


def register(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb."""
    plain = argparse.RawDescriptionHelpFormatter
    one = verbs.add_parser(
        "check",
        help="find out what is wrong, and how to mend it",
        description=_DESCRIPTION,
        formatter_class=plain,
    )
    one.add_argument("--config", type=Path, metavar="FILE", help="settings (default: those of meshwalld)")
    one.add_argument("-v", "--verbose", action="store_true", help="also print what is fine")
    output_option(one)
    one.set_defaults(run=_check)


def _check(options: argparse.Namespace) -> int:
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # it would print handshakes of its own
    from clustermesh.check import Severity, diagnose, verdict  # noqa: PLC0415 - gRPC, for those who ask
    from daemon.config import ConfigError, load  # noqa: PLC0415

    named = options.config or os.environ.get("MESHWALL_CONFIG")
    try:
        config = load(Path(named) if named else None)
    except ConfigError as error:
        print(f"meshwall: {printable(str(error))}", file=sys.stderr)
        return 2
    looks, findings = _looks(config)

    async def work() -> None:
        for look in looks:  # one after the other: the second of two clusters with one id is the wrong one
            findings.extend(await diagnose(look))

    asyncio.run(work())
    counts = verdict(findings)
    found: Json = {
        "stores": [look.name for look in looks],
        "errors": counts[Severity.ERROR],
        "warnings": counts[Severity.WARNING],
        "findings": [_finding(one) for one in findings],
    }
    show(found, options.output, lambda all_of_it: lines(all_of_it, verbose=options.verbose))
    return 1 if counts[Severity.ERROR] else 0


def _finding(one: "Finding") -> Json:
    return {
        "severity": one.severity.value,
        "store": one.store,
        "where": one.where,
        "text": one.text,
        "fix": one.fix,
    }


def lines(found: Json, *, verbose: bool) -> Sequence[str]:
    """Store by store, each finding with its fix below; what is fine only if it is asked for."""
    if not found["stores"] and not found["findings"]:
        return ["no store is set up: `etcd` and `clusters_dir` are not in the settings"]
    out: list[str] = []
    for store in dict.fromkeys([*found["stores"], *(one["store"] for one in found["findings"])]):
        out.append(f"{printable(store)}:")
        mine = [one for one in found["findings"] if one["store"] == store]
        for one in mine:
            if one["severity"] != "ok" or verbose:
                out.append(f"  {one['severity']:8}{printable(one['where'])}: {printable(one['text'])}")
                out += [f"          fix: {printable(one['fix'])}"] if one["fix"] else []
        fine = sum(1 for one in mine if one["severity"] == "ok")
        out.append(f"  {fine} checks are fine")
    out.append(f"{found['errors']} errors, {found['warnings']} warnings")
    return out


def _looks(config: "Config") -> "tuple[list[Look], list[Finding]]":
    """What there is to look at, and what is wrong with the files that say so."""
    from clustermesh.check import Finding, Look, Severity  # noqa: PLC0415
    from clustermesh.settings import EtcdSettings  # noqa: PLC0415
    from clustermesh.trust import Trust  # noqa: PLC0415
    from daemon.sources.meshdir import read_directory  # noqa: PLC0415

    taken: dict[int, str] = {}
    trust = Trust(
        config.cluster_name,
        config.cluster_id,
        max_clusters=config.max_connected_clusters,
        clusters=config.clusters,
    )
    looks: list[Look] = []
    findings: list[Finding] = []
    files = dict(read_directory(config.clusters_dir)) if config.clusters_dir else {}
    files.pop(config.cluster_name, None)
    if config.etcd is not None:
        writes = config.publish and bool(config.cluster_id)
        expected = tuple(one for one in (config.cluster_name, *config.clusters) if one not in files)
        settings = EtcdSettings(**config.etcd.model_dump())
        looks.append(
            Look(
                "etcd", settings, trust, writes=writes, node=config.node_name, expected=expected, taken=taken
            )
        )
    for name, settings_or_problem in sorted(files.items()):
        if isinstance(settings_or_problem, str):
            fix = "correct the file: meshwall mesh join writes one"
            findings.append(Finding(Severity.ERROR, f"{name}", "clusters_dir", settings_or_problem, fix))
        else:
            pinned = {one: number for one, number in config.clusters.items() if one == name}
            mine = replace(trust, clusters=pinned)
            looks.append(Look(name, settings_or_problem, mine, only=name, expected=(name,), taken=taken))
    return looks, findings

"""`meshwall service list|get|exports`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING
from urllib.parse import quote

from daemon.cli.client import Json, filters, listing, output_option, printed, table

if TYPE_CHECKING:
    import argparse


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the noun."""
    noun = subparsers.add_parser("service", aliases=["services", "svc"], help="services of all clusters")
    verbs = noun.add_subparsers(title="commands", metavar="COMMAND", required=True)
    many = verbs.add_parser("list", aliases=["ls"], help="each with its backends, by cluster")
    many.add_argument("-n", "--namespace", default="", metavar="NAME", help="only of this namespace")
    many.add_argument("--name", default="", metavar="NAME", help="only of this name")
    many.add_argument("--cluster", default="", metavar="NAME", help="only those this cluster has")
    many.add_argument(
        "--affinity", default="", choices=("local", "remote", "none"), help="only with this affinity"
    )
    output_option(many)
    query = filters("namespace", "name", "cluster", "affinity")
    many.set_defaults(run=listing("/v1/services", service_lines, query))
    single = verbs.add_parser("get", help="one: where a new connection from here goes, and why")
    single.add_argument("service", metavar="NAMESPACE/NAME")
    output_option(single)
    single.set_defaults(
        run=lambda one: printed(one, f"/v1/services/{quote(_full(one.service), safe='/')}", one_lines)
    )
    exports = verbs.add_parser("exports", help="exported services, and which export counts where they differ")
    output_option(exports)
    exports.set_defaults(run=listing("/v1/serviceexports", export_lines))


def _full(name: str) -> str:
    return name if "/" in name else f"default/{name}"


def service_lines(found: Json) -> Sequence[str]:
    """A row per service; backends as chosen/all per cluster."""
    rows: list[Sequence[object]] = [
        ("NAMESPACE", "NAME", "GLOBAL", "AFFINITY", "FRONTENDS", "CHOSEN/BACKENDS")
    ]
    for one in found["services"]:
        counts: dict[str, list[int]] = {}
        for backend in one["backends"]:
            count = counts.setdefault(backend["cluster"], [0, 0])
            count[0] += backend["chosen"]
            count[1] += 1
        per_cluster = ", ".join(f"{name} {some}/{every}" for name, (some, every) in sorted(counts.items()))
        glob = "yes" if one["global"] else "no"
        rows.append(
            (one["namespace"], one["name"], glob, one["affinity"], ", ".join(one["frontends"]), per_cluster)
        )
    return table(rows)


def one_lines(found: Json) -> Sequence[str]:
    """The service, then its backends with the reason."""
    head: list[Sequence[object]] = [
        ("service", f"{found['namespace']}/{found['name']}"),
        ("global", "yes" if found["global"] else "no"),
        ("affinity", found["affinity"]),
        ("said by", ", ".join(found["sources"])),
    ]
    head += [("frontend", one) for one in found["frontends"]]
    head.append(("now", found["text"]))
    rows: list[Sequence[object]] = [("BACKEND", "PORTS", "CLUSTER", "CHOSEN", "WHY")]
    rows += [
        (
            one["address"],
            ", ".join(one["ports"]),
            one["cluster"],
            "yes" if one["chosen"] else "no",
            one["reason"],
        )
        for one in found["backends"]
    ]
    return [*table(head), "", *table(rows)]


def export_lines(found: Json) -> Sequence[str]:
    rows: list[Sequence[object]] = [
        ("NAMESPACE", "NAME", "CLUSTER", "CREATED", "TYPE", "SESSION", "PORTS", "COUNTS")
    ]
    rows += [
        (
            one["namespace"],
            one["name"],
            one["cluster"],
            one["created"],
            one["type"],
            one["session_affinity"],
            ", ".join(one["ports"]),
            "yes" if one["counts"] else "no: another is older",
        )
        for one in found["exports"]
    ]
    return table(rows)

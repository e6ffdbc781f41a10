"""`meshwall mesh invite` and `meshwall mesh join`: least rights in an etcd, and the file that uses them."""

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clustermesh import rights, wire

if TYPE_CHECKING:
    from clustermesh.settings import EtcdSettings

PASSWORD = "MESHWALL_ETCD__PASSWORD"  # noqa: S105 - the name of a variable
DIRECTORY = Path("/etc/meshwall/clustermesh")

_INVITE = """\
prints the users and roles that a cluster needs in the etcd that holds it, as etcdctl commands:
  CLUSTER-reader  other clusters: read this cluster, nothing else
  CLUSTER-writer  its own hosts: write what is theirs
  CLUSTER-member  the same hosts: read what the store holds
A user is the common name (CN) of a client certificate. With --apply it is done, by an administrator's credentials;
doing it again changes nothing.
"""
_JOIN = """\
writes the file by which this host reads another cluster from that cluster's etcd, in the format of Cilium's
clustermesh directory. The daemon follows the directory that `clusters_dir` names.
"""


def register(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verbs."""
    plain = argparse.RawDescriptionHelpFormatter
    one = verbs.add_parser(
        "invite", help="least rights for a cluster in its etcd", description=_INVITE, formatter_class=plain
    )
    one.add_argument("--cluster", required=True, metavar="NAME", help="the cluster whose data it is")
    one.add_argument(
        "--reader",
        action="append",
        metavar="USER",
        help="other clusters' user; several (default NAME-reader)",
    )
    one.add_argument(
        "--writer", action="append", metavar="USER", help="its own hosts' user; several (default NAME-writer)"
    )
    one.add_argument("-o", "--output", choices=("commands", "json"), default="commands", help="how to print")
    one.add_argument("--apply", action="store_true", help="do it, in the etcd of --endpoints")
    _etcd_options(one, "with --apply: ")
    one.add_argument("--username", default="", help=f"with --apply: administrator; password in {PASSWORD}")
    one.set_defaults(run=_invite)
    two = verbs.add_parser("join", help="read another cluster", description=_JOIN, formatter_class=plain)
    two.add_argument("--cluster", required=True, metavar="NAME", help="the other cluster")
    _etcd_options(two, "")
    two.add_argument("--directory", type=Path, default=DIRECTORY, metavar="DIR", help=f"default {DIRECTORY}")
    two.add_argument("--force", action="store_true", help="replace a file that is there")
    two.set_defaults(run=_join)


def _etcd_options(parser: argparse.ArgumentParser, when: str) -> None:
    parser.add_argument(
        "--endpoints", default="", metavar="URL,URL", help=f"{when}such as https://etcd.example:2379"
    )
    for name, text in (("ca", "CA certificates"), ("cert", "client certificate"), ("key", "its key")):
        parser.add_argument(f"--{name}", default="", metavar="FILE", help=f"{when}{text}")


def _invite(options: argparse.Namespace) -> int:
    """Exit status 0; 1 when the store refuses or is out of reach; 2 for wrong arguments."""
    cluster = options.cluster
    if not wire.valid_cluster_name(cluster):
        return _wrong(f"--cluster: {cluster!r} is not a cluster name: lower case, digits and -, 32 at most")
    writers = options.writer or [f"{cluster}-writer"]
    readers = options.reader or [f"{cluster}-reader"]
    if shared := set(writers) & set(readers):
        return _wrong(f"{min(shared)} is a reader and a writer: they must be different users")
    roles = [
        rights.reader(cluster, readers), rights.writer(cluster, writers), rights.member(cluster, writers)
    ]  # fmt: skip
    if options.apply:
        return _apply(options, roles)
    if options.output == "json":
        print(json.dumps({"roles": [_role(one) for one in roles]}, indent=2))
    else:
        print("\n".join(rights.commands(roles)))
        print("# once, if users are not in force yet:")
        for words in ("user add --no-password root", "user grant-role root root", "auth enable"):
            print(f"#   etcdctl {words}")
    return 0


def _role(role: rights.Role) -> dict[str, object]:
    permissions = [{"access": one.access, "key": one.key, "range_end": one.end} for one in role.rights]
    return {"name": role.name, "permissions": permissions, "users": list(role.users)}


def _apply(options: argparse.Namespace, roles: Sequence[rights.Role]) -> int:
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # it would print handshakes of its own
    from clustermesh.admin import apply  # noqa: PLC0415 - gRPC, for those who ask
    from clustermesh.etcd import EtcdKV  # noqa: PLC0415
    from clustermesh.kv import KVError  # noqa: PLC0415

    settings = _settings(options, options.username)
    if settings is None:
        return 2

    async def work() -> list[str]:
        kv = EtcdKV(settings)
        try:
            return await apply(kv, roles)
        finally:
            await kv.close()

    try:
        done = asyncio.run(work())
    except KVError as error:
        print(f"meshwall: {error}", file=sys.stderr)
        return 1
    if options.output == "json":
        print(json.dumps({"done": done}, indent=2))
    else:
        print("\n".join(done or ["everything is as it should be"]))
    return 0


def _join(options: argparse.Namespace) -> int:
    """Exit status 0; 1 when the file cannot be written; 2 for wrong arguments."""
    cluster = options.cluster
    if not wire.valid_cluster_name(cluster):
        return _wrong(f"--cluster: {cluster!r} is not a cluster name: lower case, digits and -, 32 at most")
    settings = _settings(options, "")
    if settings is None:
        return 2
    path: Path = options.directory / cluster
    if path.exists() and not options.force:
        return _wrong(f"{path} is there already: use --force to replace it")
    for name in ("ca", "cert", "key"):
        file = getattr(options, name)
        if file and not Path(file).exists():
            print(f"meshwall: --{name}: {file} is not there yet; the daemon waits for it", file=sys.stderr)
    text = rights.remote_file(settings.endpoints, options.ca, options.cert, options.key)
    try:
        options.directory.mkdir(parents=True, exist_ok=True, mode=0o755)
        fresh = options.directory / f".{cluster}.new"
        fresh.unlink(missing_ok=True)
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
            out.write(text)
        fresh.rename(path)
    except OSError as error:
        print(f"meshwall: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    print(f"{path} written; `clusters_dir: {options.directory}` in meshwall.yaml has the daemon follow it")
    return 0


def _settings(options: argparse.Namespace, username: str) -> "EtcdSettings | None":
    """How the etcd is reached; None, and a word about it, if that cannot be."""
    from clustermesh.settings import EtcdSettings, EtcdSettingsError  # noqa: PLC0415

    endpoints = tuple(one.strip() for one in options.endpoints.split(",") if one.strip())
    password = os.environ.get(PASSWORD, "") if username else ""
    for name in ("ca", "cert", "key"):
        if path := getattr(options, name):
            setattr(options, name, str(Path(path).absolute()))
    try:
        return EtcdSettings(
            endpoints,
            ca=options.ca,
            cert=options.cert,
            key=options.key,
            username=username,
            password=password,
        )
    except EtcdSettingsError as error:
        _wrong(str(error).replace("etcd.", "--"))
        return None


def _wrong(text: str) -> int:
    print(f"meshwall: {text}", file=sys.stderr)
    return 2

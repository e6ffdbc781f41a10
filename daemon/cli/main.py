"""`meshwall`: finds the noun, imports only what it needs, and runs the verb.

Exit status: 0 good, 1 findings or the daemon is out of reach, 2 a wrong question, 130 interrupted.
"""

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Iterator, Sequence

# Module -> the nouns it registers, with what `meshwall --help` says of them. Importing is for those who ask.
NOUNS = {
    "status": {"status": "is it working: enforcement, devices, policies, mesh, drops"},
    "policies": {"policy": "check, explain, test, compare and list policies"},
    "flows": {"observe": "show what was dropped, audited and newly allowed, with the deciding rule"},
    "ip": {"ip": "which address is which identity, and who says so"},
    "identity": {"identity": "security identities and their labels"},
    "ct": {"ct": "tracked connections"},
    "trace": {"trace": "what the loaded programs would do with a packet"},
    "panic": {"panic": "let everything pass, or only the failsafe list, at once and without the daemon"},
    "audit": {"audit": "report what would be dropped instead of dropping it, for the host or a policy"},
    "mesh": {"mesh": "other clusters and the shared store", "node": "nodes of all clusters"},
    "service": {"service": "services of all clusters, and where a new connection goes"},
    "cleanup": {"cleanup": "remove all enforcement from this host"},
    "version": {"version": "versions of command and daemon"},
}
ALIASES = {
    "monitor": "observe",
    "ipcache": "ip",
    "clustermesh": "mesh",
    "nodes": "node",
    "services": "service",
    "svc": "service",
    "identities": "identity",
    "conntrack": "ct",
}
# Words that people know from other programs, and what they are called here.
ELSEWHERE = {
    "bpf": "meshwall ip list, meshwall ct list, meshwall policy matrix",
    "endpoint": "meshwall status",
    "monitor-drops": "meshwall observe --verdict DROPPED -f",
    "troubleshoot": "meshwall mesh check",
    "validate": "meshwall policy check PATH",
    "reload": "systemctl reload meshwalld",
    "hubble": "meshwall observe",
}


def module_of(noun: str) -> str | None:
    """The module that registers a noun or alias."""
    name = ALIASES.get(noun, noun)
    return next((module for module, nouns in NOUNS.items() if name in nouns), None)


def parser_for(noun: str | None) -> argparse.ArgumentParser:
    """The whole parser, of which only the part of `noun` is filled in."""
    parser = argparse.ArgumentParser(
        prog="meshwall",
        description="Host firewall and cluster mesh: what is enforced here, and why.",
        epilog="Each command explains itself with --help. Most take -o json|yaml|table and --socket PATH.",
    )
    parser.add_argument(
        "--socket", metavar="PATH", help="of the daemon (default /run/meshwall/meshwall.sock)"
    )
    parser.add_argument("--version", action="store_true", help="the same as `meshwall version`")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="noun")
    wanted = module_of(noun) if noun else None
    for module, nouns in NOUNS.items():
        if module == wanted:
            importlib.import_module(f"daemon.cli.{module}").register(commands)
        else:
            for name, text in nouns.items():
                commands.add_parser(name, help=text, add_help=False)
    for leaf in _leaves(commands):
        _accept_socket(leaf)
    return parser


def _leaves(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> Iterator[argparse.ArgumentParser]:
    for parser in dict.fromkeys(commands.choices.values()):
        nested = [one for one in parser._actions if isinstance(one, argparse._SubParsersAction)]
        yield parser
        for one in nested:
            yield from _leaves(one)


def _accept_socket(parser: argparse.ArgumentParser) -> None:
    """`--socket` may stand before or after the command."""
    with contextlib.suppress(argparse.ArgumentError):  # has it already
        parser.add_argument("--socket", metavar="PATH", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def noun_in(arguments: Sequence[str]) -> str | None:
    """The first word that is not an option or its value."""
    skip = False
    for one in arguments:
        if skip:
            skip = False
        elif one == "--socket":
            skip = True
        elif not one.startswith("-"):
            return one
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """The program `meshwall`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    noun = noun_in(arguments)
    if noun is None and "--version" in arguments:
        arguments, noun = ["version"], "version"
    if noun in ELSEWHERE:
        print(f"meshwall: there is no `{noun}` here; use: {ELSEWHERE[noun]}", file=sys.stderr)
        return 2
    parser = parser_for(noun)
    options = parser.parse_args(arguments)
    if options.noun is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        code: int = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    return code


if __name__ == "__main__":
    sys.exit(main())

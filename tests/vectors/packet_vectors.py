"""Run packet vector files through the model and through the loaded programs at XDP and TCX.

`python tests/vectors/packet_vectors.py FILE.jsonl...` writes one results file for each of them (the format
is that of the vectors' own score.py) and scores it. Treatments are not read off the parser but measured:
each frame runs under a policy that allows everything and under one that denies everything but the fail-safe
ports, ICMP errors also after this host has sent the packet that they quote. Frames that the kernel's test
run refuses (under 14 bytes; at TCX also cut IP headers) go to the model alone. Exit status: failures on
`must` rows. Without root only the model is run.
"""

import argparse
import contextlib
import errno
import ipaddress
import json
import os
import struct
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bpf import frames
from bpf.layout import (
    PORTS_TCP,
    PORTS_UDP,
    RULE_FAILSAFE,
    SLOT_HOST,
    CellFlag,
    CellVerdict,
    Hook,
    PacketClass,
    Reason,
)
from bpf.model import SCTP, TCP, UDP, Direction, Host, Packet, Policy, Quote, parse, quoted
from bpf.run import Rig

OWN = ("192.0.2.1", "2001:db8:a::1", "fe80::1:1")
ALLOW = CellVerdict.ALLOW << 28 | CellFlag.LOG << 24 | 20
SAVED = CellVerdict.ALLOW << 28 | RULE_FAILSAFE
FAILSAFE = (PORTS_TCP + 22, PORTS_UDP + 68, PORTS_UDP + 546)
NAMES = {kind: kind.name.lower().replace("_", "-") for kind in PacketClass}
PASSING_AS = {Reason.LINK: "accept", Reason.NON_IP: "pass"}

Row = dict[str, Any]


def policies(own: Sequence[str]) -> tuple[Policy, Policy]:
    """Allow everything (an event for each packet); deny everything but the fail-safe ports."""
    addresses = {ipaddress.ip_address(text).packed: SLOT_HOST for text in own}
    world = {(Direction.INGRESS, slot): tuple((port, port, SAVED) for port in FAILSAFE) for slot in (0, 2)}
    return (
        Policy(addresses, default={Direction.INGRESS: ALLOW, Direction.EGRESS: ALLOW}),
        Policy(addresses, rows=world),
    )


class CannotRun(Exception):  # noqa: N818 - a fact about a frame, not a failure
    """The kernel's test run refuses a frame of this length."""


@dataclass(frozen=True)
class Answer:
    """What one subject did with one frame under one policy."""

    passes: bool
    reason: Reason
    facts: Row


class Model:
    """The oracle as a subject."""

    name = "model"

    def __init__(self) -> None:
        self._host = Host(Policy())

    def start(self, policy: Policy) -> None:
        """Nothing has happened yet, and this policy is in force."""
        self._host = Host(policy)

    def switch(self, policy: Policy) -> None:
        """A new policy; connections stay."""
        self._host.policy = policy

    def feed(self, frame: bytes, direction: Direction) -> Answer:
        """One frame."""
        decision = self._host.judge(frame, direction)
        packet = parse(frame)
        return Answer(
            decision.passes, decision.reason, {"class": NAMES[packet.kind], "tuple": facts_tuple(packet)}
        )


def facts_tuple(packet: Packet) -> list[Any]:
    """The tuple as score.py compares it."""
    src, dst = (str(ipaddress.ip_address(raw)) if raw else None for raw in (packet.src, packet.dst))
    return [packet.family or None, src, dst, packet.proto, packet.sport, packet.dport]


class Programs:
    """A loaded program as a subject; its facts come from its events."""

    def __init__(self, rig: Rig, hook: Hook) -> None:
        self.name = hook.name.lower()
        self._rig, self._hook = rig, hook

    def start(self, policy: Policy) -> None:
        """Nothing has happened yet, and this policy is in force."""
        self._rig.forget()
        self._rig.install(policy)

    def switch(self, policy: Policy) -> None:
        """A new policy; connections stay."""
        self._rig.install(policy)

    def feed(self, frame: bytes, direction: Direction) -> Answer:
        """One frame, through the egress program when the host sends it."""
        hook = Hook.TCX_EGRESS if direction is Direction.EGRESS else self._hook
        before = self._rig.reasons(direction)
        self._rig.events()
        try:
            verdict = self._rig.run(hook, frame)
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise CannotRun(len(frame)) from error
            raise
        after = self._rig.reasons(direction)
        counted = [reason for reason, packets in after.items() if packets != before.get(reason, 0)]
        events = self._rig.events()
        # XDP counts nothing when it leaves a first packet to the next hook
        reason = counted[0] if counted else Reason.FORWARDED
        return Answer(verdict.passes, reason, event_facts(events[0]) if events else {})


def event_facts(event: Row) -> Row:
    """Class and tuple as the program saw them."""
    size = 4 if event["family"] == 4 else 16
    kind = PacketClass(event["packet_class"])
    ends = [
        str(ipaddress.ip_address(event[name][:size])) if event["family"] else None
        for name in ("saddr", "daddr")
    ]
    ports: list[int | None] = [None, None]
    if event["proto"] in (6, 17, 132) and kind is not PacketClass.FRAG_NONFIRST:
        ports = [int.from_bytes(event[name], "big") for name in ("sport_be", "dport_be")]
    return {"class": NAMES[kind], "tuple": [event["family"] or None, *ends, event["proto"], *ports]}


Subject = Model | Programs


def treatment(row: Row, allowed: Answer, denied: Answer, related: Callable[[], bool]) -> str:
    """The word for what happened under both policies."""
    packet = parse(bytes.fromhex(row["hex"]))
    if packet.kind is PacketClass.FRAG_NONFIRST and not denied.passes:
        return "frag-follow"
    if allowed.passes and denied.passes:
        return PASSING_AS.get(denied.reason, "failsafe")
    if not allowed.passes:
        return "drop"
    errors = {PacketClass.ICMP4: (3, 11, 12), PacketClass.ICMP6: (1, 2, 3, 4)}.get(packet.kind, ())
    return "related" if packet.icmp_type in errors and related() else "policy"


def sent_by_us(quote: Quote) -> bytes:
    """The first packet of the flow that an ICMP error quotes, as this host sends it."""
    src, dst = (str(ipaddress.ip_address(raw)) for raw in (quote.src, quote.dst))
    if quote.proto == TCP:
        return frames.tcp(src, dst, quote.sport, quote.dport)
    if quote.proto == UDP:
        return frames.udp(src, dst, quote.sport, quote.dport)
    if quote.proto == SCTP:
        return frames.ip(src, dst, SCTP, struct.pack(">HH", quote.sport, quote.dport) + bytes(8))
    return frames.icmp(src, dst, 8 if quote.family == 4 else 128, identifier=quote.sport)


def answers_errors_rightly(subject: Subject, row: Row, deny: Policy) -> bool:
    """An ICMP error passes a denying policy once this host has sent what it quotes, and never otherwise."""
    frame = bytes.fromhex(row["hex"])
    packet = parse(frame)
    quote = quoted(packet, frame)
    if quote is None or quote.src != packet.dst:
        return True  # it names no flow of ours: that it was dropped is all there is to see
    subject.start(replace(deny, default={Direction.EGRESS: ALLOW}))
    subject.feed(sent_by_us(quote), Direction.EGRESS)
    subject.switch(deny)
    return subject.feed(frame, Direction.INGRESS).passes


def results(subject: Subject, rows: list[Row], own: Sequence[str]) -> list[Row]:
    """One result for each row. Rows of one sequence are fed in order into the same state."""
    allow, deny = policies(own)
    found: list[Row] = []
    for row in rows:
        before = [
            other
            for other in rows
            if row.get("seq") and other.get("seq") == row["seq"] and other["step"] < row["step"]
        ]
        answers = []
        for policy in (allow, deny):
            subject.start(policy)
            for other in sorted(before, key=lambda one: one["step"]):
                subject.feed(bytes.fromhex(other["hex"]), direction_of(other))
            with contextlib.suppress(CannotRun):
                answers.append(subject.feed(bytes.fromhex(row["hex"]), direction_of(row)))
        if not answers:
            found.append({"name": row["name"]})
            continue
        word = treatment(row, *answers, lambda row=row: answers_errors_rightly(subject, row, deny))  # type: ignore[misc]
        found.append({"name": row["name"], **(answers[1].facts or answers[0].facts), "verdict": word})
    return found


def direction_of(row: Row) -> Direction:
    """Of a vector row."""
    return Direction.EGRESS if row["dir"] == "out" else Direction.INGRESS


def score(rows: list[Row], found: list[Row]) -> tuple[int, int, list[str]]:
    """Failures on must rows, on the others, and a line for each; the rules of the vectors' score.py."""
    by_name, hard, soft, lines = {one["name"]: one for one in found}, 0, 0, []
    for row in rows:
        got, facts, alternatives, why = by_name[row["name"]], row["facts"], row.get("alt", []), []
        if "class" in got and got["class"] not in [facts["class"], *alternatives]:
            why.append(f"class {got['class']}, want {facts['class']}")
        wanted = [facts[key] for key in ("family", "src", "dst", "proto", "sport", "dport")]
        if got.get("class") == facts["class"] and facts["family"] and got["tuple"] != wanted:
            why.append(f"tuple {got['tuple']}, want {wanted}")
        if "verdict" in got and got["verdict"] not in [row["default"], *alternatives]:
            why.append(f"verdict {got['verdict']}, want {row['default']}")
        if why:
            hard, soft = hard + row["must"], soft + (not row["must"])
            lines.append(f"{'FAIL' if row['must'] else 'soft'} {row['name']} {'; '.join(why)}")
    return hard, soft, lines


def run_file(path: Path, subjects: Sequence[Subject], own: Sequence[str], out: Path) -> int:
    """Prints the score of each subject; the number of failures on must rows."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    failures = 0
    for subject in subjects:
        found = results(subject, rows, own)
        target = out / f"{path.stem}.{subject.name}.jsonl"
        target.write_text("".join(json.dumps(one) + "\n" for one in found), encoding="utf-8")
        hard, soft, lines = score(rows, found)
        skipped = sum("verdict" not in one for one in found)
        total = f"{subject.name}: {len(rows)} rows, {hard} must-failures, {soft} soft, {skipped} cannot be run here"
        print("\n".join([*lines, f"{total}; {target}"]))
        failures += hard
    return failures


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.jsonl")
    parser.add_argument("--out", type=Path, help="directory of the results files (default: a temporary one)")
    parser.add_argument(
        "--own", nargs="+", default=OWN, help="addresses of the protected host in the vectors"
    )
    options = parser.parse_args(arguments)
    out = options.out or Path(tempfile.mkdtemp(prefix="meshwall-vectors-"))
    out.mkdir(parents=True, exist_ok=True)
    if os.geteuid():
        print("not root: only the model is run")
        return min(sum(run_file(path, [Model()], options.own, out) for path in options.files), 255)
    with Rig() as rig:
        subjects = [Model(), Programs(rig, Hook.XDP), Programs(rig, Hook.TCX_INGRESS)]
        return min(sum(run_file(path, subjects, options.own, out) for path in options.files), 255)


if __name__ == "__main__":
    sys.exit(main())

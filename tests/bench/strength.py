"""Do the tests notice when something is wrong? One deliberate fault at a time, and the smallest tests that should fail.

`./dev bench strength [WORD...]`. Works on a copy of the files that git knows, in a temporary directory. Each fault
replaces one piece of text (a fault whose text is not found once is itself an error: mend it here). What was found is
kept in .cache/strength.jsonl by fault and commit, so a run that was stopped goes on where it was; WORDs choose faults
by name and run them again. Aim: at least 80% noticed. 10 to 15 minutes.
"""

# ruff: noqa: E501 - a fault is one line

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / ".cache" / "strength.jsonl"
AIM = 0.8
LIMIT_S = 240  # for the tests of one fault
PROGRAMS = ("tests/kernel/test_programs.py", "tests/kernel/test_programs_fuzz.py")
POLICY = ("tests/unit/policy",)
TABLES = ("tests/unit/datapath", "tests/unit/state")
LOADER = ("tests/kernel/test_loader.py",)
PARSE, TRACK, FRAGMENTS = "bpf/src/parse.h", "bpf/src/conntrack.h", "bpf/src/fragments.h"
JUDGE, ADDRESS, HOST = "bpf/src/verdict.h", "bpf/src/peer.h", "bpf/src/host.c"
IMAGE, IP4, ADDRESSES = "daemon/datapath/image.py", "daemon/datapath/ip4.py", "daemon/datapath/addresses.py"
COMPILE, MATCH = "daemon/policy/compile.py", "daemon/policy/matching.py"
ATTACH = "bpf/attach.py"


@dataclass(frozen=True, slots=True)
class Fault:
    """`old` is in `file` once and becomes `new`."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


FAULTS = (
    # --- parser
    Fault("parse: ports are read inside IPv4 options", PARSE, "off + ihl;", "off + 20;", PROGRAMS),
    Fault("parse: bytes after the total length count", PARSE, "p->limit = off + total;", "p->limit = p->length;", PROGRAMS),
    Fault("parse: fragment offset in wrong units", PARSE, "(frag & 0x1fff) * 8", "(frag & 0x1fff)", PROGRAMS),
    Fault("parse: a fragment may overwrite TCP flags", PARSE, "offset < 20) ||", "offset < 8) ||", PROGRAMS),
    Fault("parse: FIN without ACK passes", PARSE, " || (flags & TCP_FIN && !(flags & TCP_ACK))", "", PROGRAMS),
    Fault("parse: extension headers too long", PARSE, "(ext->length + 1) * 8", "(ext->length + 2) * 8", PROGRAMS),
    Fault("parse: four extension headers at most", PARSE, "EXT_HEADERS 8", "EXT_HEADERS 4", PROGRAMS),
    Fault("parse: routing header with segments left", PARSE, "!routing->type || routing->left", "!routing->type", PROGRAMS),
    Fault("parse: UDP length under eight", PARSE, "be16(udp->length) < 8", "be16(udp->length) < 4", PROGRAMS),
    Fault("parse: neighbour discovery from afar", PARSE, "p->hop_limit != 255 || ", "", PROGRAMS),
    Fault("parse: strict source route", PARSE, " || option[0] == 137", "", PROGRAMS),
    Fault("parse: TCP judged by source port", PARSE, "PORTS_TCP + be16(tcp->dst)", "PORTS_TCP + be16(tcp->src)", PROGRAMS),
    Fault("parse: unaligned fragments", PARSE, "(more && bytes & 7)", "(more && bytes & 3)", PROGRAMS),
    Fault("parse: end of an IPv6 packet", PARSE, "p->limit = off + sizeof(*ip) + be16", "p->limit = off + be16", PROGRAMS),
    # --- connections
    Fault("track: an answer of the wrong opener", TRACK, "flow_touch(&f, s->direction == INGRESS ? CT_ORIGIN_OUT : CT_ORIGIN_IN", "flow_touch(&f, s->direction == INGRESS ? CT_ORIGIN_IN : CT_ORIGIN_OUT", PROGRAMS),
    Fault("track: a SYN is an answer", TRACK, "if (is_tcp_open(p) || p->class", "if (p->class", PROGRAMS),
    Fault("track: any segment opens", TRACK, "\t\treturn is_tcp_open(p);", "\t\treturn 1;", PROGRAMS),
    Fault("track: entries never end", TRACK, "return entry && (__s64)(entry->expires - bpf_jiffies64()) >= 0;", "return entry != NULL;", PROGRAMS),
    Fault("track: a forged reset lasts", TRACK, "\t\t\tflags &= ~CT_RESET;", "\t\t\tflags |= 0;", PROGRAMS),
    Fault("track: all echoes are one", TRACK, "f->local_port = p->sport;\t/* the echo", "f->local_port = 0;\t/* the echo", PROGRAMS),
    Fault("track: errors about anything", TRACK, "if (!same_address(q.src, p->dst))", "if (0)", PROGRAMS),
    Fault("track: half of an IPv6 address", TRACK, "return a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3];", "return a[0] == b[0] && a[1] == b[1];", PROGRAMS),
    Fault("track: an answer opens a connection", TRACK, "if (p->proto != PROTO_TCP && flow_known(&f, !origin))", "if (0)", PROGRAMS),
    Fault("track: one answer makes a conversation", TRACK, "proven = young && !reply && flags & CT_SEEN_REPLY", "proven = young && flags & CT_SEEN_REPLY", PROGRAMS),
    Fault("track: a conversation stays half open", TRACK, "proven = young && !reply &&", "proven = 0 && young && !reply &&", PROGRAMS),
    Fault("track: a trace leaves traces", TRACK, "\tif (p->dry)\n\t\treturn flow_known(f, origin);\n", "", PROGRAMS),
    Fault("track: a closed connection lives on", TRACK, "== (CT_FIN_LOCAL | CT_FIN_REMOTE))", "== (CT_FIN_LOCAL | CT_FIN_REMOTE | 64))", PROGRAMS),
    Fault("fragments: whatever protocol", FRAGMENTS, "key->proto = p->frag_proto;", "key->proto = 0;", PROGRAMS),
    Fault("fragments: denied ones forgotten", FRAGMENTS, "\tif (!pass)\n\t\tmap_put(fragments_denied", "\tif (!pass && 0)\n\t\tmap_put(fragments_denied", PROGRAMS),
    Fault("fragments: one source takes all", FRAGMENTS, "if (share->used >= FRAGMENTS / 16)", "if (share->used >= FRAGMENTS * 16)", PROGRAMS),
    # --- verdict and addresses in C
    Fault("judge: egress by the rows of ingress", JUDGE, "rows->ingress_at : rows->egress_at", "rows->ingress_at : rows->ingress_at", PROGRAMS),
    Fault("judge: ports of the other generation", JUDGE, "(s->buffer * 2 + direction) * PORT_BLOCKS", "(!s->buffer * 2 + direction) * PORT_BLOCKS", PROGRAMS),
    Fault("judge: deny told as default", JUDGE, "REASON_POLICY_DENY : REASON_POLICY_DEFAULT", "REASON_POLICY_DEFAULT : REASON_POLICY_DEFAULT", PROGRAMS),
    Fault("judge: audit of a rule", JUDGE, "cell_flags(o->cell) & CELLFLAG_AUDIT", "cell_flags(o->cell) & 0", PROGRAMS),
    Fault("judge: panic passes policy", JUDGE, "if (s->panic == PANIC_FAILSAFE && cell_rule(block) != RULE_FAILSAFE)", "if (s->panic == PANIC_FAILSAFE && 0)", PROGRAMS),
    Fault("address: hosts are not asked for", ADDRESS, "if (entry & ENTRY_HOSTS) {", "if (entry & ENTRY_HOSTS && 0) {", PROGRAMS),
    Fault("address: third octet twice", ADDRESS, "entry = block_entry(entry & ENTRY_MASK, host);", "entry = block_entry(entry & ENTRY_MASK, host >> 8);", PROGRAMS),
    Fault("address: IPv6 /64 before longer ones", ADDRESS, "if (!peer && flags & CONFIG_V6_TRIE)", "if (peer && flags & CONFIG_V6_TRIE)", PROGRAMS),
    # --- what policies mean
    Fault("policy: an allow beats a deny", COMPILE, "        for one in denies:\n", "        for one in denies[:0]:\n", POLICY),
    Fault("policy: audit closes", COMPILE, "if passes and would_drop else kept", "if would_drop else kept", POLICY),
    Fault("policy: fixed rules for nobody", COMPILE, "if one.peers is None or not set(one.peers).isdisjoint(signature)", "if one.peers is None", POLICY),
    Fault("policy: hidden rules hide too much", COMPILE, "elif bits & ~hidden:", "elif not bits & hidden:", POLICY),
    Fault("policy: exceptions of a prefix", MATCH, "found[prefix] = inside & ~excepted", "found[prefix] = inside", POLICY),
    Fault("policy: NotIn as In", MATCH, "return not any(value in requirement.values for value in values)", "return any(value in requirement.values for value in values)", POLICY),
    Fault("policy: label sources mixed", MATCH, "        if source in (ANY_SOURCE, label.source):\n                mask |= bit", "        if True:\n                mask |= bit", POLICY),
    # --- switch of a policy
    Fault("switch: the flip comes first", IMAGE, '        ops += [Order(), _config_op("generation", self.generation), Grace()]', '        ops = [Order(), _config_op("generation", self.generation), Grace(), *ops]', TABLES),
    Fault("switch: cells of both policies overlap", IMAGE, "        if needed <= first:\n", "        if needed <= end:\n", TABLES),
    Fault("switch: a number for two rules", IMAGE, "if number not in busy)", "if True)", TABLES),
    Fault("switch: slots used again at once", IMAGE, "            self._leaving.append(slot)", "            self._free.append(slot)", TABLES),
    Fault("switch: a slot of an identity split", IMAGE, "heirs = set(self._owner_of)", "heirs = set[int]()", TABLES),
    Fault("switch: rows of a fresh slot only later", IMAGE, "self._class_op(1 - buffer, slot, self._rows.get(old, (0, 0)))", "self._class_op(1 - buffer, slot, (0, 0))", TABLES),
    Fault("switch: no order before the flip", IMAGE, "[Order(), _config_op(\"generation\"", "[_config_op(\"generation\"", TABLES),
    Fault("switch: an owner's rows are forgotten", IMAGE, "for slot, identity in self._owner_of.items():\n", "for slot, identity in list(self._owner_of.items())[:2]:\n", TABLES),
    # --- addresses
    Fault("ip4: a host leaves the hash too early", IP4, "        ops, self._repairs = self._repairs, []\n", "        ops, self._repairs = [*self._repairs, Drop(\"ip4_hosts\", _keys(plan.drops))], []\n", TABLES),
    Fault("ip4: blocks used again at once", IP4, "            if old is not None:\n                self._retired.append(old.number)\n        root, octet", "            if old is not None:\n                self._free.append(old.number)\n        root, octet", TABLES),
    Fault("ip4: published before it is filled", IP4, "            ops += [*fills, Order()]\n        ops += stores\n", "            stores += [*fills, Order()]\n        ops += stores\n", TABLES),
    Fault("ip4: no order after filling", IP4, "ops += [*fills, Order()]", "ops += fills", TABLES),
    Fault("ip4: the hash is not announced", IP4, "flagged = [root for root, count in under.items() if count and", "flagged = [root for root, count in under.items() if not count and", TABLES),
    Fault("ip4: a host that goes leaves its slot", IP4, "found[octet] = cover[octet]", "found[octet] = entries[octet]", TABLES),
    Fault("ip4: narrow prefixes under wide ones", IP4, "return sorted(prefixes.items(), key=lambda one: one[0].length)", "return sorted(prefixes.items(), key=lambda one: -one[0].length)", TABLES),
    Fault("ip4: own addresses in the hash", IP4, "if crowded or _mixed(entries) or SLOT_HOST in after.values():", "if crowded or _mixed(entries):", TABLES),
    Fault("ip4: strays of a dead process stay", IP4, "        self._repairs.append(Drop(\"ip4_hosts\", _keys([address])))\n", "", TABLES),
    Fault("ip6: a /64 answers before what is in it", ADDRESSES, "            if prefix.length > 64:\n                ops = self._deepen", "            if prefix.length > 127:\n                ops = self._deepen", TABLES),
    Fault("ip6: tables asked too late", IMAGE, "[*self._flag_ops(self._config), *ops, *self._flag_ops()]", "[*ops, *self._flag_ops()]", TABLES),
    Fault("claims: of two clusters the first wins", "daemon/state/ips.py", "    if len(named) > 1:\n", "    if len(named) > 9:\n", TABLES),
    Fault("claims: a source that goes takes others along", "daemon/state/tables.py", "        self.counts[key.source] -= 1\n", "        self.counts[key.source] -= 1\n        others = ()\n", TABLES),
    # --- loading and attaching
    Fault("attach: detached before it is attached", ATTACH, "                link_update(link, program)\n            return\n", "                link_detach(link)\n            path.unlink()\n", LOADER),
    Fault("attach: a foreign XDP program is an error", ATTACH, "if error.errno in (errno.EBUSY, errno.EEXIST):", "if error.errno in (errno.EPERM,):", LOADER),
    Fault("attach: after other programs", ATTACH, "_put(pins, ifindex, on_way_in, BPF_F_BEFORE)", "_put(pins, ifindex, on_way_in)", LOADER),
)  # fmt: skip


def commit() -> str:
    """What the faults are tried on: the commit, and what differs from it."""
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    changes = subprocess.run(["git", "diff", "HEAD"], cwd=ROOT, check=True, capture_output=True).stdout
    return head.strip()[:12] + (hashlib.sha256(changes).hexdigest()[:8] if changes else "")


def copied(home: Path) -> Path:
    """The files that git knows, in a folder of their own."""
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    tree = home / "tree"
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    return tree


def passes(tree: Path, tests: tuple[str, ...]) -> bool:
    """Whether the tests pass there; tests that take much longer than without a fault (a search for the smallest
    example, a hang) do not."""
    vectors = os.environ.get("MESHWALL_VECTORS", str(ROOT.parent / "shared" / "vectors"))
    environment = os.environ | {
        "PYTHONPATH": str(tree),
        "MESHWALL_VECTORS": vectors,
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, timeout=LIMIT_S, check=False, text=True
        )
    except subprocess.TimeoutExpired:
        return False
    if done.returncode not in (0, 1):  # 1: a test failed; others: nothing was tested
        sys.exit(
            f"pytest {' '.join(tests)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    return done.returncode == 0


def noticed(tree: Path, fault: Fault) -> bool:
    """Whether a test fails, the cheapest file first."""
    path = tree / fault.file
    text = path.read_text()
    path.write_text(text.replace(fault.old, fault.new))
    try:
        return not all(passes(tree, (one,)) for one in fault.tests)
    finally:
        path.write_text(text)


def remembered(state: str) -> dict[str, bool]:
    """What an earlier run found about this state of the files."""
    lines = KEPT.read_text().splitlines() if KEPT.exists() else []
    rows = [json.loads(one) for one in lines]
    return {row["fault"]: row["noticed"] for row in rows if row["state"] == state}


def main() -> int:
    """One line for each fault; the status says whether enough of them were noticed, and all still fit the text."""
    words = [one.lower() for one in sys.argv[1:]]
    chosen = [one for one in FAULTS if not words or any(word in one.name.lower() for word in words)]
    stale = [one for one in FAULTS if (ROOT / one.file).read_text().count(one.old) != 1]
    for one in stale:
        print(f"mend this fault, its text is not there once: {one.name} ({one.file}: {one.old!r})")
    state = commit()
    known = {} if words else remembered(state)
    KEPT.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mwstrength") as home:
        tree = copied(Path(home))
        todo = [one for one in chosen if one.name not in known and one not in stale]
        for tests in dict.fromkeys(file for one in todo for file in one.tests):
            if not passes(tree, (tests,)):
                sys.exit(f"{tests} fails without any fault: there is nothing to learn from it")
        for one in todo:
            started = time.monotonic()
            known[one.name] = noticed(tree, one)
            with KEPT.open("a") as kept:
                kept.write(json.dumps({"state": state, "fault": one.name, "noticed": known[one.name]}) + "\n")
            took = time.monotonic() - started
            print(f"{'noticed' if known[one.name] else 'SURVIVED':8} {took:5.0f} s  {one.name}", flush=True)
    tried = [one.name for one in chosen if one.name in known]
    good = sum(known[one] for one in tried)
    print(f"{good} of {len(tried)} faults noticed")
    for name in tried:
        if not known[name]:
            print(f"  survived: {name}")
    return 0 if tried and not stale and good >= AIM * len(tried) else 1


if __name__ == "__main__":
    raise SystemExit(main())

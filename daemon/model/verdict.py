"""Verdicts, packed cells and drop reasons; numbers equal to bpf/layout.py, held together by a test."""

from enum import IntEnum, IntFlag


class Verdict(IntEnum):
    """What the policy says of a new connection. Zero is deny, so that memory nobody wrote is closed."""

    DEFAULT_DENY = 0  # the direction is under policy and no rule mentions this
    ALLOW = 1  # an allow rule, or the implicit allow of policies without default deny
    DENY = 2  # a deny rule
    REDIRECT = 3  # allowed at layers 3 and 4, subject to a layer 7 rule


class CellFlag(IntFlag):
    """Flags of a matrix cell, above the rule number."""

    NONE = 0
    AUDIT = 1  # the deciding policy is in audit mode: report, do not drop
    LOG = 2
    REJECT = 4  # tell the sender of a denied packet
    AUTH = 8


RULE_BITS = 24


def pack_cell(verdict: Verdict, rule: int, flags: CellFlag = CellFlag.NONE) -> int:
    """A matrix cell as the kernel reads it: verdict in bits 28-31, flags in 24-27, rule number in 0-23."""
    return verdict << 28 | flags << RULE_BITS | rule


def unpack_cell(cell: int) -> tuple[Verdict, int, CellFlag]:
    """The inverse of pack_cell."""
    return Verdict(cell >> 28), cell & (1 << RULE_BITS) - 1, CellFlag(cell >> RULE_BITS & 15)


class FixedRule(IntEnum):
    """Rule numbers that no document stands behind; equal to RULE_* in bpf/layout.py."""

    DEFAULT_DENY_INGRESS = 0
    DEFAULT_DENY_EGRESS = 1
    DEFAULT_ALLOW = 2
    FAILSAFE = 3
    EXEMPT = 5  # node ports that the settings leave to the policy of what is behind them
    LOCALHOST = 4  # this host may reach its own workloads unless a deny rule says otherwise


FIRST_RULE = 16  # the first number of a policy's rule

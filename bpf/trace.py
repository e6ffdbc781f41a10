"""One packet through a loaded program without leaving anything behind, and what the program made of it.

A packet that carries the cookie of `config` (in front of the frame for XDP, in the control block for tc) is judged
as any other, but writes no state, counter or event: the outcome goes to the map `trace`.
"""

import struct
from dataclasses import dataclass

from bpf.layout import CONFIG, EVENT, TRACE, Hook
from bpf.syscall import PinnedMap, prog_test_run

XDP_MD = struct.Struct("=6I")  # data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex
SKB_INGRESS_IFINDEX, SKB_CB, SKB_SIZE = 36, 48, 192  # offsets in struct __sk_buff, and its size
LEAST_FRAME = 14  # the kernel's test run takes nothing shorter
LOOPBACK = 1
NOTHING = bytes(TRACE.size)
XDP_PASS, TCX_NEXT = 2, 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Traced:
    """What a program did with a packet. `event` and `outcome` are None when it passed before it was judged."""

    hook: Hook
    passes: bool
    event: dict[str, int | bytes] | None  # fields of layout.EVENT
    outcome: dict[str, int] | None  # the other fields of layout.TRACE


def traced(
    program: int, config: PinnedMap, answers: PinnedMap, hook: Hook, frame: bytes, *, forwarded: bool = False
) -> Traced:
    """Run a frame of at least LEAST_FRAME bytes. OSError when the kernel refuses; one at a time, the caller sees to it.

    forwarded: at TCX egress, it came from another device.
    """
    cookie = CONFIG.unpack(config.lookup(0) or b"")["trace_cookie"]
    raw = struct.pack("=Q", cookie)
    answers.update(0, NOTHING)
    if hook is Hook.XDP:
        whole = raw + frame
        context = XDP_MD.pack(len(raw), len(whole), 0, 0, 0, 0)
        passes = prog_test_run(program, whole, context=context).value == XDP_PASS
    else:
        skb = bytearray(SKB_SIZE)
        skb[SKB_CB : SKB_CB + len(raw)] = raw
        if forwarded:
            struct.pack_into("=I", skb, SKB_INGRESS_IFINDEX, LOOPBACK)
        passes = prog_test_run(program, frame, context=bytes(skb)).value == TCX_NEXT
    found = TRACE.unpack(answers.lookup(0) or NOTHING)
    if not found["done"]:
        return Traced(hook, passes, None, None)
    event = {name: _plain(value) for name, value in EVENT.unpack(bytes(found["event"])).items()}  # type: ignore[call-overload]
    outcome = {name: int(str(value)) for name, value in found.items() if name not in ("event", "pad", "done")}
    return Traced(hook, passes, event, outcome)


def _plain(value: object) -> int | bytes:
    return value if isinstance(value, bytes) else int(str(value))

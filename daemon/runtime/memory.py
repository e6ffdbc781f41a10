"""What the C library does with memory that Python gives back."""

import ctypes

M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8
LARGE_BYTES = 128 << 10  # glibc raises it with use, and then keeps what was freed


def keep_small() -> None:
    """Large buffers go back to the kernel when freed, and threads share one arena. Elsewhere than on glibc: nothing."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
        mallopt(M_ARENA_MAX, 1)


def trim() -> None:
    """Give back what starting up has freed."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)

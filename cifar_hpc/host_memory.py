"""How this process gets its memory from the operating system."""

from __future__ import annotations

import ctypes

# malloc.h of glibc
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let malloc keep what is freed, instead of giving it back and asking for it again.

    A training step on a CPU frees and allocates gigabytes of activations. glibc maps each large one anew, and the
    kernel fills it with zeros page by page, which took a third of a step (mallopt(3)). The process then keeps the
    memory of its largest moment.

    Returns:
        Whether that is possible here; elsewhere than in glibc it is not, and changes nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))

"""How this process takes memory from the system."""

import ctypes
from importlib.util import find_spec

import jax

# Numbers of <malloc.h>.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Has malloc keep what is freed for later, where a CPU is the device. To be called before the first use of a device.

    XLA:CPU allocates a program's temporary buffers at every call. glibc maps blocks of this size anew, and the kernel clears
    their pages when they are first written: 1.3 GiB a step of the 110M model of two rows, a fifth of its time. Kept, they have
    one heap for all threads (a thread's own heap holds no large block, and those that exist cannot be taken away: hence
    before), which does not shrink: the process stays as large as it was at most.

    Other devices' hosts, and systems without glibc, are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not _is_cpu_only():
        return
    for parameter, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)):
        mallopt(parameter, value)


def _is_cpu_only() -> bool:
    """Whether JAX will use CPUs, told without asking it: it would start them."""
    if platforms := jax.config.jax_platforms:
        return platforms == "cpu"
    return find_spec("libtpu") is None and find_spec("jax_plugins") is None

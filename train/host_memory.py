"""How this process takes memory from the system."""

import ctypes

import jax

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of <malloc.h>


def keep_freed_memory() -> None:
    """Has malloc keep what is freed for later, where a CPU is the device. To be called before the first use of a device.

    XLA:CPU allocates a program's temporary buffers at every call. glibc maps blocks of this size anew, and the kernel clears
    their pages when they are first written: 1.3 GiB a step of the 110M model of two rows, a fifth of its time. The main
    thread's heap keeps them, if it may grow by any block and never shrinks (the process stays as large as it was at most);
    heaps of other threads hold no large block. So programs run in the thread that calls them.

    Other devices' hosts are left as they are, and systems without glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # read when devices are first looked for, as in the next line
    if jax.default_backend() != "cpu":
        return
    for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)):
        mallopt(parameter, value)

"""What this machine's CPU can do, told before JAX is there."""

import functools
from pathlib import Path


@functools.cache
def has_amx() -> bool:
    """Whether it has matrix units (Intel's Advanced Matrix Extensions), which multiply bfloat16 and int8."""
    try:
        return "amx_tile" in Path("/proc/cpuinfo").read_text()
    except OSError:  # no Linux
        return False

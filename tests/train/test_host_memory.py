"""That a program's temporary buffers are not taken from the system at every call, which only a process of its own can show."""

import subprocess
import sys

import pytest

CALLS = 20  # threads may take memory of their own in the first
PROGRAM = f"""
import resource, statistics, sys
import jax, jax.numpy as jnp
from train.host_memory import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
x = jnp.ones((2048, 16))
f = jax.jit(lambda x: jnp.sum(jnp.stack([x @ (x + i).T for i in range(8)]) @ x))  # 128 MiB and more
assert f.lower(x).compile().memory_analysis().temp_size_in_bytes > 128 << 20
faults = []
for _ in range({CALLS}):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    f(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(statistics.median_low(faults[{CALLS} // 2 :]))
"""


def page_faults(choice: str) -> int:
    """Of a call, when some were made before."""
    ran = subprocess.run([sys.executable, "-c", PROGRAM, choice], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    return int(ran.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_kept_memory_is_not_cleared_by_the_system_again():
    least = (128 << 20) // 4096
    assert page_faults("kept") < least // 100 < least < page_faults("given back")

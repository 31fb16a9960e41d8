import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, resource, sys
from ddpm_hf.allocator import keep_freed_memory
try:
    ctypes.CDLL("libc.so.6").gnu_get_libc_version
except (OSError, AttributeError):
    sys.exit("no glibc")
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20
if sys.argv[1] == "True":
    keep_freed_memory()
before = resident()
pixels = b"x" * 2**24 * 4  # 64 MiB
del pixels
print(resident() - before)
"""


@pytest.mark.parametrize("keeps", [True, False])
def test_freed_memory_is_kept_only_where_it_is_asked_for(keeps):
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(keeps)], capture_output=True, text=True)
    if done.stderr.strip() == "no glibc":
        pytest.skip("another C library than glibc")
    assert done.returncode == 0, done.stderr
    assert (float(done.stdout) > 32) == keeps

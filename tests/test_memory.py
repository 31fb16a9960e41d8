import os
import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, resource, sys
from ddpm_hf.utils.memory import tune_process
try:
    ctypes.CDLL("libc.so.6").gnu_get_libc_version
except (OSError, AttributeError):
    sys.exit("no glibc")
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20
if sys.argv[1] == "True":
    tune_process()
before = resident()
pixels = b"x" * 2**24 * 4  # 64 MiB
del pixels
print(resident() - before)
"""


@pytest.mark.parametrize("keeps", [True, False])
def test_freed_memory_is_kept_only_where_it_is_asked_for(keeps):
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(keeps)], capture_output=True, text=True)
    if done.stderr.strip() == "no glibc":
        pytest.skip("the C library is not glibc")
    assert done.returncode == 0, done.stderr
    assert (float(done.stdout) > 32) == keeps


@pytest.mark.parametrize(("launched", "processes", "one"), [(True, 1, False), (True, 2, True), (False, 1, True)])
def test_a_process_that_is_launched_alone_computes_on_all_cores(launched, processes, one):
    code = """
import torch
from ddpm_hf.utils.memory import tune_process
torch.set_num_threads(1)
torch.set_num_threads, threads = (lambda n: threads.append(n)), []
tune_process()
print(threads)
"""
    launcher = {"ACCELERATE_MIXED_PRECISION": "no"} if launched else {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(processes), **launcher}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert done.stdout.strip() == ("[]" if one else f"[{cores}]")

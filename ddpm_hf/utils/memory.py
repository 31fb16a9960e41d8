"""glibc malloc tuning and thread count for command-line and training processes; errors of memory that does not suffice.

A library must not change these in the process that imports it, so only commands and scripts call `tune_process`.
"""

import contextlib
import ctypes
import os

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED")  # on CUDA, on a CPU, in cuBLAS
PROCESSES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # torchrun's and MPIs'


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of the device or of the machine does not suffice."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)


def tune_process() -> None:
    """Have this process keep the memory that it frees, and compute on all cores if it was launched alone.

    `accelerate launch` gives its only process one thread, however many cores there are.
    """
    keep_freed_memory()
    if "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1":
        import torch  # takes a second, which other commands that import this module need not wait for
        from accelerate.utils import get_int_from_env

        if get_int_from_env(PROCESSES, 1) == 1:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
            torch.set_num_threads(cores)


def keep_freed_memory() -> None:
    """Have glibc keep freed memory: by default each update gives its activations back and faults them in again."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        # M_MMAP_THRESHOLD, of which older versions of glibc take 32 MiB at most, and then M_TRIM_THRESHOLD
        if mallopt(-3, 2**30) or mallopt(-3, 2**25):
            mallopt(-1, 2**30)

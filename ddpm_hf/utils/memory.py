"""glibc malloc tuning and thread count of processes, and recognition of out-of-memory errors.

Only commands and scripts call `tune_process` and `keep_freed_memory`, because they change the whole process.
"""

import contextlib
import ctypes
import os

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED")  # CUDA, CPU, cuBLAS
PROCESSES = (
    "WORLD_SIZE",
    "PMI_SIZE",
    "OMPI_COMM_WORLD_SIZE",
    "MV2_COMM_WORLD_SIZE",
)  # of torchrun and MPI


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the device or the machine is out of memory."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)


def tune_process() -> None:
    """Keep freed memory in this process, and use all cores if it is the only process of a launcher.

    `accelerate launch` sets one thread even for a single process.
    """
    keep_freed_memory()
    if "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1":
        import torch  # slow, so not imported by the other commands
        from accelerate.utils import get_int_from_env

        if get_int_from_env(PROCESSES, 1) == 1:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
            torch.set_num_threads(cores)


def keep_freed_memory() -> None:
    """Make glibc keep freed memory, instead of returning the activations of each update to the kernel."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        # M_MMAP_THRESHOLD, at most 32 MiB in older versions of glibc, then M_TRIM_THRESHOLD
        if mallopt(-3, 2**30) or mallopt(-3, 2**25):
            mallopt(-1, 2**30)

"""The C library's memory, in processes that are ours: trainings and commands, not those of who imports us."""

import contextlib
import ctypes

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED")  # on CUDA, on a CPU, in cuBLAS


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of the device or of the machine does not suffice."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)


def keep_freed_memory() -> None:
    """Have glibc keep freed memory: by default each update gives its activations back and faults them in again."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        # M_MMAP_THRESHOLD, of which older versions of glibc take 32 MiB at most, and then M_TRIM_THRESHOLD
        if mallopt(-3, 2**30) or mallopt(-3, 2**25):
            mallopt(-1, 2**30)

"""The C library's memory, in processes that are ours: trainings and commands, not those of who imports us."""

import contextlib
import ctypes


def keep_freed_memory() -> None:
    """Have glibc keep freed memory: by default each update gives its activations back and faults them in again."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        # M_MMAP_THRESHOLD, of which older versions of glibc take 32 MiB at most, and then M_TRIM_THRESHOLD
        if mallopt(-3, 2**30) or mallopt(-3, 2**25):
            mallopt(-1, 2**30)

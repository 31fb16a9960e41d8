"""Work shared by several processes: either all of them get the result, or all of them raise an error."""

from collections.abc import Callable

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object


def in_all(work: Callable[[], list], accelerator: Accelerator | None) -> list:
    """Call `work` in every process and return the concatenation of their lists, in the order of the processes.

    Raises:
        Exception: the error of `work`, in the process where it failed.
        RuntimeError: `work` failed in another process. Otherwise this process would wait for it for ever.
    """
    if accelerator is None or accelerator.num_processes == 1:
        return work()
    error, found = None, []
    try:
        found = work()
    except (Exception, KeyboardInterrupt) as raised:
        error = raised
    parts = gather_object([(error and f"{type(error).__name__}: {error}", found)])
    if error is not None:
        raise error
    for failure, _ in parts:
        if failure:
            raise RuntimeError(f"another process failed: {failure}")
    return [each for _, found in parts for each in found]


def by_main(accelerator: Accelerator, work: Callable[[], object]) -> None:
    """Call `work` in the main process only; the others wait for it.

    Raises:
        Exception: the error of `work`, in the main process.
        ValueError: the message of that error, in the other processes.
    """
    error = None
    if accelerator.is_main_process:
        try:
            work()
        except Exception as raised:
            error = raised
    reason = broadcast_object_list([error and str(error)])[0]
    if error is not None:
        raise error
    if reason is not None:
        raise ValueError(reason)

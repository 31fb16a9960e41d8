"""Decodes many images in the order in which they come, in several processes if that is wanted.

`datasets`' `map(num_proc=…)` also decodes in several processes, but the first image must come before all others,
a stream must be read no further than needed, and a run must end soon after a signal and name the setting when a worker
dies.
"""

import collections
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice

import torch

from ddpm_hf.data.decoding import Decoded, Decoder
from ddpm_hf.data.pages import BadImage
from ddpm_hf.data.sources import Item
from ddpm_hf.utils.signals import STOPPING, raise_if_stopped

CHUNK = 16  # images per task of a worker process


def decode_each(items: Iterable[Item], decoder: Decoder, workers: int) -> Iterator[tuple[Item, Decoded | BadImage]]:
    """Decode all items in order, in `workers` processes, and yield each with its image or the reason why it is broken.

    The first image sets what the settings leave open in `decoder`; all others must have its size and bit depth.
    """
    items = iter(items)
    for item in items:
        raise_if_stopped()
        result = _decode(decoder, item)
        if isinstance(result, Decoded):
            decoder.hold_to(result.deep, result.pixels.shape, result.has_alpha)
        yield item, result
        if isinstance(result, Decoded):
            break
    if not workers:
        for item in items:
            raise_if_stopped()
            yield item, _decode(decoder, item)
        return
    with _explain_no_workers(workers):
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin_worker)
    ahead = collections.deque()
    try:
        while chunk := list(islice(items, CHUNK)):
            with _explain_no_workers(workers):  # the first calls start the processes
                ahead.append((chunk, pool.submit(_decode_chunk, decoder, chunk)))
            raise_if_stopped()
            if len(ahead) > 2 * workers:
                chunk, results = ahead.popleft()
                yield from zip(chunk, results.result())
        for chunk, results in ahead:
            raise_if_stopped()
            yield from zip(chunk, results.result())
    except BrokenProcessPool as error:
        raise ValueError(
            f"dataloader_num_workers={workers}: a worker died, perhaps because memory ran out, or because the script "
            'lacks `if __name__ == "__main__":` around its code, which each worker then runs again'
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _explain_no_workers(workers: int) -> Iterator[None]:
    """Raise ValueError where the machine does not let this process start another one."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"dataloader_num_workers={workers}: worker processes can't be started ({error}): they need room in "
            "/dev/shm (in a container, --shm-size), open files and memory; 0 decodes without them"
        ) from error


def _begin_worker() -> None:
    """Use one thread, ignore signals, which the main process handles, and exit when it exits or is killed."""
    torch.set_num_threads(1)
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _decode_chunk(decoder: Decoder, items: list[Item]) -> list[Decoded | BadImage]:
    return [_decode(decoder, item) for item in items]


def _decode(decoder: Decoder, item: Item) -> Decoded | BadImage:
    if item.source is None:
        return BadImage("has no image")
    try:
        return decoder(item.source, item.frame)
    except ValueError as error:
        raise ValueError(f"{item} {error}") from error

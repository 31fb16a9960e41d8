"""Guards of a run: skipped updates, divergence, errors of memory and compiler, invalid images, stop signals."""

import contextlib
import csv
import io
import logging
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from ddpm_hf.data.dataset import BadImages
from ddpm_hf.training.checkpoints import QUARANTINE, QUARANTINE_HEADER, Checkpoints, is_quarantine
from ddpm_hf.training.log import LOG_EVERY
from ddpm_hf.utils.files import write
from ddpm_hf.utils.memory import is_out_of_memory
from ddpm_hf.utils.signals import stop_requested

SKIPPED_IN_A_ROW = 20  # updates; float16's scaler may need so many to find its scale
# A training has diverged when the held-out loss is so many times its lowest, and the training loss so many times what
# it was then. When a network memorises a few images, the first grows and the second falls.
HELD_OUT_GROWN, TRAINING_GROWN = 3.0, 2.0
log = logging.getLogger(__name__)


def can_sync_each_step(device: torch.device) -> bool:
    """Whether the host may read a number each update. On CUDA it would wait for that where it should run ahead."""
    return device.type != "cuda"


class Skips:
    """Counts on the device how many updates in a row were skipped, so that the host can read it later.

    Args:
        run: a `Run`.
        checkpoints: to name the last good one.
    """

    def __init__(self, run, checkpoints: Checkpoints):
        self.run, self.checkpoints = run, checkpoints
        self.in_a_row, self.most, self.last = torch.zeros(3, dtype=torch.int64, device=run.accelerator.device)

    def update(self, applied: torch.Tensor) -> None:
        """Count an update that was applied or skipped, bool ()."""
        self.in_a_row = (self.in_a_row + 1) * applied.logical_not()
        self.last = torch.where(self.in_a_row > self.most, self.run.step, self.last)
        self.most = torch.maximum(self.in_a_row, self.most)

    def check(self) -> None:
        """Raise FloatingPointError if too many in a row were skipped."""
        most, config = int(self.most), self.run.config
        if most < SKIPPED_IN_A_ROW:
            return
        there = self.checkpoints.found()
        raise FloatingPointError(
            f"the loss or its gradient was not finite in {most} updates in a row, the last of them {int(self.last)}; "
            f"they changed nothing, and {there[-1] if there else 'no checkpoint'} is whole. "
            f"Try a smaller learning_rate than {config.learning_rate:g}"
            + (", or mixed_precision bf16 or no" if config.mixed_precision == "fp16" else "")
        )


def divergence(run, checkpoints: Checkpoints, held_out: float | None, loss: float | None) -> str | None:
    """The reason why the current network must not replace an earlier checkpoint; None if it may.

    Args:
        held_out: the held-out loss now, the same in all processes; None if nothing was held out.
        loss: the training loss since the last row of the log, weighted as it is trained.

    Raises:
        FloatingPointError: the held-out loss is not finite.
    """
    if held_out is None:
        return None
    best, there = run.best, checkpoints.found()
    good = f"{there[-1]} is from before it" if there else "no checkpoint was saved before it"
    advice = f"try a smaller learning_rate than {run.config.learning_rate:g}"
    if not math.isfinite(held_out):
        raise FloatingPointError(
            f"after update {run.step} the held-out loss is {held_out}, though the weights are finite: the training has "
            f"diverged, and this update is not saved; {good}; {advice}"
        )
    if not best or held_out <= HELD_OUT_GROWN * best["held_out_loss"]:
        return None
    if loss is not None and best["loss"] is not None and loss <= TRAINING_GROWN * best["loss"]:
        return None
    return (
        f"after update {run.step} the held-out loss is {held_out:.4g}, more than {HELD_OUT_GROWN:g} times its lowest "
        f"({best['held_out_loss']:.4g} after update {best['step']}), and the training loss has grown too: the training "
        f"has diverged. No checkpoint is made and the pipeline stays as it was; {good}; {advice}"
    )


class UpdateError(ValueError):
    """An update failed in this process, and perhaps in no other: each prints its own."""

    of_each_process = True


@contextlib.contextmanager
def explain_failure(config) -> Iterator[None]:
    """Around an update: an `UpdateError` that names the settings that help where memory or the compiler fails."""
    try:
        yield
    except RuntimeError as error:
        reason = str(getattr(error, "inner_exception", error)).strip().partition("\n")[0]
        if config.compile and isinstance(error, torch._dynamo.exc.TorchDynamoException):
            raise UpdateError(
                f"compile=True: torch.compile can't compile the network here ({reason}): it needs a C++ compiler such "
                "as g++, on CUDA a C compiler and Triton; or leave out compile"
            ) from error
        if not is_out_of_memory(error):
            raise
        batch, micros, help = config.train_batch_size, config.gradient_accumulation_steps, []
        if batch > 1:
            parts = next(n for n in (4, 2, *range(3, batch + 1)) if batch % n == 0)
            help.append(
                f"--train_batch_size {batch // parts} --gradient_accumulation_steps {parts * micros} sees the same "
                "images, noise and timesteps in an update"
            )
        if not config.gradient_checkpointing:
            help.append("--gradient_checkpointing true keeps fewer activations and takes more time")
        raise UpdateError(
            f"train_batch_size={batch}: memory does not hold an update of so many images at once; "
            f"{', and '.join(help) or 'make the network or the images smaller'} ({reason})"
        ) from error


@contextlib.contextmanager
def explain_bad_images(config) -> Iterator[None]:
    """Around the decoding of images: if too many are invalid, write quarantine.csv and raise an error that names it."""
    try:
        yield
    except BadImages as error:
        folder = Path(config.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_quarantine(folder, error.bad)
        explained = ValueError(f"{error}. {folder / QUARANTINE} lists all of them")
        explained.of_each_process = config.streaming
        raise explained from error
    except ValueError as error:
        error.of_each_process = config.streaming  # each process reads its own part of a stream
        raise


def write_quarantine(folder: Path, bad: list[tuple[str, str]]) -> None:
    """Write the list of invalid images, (path, reason); without any, remove the list of an earlier run."""
    if bad:
        text = io.StringIO(newline="")
        csv.writer(text).writerows([QUARANTINE_HEADER.split(","), *dict(bad).items()])
        write(folder / QUARANTINE, text.getvalue())
    elif is_quarantine(folder / QUARANTINE):
        (folder / QUARANTINE).unlink()


def stop_asked(run) -> bool:
    """Whether any process was asked to stop. Several processes on CUDA ask each other only where they wait anyway."""
    accelerator = run.accelerator
    if accelerator.num_processes == 1:
        return stop_requested()
    syncs = can_sync_each_step(accelerator.device)
    if not syncs and run.step % LOG_EVERY and run.step % run.config.checkpointing_steps:
        return False
    asked = torch.tensor(float(stop_requested()), device=accelerator.device)
    return accelerator.reduce(asked).item() > 0

"""What belongs to a save: the held-out loss, a row of the log, the checkpoint, the pipeline, and the callbacks."""

import contextlib
import logging
import math
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object

from ddpm_hf.training.batch import assign_noise, on_device
from ddpm_hf.training.checkpoints import save_pipeline
from ddpm_hf.training.guards import divergence, write_quarantine
from ddpm_hf.training.loss import Batch
from ddpm_hf.training.resume import recorded
from ddpm_hf.training.run import Run
from ddpm_hf.utils.seeds import seeded_generator
from ddpm_hf.utils.signals import Stopped, stop_requested

if TYPE_CHECKING:
    from ddpm_hf.training.setup import Training

HELD_OUT_AT_A_STOP = 32  # images: a process that was asked to stop has few seconds
log = logging.getLogger(__name__)


def save(training: "Training") -> None:
    """Measure the EMA network, save checkpoint and pipeline unless the training has diverged, and call the callbacks.

    Raises:
        FloatingPointError: the run has diverged, and this is its end or the held-out loss is not finite.
    """
    run, accelerator, main = training.run, training.run.accelerator, training.run.accelerator.is_main_process
    run.metrics, measured = [], None
    with training.progress.pause():
        if not run.stopped_by:
            measured = held_out_loss(run, training.objective)
        held_out = held_out_loss(run, training.objective, HELD_OUT_AT_A_STOP) if measured is None else measured
    loss = training.progress.write_row(measured)
    why = divergence(run, training.checkpoints, held_out, loss)
    training.saved = why is None
    if why is not None and run.finished:
        raise FloatingPointError(why)
    if why is not None:
        if main:
            log.error(why)
        return training.progress.restart_clock()
    if measured is not None and measured <= run.best.get("held_out_loss", math.inf):
        run.best = {"step": run.step, "held_out_loss": measured, "loss": loss}
    _write(training)
    # One process that was asked to stop evaluates no more; several can't know of each other here.
    if not run.stopped_by and (accelerator.num_processes > 1 or not stop_requested()):
        for callback in training.callbacks:
            with contextlib.suppress(Stopped):
                run.metrics += callback.on_evaluate(run) or []
    for callback in training.callbacks if main else ():
        with contextlib.suppress(Stopped):  # what one of them leaves undone is nothing to the others
            callback.on_save(run)
    accelerator.wait_for_everyone()
    training.progress.restart_clock()


def _write(training: "Training") -> None:
    run, accelerator = training.run, training.run.accelerator
    streams = gather_object([run.images.state()]) if run.config.streaming else None
    if not accelerator.is_main_process:
        return
    scaler = accelerator.scaler.state_dict() if accelerator.scaler else None
    more = {**recorded(run, training.objective), "best": run.best, "streams": streams, "scaler": scaler}
    training.checkpoints.save(run.step, run.total_steps, run.unet, training.ema, training.optimizer, **more)
    if streams:
        write_quarantine(run.output_dir, [bad for stream in streams for bad in stream["bad"]])
    save_pipeline(run.output_dir, run.pipeline, run.unet)


@torch.no_grad()
def held_out_loss(run: Run, objective, most: int | None = None) -> float | None:
    """Mean of the objective's errors of the EMA network on the held-out images, at timesteps spread evenly over T.

    It is not weighted, and held-out images without a class are predicted without one. Noise and timesteps are the same
    each time and in every run, so that only the network makes the difference. With `noise_assignment`, noise is
    assigned within batches of `train_batch_size`, as in training.

    Args:
        most: images to take, evenly spread; None: all, unless a stop is asked for meanwhile.

    Returns:
        None if there are no held-out images, or a process was asked to stop before all were seen.
    """
    if run.held_out is None:
        return None
    unet, scheduler, accelerator = run.pipeline.unet, run.pipeline.scheduler, run.accelerator
    images = torch.arange(len(run.held_out))
    if most is not None and most < len(images):
        images = torch.linspace(0, len(images) - 1, most).round().long()
    n, labels = len(images), None
    if run.config.class_conditional:
        labels = run.held_out.labels[images]
        labels = torch.where(labels < 0, unet.config.num_classes, labels)
    generator = seeded_generator(0, "held-out loss", n)
    uniform = (torch.randperm(n, generator=generator) + 0.5).double() / n
    total = torch.zeros(2, device=unet.device)  # of the errors, and of processes that were asked to stop
    for k, part in enumerate(torch.arange(n).split(run.config.train_batch_size)):
        noise = torch.randn((len(part), *run.held_out.shape), generator=generator)
        if most is None and stop_requested():
            total[1] = 1
            break
        if k % accelerator.num_processes == accelerator.process_index:
            of_part = None if labels is None else labels[part]
            pixels, valid = run.held_out.batch_and_valid(images[part])
            batch = Batch(pixels, noise, uniform[part], of_part, valid)
            batch = assign_noise(batch) if run.config.noise_assignment else batch
            total[0] += objective(unet, scheduler, on_device(batch, unet.device)).errors.sum()
    loss, stopped = accelerator.reduce(total, "sum").tolist()
    return None if stopped else loss / n

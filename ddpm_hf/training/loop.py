"""The training loop (Ho et al. 2020, arXiv:2006.11239, algorithm 1)."""

import contextlib
import math
from collections.abc import Callable, Iterable

import torch

from ddpm_hf.training.batch import on_device
from ddpm_hf.training.guards import explain_bad_images, explain_failure, stop_asked
from ddpm_hf.training.loss import Losses
from ddpm_hf.training.run import Run, TrainCallback
from ddpm_hf.training.saving import save
from ddpm_hf.training.setup import Training, open_run
from ddpm_hf.utils.signals import Stopped


def train(config, callbacks: Iterable[TrainCallback] = (), objective: Callable[..., Losses] | None = None) -> Run:
    """Train as `config`, a `TrainConfig`, says and leave a pipeline folder in `config.output_dir`.

    Order, noise, timesteps, augmentations and dropped labels are functions of (seed, update, position in the global
    batch), dropout of (seed, update, micro-batch), so a resumed run continues as if it had not been interrupted, and
    several processes do what one does. SIGTERM, SIGHUP, SIGUSR1, Ctrl-C and the end of the launcher save a checkpoint
    and the pipeline and end the run before its time; `stopped_by` of the result says so. The process's own random
    numbers are left as they were.

    Args:
        callbacks: what else happens, in this order at each event.
        objective: called as `objective(network, scheduler, batch)`; None: `DenoisingLoss`.

    Raises:
        ValueError: a setting is invalid; nothing has been written then, except quarantine.csv if too many images are
            invalid. Or an update runs out of memory or can't be compiled; earlier checkpoints are complete.
        FloatingPointError: losses or gradients were not finite too many times in a row, or the training has diverged.
        Stopped: one of the signals came before the first update; nothing has been written then.
    """
    with open_run(config, list(callbacks), objective) as training:
        run, began_at = training.run, training.run.step
        with training.progress:
            with contextlib.suppress(Stopped):
                if run.finished:  # resumed after its last update
                    save(training)
                run_updates(training)
            training.stop.may_raise = False
            if not run.finished:
                run.stopped_by = training.stop.name or "SIGTERM"  # of another process
                if run.step > began_at:
                    save(training)
    return run


def run_updates(training: Training) -> None:
    """Update after update until the end, or until a process is asked to stop."""
    run, accelerator, network, optimizer = training.run, training.run.accelerator, training.network, training.optimizer
    config, scheduler, batches = run.config, run.pipeline.scheduler, training.batches
    while not run.finished and not stop_asked(run):
        # On CUDA the host comes here while the device still computes the update before: nothing in this loop waits for
        # it but a row of log.csv, and copies go from pinned memory, so no thread has to prefetch.
        with training.progress.loading(), explain_bad_images(config):
            micro_batches = batches.draw(run.step)
        rate = learning_rate(config, run.step, run.total_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        with explain_failure(config):
            loss, seen = 0.0, []
            for k, batch in enumerate(micro_batches):
                torch.manual_seed(training.dropout_seed(run.step, k))
                last = k == len(micro_batches) - 1  # gradients of several processes are averaged once an update
                synced = contextlib.nullcontext() if last else accelerator.no_sync(network)
                with synced, training.log_first_compile():
                    losses = training.objective(network, scheduler, on_device(batch, accelerator.device))
                    micro_loss = losses.loss.mean() / len(micro_batches)
                    accelerator.backward(micro_loss)
                loss = loss + micro_loss.detach()
                seen.append((losses.timesteps, losses.errors.detach()))
            norm = accelerator.clip_grad_norm_(network.parameters(), config.max_grad_norm)
            applied = step_if_finite(accelerator, optimizer, loss, norm)
            run.step += 1
            training.ema.update(run.unet, run.step, bool(applied) if training.looks else applied)
        training.after_update(loss, seen, applied, rate)
        if run.finished or run.step % config.checkpointing_steps == 0:
            save(training)


def step_if_finite(accelerator, optimizer, *values: torch.Tensor) -> torch.Tensor:
    """The optimizer's step if these numbers are finite in all processes; else weights and moments stay as they are.

    Returns:
        Whether the step was taken, bool (), on the device, where the host does not wait to read it.
    """
    finite = torch.stack([value.isfinite() for value in values]).all()
    if accelerator.num_processes > 1:
        finite = accelerator.reduce(finite.float(), "sum") == accelerator.num_processes
    if accelerator.scaler is None:  # float16's tells the optimizer itself, and learns from what it skips
        optimizer.optimizer.found_inf = finite.logical_not().float()
    optimizer.step()
    optimizer.zero_grad()
    return finite


def learning_rate(config, step: int, total_steps: int) -> float:
    """Of update `step`, counted from 0: linear warm-up, then constant, or cosine or linear to 0.

    `wsd` (warm-up, stable, decay; Hu et al. 2024, arXiv:2404.06395, section 4) is linear to 0 in the last
    `lr_decay_share` of all updates, and constant before.
    """
    begin = warmup = config.lr_warmup_steps
    rate = config.learning_rate * min(1.0, (step + 1) / (warmup + 1))
    if config.lr_scheduler == "constant":
        return rate
    if config.lr_scheduler == "wsd":
        begin = max(warmup, total_steps - round(config.lr_decay_share * total_steps))
    done = max(0.0, (step - begin) / max(1, total_steps - begin))
    return rate * (0.5 * (1 + math.cos(math.pi * done)) if config.lr_scheduler == "cosine" else 1 - done)

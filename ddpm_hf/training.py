"""The training of a DDPM: the loss, the loop, and what surrounds them so that a run can be trusted."""

import contextlib
import csv
import dataclasses
import importlib.util
import inspect
import io
import json
import logging
import math
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from ddpm_hf.allocator import is_out_of_memory, keep_freed_memory
from ddpm_hf.checkpoints import QUARANTINE, QUARANTINE_HEADER, TRAIN_CONFIG, Checkpoints, is_quarantine, save_pipeline
from ddpm_hf.config import TrainConfig
from ddpm_hf.data import BadImages, ImageData, flip_horizontally_
from ddpm_hf.ema import EMA
from ddpm_hf.files import Lock, write
from ddpm_hf.bound import bound_terms
from ddpm_hf.pipeline import DDPMCustomPipeline, load_pipeline, num_classes
from ddpm_hf.previews import Previews
from ddpm_hf.progress import LOG_EVERY, Progress
from ddpm_hf.scheduler import NoiseScheduler, to_device
from ddpm_hf.seeds import seeded_generator, stream_seed
from ddpm_hf.signals import Stopped, StopSignals, exit_status, stop_requested
from ddpm_hf.solvers import scheduler_class
from ddpm_hf.streaming import ImageStream, open_images
from ddpm_hf.unet import DDPMUNet

SKIPPED_IN_A_ROW = 20  # updates; float16's scaler may need so many to find its scale
FEW_IMAGES = 500
VLB_WEIGHT = 0.001  # of the bound in bits/dim, for a learned variance (arXiv:2102.09672, equation 16)
# Seconds. With DistributedDataParallel, gloo's threads outlive their process group (torch 2.13), and a thread that lets
# go of the last tensor it sent while Python ends makes the process abort, all being saved.
GLOO_LETS_GO = 0.3
OBJECTIVE = ("prediction_type", "num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas",
             "rescale_betas_zero_snr", "variance_type")  # fmt: skip
DATA = ("train_data_dir", "dataset_name", "dataset_config_name")
# Of the network's configuration, what changes neither its weights nor what they compute
NOT_THE_NETWORK = ("sample_size", "class_names", "dropout", "dropout_channels")
# Settings that a checkpoint does not keep: where a run writes, how many processes decode (which changes nothing), and
# what is kept as network, objective and batch
NOT_KEPT = ("config", "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "logger", "push_to_hub",
            "hub_model_id", "hub_private_repo", "dataloader_num_workers", "unet", "scheduler", "train_batch_size",
            "gradient_accumulation_steps")  # fmt: skip
# A training has diverged when the held-out loss is so many times its lowest, and the training loss so many times what
# it was then. Of a network that learns a few images by heart the first grows and the second falls.
HELD_OUT_GROWN, TRAINING_GROWN = 3.0, 2.0
HELD_OUT_AT_A_STOP = 32  # images: a process that was asked to stop has few seconds
log = logging.getLogger(__name__)


@dataclass
class Run:
    """A training run as its callbacks see it.

    Args:
        config: the resolved configuration.
        pipeline: the averaged (EMA) network with its scheduler.
        unet: the network itself, whose weights are the raw ones.
        images, held_out: what is trained on, and what is measured on (None where there is only one image).
        total_steps: updates in all.
        accelerator: which of the processes this is.
        step: updates done.
        metrics: what has been measured of the model as it is now, for the model card: each a dict of `type`, `name`,
            `value`, `split` and `protocol`.
        best: of the save with the lowest held-out loss so far, `step`, `held_out_loss` and `loss`; {} before the first.
        stopped_by: the signal that ended it before its time, or None.
    """

    config: TrainConfig
    pipeline: DDPMCustomPipeline
    unet: DDPMUNet
    images: ImageData | ImageStream
    held_out: ImageData | None
    total_steps: int
    accelerator: Accelerator
    step: int = 0
    metrics: list[dict] = field(default_factory=list)
    best: dict = field(default_factory=dict)
    stopped_by: str | None = None

    @property
    def exit_status(self) -> int:
        """Of a process that does nothing else: 0, or 128 + the signal's number if one was received."""
        return exit_status(self.stopped_by) if self.stopped_by else 0

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def finished(self) -> bool:
        return self.step >= self.total_steps


def diffusion_loss(network, scheduler, images, noise, timesteps, class_labels=None, levels=256):
    """L_simple of each image, the mean squared error of the prediction (Ho et al. 2020, equation 14), and L_vlb.

    Args:
        images, noise: (B, C, H, W); images in [-1, 1].
        timesteps: (B,).
        class_labels: (B,), for a class-conditional network.
        levels: of a pixel, for L_vlb.

    Returns:
        L_simple, float32 (B,); and for a learned variance L_vlb as the one timestep estimates it, in bits/dim, (B,), of
        which only the variance learns (Nichol & Dhariwal 2021, arXiv:2102.09672, section 3.1), otherwise None.
    """
    noisy = scheduler.add_noise(images, noise, timesteps)
    classes = {} if class_labels is None else {"class_labels": class_labels}
    output = network(noisy, timesteps, **classes).sample.float()
    prediction, variance = output[:, : images.shape[1]], output[:, images.shape[1] :]
    errors = (prediction - scheduler.target(images, noise, timesteps)).square().mean(dim=(1, 2, 3))
    if scheduler.config.variance_type != "learned_range":
        return errors, None
    output = torch.cat([prediction.detach(), variance], dim=1)
    terms = bound_terms(scheduler, images, noisy, timesteps, output, levels)
    return errors, len(scheduler) * terms


def train(
    config: TrainConfig,
    on_start: Iterable[Callable[[Run], None]] = (),
    on_save: Iterable[Callable[[Run], None]] = (),
    preview: Callable[[Run], None] | None = None,
    on_begin: Iterable[Callable[[Run], None]] = (),
) -> Run:
    """Train as `config` says (Ho et al. 2020, algorithm 1) and leave a pipeline folder in `config.output_dir`.

    Order, noise, timesteps, flips and hidden classes are functions of (seed, update, position in the global batch),
    dropout of (seed, update, position of the micro-batch), so a resumed run continues as if it had not been
    interrupted, and several processes do what one does. SIGTERM and Ctrl-C save a checkpoint and the pipeline and end
    the run before its time; `stopped_by` of the result tells of it.

    Args:
        on_start: called with the `Run` by the main process once all has been checked and before anything is written.
        on_save: called with the `Run` by the main process after each save, the last one included.
        preview: called with the `Run` by all processes after saves, as often as `preview_time_share` allows and at the
            end; if it fails, the run goes on.
        on_begin: called with the `Run` by the main process after train_config.json was written, before the first
            update.

    Raises:
        ValueError: something in `config` can't be; nothing has been written then (but quarantine.csv, if that is it).
            Or memory, or the compiler, fails in an update; the checkpoints from before it are whole.
        FloatingPointError: losses or gradients were not finite too many times in a row, or the training has diverged.
        Stopped: SIGTERM or Ctrl-C came before the first update; nothing has been written then.
    """
    folder = Path(config.output_dir)
    if folder.is_file():
        raise ValueError(f"output_dir={config.output_dir!r} is a file; it must be a folder or not be there yet")
    accelerator = _accelerator(config)
    with StopSignals() as stop, contextlib.ExitStack() as stack:
        _by_main(accelerator, lambda: stack.enter_context(Lock(folder, "train")))
        checkpoints = Checkpoints(folder, config.checkpoints_total_limit)
        _by_main(accelerator, checkpoints.roll_back)
        paths = checkpoints.find(config)
        accelerator.wait_for_everyone()
        try:
            return _train(config, accelerator, checkpoints, paths, stop, on_start, on_begin, on_save, preview)
        finally:
            if accelerator.is_main_process:
                checkpoints.roll_back()  # if it has ended before its first checkpoint


def _by_main(accelerator: Accelerator, work: Callable) -> None:
    """Have the main process do something, and all raise its error."""
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


def _train(config, accelerator, checkpoints, paths, stop, on_start, on_begin, on_save, preview) -> Run:
    images, held_out = _images(config, accelerator)
    unet, scheduler = _model(config, images)
    ema = EMA(unet, config.ema_max_decay)
    optimizer = torch.optim.AdamW(
        unet.parameters(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.adam_weight_decay,
        fused=True,
    )
    micro_batch, micros = config.train_batch_size, config.gradient_accumulation_steps
    processes = accelerator.num_processes
    global_batch = micro_batch * processes * micros
    total_steps = config.max_train_steps or math.ceil(config.num_epochs * images.num_images / global_batch)
    run = Run(config, DDPMCustomPipeline(ema.model, scheduler), unet, images, held_out, total_steps, accelerator)
    state = checkpoints.restore(config, paths, lambda saved: _check_same(saved, run), unet, ema, optimizer)
    run.step = state["step"]
    restore_run_state(state, run)
    accelerator.wait_for_everyone()  # until all have read what is now written over
    if accelerator.is_main_process:
        for callback in on_start:
            callback(run)
        checkpoints.make_room(state["kept"])
        config.save(run.output_dir / TRAIN_CONFIG)  # first: it marks what is in the folder as that of a run
        _write_quarantine(run.output_dir, images.bad)
        for callback in on_begin:
            callback(run)
    network, optimizer = accelerator.prepare(unet.train(), optimizer)
    device, may_look = accelerator.device, _may_look(accelerator.device)
    ema.model.to(device)
    compiling = Compiling(run)
    _start_trackers(run)
    progress, previews = Progress(run, global_batch, state["kept"] or 0), Previews(preview, config.preview_time_share)
    # Of the global batch, micro-batch by micro-batch, what this process does
    micro_numbers = range(accelerator.process_index, micros * processes, processes)
    rows = (torch.tensor(micro_numbers)[:, None] * micro_batch + torch.arange(micro_batch)).flatten()

    def save():
        """What belongs to a save: the held-out loss, a row of the log, checkpoint, pipeline, previews, callbacks."""
        run.metrics.clear()
        measured = None
        with progress.pause():
            if not run.stopped_by:
                measured = held_out_loss(run)
            held_out = held_out_loss(run, HELD_OUT_AT_A_STOP) if measured is None else measured
        loss = progress.write_row(learning_rate(config, run.step - 1, total_steps), measured)
        why = _diverged(run, checkpoints, held_out, loss)
        if why is not None and run.finished:
            raise FloatingPointError(why)
        nonlocal saved
        saved = why is None
        if saved:
            write_down(measured, loss)
        elif accelerator.is_main_process:
            log.error(why)
        if why is None and not run.stopped_by and (accelerator.num_processes > 1 or not stop_requested()):
            previews.after_save(run, progress.images_per_second)
        if why is None and accelerator.is_main_process:
            for callback in on_save:
                with contextlib.suppress(Stopped):  # what one of them leaves undone is nothing to the others
                    callback(run)
        accelerator.wait_for_everyone()
        progress.restart_clock()

    def write_down(measured, loss):
        if measured is not None and measured <= run.best.get("held_out_loss", math.inf):
            run.best = {"step": run.step, "held_out_loss": measured, "loss": loss}
        streams = gather_object([images.state()]) if config.streaming else None
        if accelerator.is_main_process:
            scaler = accelerator.scaler.state_dict() if accelerator.scaler else None
            more = {"images": _identity(run), **_recorded(run), "best": run.best, "streams": streams, "scaler": scaler}
            checkpoints.save(run.step, total_steps, unet, ema, optimizer, **more)
            if streams:
                _write_quarantine(run.output_dir, [bad for stream in streams for bad in stream["bad"]])
            save_pipeline(run)

    skips = Skips(device)
    began_at, saved = run.step, False
    with progress:
        with contextlib.suppress(Stopped):
            stop.may_raise = accelerator.num_processes == 1  # else the others would wait for this one
            if run.finished:  # resumed behind its end
                save()
            while not run.finished and not _stop_asked(run):
                # On CUDA the host comes here while the device still computes the update before: nothing in this loop
                # waits for it but the reading for a row of log.csv, and copies go from pinned memory. No thread has to
                # prefetch.
                with progress.loading(), _quarantining(config):
                    of_all = draw(config, scheduler, (global_batch, *images.shape), run.step)
                    noise, timesteps, flips, hidden = (d[rows] for d in of_all)
                    batch, labels = images.batch_for_step(config.seed, run.step, global_batch, rows)
                    batch = flip_horizontally_(batch, flips.flatten())
                    labels = _labels(run, labels, hidden)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(config, run.step, total_steps)
                with _explaining(config):
                    loss, seen = 0.0, []
                    for micro, number in enumerate(micro_numbers):
                        this = slice(micro * micro_batch, (micro + 1) * micro_batch)
                        x, z, t = (to_device(d[this], device) for d in (batch, noise, timesteps))
                        y = None if labels is None else to_device(labels[this], device)
                        torch.manual_seed(stream_seed(config.seed, "dropout", run.step * micros * processes + number))
                        synced = accelerator.no_sync(network) if micro < micros - 1 else contextlib.nullcontext()
                        with synced, compiling.told_once():
                            errors, bounds = diffusion_loss(network, scheduler, x, z, t, y, images.levels)
                            weights = 1.0 if config.snr_gamma is None else scheduler.min_snr_weight(t, config.snr_gamma)
                            losses = weights * errors if bounds is None else weights * errors + VLB_WEIGHT * bounds
                            micro_loss = losses.mean() / micros
                            accelerator.backward(micro_loss)
                        loss = loss + micro_loss.detach()
                        seen.append((t, errors.detach()))
                    norm = accelerator.clip_grad_norm_(network.parameters(), config.max_grad_norm)
                    finite = _all_finite(accelerator, loss, norm)
                    _step(accelerator, optimizer, finite)
                    optimizer.zero_grad()
                    run.step += 1
                    if not may_look:
                        ema.update(unet, run.step, finite.float())
                    elif finite:
                        ema.update(unet, run.step)

                progress.update(loss, seen, finite)
                skips.update(finite, run.step)
                to_save = run.finished or run.step % config.checkpointing_steps == 0
                to_log = run.step % LOG_EVERY == 0
                if to_save or to_log or may_look:
                    skips.check(run, checkpoints)
                if to_save:
                    save()
                elif to_log:
                    progress.write_row(learning_rate(config, run.step - 1, total_steps))
        stop.may_raise = False
        if not run.finished:
            run.stopped_by = stop.name or "SIGTERM"  # of another process
            if run.step > began_at:
                save()
    if run.stopped_by and accelerator.is_main_process:
        by = f"stopped by {stop.name or 'a signal to another process'}"
        if run.step == began_at:
            log.warning(f"{by} before the first update: nothing is saved")
        elif saved:
            log.warning(
                f"{by} after update {run.step} of {total_steps}; the same command with --resume_from_checkpoint latest "
                "goes on from there"
            )
        else:
            log.warning(f"{by} after update {run.step} of {total_steps}, of which nothing is saved")
    run.stopped_by = run.stopped_by or stop.name
    accelerator.end_training()
    if accelerator.num_processes > 1 and accelerator.device.type == "cpu":
        time.sleep(GLOO_LETS_GO)
    return run


def _accelerator(config: TrainConfig) -> Accelerator:
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("true", "1"):
            raise ValueError(
                f"{name} has not been tested with this training loop, whose networks fit one device: run `accelerate "
                "config` anew without it, or start with `accelerate launch --multi_gpu`"
            )
    if config.logger and importlib.util.find_spec(config.logger) is None:
        raise ValueError(f"logger={config.logger!r} is not installed: `pip install {config.logger}`")
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision, log_with=config.logger, project_dir=config.output_dir
    )
    config.mixed_precision = accelerator.mixed_precision  # which the launcher may have decided
    if config.mixed_precision == "fp16" and accelerator.device.type != "cuda":
        # Accelerate would silently run in float32.
        raise ValueError("mixed_precision='fp16' needs a CUDA device; use bf16 or no")
    if accelerator.device.type == "cpu":
        launched = "ACCELERATE_MIXED_PRECISION" in os.environ
        if launched and accelerator.num_processes == 1 and os.environ.get("OMP_NUM_THREADS") == "1":
            # `accelerate launch` gives its only process one thread, however many cores there are
            torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
        keep_freed_memory()
    return accelerator


def _images(config: TrainConfig, accelerator: Accelerator):
    """Images to train on and to measure on; what can't be used is told."""
    main = accelerator.is_main_process
    with _quarantining(config):
        images, held_out = open_images(config, accelerator.process_index, accelerator.num_processes)
    if len(set(gather_object([images.fingerprint]))) > 1:
        raise ValueError("the processes have read different images: is the data set being changed?")
    without = int((images.labels < 0).sum()) if isinstance(images, ImageData) and images.label_names else 0
    if config.class_conditional and (images.label_names is None or without == images.num_images):
        raise ValueError(
            f"class_conditional=True: the images of {config.train_data_dir or config.dataset_name!r} have no classes; "
            "they need a column of type ClassLabel, or folders, one a class, with every image in one of them"
        )
    if config.class_conditional and without and main:
        log.warning(f"{without} of {images.num_images} images have no class and are learnt without one")
    if main and images.bad:
        log.warning(f"{len(images.bad)} images can't be used and are left out: {QUARANTINE} says why")
    if main and images.num_images is not None and images.num_images < FEW_IMAGES:
        log.warning(
            f"{images.num_images} images are fewer than {FEW_IMAGES}: the network will learn them by heart rather than "
            "what they have in common; compare neighbours.png"
        )
    return images, held_out


@contextlib.contextmanager
def _quarantining(config: TrainConfig) -> Iterator[None]:
    """Around what decodes: if too many images can't be used, their list is written before that is told."""
    try:
        yield
    except BadImages as error:
        Path(config.output_dir).mkdir(parents=True, exist_ok=True)
        _write_quarantine(Path(config.output_dir), error.bad)
        told = ValueError(f"{error}. All are in {Path(config.output_dir) / QUARANTINE}")
        told.of_each_process = config.streaming
        raise told from error
    except ValueError as error:
        error.of_each_process = config.streaming  # each process reads its own part of a stream
        raise


def _write_quarantine(folder: Path, bad: list[tuple[str, str]]) -> None:
    if bad:
        text = io.StringIO(newline="")
        csv.writer(text).writerows([QUARANTINE_HEADER.split(","), *dict(bad).items()])
        write(folder / QUARANTINE, text.getvalue())
    elif is_quarantine(folder / QUARANTINE):
        (folder / QUARANTINE).unlink()  # of a run before this one


def restore_run_state(state: dict, run: Run) -> None:
    """From what a checkpoint holds beside weights."""
    accelerator, streams = run.accelerator, state.get("streams")
    same_images = run.step and state["images"] == _identity(run)
    if state["kept"] is not None and same_images:  # of other images the held-out loss is another
        run.best = state.get("best", {})
    before = state.get("settings", {})
    moved = any(before.get(name, v) != v for name, v in vars(run.config).items() if name in DATA)
    if state["kept"] is not None and not same_images and moved:
        raise ValueError(
            f"resume_from_checkpoint: output_dir={str(run.output_dir)!r} holds a run on other data "
            f"({before['train_data_dir'] or before['dataset_name']!r}, {state['images']}) than this one "
            f"({run.config.train_data_dir or run.config.dataset_name!r}, {_identity(run)}): choose another output_dir"
        )
    if run.step and not same_images and accelerator.is_main_process:
        log.warning(
            f"the images ({_identity(run)}) are not those of the checkpoint ({state['images']}): "
            "the run goes on, but not to the same bits"
        )
    if state.get("scaler") and accelerator.scaler:
        accelerator.scaler.load_state_dict(state["scaler"])
    if run.config.streaming and run.step:
        if streams is None or len(streams) != accelerator.num_processes:
            raise ValueError(
                f"streaming=True goes on with as many processes as it began with, {len(streams or [])} and not "
                f"{accelerator.num_processes}"
            )
        run.images.go_to(streams[accelerator.process_index])


def _identity(run: Run) -> str:
    """Other images, or other classes where they count, have another."""
    images = run.images
    if not run.config.class_conditional or not isinstance(images, ImageData):
        return images.fingerprint
    checksum = zlib.crc32(images.labels.numpy(), zlib.crc32(repr(images.label_names).encode()))
    return f"{images.fingerprint}, classes {checksum:08x}"


def _recorded(run: Run) -> dict:
    """What a checkpoint keeps of the settings of its run, as JSON gives it back."""
    config = run.config
    network = {name: value for name, value in run.unet.config.items() if name[:1] != "_"}
    objective = {name: run.pipeline.scheduler.config.get(name) for name in OBJECTIVE} | {"snr_gamma": config.snr_gamma}
    batch = {
        "train_batch_size": config.train_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "processes": run.accelerator.num_processes,
    }
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in NOT_KEPT}
    return json.loads(json.dumps({"settings": settings, "network": network, "objective": objective, "batch": batch}))


def _check_same(state: dict, run: Run) -> None:
    """Raise ValueError if a checkpoint is of another network, objective, global batch or seed; log what else differs.

    Checkpoints of versions that did not record something are not compared in it.
    """
    here = _recorded(run)
    for what, ignored in (("network", NOT_THE_NETWORK), ("objective", ())):
        before = {name: state[what][name] for name in here[what] if name in state.get(what, ())}
        changed = _differences({k: v for k, v in here[what].items() if k in before and k not in ignored}, before)
        if changed:
            raise ValueError(
                f"resume_from_checkpoint: this run has another {what} than the checkpoint: {changed}; "
                "resume with the settings that it began with"
            )
    before = state.get("batch", here["batch"])
    sizes = [math.prod(batch.values()) for batch in (here["batch"], before)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"resume_from_checkpoint: an update of this run sees {sizes[0]} images and one of the checkpoint's saw "
            f"{sizes[1]} ({_differences(here['batch'], before)}): their product must stay, or the order of the data "
            "changes"
        )
    settings = state.get("settings", here["settings"])
    if settings["seed"] != run.config.seed:
        raise ValueError(
            f"resume_from_checkpoint: seed={run.config.seed}, and the checkpoint's run had seed={settings['seed']}: "
            "the order of the data and the noise would change; resume with that seed"
        )
    changed = [
        _differences(now, then)
        for now, then in (
            (here["settings"], settings),
            ({name: v for name, v in here["network"].items() if name.startswith("dropout")}, state.get("network", {})),
            (here["batch"], before),
        )
    ]
    if any(changed) and run.accelerator.is_main_process:
        log.warning(f"resuming with changed settings: {', '.join(filter(None, changed))}")


def _differences(now: dict, before: dict) -> str:
    """The settings of `now` that `before` has with another value, in words."""
    return ", ".join(f"{name}={v!r} was {before[name]!r}" for name, v in now.items() if before.get(name, v) != v)


def _diverged(run: Run, checkpoints: Checkpoints, held_out: float | None, loss: float | None) -> str | None:
    """Why the network as it is now must not take the place of an earlier one; None if it may.

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
            f"diverged, and nothing is saved of it; {good}; {advice}"
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


def _start_trackers(run: Run) -> None:
    if run.config.logger:
        name = {"name": run.output_dir.name}
        settings = {key: v if isinstance(v, int | float | str) else str(v) for key, v in vars(run.config).items()}
        wandb = {**name, "dir": str(run.output_dir)}
        run.accelerator.init_trackers("ddpm_hf", settings, {"wandb": wandb, "trackio": name})


def _may_look(device: torch.device) -> bool:
    """Whether the host may read a number each update. On CUDA that would have it wait where it should run ahead."""
    return device.type != "cuda"


def _all_finite(accelerator: Accelerator, *values: torch.Tensor) -> torch.Tensor:
    """Whether these numbers are finite in all processes, so that all do the same: bool (), on the device."""
    finite = torch.stack([value.isfinite() for value in values]).all()
    if accelerator.num_processes > 1:
        finite = accelerator.reduce(finite.float(), "sum") == accelerator.num_processes
    return finite


def _step(accelerator: Accelerator, optimizer, finite: torch.Tensor) -> None:
    """AdamW's step, which leaves weights, moments and its count as they are where `finite` is false."""
    if accelerator.scaler is None:  # float16's tells AdamW itself, and learns from what it skips
        optimizer.optimizer.found_inf = finite.logical_not().float()
    optimizer.step()


class Skips:
    """Counts on the device how many updates in a row were skipped, so that it is seen later too."""

    def __init__(self, device: torch.device):
        self.in_a_row, self.most, self.last = torch.zeros(3, dtype=torch.int64, device=device)

    def update(self, finite: torch.Tensor, step: int) -> None:
        self.in_a_row = (self.in_a_row + 1) * finite.logical_not()
        self.last = torch.where(self.in_a_row > self.most, step, self.last)
        self.most = torch.maximum(self.in_a_row, self.most)

    def check(self, run: Run, checkpoints: Checkpoints) -> None:
        """End a run in which too many in a row were skipped."""
        most = int(self.most)
        if most < SKIPPED_IN_A_ROW:
            return
        there = checkpoints.found()
        raise FloatingPointError(
            f"the loss or its gradient was not finite in {most} updates in a row, the last of them {int(self.last)}; "
            f"they changed nothing, and {there[-1] if there else 'no checkpoint'} is whole. "
            f"Try a smaller learning_rate than {run.config.learning_rate:g}"
            + (", or mixed_precision bf16 or no" if run.config.mixed_precision == "fp16" else "")
        )


def _model(config: TrainConfig, images: ImageData | ImageStream):
    """The network and the scheduler that `config` asks for, made for these images."""
    channels, height, width = images.shape
    torch.manual_seed(config.seed)
    source = config.pretrained_model_name_or_path
    if source is not None and config.unet:
        raise ValueError(f"unet={config.unet!r} must be empty: the network comes with the weights")
    settings = {**config.scheduler, **({"prediction_type": config.prediction_type} if config.prediction_type else {})}
    if config.learned_variance:
        settings["variance_type"] = "learned_range"
    pipeline = None if source is None else load_pipeline(source, "pretrained_model_name_or_path")
    merged = settings if pipeline is None else {**pipeline.scheduler.config, **settings}
    kind = scheduler_class(merged)
    unknown = sorted(settings.keys() - inspect.signature(kind.__init__).parameters.keys())
    if unknown:
        raise ValueError(f"scheduler={config.scheduler!r}: {kind.__name__} has no {', '.join(unknown)}")
    try:
        scheduler = kind.from_config(merged)
        if pipeline is None:
            size = height if height == width else (height, width)
            names = images.label_names if config.class_conditional else None
            classes = {"num_classes": len(names), "class_names": names} if names else {}
            variance = {"out_channels": 2 * channels} if config.learned_variance else {}
            unet = DDPMUNet(**{"sample_size": size, "in_channels": channels, **variance, **classes, **config.unet})
        else:
            unet = pipeline.unet
    except TypeError as error:  # an argument that DDPMUNet does not have, or a value of the wrong type
        raise ValueError(f"unet={config.unet!r}, scheduler={config.scheduler!r}: {error}") from error
    if unet.config.in_channels != channels:
        of = "unet" if source is None else f"pretrained_model_name_or_path={source!r}"
        made_for = unet.config.in_channels
        raise ValueError(f"{of} is made for {made_for} channels and the images have {channels}: set channels")
    _check_classes(config, unet, images.label_names)
    learned = scheduler.config.variance_type == "learned_range"
    if learned != (unet.config.get("out_channels") == 2 * channels):
        predicts = unet.config.get("out_channels") or channels
        raise ValueError(
            f"learned_variance={config.learned_variance}: the network predicts {predicts} channels of images of "
            f"{channels}, and the scheduler has variance_type={scheduler.config.variance_type!r}: set learned_variance "
            "and neither of the others for a new network, and leave it out to go on with one that has it"
        )
    if config.snr_gamma is not None and scheduler.config.rescale_betas_zero_snr:
        raise ValueError(
            f"snr_gamma={config.snr_gamma:g} with rescale_betas_zero_snr gives the last timestep, where samples begin, "
            "the weight 0: leave one of them out"
        )
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    scheduler.set_timesteps(config.ddpm_num_inference_steps)  # a number that can't be should not wait for the samples
    return unet, scheduler


def _check_classes(config: TrainConfig, unet, names: list[str] | None) -> None:
    classes = num_classes(unet)
    if not config.class_conditional:
        if classes is not None:
            raise ValueError(f"the network has {classes} classes (num_classes): set class_conditional")
    elif classes != len(names) or (unet.config.class_names or names) != names:
        made_for = (
            "none" if classes is None else f"{classes} ({', '.join(unet.config.class_names or ['nameless'])[:80]})"
        )
        of_images = f"{len(names)} classes ({', '.join(names)[:80]})"
        raise ValueError(
            f"class_conditional=True: the images have {of_images} and the network has {made_for}: leave out "
            "class_conditional, or pretrained_model_name_or_path, or num_classes"
        )
    elif unet.config.class_names is None:
        unet.register_to_config(class_names=names)


def _labels(run: Run, labels: torch.Tensor | None, hidden: torch.Tensor) -> torch.Tensor | None:
    """What the network is told of the classes (B,): the null label for those that are hidden, None if it has none."""
    if not run.config.class_conditional:
        return None
    return torch.where(hidden | (labels < 0), run.unet.config.num_classes, labels)


def draw(config: TrainConfig, scheduler: NoiseScheduler, shape, step: int):
    """noise (B, C, H, W), timesteps (B,), flips (B, 1, 1, 1) and hidden labels (B,) of the global batch of an update.

    Antithetic timesteps are T ((u + i / B) mod 1), rounded down, with one u for all i (Kingma et al. 2021,
    arXiv:2107.00630, appendix I.1): each alone is uniform in 0 ... T-1, and together they leave no part of it out.
    """
    generator, B, T = seeded_generator(config.seed, "noise", step), shape[0], len(scheduler)
    noise = torch.randn(shape, generator=generator)
    if config.antithetic_timesteps:
        offset = torch.rand(1, generator=generator, dtype=torch.float64)
        timesteps = ((offset + torch.arange(B) / B) % 1 * T).long()
    else:
        timesteps = torch.randint(T, (B,), generator=generator)
    flips = torch.rand(B, 1, 1, 1, generator=generator) < (0.5 if config.random_flip else 0.0)
    hidden = torch.rand(B, generator=generator) < config.label_dropout
    return noise, timesteps, flips, hidden


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """Of update `step`, counted from 0: linear warm-up, then constant, or cosine or linear to 0."""
    warmup = config.lr_warmup_steps
    rate = config.learning_rate * min(1.0, (step + 1) / (warmup + 1))
    if config.lr_scheduler == "constant":
        return rate
    done = max(0.0, (step - warmup) / max(1, total_steps - warmup))
    return rate * (0.5 * (1 + math.cos(math.pi * done)) if config.lr_scheduler == "cosine" else 1 - done)


@torch.no_grad()
def held_out_loss(run: Run, most: int | None = None) -> float | None:
    """L_simple of the averaged network on the held-out images, at timesteps spread evenly over 0 ... T-1.

    It is not weighted, and held-out images without a class are predicted without one. Noise and timesteps are the same
    each time and in every run, so that only the network makes the difference.

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
    n = len(images)
    generator = seeded_generator(0, "held-out loss", n)
    timesteps = (torch.arange(n) * len(scheduler) // n)[torch.randperm(n, generator=generator)]
    total = torch.zeros(2, device=unet.device)  # of the losses, and of processes that were asked to stop
    for k, numbers in enumerate(torch.arange(n).split(run.config.train_batch_size)):
        z = torch.randn((len(numbers), *run.held_out.shape), generator=generator)
        if most is None and stop_requested():
            total[1] = 1
            break
        if k % accelerator.num_processes == accelerator.process_index:
            x, z, t = (d.to(unet.device) for d in (run.held_out.batch(images[numbers]), z, timesteps[numbers]))
            y = None
            if run.config.class_conditional:
                y = _labels(run, run.held_out.labels[images[numbers]], torch.tensor(False)).to(unet.device)
            total[0] += diffusion_loss(unet, scheduler, x, z, t, y)[0].sum()
    loss, stopped = accelerator.reduce(total, "sum").tolist()
    return None if stopped else loss / n


class UpdateError(ValueError):
    """What made an update fail in this process, and perhaps in no other: each tells its own."""

    of_each_process = True


@contextlib.contextmanager
def _explaining(config: TrainConfig) -> Iterator[None]:
    """Around an update: what settings would help where memory or the compiler fails."""
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


class Compiling:
    """Compiles the network of a `Run` in place, if it is to be: its forward and backward when they are first called."""

    def __init__(self, run: Run):
        self.pending, self.main = run.config.compile, run.accelerator.is_main_process
        if self.pending:
            run.unet.compile()

    @contextlib.contextmanager
    def told_once(self) -> Iterator[None]:
        """Around what calls them."""
        told, self.pending = self.pending and self.main, False
        began = time.monotonic()
        if told:
            log.warning("compiling the network: the first update takes longer, from half a minute to several minutes")
        yield
        if told:
            log.warning(f"compiled the network in {time.monotonic() - began:.0f} seconds")


def _stop_asked(run: Run) -> bool:
    """Whether any process has been asked to stop. Several on CUDA ask one another where they wait anyway."""
    accelerator = run.accelerator
    if accelerator.num_processes == 1:
        return stop_requested()
    if not _may_look(accelerator.device) and run.step % LOG_EVERY and run.step % run.config.checkpointing_steps:
        return False
    asked = torch.tensor(float(stop_requested()), device=accelerator.device)
    return accelerator.reduce(asked).item() > 0

"""Prepare a run from its configuration: images, network, optimizer and the checkpoint to resume from."""

import contextlib
import importlib.util
import logging
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from ddpm_hf.data.dataset import ImageData
from ddpm_hf.data.streaming import open_images
from ddpm_hf.pipelines.pipeline import DDPMCustomPipeline
from ddpm_hf.training.batch import Batches
from ddpm_hf.training.checkpoints import TRAIN_CONFIG, Checkpoints
from ddpm_hf.training.config import TrainConfig
from ddpm_hf.training.ema import EMA
from ddpm_hf.training.guards import Skips, can_sync_each_step, explain_bad_images, write_quarantine
from ddpm_hf.training.log import LOG_EVERY, TrainingLog
from ddpm_hf.training.model import build_model, build_objective, signal_left
from ddpm_hf.training.optimizer import build_optimizer
from ddpm_hf.training.resume import check_same, keep_split, restore_run_state
from ddpm_hf.training.run import Run, TrainCallback
from ddpm_hf.utils.arguments import mode_of
from ddpm_hf.utils.distributed import by_main
from ddpm_hf.utils.files import locked
from ddpm_hf.utils.seeds import stream_seed
from ddpm_hf.utils.signals import StopSignals

FEW_IMAGES = 500
MEASURED, MEASURED_NUMBERS = 10_000, 2**26  # images, and numbers, for statistics
# With DistributedDataParallel, gloo's threads outlive their process group (torch 2.13), and a thread that lets go of
# the last tensor it sent while Python ends makes the process abort, all being saved.
GLOO_SHUTDOWN_SECONDS = 0.3
log = logging.getLogger(__name__)


class Training:
    """What the loop works with.

    Attributes:
        run: the `Run`.
        network, optimizer: as Accelerate wraps them.
        ema, objective, batches, checkpoints, callbacks: see their classes.
        progress: the bar and log.csv.
        stop: the signals that arrived.
        saved: whether the last save wrote a checkpoint.
        looks: whether the host reads each update whether it was applied.
    """

    def __init__(self, run: Run, ema: EMA, optimizer, objective, checkpoints: Checkpoints, callbacks, stop):
        self.run, self.ema, self.objective, self.stop = run, ema, objective, stop
        self.checkpoints, self.callbacks, self.saved = checkpoints, callbacks, False
        config, accelerator, self.optimizer = run.config, run.accelerator, optimizer
        null_label = run.unet.config.num_classes if config.class_conditional else None
        world = accelerator.num_processes
        self.batches = Batches(config, run.images, null_label, accelerator.process_index, world)
        self.skips = Skips(run, checkpoints)
        self.looks = can_sync_each_step(accelerator.device)
        self.to_compile = config.compile

    def start(self, kept: int | None) -> None:
        """Move network and optimizer to the device. `kept`: the update up to which log.csv belongs to this run."""
        run, accelerator = self.run, self.run.accelerator
        self.network, self.optimizer = accelerator.prepare(run.unet.train(), self.optimizer)
        self.ema.to(accelerator.device)
        if self.to_compile:
            run.unet.compile()  # in place: forward and backward, when they are first called
        self.progress = TrainingLog(run, self.batches.global_batch, kept or 0)

    def dropout_seed(self, step: int, k: int) -> int:
        """The seed of this process's micro-batch number `k` of update `step`."""
        return stream_seed(self.run.config.seed, "dropout", step * self.batches.micros + self.batches.numbers[k])

    def after_update(self, loss, seen, applied: torch.Tensor, rate: float) -> None:
        """Count an update and log it; see `TrainingLog.update` for the arguments."""
        run = self.run
        self.progress.update(loss, seen, applied, rate)
        self.skips.update(applied)
        due = run.finished or run.step % run.config.checkpointing_steps == 0  # for a save, which writes a row itself
        to_log = run.step % LOG_EVERY == 0
        if due or to_log or self.looks:
            self.skips.check()
        if to_log and not due:
            self.progress.write_row()
        for callback in self.callbacks if run.accelerator.is_main_process else ():
            callback.on_step_end(run)

    @contextlib.contextmanager
    def log_first_compile(self) -> Iterator[None]:
        """Log the start and the duration of the first call of a compiled network."""
        compiles, self.to_compile = self.to_compile and self.run.accelerator.is_main_process, False
        began = time.monotonic()
        if compiles:
            log.warning("compiling the network: the first update takes longer, from half a minute to several minutes")
        yield
        if compiles:
            log.warning(f"compiled the network in {time.monotonic() - began:.0f} seconds")


@contextlib.contextmanager
def open_run(config: TrainConfig, callbacks: list[TrainCallback], objective=None) -> Iterator[Training]:
    """Open a `Training` in a folder that it locks, and close it: log how it ended, and end the trackers.

    Everything is checked before anything is written. Raises the errors of `train`.
    """
    folder = Path(config.output_dir)
    if folder.is_file():
        raise ValueError(f"output_dir={config.output_dir!r} is a file; it must be a folder or not be there yet")
    accelerator = make_accelerator(config)
    with StopSignals() as stop, contextlib.ExitStack() as stack, own_random_numbers():
        by_main(accelerator, lambda: stack.enter_context(locked(folder, "train")))
        checkpoints = Checkpoints(folder, config.checkpoints_total_limit, config.post_hoc_ema_limit)
        by_main(accelerator, checkpoints.roll_back)
        paths = checkpoints.find(config.resume_from_checkpoint, config.overwrite_output_dir)
        accelerator.wait_for_everyone()
        try:
            training, kept = _prepare(config, accelerator, checkpoints, paths, objective, callbacks, stop)
            _begin(training, kept)
            began_at, stop.may_raise = training.run.step, accelerator.num_processes == 1  # else the others would wait
            yield training
            _end(training, began_at)
        finally:
            if accelerator.is_main_process:
                checkpoints.roll_back()  # if it has ended before its first checkpoint


@contextlib.contextmanager
def own_random_numbers() -> Iterator[None]:
    """Restore torch's global random state at the end: a run seeds it for initial weights and dropout."""
    cpu, cuda = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        torch.cuda.set_rng_state_all(cuda)


def make_accelerator(config: TrainConfig) -> Accelerator:
    """The process's `Accelerator`, whose precision `config` then has; ValueError for what is not supported."""
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
    return accelerator


def _prepare(config, accelerator, checkpoints, paths, objective, callbacks, stop) -> tuple[Training, int | None]:
    """The training at the update where it starts, and that update if the checkpoint lies in this folder (else None)."""
    state = checkpoints.first_state(paths)
    keep_split(config, None if state is None else state.get("settings", {}))
    images, held_out = _images(config, accelerator)
    torch.manual_seed(config.seed)
    names, before = images.label_names, ((state or {}).get("network") or {}).get("class_names")
    same_names = names and before and sorted(names) == sorted(before)
    std = ((state or {}).get("objective") or {}).get("sigma_data")  # also if the images are others now
    unet, scheduler = build_model(
        config,
        images.shape,
        before if same_names else names,
        lambda: broadcast_object_list([std or std_of(images, config.seed)])[0],
    )
    if "has_alpha" in unet.config:  # a DDPMUNet
        are_bands = mode_of(images.shape[0]) in ("LA", "RGBA") and not images.has_alpha
        unet.register_to_config(has_alpha=False if are_bands else None)
    for part in filter(None, (images, held_out)):
        part.order_classes(unet.config.get("class_names"))  # of a checkpoint or a pretrained network, as it has learnt
    if accelerator.is_main_process and (warning := signal_left(scheduler)):
        log.warning(warning)
    ema = EMA(unet, config.ema_max_decay, config.ema_sigma_rel, config.post_hoc_ema)
    optimizer = build_optimizer(config, unet)
    global_batch = config.train_batch_size * accelerator.num_processes * config.gradient_accumulation_steps
    total_steps = config.max_train_steps or math.ceil(config.num_epochs * images.num_images / global_batch)
    pipeline = DDPMCustomPipeline(ema.model, scheduler, config.sampling_scheduler, config.sampling_steps)
    run = Run(config, pipeline, unet, images, held_out, total_steps, accelerator)
    objective = build_objective(config, images.levels) if objective is None else objective
    training = Training(run, ema, optimizer, objective, checkpoints, callbacks, stop)

    def check(saved: dict) -> None:
        check_same(saved, run, objective)

    start_anew = config.overwrite_output_dir and config.resume_from_checkpoint == "latest"  # if all are damaged
    state = checkpoints.restore(paths, check, unet, ema, optimizer, start_anew)
    run.step = state["step"]
    restore_run_state(state, run)
    return training, state["kept"]


def _begin(training: Training, kept: int | None) -> None:
    """Write the first files and start trackers and network."""
    run, accelerator = training.run, training.run.accelerator
    accelerator.wait_for_everyone()  # until all have read what is now written over
    if accelerator.is_main_process:
        for callback in training.callbacks:
            callback.on_init_end(run)
        training.checkpoints.make_room(kept)
        run.config.save(run.output_dir / TRAIN_CONFIG)  # first: it marks what is in the folder as that of a run
        write_quarantine(run.output_dir, run.images.bad)
        for callback in training.callbacks:
            callback.on_train_begin(run)
    training.start(kept)
    if run.config.logger:
        name = {"name": run.output_dir.name}
        settings = {key: v if isinstance(v, int | float | str) else str(v) for key, v in vars(run.config).items()}
        trackers = {"wandb": {**name, "dir": str(run.output_dir)}, "trackio": name}
        accelerator.init_trackers("ddpm_hf", settings, trackers)


def _end(training: Training, began_at: int) -> None:
    """Log how the run ended, and end trackers and process group."""
    run, accelerator, stop = training.run, training.run.accelerator, training.stop
    if run.stopped_by and accelerator.is_main_process:
        by = f"stopped by {stop.name or 'a signal to another process'}"
        if run.step == began_at:
            log.warning(f"{by} before the first update: nothing is saved")
        elif training.saved:
            log.warning(
                f"{by} after update {run.step} of {run.total_steps}; the same command with --resume_from_checkpoint "
                "latest continues from there"
            )
        else:
            log.warning(f"{by} after update {run.step} of {run.total_steps}, which was not saved")
    run.stopped_by = run.stopped_by or stop.name
    accelerator.end_training()
    for callback in training.callbacks if accelerator.is_main_process else ():
        callback.on_train_end(run)
    if accelerator.num_processes > 1 and accelerator.device.type == "cpu":
        time.sleep(GLOO_SHUTDOWN_SECONDS)


def std_of(images, seed: int) -> float:
    """The standard deviation of the values of the images in [-1, 1], to four digits: of all, or of at most `MEASURED`.

    Missing values are left out. Of a stream the first images are measured.
    """
    if isinstance(images, ImageData):
        number = min(MEASURED, len(images), max(1, MEASURED_NUMBERS // math.prod(images.shape)))
        measured, valid = images.batch_and_valid(torch.linspace(0, len(images) - 1, number).round().long())
        values = measured if valid is None else measured[valid]
    else:
        values = images.first(64, seed)
    std = values.double().std(correction=0).item()
    if not std > 0:
        raise ValueError(
            f"objective='edm': all values of the {len(values)} images are the same, so there is nothing to learn"
        )
    return float(f"{std:.4g}")


def _images(config: TrainConfig, accelerator: Accelerator):
    """Training and held-out images; the main process logs which ones are left out."""
    main = accelerator.is_main_process
    with explain_bad_images(config):
        images, held_out = open_images(config, accelerator.process_index, accelerator.num_processes)
    if len(set(gather_object([images.fingerprint]))) > 1:
        raise ValueError("the processes have read different images; do not change the data set while training starts")
    _check_images(config, images)
    without = int((images.labels < 0).sum()) if isinstance(images, ImageData) and images.label_names else 0
    if config.class_conditional and without and main:
        log.warning(f"{without} of {images.num_images} images have no class; they are trained with the null label")
    if config.class_conditional and isinstance(images, ImageData) and main:
        empty = sorted(set(range(len(images.label_names))) - set(images.labels.tolist()))
        if empty:
            log.warning(f"{len(empty)} classes have no training images, such as {images.label_names[empty[0]]!r}")
    if main and images.bad:
        log.warning(f"{len(images.bad)} invalid images are left out; quarantine.csv lists them with the reason")
    if main and images.num_images is not None and images.num_images < FEW_IMAGES:
        log.warning(
            f"{images.num_images} images are fewer than {FEW_IMAGES}: the network is likely to memorise them; compare "
            "neighbours.png"
        )
    return images, held_out


def _check_images(config: TrainConfig, images) -> None:
    """Raise ValueError if the images do not fit the settings of training; set how they are ordered."""
    has_classes = images.label_names is not None and not (isinstance(images, ImageData) and (images.labels < 0).all())
    for name in ("class_conditional", "class_balance"):
        if getattr(config, name) and not has_classes:
            raise ValueError(
                f"{name}={getattr(config, name)}: the images of {config.train_data_dir or config.dataset_name!r} have "
                "no classes; "
                + (images.no_classes or "they need a column of classes (--label_column), or folders, one a class")
            )
    if config.random_rotate90 and images.shape[1] != images.shape[2]:
        height, width = images.shape[1:]
        raise ValueError(f"random_rotate90=True needs square images; these are {width}x{height}: give --resolution")
    if config.class_balance:
        images.class_balance = config.class_balance

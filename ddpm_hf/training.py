"""The training of a DDPM: the loss, the loop, and what surrounds them so that a run can be trusted."""

import contextlib
import csv
import ctypes
import inspect
import json
import logging
import math
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from ddpm_hf.config import TrainConfig
from ddpm_hf.data import ImageData, batch_indices, load_images, seeded_generator, stream_seed
from ddpm_hf.ema import EMA
from ddpm_hf.pipeline import DDPMCustomPipeline, load_pipeline, make_scheduler
from ddpm_hf.scheduler import LinearNoiseScheduler
from ddpm_hf.unet import DDPMUNet

LOG_EVERY = 10  # updates a row of log.csv
log = logging.getLogger(__name__)


@dataclass
class Run:
    """A training run as its callbacks see it.

    Args:
        config: the resolved configuration.
        pipeline: the averaged (EMA) network with its scheduler.
        images, held_out: what is trained on, and what is measured on (None where there is only one image).
        total_steps: updates in all.
        step: updates done.
    """

    config: TrainConfig
    pipeline: DDPMCustomPipeline
    images: ImageData
    held_out: ImageData | None
    total_steps: int
    step: int = 0

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def finished(self) -> bool:
        return self.step >= self.total_steps


def diffusion_loss(network, scheduler, images, noise, timesteps) -> torch.Tensor:
    """L_simple, the mean squared error of the prediction (Ho et al. 2020, equation 14).

    Args:
        images, noise: (B, C, H, W); images in [-1, 1].
        timesteps: (B,).
    """
    noisy = scheduler.add_noise(images, noise, timesteps)
    if scheduler.config.prediction_type == "epsilon":
        target = noise
    elif scheduler.config.prediction_type == "sample":
        target = images
    else:
        target = scheduler.get_velocity(images, noise, timesteps)
    return F.mse_loss(network(noisy, timesteps).sample.float(), target)


def train(
    config: TrainConfig, on_start: Iterable[Callable[[Run], None]] = (), on_save: Iterable[Callable[[Run], None]] = ()
) -> Run:
    """Train as `config` says (Ho et al. 2020, algorithm 1) and leave a pipeline folder in `config.output_dir`.

    Order, noise, timesteps and flips are functions of (seed, update, position in the global batch), dropout of (seed,
    update, process), so a resumed run continues as if it had not been interrupted. SIGTERM and Ctrl-C save a
    checkpoint and the pipeline and end the run before its time.

    Args:
        on_start: called with the `Run` by the main process once all has been checked and before anything is written.
        on_save: called with the `Run` by the main process after each save, the last one included.

    Raises:
        ValueError: something in `config` can't be; nothing has been written then.
    """
    if Path(config.output_dir).is_file():
        raise ValueError(f"output_dir={config.output_dir!r} is a file; it must be a folder or not be there yet")
    accelerator = _accelerator(config)
    images, held_out = load_images(config)
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
    global_batch = micro_batch * accelerator.num_processes * micros
    total_steps = config.max_train_steps or math.ceil(config.num_epochs * len(images) / global_batch)
    run = Run(config, DDPMCustomPipeline(ema.model, scheduler), images, held_out, total_steps)
    checkpoints = Checkpoints(run.output_dir, config.checkpoints_total_limit)
    run.step = checkpoints.restore(config, unet, ema, optimizer)
    accelerator.wait_for_everyone()  # until all have read what is now written over
    if accelerator.is_main_process:
        for callback in on_start:
            callback(run)
        checkpoints.clear_after(run.step)
        run.output_dir.mkdir(parents=True, exist_ok=True)
        config.save(run.output_dir / "train_config.json")
    network, optimizer = accelerator.prepare(unet.train(), optimizer)
    ema.model.to(accelerator.device)
    progress = Progress(run, global_batch, accelerator)

    def save():
        held_out = held_out_loss(run) if accelerator.is_main_process else None
        progress.write_row(held_out)
        if accelerator.is_main_process:
            checkpoints.save(run, unet, ema, optimizer)
            save_pipeline(run, unet)
            for callback in on_save:
                callback(run)
        accelerator.wait_for_everyone()

    with progress, StopSignals() as stop:
        if run.finished:  # resumed behind its end
            save()
        while not run.finished and not stop.received(accelerator):
            batch = images.batch(batch_indices(config.seed, run.step, global_batch, len(images)))
            noise, timesteps, flips = draw(config, scheduler, batch.shape, run.step)
            torch.manual_seed(stream_seed(config.seed, f"dropout of process {accelerator.process_index}", run.step))
            batch = torch.where(flips, batch.flip(3), batch)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, run.step, total_steps)
            for micro in range(micros):
                first = (micro * accelerator.num_processes + accelerator.process_index) * micro_batch
                x, z, t = (d[first : first + micro_batch].to(accelerator.device) for d in (batch, noise, timesteps))
                with accelerator.no_sync(network) if micro < micros - 1 else contextlib.nullcontext():
                    loss = diffusion_loss(network, scheduler, x, z, t) / micros
                    accelerator.backward(loss)
                progress.add(loss.detach())
            accelerator.clip_grad_norm_(network.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            run.step += 1
            ema.update(unet, run.step)

            progress.update()
            if run.finished or run.step % config.checkpointing_steps == 0:
                save()
            elif run.step % LOG_EVERY == 0:
                progress.write_row()
        if not run.finished:
            progress.write_row()
            if accelerator.is_main_process:
                checkpoints.save(run, unet, ema, optimizer)
                save_pipeline(run, unet)
    if not run.finished and accelerator.is_main_process:
        log.warning(
            f"stopped by {stop.name or 'a signal to another process'} after update {run.step} of {total_steps}; "
            "the same command with --resume_from_checkpoint latest goes on from there"
        )
    accelerator.end_training()
    return run


def _accelerator(config: TrainConfig) -> Accelerator:
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    config.mixed_precision = accelerator.mixed_precision  # which the launcher may have decided
    if config.mixed_precision == "fp16" and accelerator.device.type != "cuda":
        # Accelerate would silently run in float32.
        raise ValueError("mixed_precision='fp16' needs a CUDA device; use bf16 or no")
    if accelerator.device.type == "cpu":
        launched = "ACCELERATE_MIXED_PRECISION" in os.environ
        if launched and accelerator.num_processes == 1 and os.environ.get("OMP_NUM_THREADS") == "1":
            # `accelerate launch` gives its only process one thread, however many cores there are
            torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
        _keep_freed_memory()
    return accelerator


def _keep_freed_memory() -> None:
    """Have glibc keep freed memory: by default each update gives its activations back and faults them in again."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD


def _model(config: TrainConfig, images: ImageData):
    """The network and the scheduler that `config` asks for, made for these images."""
    channels, height, width = images.pixels.shape[1:]
    torch.manual_seed(config.seed)
    source = config.pretrained_model_name_or_path
    unknown = sorted(config.scheduler.keys() - inspect.signature(LinearNoiseScheduler.__init__).parameters.keys())
    if unknown:
        raise ValueError(f"scheduler={config.scheduler!r}: LinearNoiseScheduler has no {', '.join(unknown)}")
    if source is not None and config.unet:
        raise ValueError(f"unet={config.unet!r} must be empty: the network comes with the weights")
    try:
        if source is None:
            size = height if height == width else (height, width)
            unet = DDPMUNet(**{"sample_size": size, "in_channels": channels, **config.unet})
            scheduler = make_scheduler(config.scheduler)
        else:
            pipeline = load_pipeline(source, "pretrained_model_name_or_path")
            unet = pipeline.unet
            scheduler = make_scheduler({**pipeline.scheduler.config, **config.scheduler})
    except TypeError as error:  # an argument that DDPMUNet does not have, or a value of the wrong type
        raise ValueError(f"unet={config.unet!r}, scheduler={config.scheduler!r}: {error}") from error
    if unet.config.in_channels != channels:
        of = "unet" if source is None else f"pretrained_model_name_or_path={source!r}"
        made_for = unet.config.in_channels
        raise ValueError(f"{of} is made for {made_for} channels and the images have {channels}: set channels")
    scheduler.set_timesteps(config.ddpm_num_inference_steps)  # a number that can't be should not wait for the samples
    return unet, scheduler


def draw(config: TrainConfig, scheduler, shape, step: int):
    """noise (B, C, H, W), timesteps (B,) and flips (B, 1, 1, 1) of the global batch of update `step`."""
    generator = seeded_generator(config.seed, "noise", step)
    noise = torch.randn(shape, generator=generator)
    timesteps = torch.randint(len(scheduler), shape[:1], generator=generator)
    flips = torch.rand(shape[0], 1, 1, 1, generator=generator) < (0.5 if config.random_flip else 0.0)
    return noise, timesteps, flips


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """Of update `step`, counted from 0: linear warm-up, then constant, or cosine or linear to 0."""
    warmup = config.lr_warmup_steps
    rate = config.learning_rate * min(1.0, (step + 1) / (warmup + 1))
    if config.lr_scheduler == "constant":
        return rate
    done = max(0.0, (step - warmup) / max(1, total_steps - warmup))
    return rate * (0.5 * (1 + math.cos(math.pi * done)) if config.lr_scheduler == "cosine" else 1 - done)


@torch.no_grad()
def held_out_loss(run: Run) -> float:
    """`diffusion_loss` of the averaged network on the held-out images, at timesteps spread evenly over 0 ... T-1.

    Noise and timesteps are the same each time and in every run, so that only the network makes the difference.
    """
    if run.held_out is None:
        return math.nan
    unet, scheduler = run.pipeline.unet, run.pipeline.scheduler
    n = len(run.held_out)
    generator = seeded_generator(0, "held-out loss", n)
    timesteps = (torch.arange(n) * len(scheduler) // n)[torch.randperm(n, generator=generator)]
    total = 0.0
    for indices in torch.arange(n).split(run.config.train_batch_size):
        x = run.held_out.batch(indices)
        z = torch.randn(x.shape, generator=generator)
        x, z, t = (d.to(unet.device) for d in (x, z, timesteps[indices]))
        total += diffusion_loss(unet, scheduler, x, z, t).item() * len(indices)
    return total / n


def save_pipeline(run: Run, unet: DDPMUNet) -> None:
    """Pipeline folder in `run.output_dir`: the averaged weights, and the raw ones as `variant="raw"`.

    It is written beside and moved file by file, so a reader never meets half a file.
    """
    with tempfile.TemporaryDirectory(dir=run.output_dir, prefix=".saving-") as folder:
        run.pipeline.save_pretrained(folder)
        unet.save_pretrained(Path(folder) / "unet", variant="raw")
        for path in sorted(Path(folder).rglob("*")):
            target = run.output_dir / path.relative_to(folder)
            target.mkdir(exist_ok=True) if path.is_dir() else os.replace(path, target)


class Progress:
    """What a person sees of the loop: the progress bar and log.csv."""

    COLUMNS = ("step", "images_seen", "loss", "held_out_loss", "learning_rate", "images_per_second", "seconds")

    def __init__(self, run: Run, global_batch: int, accelerator: Accelerator):
        self.run, self.global_batch, self.accelerator = run, global_batch, accelerator
        self.path = run.output_dir / "log.csv"
        self.losses, self.logged_step = [], run.step
        self.before = 0.0  # seconds that the run took before it was resumed
        if accelerator.is_main_process:
            self._cut_back()
        self.started = self.logged_at = time.monotonic()

    def _cut_back(self) -> None:
        """Leave the rows of log.csv up to the update from which the run goes on."""
        rows = read_log(self.path) if self.run.step and self.path.exists() else []
        rows = [row for row in rows if row["step"] <= self.run.step]
        self.before = rows[-1]["seconds"] if rows else 0.0
        with open(self.path, "w", newline="") as file:
            writer = csv.DictWriter(file, self.COLUMNS)
            writer.writeheader()
            writer.writerows(rows)

    def __enter__(self):
        self.bar = tqdm(
            total=self.run.total_steps,
            initial=self.run.step,
            unit=" updates",
            desc=Path(self.run.config.config).stem,
            disable=not self.accelerator.is_main_process,
        )
        return self

    def __exit__(self, *_):
        self.bar.close()

    def add(self, loss: torch.Tensor) -> None:
        self.losses.append(loss)  # looked at every LOG_EVERY updates only: looking stops the device

    def update(self) -> None:
        self.bar.update()

    def write_row(self, held_out: float | None = None) -> None:
        """A row of log.csv: the mean loss since the last one and, at a save, the held-out loss."""
        run, now = self.run, time.monotonic()
        if run.step == self.logged_step:  # stopped just now, or resumed behind the end
            return
        row = {"step": run.step, "images_seen": run.step * self.global_batch, "held_out_loss": held_out}
        row["seconds"] = round(self.before + now - self.started, 2)
        updates = run.step - self.logged_step
        loss = self.accelerator.reduce(torch.stack(self.losses).sum() / updates, "mean").item()
        speed = updates * self.global_batch / (now - self.logged_at)
        rate = learning_rate(run.config, run.step - 1, run.total_steps)
        row |= {"loss": loss, "images_per_second": round(speed, 1), "learning_rate": rate}
        self.bar.set_postfix_str(f"loss={loss:.4f}, {speed:.0f} images/s")
        if self.accelerator.is_main_process:
            with open(self.path, "a", newline="") as file:
                csv.DictWriter(file, self.COLUMNS).writerow(row)
        self.losses, self.logged_step, self.logged_at = [], run.step, time.monotonic()


def read_log(path) -> list[dict]:
    """Rows of log.csv, numbers as floats and empty cells as None."""
    with open(path, newline="") as file:
        return [{k: float(v) if v else None for k, v in row.items()} for row in csv.DictReader(file)]


class Checkpoints:
    """The folders `checkpoint-<step>` of a run: raw and averaged weights, AdamW's moments and the update's number.

    All else that a run in float32 or bf16 goes on from is a function of that number. No file is a pickle. A folder is
    written beside and renamed, and renamed before it is removed: one that bears the name is whole.
    """

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit

    def found(self) -> list[Path]:
        """Oldest first. Folders of the name that other programs wrote are none of ours."""
        ours = [path for path in self.folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
        return sorted((path for path in ours if (path / "state.json").is_file()), key=self._step)

    @staticmethod
    def _step(path: Path) -> int:
        return int(path.name.split("-")[1])

    def _remove(self, path: Path) -> None:
        aside = self.folder / f".removed-{path.name}"
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)
        shutil.rmtree(aside)

    def restore(self, config: TrainConfig, unet, ema: EMA, optimizer) -> int:
        """Load what `resume_from_checkpoint` names; the update to go on from, 0 for a fresh start."""
        wanted, found = config.resume_from_checkpoint, self.found()
        path = None
        if wanted == "latest":
            if not found:
                log.warning(f"{self.folder} holds no checkpoint yet: starting from the beginning")
                return 0
            path = found[-1]
        elif wanted is not None:
            path = Path(wanted) if Path(wanted).is_dir() else self.folder / wanted
            if not (path / "state.json").is_file():
                there = ", ".join(f.name for f in found) or "none"
                raise ValueError(
                    f"resume_from_checkpoint={wanted!r} is no checkpoint; in {self.folder} there is {there}"
                )
        elsewhere = path is None or path.resolve().parent != self.folder.resolve()
        if elsewhere and found and not config.overwrite_output_dir:
            state = json.loads((found[-1] / "state.json").read_text())
            if state["step"] < state["total_steps"]:
                raise ValueError(
                    f"output_dir={config.output_dir!r} holds an unfinished run ({found[-1].name} of "
                    f"{state['total_steps']}): go on with --resume_from_checkpoint latest, choose another folder, "
                    "or give --overwrite_output_dir"
                )
        return 0 if path is None else self._load(path, unet, ema, optimizer)

    def _load(self, path: Path, unet, ema: EMA, optimizer) -> int:
        try:
            weights, average, moments = (
                load_file(path / f"{name}.safetensors") for name in ("unet", "ema", "optimizer")
            )
            step = json.loads((path / "state.json").read_text())["step"]
        except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is damaged ({error}); name an earlier checkpoint") from error
        _load_weights(unet, weights, path)
        _load_weights(ema.model, average, path)
        for name, parameter in unet.named_parameters():
            if parameter.requires_grad and moments:
                keys = ("step", "exp_avg", "exp_avg_sq")
                optimizer.state[parameter] = {key: moments[f"{key}/{name}"] for key in keys}
        return step

    def clear_after(self, step: int) -> None:
        """Remove the checkpoints that this run is going to write anew."""
        for path in self.found():
            if self._step(path) > step:
                self._remove(path)

    def save(self, run: Run, unet, ema: EMA, optimizer) -> None:
        target = self.folder / f"checkpoint-{run.step}"
        if target in self.found():  # stopped just after a save, or resumed behind the end
            return
        beside = self.folder / f".{target.name}"
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        save_file(unet.state_dict(), beside / "unet.safetensors")
        save_file(ema.model.state_dict(), beside / "ema.safetensors")
        moments = {
            f"{key}/{name}": value
            for name, parameter in unet.named_parameters()
            for key, value in optimizer.state[parameter].items()
        }
        save_file(moments, beside / "optimizer.safetensors")
        (beside / "state.json").write_text(json.dumps({"step": run.step, "total_steps": run.total_steps}))
        os.replace(beside, target)
        for path in self.found()[: -self.limit]:
            self._remove(path)


def _load_weights(model, weights: dict, path: Path) -> None:
    wanted = model.state_dict()
    for name in sorted(weights.keys() | wanted.keys()):
        shapes = [tuple(w[name].shape) if name in w else None for w in (weights, wanted)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{path} has {name} as {shapes[0]} and the network wants {shapes[1]}: it is of another one"
            )
    model.load_state_dict(weights)


class StopSignals:
    """Notes SIGTERM and Ctrl-C instead of dying of them. A second one has its usual effect."""

    def __enter__(self):
        self.name = None
        try:
            self.usual = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread, where signals do not arrive either
            self.usual = {}
        return self

    def __exit__(self, *_):
        for number, handler in self.usual.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        self.name = signal.Signals(number).name
        signal.signal(number, self.usual[number])

    def received(self, accelerator: Accelerator) -> bool:
        """Whether any process has been asked to stop."""
        if accelerator.num_processes == 1:
            return self.name is not None
        asked = torch.tensor(float(self.name is not None), device=accelerator.device)
        return accelerator.reduce(asked).item() > 0

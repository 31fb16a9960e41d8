"""The settings that a checkpoint keeps, and whether a run may resume from it."""

import dataclasses
import json
import logging
import math
import zlib

from ddpm_hf.data.config import EARLIER_SPLIT
from ddpm_hf.data.dataset import ImageData
from ddpm_hf.schedulers.timesteps import PREDICTION
from ddpm_hf.training.config import OF_CONTINUOUS, TrainConfig
from ddpm_hf.training.run import Run
from ddpm_hf.utils.arguments import show

OBJECTIVE = (*PREDICTION, "variance_type")
DATA = ("train_data_dir", "dataset_name", "dataset_config_name")
# Of the network's configuration, what changes neither its weights nor what they compute
NOT_THE_NETWORK = ("sample_size", "class_names", "value_range", "has_alpha", "dropout", "dropout_channels")
# Settings that a checkpoint does not keep: where a run writes, how and where it decodes (which changes nothing), and
# what is kept as network, objective and batch
NOT_KEPT = ("config", "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "logger", "push_to_hub",
            "hub_model_id", "hub_private_repo", "dataloader_num_workers", "cache_dir", "unet", "scheduler",
            "train_batch_size", "gradient_accumulation_steps")  # fmt: skip
log = logging.getLogger(__name__)


def recorded(run: Run, objective) -> dict:
    """The images and settings that a checkpoint keeps, as JSON gives them back."""
    config = run.config
    network = {name: value for name, value in run.unet.config.items() if name[:1] != "_"}
    objective_settings = {name: run.pipeline.scheduler.config.get(name) for name in OBJECTIVE} | {
        name: getattr(config, name) for name in ("snr_gamma", *OF_CONTINUOUS)
    }
    objective_settings["loss"] = getattr(objective, "__name__", type(objective).__name__)
    batch = {
        "train_batch_size": config.train_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "processes": run.accelerator.num_processes,
    }
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in NOT_KEPT}
    kept = {"settings": settings, "network": network, "objective": objective_settings, "batch": batch}
    return json.loads(json.dumps({"images": images_identity(run), **kept}))


def images_identity(run: Run) -> str:
    """A string that differs for other images and, in a class-conditional run, for other classes."""
    images = run.images
    if not run.config.class_conditional or not isinstance(images, ImageData):
        return images.fingerprint
    checksum = zlib.crc32(images.labels.numpy(), zlib.crc32(repr(images.label_names).encode()))
    return f"{images.fingerprint}, classes {checksum:08x}"


def keep_split(config: TrainConfig, settings: dict | None) -> None:
    """Hold out the images that the run to resume has held out: set `config.held_out_split`, before images are read.

    Args:
        settings: those in the checkpoint; None without a checkpoint.
    """
    if settings is None:
        return
    split = settings.get("held_out_split", EARLIER_SPLIT)
    if config.group_by is not None and split == EARLIER_SPLIT:
        raise ValueError(
            f"group_by={show(config.group_by)}: the run to resume has held out images of all groups "
            f"(held_out_split={split!r}) and has been trained on the others; leave out group_by, or start a new run"
        )
    config.held_out_split = split
    before = settings.get("group_by")
    if before != config.group_by and all(settings.get(name) == getattr(config, name) for name in DATA):
        raise ValueError(
            f"group_by={show(config.group_by)}: the run to resume had group_by={show(before)}, and with another one it "
            "would be trained on images that it has held out; resume with that one, or start a new run"
        )


def restore_run_state(state: dict, run: Run) -> None:
    """Restore what a checkpoint holds besides weights: the best loss, fp16's loss scale, the position in a stream."""
    accelerator, config, streams = run.accelerator, run.config, state.get("streams")
    same_images = run.step and state["images"] == images_identity(run)
    if state["kept"] is not None and same_images:  # of other images the held-out loss is another
        run.best = state.get("best", {})
    before = state.get("settings", {})
    moved = any(before.get(name, v) != v for name, v in vars(config).items() if name in DATA)
    if state["kept"] is not None and not same_images and moved:
        raise ValueError(
            f"resume_from_checkpoint: output_dir={str(run.output_dir)!r} holds a run on other data "
            f"({before['train_data_dir'] or before['dataset_name']!r}, {state['images']}) than this one "
            f"({config.train_data_dir or config.dataset_name!r}, {images_identity(run)}): choose another output_dir"
        )
    if run.step and not same_images and accelerator.is_main_process:
        log.warning(
            f"the images ({images_identity(run)}) are not those of the checkpoint ({state['images']}): "
            "the run continues, but its results will differ"
        )
    if state.get("scaler") and accelerator.scaler:
        accelerator.scaler.load_state_dict(state["scaler"])
    if config.streaming and run.step:
        if streams is None or len(streams) != accelerator.num_processes:
            raise ValueError(
                f"streaming=True: this run has {accelerator.num_processes} processes and the checkpoint's had "
                f"{len(streams or [])}; resume a stream with the same number"
            )
        run.images.go_to(streams[accelerator.process_index])


def check_same(state: dict, run: Run, objective) -> None:
    """Raise ValueError if a checkpoint has another network, objective, global batch, seed or optimizer.

    What else differs is logged.

    Checkpoints of versions that did not record something are not compared in it.
    """
    here = recorded(run, objective)
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
    optimizer = settings.get("optimizer", "adamw")
    if optimizer != run.config.optimizer:
        raise ValueError(
            f"optimizer={run.config.optimizer!r}, and the checkpoint's run had optimizer={optimizer!r}, whose moments "
            "the other has no use for: resume with that one, or start a new run from its weights with "
            "--pretrained_model_name_or_path"
        )
    if run.config.post_hoc_ema and not settings.get("post_hoc_ema", False):
        raise ValueError(
            "post_hoc_ema=True, and the checkpoint's run did not keep these averages, which can't begin later: leave "
            "post_hoc_ema out, or start a new run"
        )
    dropout = {name: v for name, v in here["network"].items() if name.startswith("dropout")}
    pairs = (here["settings"], settings), (dropout, state.get("network", {})), (here["batch"], before)
    changed = [_differences(now, then) for now, then in pairs]
    if any(changed) and run.accelerator.is_main_process:
        log.warning(f"resuming with changed settings: {', '.join(filter(None, changed))}")


def _differences(now: dict, before: dict) -> str:
    """The settings of `now` that `before` has with another value, in words."""
    return ", ".join(f"{name}={v!r} was {before[name]!r}" for name, v in now.items() if before.get(name, v) != v)

"""Collects the facts of a training run for run.json, from which the model card is written."""

import math
import platform
from pathlib import Path

import torch
from accelerate import Accelerator

from ddpm_hf.data.config import EMBEDDED_DIGITS
from ddpm_hf.pipelines.loading import is_hub_id
from ddpm_hf.training.log import read_log
from ddpm_hf.utils.versions import versions

PACKAGES = ("ddpm-hf", "torch", "diffusers", "accelerate", "datasets", "transformers")


def facts_of(run, before: dict) -> dict:
    """The content of run.json for the current state of a `Run`. Unknown values are None.

    Args:
        before: the content of run.json from before this run was resumed; {} if there is none.
    """
    config, images, base = run.config, run.images, run.config.pretrained_model_name_or_path
    channels, height, width = images.shape
    log = read_log(run.output_dir / "log.csv")
    name = config.train_data_dir or config.dataset_name
    on_hub = config.train_data_dir is None and "/" in name and is_hub_id(name)
    used = before.get("training", {}).get("hardware") if config.resume_from_checkpoint else None
    return {
        "data": {
            "name": name if on_hub else Path(name).resolve().name,
            "on_hub": on_hub,
            "local": not on_hub and name != EMBEDDED_DIGITS,
            "license": config.data_license or images.license,
            "num_images": images.num_images,
            "num_held_out": len(run.held_out) if run.held_out else 0,
            "channels": channels,
            "height": height,
            "width": width,
            "classes": images.label_names if config.class_conditional else None,
        },
        "training": {
            "recipe": Path(config.config).stem,
            "base_model": base if base is None or is_hub_id(base) else "a local model",
            "updates": run.step,
            "total_updates": run.total_steps,
            "images_seen": int(log[-1]["images_seen"]) if log else None,
            "seconds": log[-1]["seconds"] if log else None,
            "optimizer": {"adamw": "AdamW", "muon": "Muon and AdamW"}[config.optimizer],
            "seed": config.seed,
            # all devices that a resumed run has used, in order
            "hardware": list(dict.fromkeys([*map(str, used or ()), hardware(run.accelerator)])),
        },
        "versions": {"python": platform.python_version(), **versions(PACKAGES)},
        "metrics": [*_held_out_loss(run, log), *run.metrics],
    }


def _held_out_loss(run, log: list[dict]) -> list[dict]:
    measured = [row for row in log if row["held_out_loss"] is not None and math.isfinite(row["held_out_loss"])]
    if not measured:
        return []
    n, update = len(run.held_out), int(measured[-1]["step"])
    assigned = f"assigned within batches of {run.config.train_batch_size}"
    noise = f"per image, {assigned}" if run.config.noise_assignment else "per image"
    protocol = (
        f"mean squared error of the prediction with EMA weights on {n:,} held-out images after update {update:,}; one "
        f"fixed sample of noise {noise}, {run.pipeline.scheduler.spread_in_words}, no loss weights"
    )
    value = measured[-1]["held_out_loss"]
    return [{"type": "mse", "name": "Held-out loss", "value": value, "split": "held out", "protocol": protocol}]


def hardware(accelerator: Accelerator) -> str:
    """The devices and the precision of a run, such as "1 process on NVIDIA H100, bf16"."""
    n, precision = accelerator.num_processes, accelerator.mixed_precision.replace("no", "fp32")
    return f"{n} process{'es, each' if n > 1 else ''} on {_device(accelerator.device)}, {precision}"


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    threads = torch.get_num_threads()
    return f"{threads} thread{'s' if threads > 1 else ''} of {model}"

"""What is said of a model: the facts of its training, kept as run.json, and the card that is made of them."""

import json
import math
import os
import platform
from importlib import metadata, resources
from pathlib import Path

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch.utils.flop_counter import FlopCounterMode

from ddpm_hf.pipeline import DDPMCustomPipeline

FACTS, CARD = "run.json", "README.md"
# The first line of what is ours to write anew. Who edits the card takes it out.
MARK = "<!-- Made by ddpm_hf of what was measured. Take this line out, or your changes to the card will be lost. -->"
PACKAGES = ("ddpm-hf", "torch", "diffusers", "accelerate", "datasets", "transformers")
PICTURES = {  # the files of a card, and what is seen in them
    "samples.png": "samples",
    "denoising.gif": "from noise to images",
    "loss.png": "training and held-out loss",
    "first_samples.png": "the first preview, of averaged and raw weights",
}


def keep_card(run) -> None:
    """After a save of a `Run`: its run.json, and README.md unless somebody has made that one theirs."""
    facts = facts_of(run)
    _write(run.output_dir / FACTS, json.dumps(facts, indent=2) + "\n")
    if is_ours(run.output_dir / CARD):
        _write(run.output_dir / CARD, str(model_card(run.pipeline, facts, run.output_dir)))


def is_ours(card: Path) -> bool:
    """Whether a card may be written here: there is none yet, or one that nobody has edited."""
    return not card.exists() or MARK in card.read_text(errors="replace")


def facts_of(run) -> dict:
    """What the card tells of a `Run`, as JSON. What nobody knows is None."""
    from ddpm_hf.progress import read_log

    config, images = run.config, run.images
    channels, height, width = images.shape
    log = read_log(run.output_dir / "log.csv")
    local = config.train_data_dir is not None
    return {
        "data": {
            "name": Path(config.train_data_dir).resolve().name if local else config.dataset_name,
            "on_hub": not local and "/" in config.dataset_name,
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
            "updates": run.step,
            "total_updates": run.total_steps,
            "images_seen": int(log[-1]["images_seen"]),
            "seconds": log[-1]["seconds"],
            "seed": config.seed,
            "processes": run.accelerator.num_processes,
            "precision": run.accelerator.mixed_precision.replace("no", "fp32"),
            "hardware": hardware(run.accelerator.device),
        },
        "versions": {"python": platform.python_version(), **_versions()},
        "metrics": [*_held_out_loss(run, log), *run.metrics],
    }


def _held_out_loss(run, log: list[dict]) -> list[dict]:
    measured = [row for row in log if row["held_out_loss"] is not None and math.isfinite(row["held_out_loss"])]
    if not measured:
        return []
    n, update = len(run.held_out), int(measured[-1]["step"])
    protocol = (
        f"mean squared error of the averaged weights' prediction on {n:,} held-out images after update {update:,}, one "
        "draw of noise each (always the same), timesteps spread evenly over 0 ... T-1, not weighted"
    )
    value = measured[-1]["held_out_loss"]
    return [{"type": "mse", "name": "Held-out loss", "value": value, "split": "held out", "protocol": protocol}]


def hardware(device: torch.device) -> str:
    """Of one process, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        named = [line.split(":", 1)[1] for line in info.read_text().splitlines() if line.startswith("model name")]
        model = named[0].strip() if named else model
    return f"{cores} cores of {model}"


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # of an extra that is not installed
            continue
    return found


def read_facts(folder: Path) -> dict:
    """run.json of a folder, or {} if it has none.

    Raises:
        ValueError: the file is not as `keep_card` writes it.
    """
    path = folder / FACTS
    if not path.exists():
        return {}
    try:
        facts = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    if not isinstance(facts, dict) or not {"data", "training", "versions", "metrics"} <= facts.keys():
        raise ValueError(f"{path} can't be read: it is not as training writes it")
    return facts


def forward_flops(unet) -> int:
    """Floating-point operations of one prediction for one image of the network's `sample_size`; a product with its
    sum counts as two."""
    with torch.device("meta"):  # nothing is computed
        meta = type(unet).from_config(unet.config).eval()
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    x = torch.empty(1, unet.config.in_channels, height, width, device="meta")
    classes = {"class_labels": torch.zeros(1, dtype=torch.long, device="meta")} if _classes(unet) else {}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        meta(x, torch.zeros(1, device="meta"), **classes)
    return counter.get_total_flops()


def _classes(unet) -> list[str] | None:
    """Names of the classes that a network knows; their numbers if they have no names."""
    number = unet.config.get("num_classes")
    return None if number is None else unet.config.get("class_names") or [str(k) for k in range(number)]


def model_card(
    pipeline: DDPMCustomPipeline,
    facts: dict,
    folder: Path,
    repo_id: str | None = None,
    license: str | None = None,
    self_contained: bool = False,
) -> ModelCard:
    """The card of a model, with nothing in it that was not measured or given.

    Args:
        facts: of its training (`facts_of`), or {} if nobody kept them.
        folder: where its pictures are.
        repo_id: user/name; `None`: it is not on the Hub.
        license: of the model, for the publisher to say: an identifier of the Hub's, such as "apache-2.0".
        self_contained: the repository carries the code that loads it.
    """
    unet, classes = pipeline.unet, _classes(pipeline.unet)
    data, training = facts.get("data", {}), facts.get("training", {})
    name = repo_id.split("/")[-1] if repo_id else folder.resolve().name
    metrics = [metric for metric in facts.get("metrics", []) if metric["value"] is not None]
    results = [
        EvalResult(
            task_type="unconditional-image-generation",
            dataset_type=data["name"] if data["on_hub"] else "images",
            dataset_name=data["name"],
            dataset_split=metric["split"],
            metric_type=metric["type"],
            metric_name=metric["name"],
            metric_value=round(metric["value"], 6),
            metric_args={"protocol": metric["protocol"]},
        )
        for metric in metrics
    ]
    card_data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation" if classes is None else None,  # the Hub has none for classes
        license=license,
        tags=["ddpm", "ddpm_hf", "pytorch", *(["class-conditional"] if classes else [])],
        datasets=[data["name"]] if data.get("on_hub") else None,
        eval_results=results or None,
        model_name=name if results else None,
    )
    channels, height, width = pipeline.image_shape
    return ModelCard.from_template(
        card_data,
        template_str=resources.files("ddpm_hf").joinpath("templates/model_card.md").read_text(),
        mark=MARK,
        name=name,
        source=repo_id or (folder.name if folder.is_absolute() else folder.as_posix()),
        on_hub=repo_id is not None,
        self_contained=self_contained,
        model_license=license,
        data=data,
        training=training,
        time=_duration(training.get("seconds")),
        versions=facts.get("versions", {}),
        metrics=metrics,
        nearness=any(metric["type"] == "nearest_training_image" for metric in metrics),
        pictures={file: text for file, text in PICTURES.items() if (folder / file).is_file()},
        can_retrain=(folder / "train_config.json").is_file(),
        raw=any((folder / "unet").glob("*.raw.safetensors")),
        classes=classes,
        call=f"class_labels={classes[:4]}, num_inference_steps=50" if classes else "16, num_inference_steps=50",
        shape=f"{height}x{width} pixels, {channels} channel{'s' if channels > 1 else ''}",
        network=type(unet).__name__,
        scheduler=pipeline.scheduler,
        parameters=sum(p.numel() for p in unet.parameters()),
        flops=forward_flops(unet),
    )


def _duration(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 300 else f"{minutes // 60} h {minutes % 60:02d} min"


def _write(path: Path, text: str) -> None:
    """A reader never meets half a file."""
    beside = path.with_name(f".{path.name}")
    beside.write_text(text)
    os.replace(beside, path)

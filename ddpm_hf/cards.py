"""What is said of a model: the facts of its training, kept as run.json, and the card that is made of them."""

import functools
import html
import json
import logging
import math
import platform
import shlex
from collections.abc import Callable
from importlib import metadata, resources
from pathlib import Path

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from jinja2 import TemplateError
from torch.utils.flop_counter import FlopCounterMode

from ddpm_hf.comparison import number, read_evaluation
from ddpm_hf.extractor import weights_sha256
from ddpm_hf.files import set_aside, write
from ddpm_hf.images import PIL_MODES
from ddpm_hf.pipeline import DDPMCustomPipeline
from ddpm_hf.solvers import plain_config

FACTS, CARD, EVALUATION = "run.json", "README.md", "evaluation.json"
# The first line of what is ours to write anew. Who edits the card takes it out.
MARK = "<!-- Made by ddpm_hf of what was measured. Take this line out, or your changes to the card will be lost. -->"
PACKAGES = ("ddpm-hf", "torch", "diffusers", "accelerate", "datasets", "transformers")
PICTURES = {  # the files of a card, and what is seen in them
    "samples.png": "samples",
    "denoising.gif": "from noise to images",
    "loss.png": "training and held-out loss",
    "first_samples.png": "the first preview, of averaged and raw weights",
}
log = logging.getLogger(__name__)


def keep_card(run) -> None:
    """After a save of a `Run`: its run.json, and README.md unless somebody has made that one theirs.

    What fails of it is told and does not end the run.
    """
    try:
        for name, read in ((FACTS, lambda path: read_facts(path.parent)), (EVALUATION, read_evaluation)):
            path = run.output_dir / name
            try:
                if path.exists():
                    read(path)
            except ValueError as error:  # not the model itself, so the run does not depend on it
                set_aside(path, str(error))
        facts = facts_of(run)
        write(run.output_dir / FACTS, json.dumps(facts, indent=2) + "\n")
        if is_ours(run.output_dir / CARD):
            write(run.output_dir / CARD, str(model_card(run.pipeline, facts, run.output_dir)))
    except Exception as error:
        log.warning(f"training goes on, but update {run.step} has no card: {type(error).__name__} {error}")


def is_ours(card: Path) -> bool:
    """Whether a card may be written here: there is none yet, or one that nobody has edited."""
    return not card.exists() or MARK in card.read_text(encoding="utf-8", errors="replace")


def facts_of(run) -> dict:
    """What the card tells of a `Run`, as JSON. What nobody knows is None."""
    from ddpm_hf.config import EMBEDDED_DIGITS  # of packages that only training needs
    from ddpm_hf.progress import read_log

    config, images, base = run.config, run.images, run.config.pretrained_model_name_or_path
    channels, height, width = images.shape
    log = read_log(run.output_dir / "log.csv")
    name = config.train_data_dir or config.dataset_name
    on_hub = config.train_data_dir is None and "/" in name and is_hub_id(name)
    before = read_facts(run.output_dir).get("training", {}) if config.resume_from_checkpoint else {}
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
            "seed": config.seed,
            # of a run that was resumed, each that it ran on
            "hardware": list(dict.fromkeys([*map(str, before.get("hardware") or ()), hardware(run.accelerator)])),
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


def is_hub_id(name: str) -> bool:
    """Whether this names a repository, and nothing here."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def hardware(accelerator) -> str:
    """And how it is used, in words."""
    n, precision = accelerator.num_processes, accelerator.mixed_precision.replace("no", "fp32")
    return f"{n} process{'es, each' if n > 1 else ''} on {_of_process(accelerator.device)}, {precision}"


def _of_process(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        named = [
            line.split(":", 1)[1]
            for line in info.read_text(encoding="utf-8", errors="replace").splitlines()
            if line.startswith("model name")
        ]
        model = named[0].strip() if named else model
    threads = torch.get_num_threads()
    return f"{threads} thread{'s' if threads > 1 else ''} of {model}"


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
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    kinds = {"data": dict, "training": dict, "versions": dict, "metrics": list}
    if not isinstance(facts, dict) or not all(isinstance(facts.get(name), kind) for name, kind in kinds.items()):
        raise ValueError(f"{path} can't be read: it is not as training writes it")
    return facts


def evaluation_of(pipeline: DDPMCustomPipeline, folder: Path) -> dict:
    """The evaluation.json of a folder, or {} if it has none, or one of other weights or another scheduler than these.

    Raises:
        ValueError: the file can't be read.
    """
    if not (folder / EVALUATION).is_file():
        return {}
    found = read_evaluation(folder / EVALUATION)
    of = found["protocol"].get("model", {})
    same = of.get("sha256") == weights_sha256(pipeline.unet) and of.get("scheduler") == plain_config(pipeline.scheduler)
    return found if same else {}


def _evaluated(pipeline: DDPMCustomPipeline, folder: Path) -> list[dict]:
    """Its metrics as a `Run` keeps its own."""
    evaluation = evaluation_of(pipeline, folder)
    if not evaluation:
        return []
    protocol, rows = evaluation["protocol"], []
    made = ", ".join(
        f"{words} {protocol[key]}" for key, words in (("num_samples", "samples"), ("num_inference_steps", "steps"),
                                                      ("guidance_scale", "guidance"), ("seed", "seed"))
        if key in protocol
    )  # fmt: skip
    for key, metric in evaluation["metrics"].items():
        of = f"{number(metric)} (95 %); " if metric["stderr"] is not None else ""
        of += "" if metric["n"] is None else f"n = {metric['n']}; "
        of += "" if key.startswith(("bpd", "loss")) else f"{made}; "
        on_held_out = key.endswith(("held_out", "real")) or key in ("bpd", "bpd_fast", "bpd_floor")
        rows.append(
            {
                "type": key,
                "name": metric["name"],
                "value": metric["value"],
                "split": "held out" if on_held_out else "train",
                "protocol": f"{of}{EVALUATION} has the whole protocol",
            }
        )
    return rows


def forward_flops(unet) -> int:
    """Floating-point operations of one prediction for one image of the network's `sample_size`.

    A product and its sum are two.
    """
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

    Raises:
        ValueError: facts that are not as `facts_of` gives them.
    """
    return card_maker(pipeline, facts, folder, repo_id, self_contained)(license)


def card_maker(
    pipeline: DDPMCustomPipeline,
    facts: dict,
    folder: Path,
    repo_id: str | None = None,
    self_contained: bool = False,
) -> Callable[[str | None], ModelCard]:
    """What makes the `model_card` for a licence that is known later. All else is as it is at the time of this call."""
    try:
        make = _card_maker(pipeline, facts, folder, repo_id, self_contained)
        make(None)  # what is wrong with the facts is wrong with every licence
    except (KeyError, TypeError, ValueError, AttributeError, TemplateError) as error:  # of another version, or edited
        raise ValueError(f"{folder / FACTS} is not as training writes it: {type(error).__name__} {error}") from error
    return make


def _card_maker(pipeline, facts, folder, repo_id, self_contained) -> Callable[[str | None], ModelCard]:
    unet, classes = pipeline.unet, _classes(pipeline.unet)
    data, training = facts.get("data", {}), facts.get("training", {})
    name = repo_id.split("/")[-1] if repo_id else folder.resolve().name
    source = repo_id or (folder.name if folder.is_absolute() else folder.as_posix())
    metrics = [*facts.get("metrics", []), *_evaluated(pipeline, folder)]
    metrics = [metric for metric in metrics if metric["value"] is not None]
    base = training.get("base_model")
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
        base_model=base if base and "/" in base else None,
        tags=["ddpm", "ddpm_hf", "pytorch", *(["class-conditional"] if classes else [])],
        datasets=[data["name"]] if data.get("on_hub") else None,
        eval_results=results or None,
        model_name=name if results else None,
    )
    channels, height, width = pipeline.image_shape
    steps = min(50, len(pipeline.scheduler))
    # Names come from data that somebody else may have made: as Python, as words of a shell, and as cells of a table
    asked = unet.config.get("class_names") or range(unet.config.get("num_classes") or 0)
    call = f"class_labels={list(asked[:4])}" if classes else "16"
    call += f", num_inference_steps={steps}" + (', output_type="np"' if channels not in PIL_MODES else "")
    words = ["ddpm-hf", "sample", source, "--num_images", "16", "--num_inference_steps", str(steps)]
    words += [] if channels in PIL_MODES else ["--format", "npy"]
    words += ["--class_labels", *classes[:4]] if classes else []
    make = functools.partial(
        ModelCard.from_template,
        card_data,
        template_str=resources.files("ddpm_hf").joinpath("templates/model_card.md").read_text(encoding="utf-8"),
        mark=MARK,
        name=name,
        source=json.dumps(source, ensure_ascii=False),
        command=shlex.join(words),
        call=call,
        self_contained=self_contained,
        data=_cells(data),
        training=_cells(training),
        base_model=base,
        time=_duration(training.get("seconds")),
        versions=facts.get("versions", {}),
        metrics=[_cells(metric) for metric in metrics],
        nearness=any(metric["type"].startswith(("nearest_training_image", "memorization")) for metric in metrics),
        pictures={file: text for file, text in PICTURES.items() if (folder / file).is_file()},
        can_retrain=(folder / "train_config.json").is_file(),
        raw=any((folder / "unet").glob("*.raw.safetensors")),
        classes=classes and [_cells(name) for name in classes],
        shape=f"{height}x{width} pixels, {channels} channel{'s' if channels > 1 else ''}",
        network=type(unet).__name__,
        scheduler=pipeline.scheduler,
        parameters=sum(p.numel() for p in unet.parameters()),
        flops=forward_flops(unet),
    )

    def licensed(license: str | None) -> ModelCard:
        card_data.license = license
        return make(model_license=license)

    return licensed


def _cells(value):
    """Text, and all text in dicts and lists, as it can stand in a table of Markdown."""
    if isinstance(value, dict):
        return {name: _cells(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_cells(each) for each in value]
    if not isinstance(value, str):
        return value
    return " ".join(html.escape(value, quote=False).split()).replace("|", "\\|")


def _duration(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 300 else f"{minutes // 60} h {minutes % 60:02d} min"

"""The model card of a pipeline folder: README.md, generated from run.json, evaluation.json and the pipeline."""

import html
import json
import shlex
from importlib import resources
from pathlib import Path

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import TemplateError
from torch.utils.flop_counter import FlopCounterMode

from ddpm_hf.pipelines.images import mode_for
from ddpm_hf.pipelines.pipeline import DDPMCustomPipeline
from ddpm_hf.schedulers.solvers import own_scheduler, plain_config, scheduler_class
from ddpm_hf.utils.arguments import NOT_FINITE, read_json
from ddpm_hf.utils.checksums import weights_sha256
from ddpm_hf.utils.files import write
from ddpm_hf.utils.results import noise_warning, number, read_evaluation

FACTS, CARD, EVALUATION = "run.json", "README.md", "evaluation.json"
# Marks a generated card, which may be overwritten. Cards on the Hub have this text, so it must not change.
MARK = "<!-- Made by ddpm_hf of what was measured. Take this line out, or your changes to the card will be lost. -->"
PICTURES = {  # uploaded files and their captions
    "samples.png": "samples",
    "denoising.gif": "sampling, from noise to images",
    "loss.png": "training and held-out loss",
    "first_samples.png": "first samples of the EMA weights and the training weights",
}
TASK = "unconditional-image-generation"


def write_card(pipeline: DDPMCustomPipeline, folder: Path) -> None:
    """Write the card of a pipeline folder, unless the card there was edited."""
    if is_generated(folder / CARD):
        write(folder / CARD, str(model_card(pipeline, read_facts(folder / FACTS), folder)))


def is_generated(card: Path) -> bool:
    """Whether a card does not exist yet or still has its `MARK`, and so may be overwritten."""
    return not card.exists() or MARK in card.read_text(encoding="utf-8", errors="replace")


def read_facts(path: Path) -> dict:
    """Read the facts of a training run from run.json; {} if the file does not exist.

    Raises:
        ValueError: the file is not JSON or lacks a part that training writes.
    """
    if not path.exists():
        return {}
    facts = read_json(path, constants=NOT_FINITE)
    kinds = {"data": dict, "training": dict, "versions": dict, "metrics": list}
    if not all(isinstance(facts.get(name), kind) for name, kind in kinds.items()):
        raise ValueError(f"{path} must hold {', '.join(kinds)}, as training writes them")
    return facts


def evaluation_of(pipeline: DDPMCustomPipeline, folder: Path) -> dict:
    """The evaluation.json of a folder; {} if it does not exist or belongs to other weights or another scheduler.

    Raises:
        ValueError: the file is not a valid evaluation.
    """
    if not (folder / EVALUATION).is_file():
        return {}
    evaluation = read_evaluation(folder / EVALUATION)
    model = evaluation["protocol"].get("model", {})
    same_weights = model.get("sha256") == weights_sha256(pipeline.unet)
    return evaluation if same_weights and model.get("scheduler") == plain_config(pipeline.scheduler) else {}


def model_card(
    pipeline: DDPMCustomPipeline,
    facts: dict,
    folder: Path,
    repo_id: str | None = None,
    license: str | None = None,
    self_contained: bool = False,
) -> ModelCard:
    """The model card of a pipeline. The text does not depend on `card.data.license`, which may be set afterwards.

    Args:
        facts: the content of run.json, or {} if the training is unknown.
        folder: contains the pictures and evaluation.json.
        repo_id: "user/name"; `None` for a model that is not on the Hub.
        license: the licence of the model: an identifier of the Hub, such as "apache-2.0".
        self_contained: the repository contains the code of the pipeline.

    Raises:
        ValueError: `facts` or evaluation.json lack an entry or have an invalid one.
    """
    name = repo_id.split("/")[-1] if repo_id else folder.resolve().name
    source = repo_id or (folder.name if folder.is_absolute() else folder.as_posix())
    evaluation = evaluation_of(pipeline, folder)
    try:
        measured = [metric | {"data": facts["data"]["name"]} for metric in facts.get("metrics", [])]
        metrics = [*measured, *_evaluated(evaluation)]
        metrics = [metric for metric in metrics if metric["value"] is not None]
        return ModelCard.from_template(
            _metadata(name, license, facts, metrics, pipeline),
            template_str=resources.files("ddpm_hf.hub").joinpath("model_card.md").read_text(encoding="utf-8"),
            mark=MARK,
            name=name,
            source=json.dumps(source, ensure_ascii=False),
            self_contained=self_contained,
            data=_cells(facts.get("data", {})),
            training=_cells(facts.get("training", {})),
            time=_duration(facts.get("training", {}).get("seconds")),
            versions=facts.get("versions", {}),
            metrics=_cells(metrics),
            noise=noise_warning(evaluation.get("metrics", {})),
            nearness=any(each["type"].startswith(("nearest_training_image", "memorization")) for each in metrics),
            pictures={file: text for file, text in PICTURES.items() if (folder / file).is_file()},
            can_retrain=(folder / "train_config.json").is_file(),
            raw=any((folder / "unet").glob("*.raw.safetensors")),
            **_of_pipeline(pipeline, source),
        )
    except (KeyError, TypeError, ValueError, AttributeError, TemplateError) as error:
        what = f"{folder / FACTS} or {EVALUATION} has a missing or invalid entry"
        raise ValueError(f"{what}: {type(error).__name__} {error}") from error


def _metadata(name: str, license: str | None, facts: dict, metrics: list[dict], pipeline) -> ModelCardData:
    """The metadata of the card, which the Hub reads."""
    classes, objective = _classes(pipeline.unet), scheduler_class(pipeline.scheduler.config).objective
    data, base = facts.get("data", {}), facts.get("training", {}).get("base_model")
    results = [
        EvalResult(
            task_type=TASK,
            dataset_type=metric["data"] if "/" in metric["data"] else "images",  # a folder's name has no slash
            dataset_name=metric["data"],
            dataset_split=metric["split"],
            metric_type=metric["type"],
            metric_name=metric["name"],
            metric_value=round(metric["value"], 6),
            metric_args={"protocol": metric["protocol"]},
        )
        for metric in metrics
    ]
    return ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag=TASK if classes is None else None,  # the Hub has no tag for class-conditional models
        base_model=base if base and "/" in base else None,
        tags=[objective, "ddpm_hf", "pytorch", *(["class-conditional"] if classes else [])],
        datasets=[data["name"]] if data.get("on_hub") else None,
        eval_results=results or None,
        model_name=name if results else None,
    )


def _of_pipeline(pipeline: DDPMCustomPipeline, source: str) -> dict:
    """Template variables that describe the pipeline and how to call it.

    Class names come from the data and are untrusted, so they are quoted for Python, the shell and Markdown tables.
    """
    unet, classes = pipeline.unet, _classes(pipeline.unet)
    channels, height, width = pipeline.image_shape
    steps = str(pipeline.config.get("sampling_steps") or min(50, len(pipeline.scheduler)))
    words = ["ddpm-hf", "sample", source, "--num_images", "16", "--num_inference_steps", steps]
    labels = list((unet.config.get("class_names") or range(len(classes or ())))[:4])
    call = f"class_labels={labels}" if classes else "16"
    call += f", num_inference_steps={steps}"
    if mode_for(unet.config) is None:
        call += ', output_type="np"'
    if classes:
        words += ["--class_labels", *classes[:4]]
    return {
        "call": call,
        "command": shlex.join(words),
        "classes": _cells(classes),
        "shape": f"{height}x{width} pixels with {channels} channel{'s' if channels > 1 else ''}",
        "network": type(unet).__name__,
        "kind": scheduler_class(pipeline.scheduler.config).paper,
        "scheduler": type(pipeline.scheduler).__name__,
        "process": _process_in_words(pipeline.scheduler),
        "parameters": sum(p.numel() for p in unet.parameters()),
        "flops": forward_flops(unet),
    }


def _process_in_words(scheduler) -> str:
    try:
        return own_scheduler(scheduler).in_words
    except ValueError:  # of diffusers, with settings that ours does not support
        return f"T = {scheduler.config.num_train_timesteps}"


def _evaluated(evaluation: dict) -> list[dict]:
    """Rows of the table of metrics, from evaluation.json."""
    protocol, rows = evaluation.get("protocol", {}), []
    reference = protocol.get("reference", {})
    names = {"num_samples": "samples", "num_inference_steps": "steps", "guidance_scale": "guidance", "seed": "seed"}
    sampling = ", ".join(f"{name} {protocol[key]}" for key, name in names.items() if key in protocol)
    for key, metric in evaluation.get("metrics", {}).items():
        how = [f"{number(metric)} (95 %)"] if metric["stderr"] is not None else []
        how += [] if metric["n"] is None else [f"n = {metric['n']}"]
        how += [] if key.startswith(("bpd", "loss")) else [sampling]
        how += [] if reference.get("as_trained", True) else [f"compared with {reference['name']}"]
        held_out = key.endswith(("held_out", "real")) or key in ("bpd", "bpd_fast", "bpd_floor", "bpd_uniform")
        rows.append(
            {
                "type": key,
                "name": metric["name"],
                "data": reference.get("name", "images"),
                "value": metric["value"],
                "split": "held out" if held_out else "train",
                "protocol": "; ".join([*how, f"{EVALUATION} has the full protocol"]),
            }
        )
    return rows


def forward_flops(unet) -> int:
    """Floating-point operations of one prediction for one image of `sample_size`; a multiply-add counts as two."""
    with torch.device("meta"):  # computes nothing
        meta = type(unet).from_config(unet.config).eval()
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    x = torch.empty(1, unet.config.in_channels, height, width, device="meta")
    classes = {"class_labels": torch.zeros(1, dtype=torch.long, device="meta")} if _classes(unet) else {}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        meta(x, torch.zeros(1, device="meta"), **classes)
    return counter.get_total_flops()


def _classes(unet) -> list[str] | None:
    """Class names of the network, or class numbers if there are no names; None for an unconditional network."""
    number = unet.config.get("num_classes")
    return None if number is None else unet.config.get("class_names") or [str(k) for k in range(number)]


def _cells(value):
    """Escape a string, or all strings in dicts and lists, for a Markdown table."""
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

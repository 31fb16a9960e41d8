"""Converting checkpoints. All keys and then all shapes are checked before anything is written."""

import importlib
import os
import pkgutil
import re
import shutil
from pathlib import Path

import diffusers
import torch

from ddpm_hf import convert as sources
from ddpm_hf.convert.source import Source, Weights
from ddpm_hf.convert.unet2d import read_folder, to_diffusers
from ddpm_hf.convert.weights import first_line, load_checked, load_weights
from ddpm_hf.models.unet import DDPMUNet
from ddpm_hf.pipelines.loading import weights_not_finite
from ddpm_hf.pipelines.pipeline import DDPMCustomPipeline, load_pipeline
from ddpm_hf.schedulers.noise import LinearNoiseScheduler
from ddpm_hf.schedulers.solvers import scheduler_class
from ddpm_hf.utils.arguments import checked, optional, path, short_errors, shorten, show
from ddpm_hf.utils.files import part_of, sync, write, writing_tree
from ddpm_hf.utils.yaml_files import read_yaml


def _find_sources() -> dict[str, Source]:
    names = [module.name for module in pkgutil.iter_modules(sources.__path__)]
    modules = {name: importlib.import_module(f"{sources.__name__}.{name}") for name in names}
    return {name: module.SOURCE for name, module in modules.items() if hasattr(module, "SOURCE")}


SOURCES = _find_sources()
KINDS = (*SOURCES, "diffusers")
SCHEDULER_KEYS = {"beta_start": "beta_start", "beta_end": "beta_end"}
SCHEDULER_KEYS |= dict.fromkeys(("num_train_timesteps", "num_timesteps", "n_steps"), "num_train_timesteps")


PATHS = {"source": path, "output": path, "source_config": optional(path)}


@short_errors()
@checked(PATHS)
def convert(source, output, kind: str | None = None, source_config=None) -> list[str]:
    """Convert a checkpoint of another project to the pipeline folder `output`.

    Args:
        source: a file of weights (`.pth`, `.pt`, `.bin`, `.safetensors`) or, for diffusers, a folder.
        output: a folder that does not exist.
        kind: one of `KINDS`; `None` to detect it from the weights.
        source_config: a YAML or JSON file with the keys of the source, flat or nested under any names.

    Returns:
        Notes for the user, one per line: what was converted, assumed and ignored.

    Raises:
        ValueError: the checkpoint cannot be converted. Nothing has been written.
    """
    source, output = Path(source), _not_there(output)
    if not source.exists():
        raise ValueError(f"source={str(source)!r} does not exist; it must be a file of weights or a diffusers folder")
    if kind not in (None, *KINDS):
        raise ValueError(f"from={kind!r} must be one of {', '.join(KINDS)}")
    if source.is_dir() and source_config is not None:
        raise ValueError("source_config is only for tutorial checkpoints; a diffusers folder has a config.json")
    if kind is not None and source.is_dir() != (kind == "diffusers"):
        have, want = ("folder", "file") if source.is_dir() else ("file", "folder")
        raise ValueError(f"source={str(source)!r} is a {have}; with from={kind!r} it must be a {want}")
    if source.is_dir():
        kind = "diffusers"
        unet, scheduler, notes = read_folder(source)
    else:
        weights = load_weights(source)
        kind = _kind_of(weights, kind, source)
        unet, scheduler, notes = _from_tutorial(weights, kind, source, source_config)
    if (bad := weights_not_finite(unet)) is not None:
        raise ValueError(f"source={str(source)!r}: {bad}")
    notes = [shorten(note) for note in notes]
    card = f"---\nlibrary_name: diffusers\ntags:\n- ddpm\n- ddpm_hf\n---\n\nConverted by ddpm_hf from {source.name}"
    card += f" ({kind}).\n" + "".join(f"\n- {note}" for note in notes) + "\n"
    _save(DDPMCustomPipeline(unet, scheduler), output, card)
    return [f"{kind}: {sum(p.numel() for p in unet.parameters()):,} parameters -> {output}", *notes]


@short_errors()
@checked(PATHS)
def convert_back(source, output) -> list[str]:
    """Convert a pipeline folder of this package to a `DDPMPipeline` of diffusers.

    Raises:
        ValueError: the folder has no `DDPMUNet`, or `UNet2DModel` cannot express a setting.
    """
    source, output = Path(source), _not_there(output)
    if not (source / "model_index.json").is_file():
        raise ValueError(f"source={str(source)!r} is not a pipeline folder: it has no model_index.json")
    pipeline = load_pipeline(str(source), "source")
    if not isinstance(pipeline.unet, DDPMUNet):
        raise ValueError(f"source={str(source)!r} has a {type(pipeline.unet).__name__}; only a DDPMUNet is converted")
    if (objective := scheduler_class(pipeline.scheduler.config).objective) != "ddpm":
        rule = "only a DDPM can be sampled by diffusers' DDPMPipeline"
        raise ValueError(f"source={str(source)!r} was trained with objective={objective!r}; {rule}")
    unet = to_diffusers(pipeline.unet)
    scheduler = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config)
    _save(diffusers.DDPMPipeline(unet, scheduler), output)
    return [f"UNet2DModel: {sum(p.numel() for p in unet.parameters()):,} parameters -> {output}"]


def _not_there(output) -> Path:
    output = Path(output)
    if output.exists():
        raise ValueError(f"output={str(output)!r} exists already; it must be a new folder")
    return output


def _save(pipeline, output: Path, card: str | None = None) -> None:
    """Save to a temporary folder next to `output`, and rename it when it is complete."""
    beside = part_of(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        beside.mkdir()
    except OSError as error:
        raise ValueError(f"output={str(output)!r} cannot be written: {error}") from error
    try:
        with writing_tree(beside):
            pipeline.save_pretrained(beside)
            if card:
                write(beside / "README.md", card)
        os.replace(beside, output)
        sync(output.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _kind_of(weights: Weights, kind: str | None, path: Path) -> str:
    """Detect the source of the weights; it must be `kind` if that is given."""
    kinds = [name for name, source in SOURCES.items() if source.signature in weights]
    if kind is None and not kinds:
        first = ", ".join(list(weights)[:3])
        raise ValueError(f"{path} is a checkpoint of none of {', '.join(SOURCES)}; its first keys are {first}")
    if kind not in (None, *kinds):
        found = f"a {kinds[0]} checkpoint" if kinds else "a checkpoint of an unknown source"
        raise ValueError(f"from={kind!r}, but {path} is {found}")
    return kind or kinds[0]


def _from_tutorial(weights: Weights, kind: str, path: Path, source_config):
    """The network, the scheduler and notes for a tutorial checkpoint."""
    source = SOURCES[kind]
    try:
        known = source.sizes(weights)
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise ValueError(f"{path} lacks weights that every {kind} network has: {error}") from error
    schedule, notes = {}, list(source.notes)
    for key, value in _read_source_config(source_config).items():
        key = source.aliases.get(key, key)
        if key in source.never_read:
            notes.append(f"{key}: {show(value)} in the configuration is ignored: the code of {kind} does not use it")
        elif key in SCHEDULER_KEYS:
            schedule[SCHEDULER_KEYS[key]] = value
        elif key not in known | source.defaults:
            notes.append(f"{key}: {show(value)} in the configuration is ignored: it is no setting of the network")
        elif key in known and known[key] != value:
            raise ValueError(f"{key} is {show(value)} in {source_config} but {known[key]!r} in the weights of {path}")
        else:
            known[key] = value
    for key, value in source.defaults.items():
        if key not in known:
            known[key] = value
            notes.append(f"{key}: {value!r} is assumed, the default of {kind}; the weights do not determine it")
    schedule = {**source.scheduler(known), **schedule}
    configured = schedule.get("num_train_timesteps")
    stored = known.get("total_time_steps", configured)
    if configured != stored:
        raise ValueError(f"{source_config} has {configured} timesteps but the weights of {path} have {stored}")
    try:
        with torch.device("meta"):
            unet = DDPMUNet(**source.settings(known))
        scheduler = LinearNoiseScheduler(**schedule)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} with {source_config or 'the source defaults'}: {first_line(error)}") from error
    taken = {}
    rules = [(re.compile(pattern), name) for pattern, name in source.names(known)]
    for key, value in weights.items():
        match, name = next(((m, name) for rule, name in rules if (m := rule.match(key))), (None, None))
        if match is None:
            raise ValueError(f"{path}: unexpected key {key}; no {kind} network of this size has it")
        if name is None:
            notes.append(f"{key} is left out: the code of {kind} does not use it")
            continue
        rest = key[match.end() :]  # in_proj_weight -> to_qkv.weight
        taken[match.expand(name) + (f".{rest[1:]}" if rest[:1] == "_" else rest)] = value
    load_checked(unet, taken, path)
    return unet, scheduler, notes


def _read_source_config(path) -> dict:
    """The configuration of a source as a flat dict."""
    flat = {}
    for key, value in (read_yaml(path, "source_config") if path is not None else {}).items():
        flat |= value if isinstance(value, dict) else {key: value}
    return flat

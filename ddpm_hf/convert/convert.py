"""The conversion. It accounts for every key, then checks every shape, and only then writes."""

import importlib
import os
import pkgutil
import re
import shutil
from pathlib import Path

import diffusers

from ddpm_hf import convert as sources
from ddpm_hf.convert.source import Source, Weights
from ddpm_hf.convert.unet2d import read_folder, to_diffusers
from ddpm_hf.convert.weights import first_line, load_checked, load_weights
from ddpm_hf.models.unet import DDPMUNet
from ddpm_hf.pipelines.pipeline import DDPMCustomPipeline, load_pipeline
from ddpm_hf.schedulers.noise import LinearNoiseScheduler
from ddpm_hf.utils.files import part_of, sync, write, writing_tree
from ddpm_hf.utils.yaml_files import read_yaml


def _find_sources() -> dict[str, Source]:
    names = [module.name for module in pkgutil.iter_modules(sources.__path__)]
    modules = {name: importlib.import_module(f"{sources.__name__}.{name}") for name in names}
    return {name: module.SOURCE for name, module in modules.items() if hasattr(module, "SOURCE")}


SOURCES = _find_sources()
KINDS = (*SOURCES, "diffusers")
DIFFUSION_KEYS = {
    "num_train_timesteps": "num_train_timesteps", "num_timesteps": "num_train_timesteps",
    "n_steps": "num_train_timesteps", "beta_start": "beta_start", "beta_end": "beta_end",
}  # fmt: skip


def convert(source, output, kind: str | None = None, source_config=None) -> list[str]:
    """Write the pipeline folder `output` from somebody else's checkpoint.

    Args:
        source: a file of weights (`.pth`, `.pt`, `.bin`, `.safetensors`) or, for diffusers, a folder.
        output: a folder that is not there yet.
        kind: one of `KINDS`; `None`: the one whose weights these are.
        source_config: YAML or JSON in the source's own keys, flat or nested under `config` or `model_params`.

    Returns:
        What a person should know, a line each: what was assumed, what was ignored.

    Raises:
        ValueError: something can't be converted; the message says why, and nothing has been written.
    """
    source, output = Path(source), _not_there(output)
    if not source.exists():
        raise ValueError(
            f"source {str(source)!r} does not exist; it must be a file of weights or a folder of diffusers"
        )
    if kind not in (None, *KINDS):
        raise ValueError(f"from={kind!r}; choose from {', '.join(KINDS)}")
    if source.is_dir() and source_config is not None:
        raise ValueError("source_config is for a tutorial's checkpoint; a folder of diffusers has its own config.json")
    if source.is_dir() and kind in (None, "diffusers"):
        kind = "diffusers"
        unet, scheduler, notes = read_folder(source)
    elif source.is_dir() or kind == "diffusers":
        have, want = ("folder", "file") if source.is_dir() else ("file", "folder")
        raise ValueError(f"source {str(source)!r} is a {have}; what comes from {kind} is a {want}")
    else:
        weights = load_weights(source)
        kind = _kind_of(weights, kind, source)
        unet, scheduler, notes = _from_tutorial(weights, kind, source, source_config)
    card = f"---\nlibrary_name: diffusers\ntags:\n- ddpm\n- ddpm_hf\n---\n\nConverted by ddpm_hf from {source.name}"
    card += f" ({kind}).\n" + "".join(f"\n- {note}" for note in notes) + "\n"
    _save(DDPMCustomPipeline(unet, scheduler), output, card)
    return [f"{kind}: {sum(p.numel() for p in unet.parameters()):,} parameters -> {output}", *notes]


def convert_back(source, output) -> list[str]:
    """Write a pipeline folder of ours as one of diffusers' own, which needs no package of ours.

    Raises:
        ValueError: the folder is without our network, or diffusers' network can't express a setting.
    """
    source, output = Path(source), _not_there(output)
    if not (source / "model_index.json").is_file():
        raise ValueError(f"source {str(source)!r} is not a pipeline folder: it has no model_index.json")
    pipeline = load_pipeline(str(source), "source")
    if not isinstance(pipeline.unet, DDPMUNet):
        raise ValueError(f"source {str(source)!r} holds a {type(pipeline.unet).__name__} already")
    unet = to_diffusers(pipeline.unet)
    scheduler = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config)
    _save(diffusers.DDPMPipeline(unet, scheduler), output)
    return [f"UNet2DModel: {sum(p.numel() for p in unet.parameters()):,} parameters -> {output}"]


def _not_there(output) -> Path:
    output = Path(output)
    if output.exists():
        raise ValueError(f"output {str(output)!r} is there already; name a folder that is not")
    return output


def _save(pipeline, output: Path, card: str | None = None) -> None:
    """Save into a folder beside, and rename it to `output` when it is whole."""
    beside = part_of(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        beside.mkdir()
    except OSError as error:
        raise ValueError(f"output {str(output)!r} can't be written: {error}") from error
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
    """The source whose weights these are, which must be `kind` where that is given."""
    kinds = [name for name, source in SOURCES.items() if source.signature in weights]
    if kind is None and not kinds:
        raise ValueError(f"{path} is of no known source: its first keys are {', '.join(list(weights)[:3])}")
    if kind not in (None, *kinds):
        raise ValueError(f"{path} is not of {kind}" + (f" but of {kinds[0]}" if kinds else "; its keys are others"))
    return kind or kinds[0]


def _from_tutorial(weights: Weights, kind: str, path: Path, source_config):
    """Network, scheduler and notes."""
    source = SOURCES[kind]
    try:
        known = source.sizes(weights)
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise ValueError(f"{path} lacks weights that every network of {kind} has: {error}") from error
    schedule, notes = {}, list(source.notes)
    for key, value in _read_source_config(source_config).items():
        key = source.aliases.get(key, key)
        if key in source.never_read:
            notes.append(f"{key}: {value!r} in the configuration is ignored: {kind} never reads it")
        elif key in DIFFUSION_KEYS:
            schedule[DIFFUSION_KEYS[key]] = value
        elif key not in known | source.defaults:
            notes.append(f"{key}: {value!r} in the configuration is ignored: it says nothing about the network")
        elif key in known and known[key] != value:
            raise ValueError(f"{key} is {value!r} in {source_config} and {known[key]!r} in the weights of {path}")
        else:
            known[key] = value
    for key, value in source.defaults.items():
        if key not in known:
            known[key] = value
            notes.append(f"{key}: {value!r} is assumed, {kind}'s default; the weights do not tell it")
    schedule = {**source.scheduler(known), **schedule}
    told = schedule.get("num_train_timesteps")
    stored = known.get("total_time_steps", told)
    if told != stored:
        raise ValueError(f"the configuration has {told} timesteps and the weights of {path} have {stored}")
    try:
        unet, scheduler = DDPMUNet(**source.settings(known)), LinearNoiseScheduler(**schedule)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} with {source_config or 'the source defaults'}: {first_line(error)}") from error
    taken = {}
    rules = [(re.compile(pattern), ours) for pattern, ours in source.names(known)]
    for key, value in weights.items():
        match, ours = next(((m, ours) for rule, ours in rules if (m := rule.match(key))), (None, None))
        if match is None:
            raise ValueError(f"{path}: no place for {key}, which no network of {kind} of this size has")
        if ours is None:
            notes.append(f"{key} is left out: the source's network does not use it")
            continue
        rest = key[match.end() :]  # in_proj_weight -> to_qkv.weight
        taken[match.expand(ours) + (f".{rest[1:]}" if rest[:1] == "_" else rest)] = value
    load_checked(unet, taken, path)
    return unet, scheduler, notes


def _read_source_config(path) -> dict:
    """A source's configuration as one flat dict."""
    flat = {}
    for key, value in (read_yaml(path, "source_config") if path is not None else {}).items():
        flat |= value if isinstance(value, dict) else {key: value}
    return flat

"""From a folder or the Hub to a network and a scheduler: nothing is run or unpickled that came with them."""

import inspect
import json
import math
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import diffusers
import torch
from diffusers import ModelMixin, SchedulerMixin
from huggingface_hub import get_cached_repo_tree, snapshot_download
from huggingface_hub.errors import CachedRepoTreeNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from ddpm_hf.scheduler import CosineNoiseScheduler, LinearNoiseScheduler
from ddpm_hf.unet import DDPMUNet

INDEX, WEIGHTS = "model_index.json", "diffusion_pytorch_model"
OURS = {cls.__name__: cls for cls in (DDPMUNet, LinearNoiseScheduler, CosineNoiseScheduler)}
KINDS = {"unet": (DDPMUNet, diffusers.UNet2DModel), "scheduler": (SchedulerMixin,)}
MODEL_OPTIONS = (
    "device_map",
    "max_memory",
    "low_cpu_mem_usage",
    "offload_folder",
    "offload_state_dict",
    "disable_mmap",
)
MOST_TIMESTEPS, LARGEST_SIDE = 10**6, 2**16
FLOATS = ("F64", "F32", "F16", "BF16")


def load_components(
    source: str | Path,
    unet: ModelMixin | None = None,
    scheduler: SchedulerMixin | None = None,
    subfolder: str = "",
    revision: str | None = None,
    variant: str | None = None,
    torch_dtype: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    **options,
) -> dict:
    """`unet` and `scheduler` of a pipeline folder; arguments as `DDPMCustomPipeline.from_pretrained` has them.

    Classes are looked up among ours and diffusers' by the names that model_index.json has for them, so it does not
    matter which module it was saved from, or what code lies beside it. Weights are read from safetensors alone, and of
    our network only if their names and shapes are those of the configuration.

    Raises:
        ValueError: an argument, or what the folder holds, can't be.
        OSError: it is not to be had.
    """
    unknown = sorted(options.keys() - set(MODEL_OPTIONS))
    if unknown:
        why = ""
        if {"trust_remote_code", "custom_pipeline"} & options.keys():
            why = "; this pipeline runs no code of a repository (diffusers.DiffusionPipeline does, if you trust it)"
        raise ValueError(f"from_pretrained has no argument {', '.join(unknown)}{why}")
    if Path(source).is_dir():
        folder = Path(source)
    else:
        hub = {"token": token, "cache_dir": cache_dir}
        local = {"local_files_only": local_files_only, "force_download": force_download}
        folder = _download(str(source), subfolder, revision, variant, hub, local)
    root, folder = root_of(folder), folder / subfolder
    check_inside(folder / INDEX, root)
    index = _read_json(folder / INDEX)
    others = sorted(
        name for name, entry in index.items() if name not in KINDS and name[0] != "_" and _is_component(entry)
    )
    if others:
        raise ValueError(f"{folder / INDEX}: a pipeline with {', '.join(others)} besides unet and scheduler is no DDPM")
    if scheduler is None:
        kind = _class_of(index, "scheduler", folder)
        _check_scheduler(folder / "scheduler" / "scheduler_config.json", kind, root)
        scheduler = kind.from_pretrained(folder, subfolder="scheduler")
    if unet is None:
        kind = _class_of(index, "unet", folder)
        _check_unet(folder / "unet", kind, variant, root)
        dtype = dtype or torch_dtype
        unet = kind.from_pretrained(
            folder, subfolder="unet", variant=variant, torch_dtype=dtype, use_safetensors=True, **options
        )
    return {"unet": unet, "scheduler": scheduler}


def _download(source: str, subfolder: str, revision: str | None, variant: str | None, hub: dict, local: dict) -> Path:
    """The snapshot of a repository in the cache, with what loading needs, and with none of its code."""
    unet = [f"unet/{name}" for name in ("config.json", *_weight_names(variant, "[0-9]" * 5))]
    wanted = [INDEX, "scheduler/scheduler_config.json", *unet]
    try:
        validate_repo_id(source)
        folder = snapshot_download(
            source,
            revision=revision,
            allow_patterns=[str(PurePosixPath(subfolder) / name) for name in wanted],
            **hub,
            **local,
        )
    except Exception as error:  # no network, no such repository, no right to it, no room: each has an error of its own
        raise OSError(f"{source!r} is no folder here, and the Hub does not give it: {error}") from error
    try:
        names = [file.path for file in get_cached_repo_tree(source, revision=revision, cache_dir=hub["cache_dir"])]
    except CachedRepoTreeNotFoundError:  # a cache that an older client filled
        names = []
    for name in names:
        parts = PurePosixPath(name.replace("\\", "/")).parts
        if ".." in parts or parts[:1] == ("/",):
            raise ValueError(f"{source!r} has a file called {name!r}, which would lie outside of it: not loaded")
    return Path(folder)


def _weight_names(variant: str | None, digits: str = "*") -> list[str]:
    """Patterns of the files that may hold the weights, and of the index if they are several."""
    dot = f".{variant}" if variant else ""
    return [
        f"{WEIGHTS}.safetensors.index{dot}.json",
        f"{WEIGHTS}{dot}.safetensors",
        f"{WEIGHTS}{dot}-{digits}-of-{digits}.safetensors",
    ]


def _is_component(entry) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and entry[0] is not None


def _class_of(index: dict, name: str, folder: Path) -> type:
    entry = index.get(name)
    if not _is_component(entry) or not all(isinstance(word, str) for word in entry):
        raise ValueError(f"{folder / INDEX}: {name}={entry!r} must be a library and a class, as save_pretrained writes")
    library, name_of_class = entry
    kind = OURS.get(name_of_class) or (getattr(diffusers, name_of_class, None) if library == "diffusers" else None)
    if not isinstance(kind, type) or not issubclass(kind, KINDS[name]):
        ours = ", ".join(n for n, cls in OURS.items() if issubclass(cls, KINDS[name]))
        raise ValueError(
            f"{folder / INDEX}: {name}={entry!r}; it must be {ours}, or one of diffusers' that does as much"
        )
    return kind


# ---------------------------------------------------------------- what a stranger may have written


def root_of(folder: Path) -> Path:
    """Where files of `folder` may lie: in it, or, of a snapshot in the Hub's cache, in the cached repository."""
    cached = folder.resolve().parent.name == "snapshots" and folder.resolve().parents[1].name.startswith("models--")
    return folder.resolve().parents[1] if cached else folder


def check_inside(path: Path, root: Path) -> None:
    """A ValueError if a file is not there, or if it is a link out of what was asked for."""
    if not path.is_file():
        raise ValueError(f"{path} is not there: this is no folder of a pipeline")
    if root.resolve() not in path.resolve().parents:
        raise ValueError(f"{path} is a link to {path.resolve()}, outside of {root}: put the file itself there")


def _read_json(path: Path) -> dict:
    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    try:
        content = json.loads(path.read_bytes(), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object, not {type(content).__name__}")
    return content


def _check_keys(path: Path, config: dict, known: Iterable[str]) -> None:
    unknown = sorted(key for key in config.keys() - set(known) if not key.startswith("_"))
    if unknown:
        raise ValueError(
            f"{path}: unknown {', '.join(unknown)[:200]}; written by a newer version, or for something else"
        )


def _arguments(kind: type) -> Iterable[str]:
    return inspect.signature(kind.__init__).parameters


def _check_scheduler(path: Path, kind: type, root: Path) -> None:
    check_inside(path, root)
    config = _read_json(path)
    timesteps, betas = config.get("num_train_timesteps", 1000), config.get("trained_betas") or ()
    if type(timesteps) is not int or not 1 <= timesteps <= MOST_TIMESTEPS or len(betas) > MOST_TIMESTEPS:
        raise ValueError(f"{path}: num_train_timesteps={timesteps!r} must be an integer in 1 ... {MOST_TIMESTEPS:,}")
    unknown = config.keys() - set(_arguments(kind))
    if kind in OURS.values() and unknown:  # a scheduler keeps those of the one that it was built from
        _check_keys(path, config, {name for other in [kind(), *kind._get_compatibles()] for name in _arguments(other)})


def _check_unet(folder: Path, kind: type, variant: str | None, root: Path) -> None:
    path = folder / "config.json"
    check_inside(path, root)
    config = _read_json(path)
    tensors = {}
    for file in _weight_files(folder, variant, root):
        tensors |= _header(file)
    if kind is not DDPMUNet:
        return
    _check_keys(path, config, _arguments(kind))
    _check_sizes(path, config, tensors)
    try:
        with torch.device("meta"):  # takes no memory
            network = kind.from_config(config)
    except Exception as error:  # values of another type fail anywhere
        raise ValueError(f"{path}: {error}") from error
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    for name in sorted(wanted.keys() | tensors.keys()):
        if wanted.get(name) != tensors.get(name):
            raise ValueError(
                f"{folder}: the weights have {name} of shape {tensors.get(name)}, and config.json asks for "
                f"{wanted.get(name)}"
            )


def _weight_files(folder: Path, variant: str | None, root: Path) -> list[Path]:
    index, whole, _ = (folder / name for name in _weight_names(variant))
    if index.is_file():
        check_inside(index, root)
        names = _read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise ValueError(f"{index}: weight_map must tell the file of each weight")
        files = []
        for name in sorted(set(names.values())):
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"{index}: {name!r} is no safetensors file beside it")
            files.append(folder / name)
    else:
        files = [whole]
    if not files or not files[0].exists():
        there = sorted(file.name for file in folder.glob(f"{WEIGHTS}*"))
        pickled = [name for name in there if name.endswith((".bin", ".ckpt", ".pt", ".pth"))]
        why = " (a pickle can run anything when it is loaded, so it is not)" if pickled else ""
        raise ValueError(f"{folder} has no {whole.name}; of weights it has {', '.join(there) or 'none'}{why}")
    for file in files:
        check_inside(file, root)
    return files


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor; safetensors itself checks that the header and the length of the file agree."""
    try:
        with safe_open(file, "pt") as tensors:
            parts = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            for name, part in parts.items():
                if part.get_dtype() not in FLOATS:
                    raise ValueError(f"{file}: {name} is of {part.get_dtype()}; weights are {', '.join(FLOATS)}")
            return {name: tuple(part.get_shape()) for name, part in parts.items()}
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged, or no safetensors file: {error}") from error


def _check_sizes(path: Path, config: dict, tensors: dict) -> None:
    """Before a network is made of it: that no number asks for more than the weights can be of."""
    largest = max((max(shape, default=1) for shape in tensors.values()), default=1)
    stages = config.get("block_out_channels")
    for name, value in config.items():
        numbers = value if isinstance(value, list) else [value]
        limit = LARGEST_SIDE if name == "sample_size" else largest
        if name.endswith("layers_per_block"):
            limit = len(tensors) // max(1, len(stages) if isinstance(stages, list) else 1)
        too_large = [n for n in numbers if isinstance(n, int | float) and not (math.isfinite(n) and abs(n) <= limit)]
        if too_large or len(numbers) > largest:
            shown = str(too_large[0]) if too_large else f"a list of {len(numbers)}"
            raise ValueError(
                f"{path}: {name} is {shown[:40]}, more than {limit}, which {len(tensors)} weights of at most {largest} "
                "rows or columns can be of"
            )

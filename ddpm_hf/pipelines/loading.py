"""Load a network and a scheduler from a folder or the Hub, without running its code or loading pickle files."""

import contextlib
import inspect
import logging
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path, PurePosixPath

import diffusers
import torch
from diffusers import ModelMixin, SchedulerMixin
from huggingface_hub import get_cached_repo_tree, snapshot_download
from huggingface_hub.errors import CachedRepoTreeNotFoundError, HfHubHTTPError
from huggingface_hub.utils import parse_ratelimit_headers, validate_repo_id
from safetensors import SafetensorError, safe_open

from ddpm_hf.models.unet import ARGUMENTS, LARGEST_SIDE, DDPMUNet
from ddpm_hf.schedulers.edm import EDMScheduler
from ddpm_hf.schedulers.flow import FlowMatchScheduler
from ddpm_hf.schedulers.noise import MOST_TIMESTEPS, CosineNoiseScheduler, LinearNoiseScheduler
from ddpm_hf.utils.arguments import (
    INFINITE,
    any_of,
    boolean,
    check,
    check_all,
    checked,
    did_you_mean,
    integer,
    matching,
    optional,
    read_json,
    shorten,
    show,
    text,
)
from ddpm_hf.utils.arguments import path as path_rule

INDEX, WEIGHTS = "model_index.json", "diffusion_pytorch_model"
OUR_CLASSES = (DDPMUNet, LinearNoiseScheduler, CosineNoiseScheduler, FlowMatchScheduler, EDMScheduler)
OURS = {cls.__name__: cls for cls in OUR_CLASSES}
KINDS = {"unet": (DDPMUNet, diffusers.UNet2DModel), "scheduler": (SchedulerMixin,)}
MODEL_OPTIONS = ("device_map", "max_memory", "low_cpu_mem_usage", "offload_folder", "offload_state_dict",
                 "disable_mmap")  # fmt: skip
# Limits above any real model, which protect the memory from a malicious file
MOST_TENSORS, MOST_SHOWN = 10**5, 240
# Old names of the attention weights of UNet2DModel, which older files still have
OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)  # statuses of the Hub
WAITS, LONGEST_WAIT = (1, 5, 20), 120  # seconds before each retry, and what the Hub may ask for at most
FLOATS = ("F64", "F32", "F16", "BF16")
log = logging.getLogger(__name__)
_OPTIONAL_TEXT = optional(matching(lambda v: isinstance(v, str) and "\0" not in v, "must be a text"))
_PATH = any_of("must be a folder, or user/model on the Hub", path_rule)
SAMPLING = {"sampling_scheduler": optional(text), "sampling_steps": optional(integer(1, MOST_TIMESTEPS))}
LOADING = {
    **dict.fromkeys(("subfolder", "revision", "variant"), _OPTIONAL_TEXT),
    "use_safetensors": optional(boolean),
    "token": optional(any_of("must be a text or a bool", text, boolean)),
    "cache_dir": optional(path_rule),
    "local_files_only": boolean,
    "force_download": boolean,
}


@checked(LOADING)
def load_components(
    source: str | Path,
    unet: ModelMixin | None = None,
    scheduler: SchedulerMixin | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    torch_dtype: torch.dtype | dict | None = None,
    dtype: torch.dtype | dict | None = None,
    use_safetensors: bool | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    **options,
) -> dict:
    """Load the arguments of the pipeline. Arguments and errors are those of `DDPMCustomPipeline.from_pretrained`.

    The class names in model_index.json refer to our classes or those of diffusers, whatever module they were saved
    from. The names and shapes of the weights must match the configuration.
    """
    _check_options(source, use_safetensors, options)
    model_options = {name: options[name] for name in MODEL_OPTIONS if name in options}
    model_options["torch_dtype"] = _dtype_of_unet(torch_dtype if dtype is None else dtype)
    variant, subfolder = variant or None, subfolder or ""
    if Path(source).is_dir():
        folder = Path(source)
    else:
        hub_options = {"token": token, "cache_dir": cache_dir, "revision": revision}
        hub_options |= {"local_files_only": local_files_only, "force_download": force_download}
        if not is_hub_id(str(source)):
            raise ValueError(f"{show(str(source))} is neither a local folder nor user/model on the Hub")
        folder = _download(str(source), subfolder, variant, hub_options)
    root, folder = root_of(folder), folder / subfolder
    index = _read_index(folder, root)
    if scheduler is None:
        path = folder / "scheduler" / "scheduler_config.json"
        with _naming(path):
            kind = _class_of(index, "scheduler", folder)
            _check_scheduler(path, kind, root)
        scheduler = kind.from_pretrained(folder, subfolder="scheduler")
    if unet is None:
        with _naming(folder / "unet" / "config.json"):
            kind = _class_of(index, "unet", folder)
            _check_unet(folder / "unet", kind, variant, root)
        unet = kind.from_pretrained(folder, subfolder="unet", variant=variant, use_safetensors=True, **model_options)
        if (bad := weights_not_finite(unet)) is not None:
            raise ValueError(f"{folder / 'unet'}: {bad}")
    with _naming(folder / INDEX):
        settings = check_all({name: index[name] for name in SAMPLING if name in index}, SAMPLING)
    return {"unet": unet, "scheduler": scheduler, **settings}


def weights_not_finite(unet) -> str | None:
    """A message if weights are NaN or infinite, which give black pictures; `None` if all in memory are finite."""
    weights = {name: w for name, w in (*unet.named_parameters(), *unet.named_buffers()) if not w.is_meta}
    bad = [name for name, weight in weights.items() if not weight.float().isfinite().all()]
    if not bad:
        return None
    kind = str(weights[bad[0]].dtype).removeprefix("torch.")
    return (
        f"weights are not finite: {len(bad)} of {len(weights)} tensors have NaN or infinities, such as {bad[0]} "
        f"({kind}); load weights that are finite in this type"
    )


def _check_options(source, use_safetensors, options: dict) -> None:
    check("pretrained_model_name_or_path", source, _PATH)
    if use_safetensors is False:
        raise ValueError("use_safetensors=False is not supported: loading a pickle file can run any code")
    unknown = {name for name, v in options.items() if name not in MODEL_OPTIONS and v is not None and v is not False}
    if unknown:
        why = ""
        if {"trust_remote_code", "custom_pipeline"} & unknown:
            why = "; it never runs code of a repository (diffusers.DiffusionPipeline does, with trust_remote_code=True)"
        raise ValueError(f"from_pretrained has no argument {', '.join(sorted(unknown))[:MOST_SHOWN]}{why}")


def _dtype_of_unet(dtype) -> torch.dtype | None:
    """The type of the network from `torch_dtype`, which may be a dict by component."""
    dtype = dtype.get("unet", dtype.get("default")) if isinstance(dtype, dict) else dtype
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise ValueError(f"torch_dtype={show(dtype)} must be a torch.dtype, or a dict from component to torch.dtype")
    return dtype


def _read_index(folder: Path, root: Path) -> dict:
    """The content of model_index.json, whose only components must be `unet` and `scheduler`."""
    path = folder / INDEX
    with _naming(path):
        check_inside(path, root)
        index = read_json(path)
        components = {name for name, entry in index.items() if name[:1] != "_" and _is_component(entry)}
        if others := ", ".join(sorted(components - KINDS.keys())):
            raise ValueError(f"{path}: unknown components {others}; a DDPM has only unet and scheduler")
    return index


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn exceptions into ValueErrors that name the file, are short and contain no control characters."""
    try:
        yield
    except Exception as error:
        message = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(shorten(message if str(path.parent) in message else f"{path}: {message}")) from error


def retried(call: Callable, statuses: Collection[int] = TRANSIENT, broken: bool = False):
    """The result of a call of the Hub's client, which is repeated after a transient status, at most three times.

    The client itself retries uploads of weights, downloads of files and listings, but not, for instance, `repo_info`,
    `whoami`, `auth_check` and `create_commit`. It waits as long as the Hub asks for, up to two minutes.

    Args:
        broken: repeat it also after a broken connection.
    """
    for wait in (*WAITS, None):
        try:
            return call()
        except Exception as error:
            # By name, because versions of the client use different HTTP libraries
            transient = broken and any(cls.__name__ == "TransportError" for cls in type(error).__mro__)
            response = response_of(error)
            asked = 0 if response is None else _seconds_to_wait(response.headers)
            transient = transient or (response is not None and response.status_code in statuses)
            if wait is None or not transient or asked > LONGEST_WAIT:
                raise
            if asked > wait:
                log.warning(f"the Hub asks to wait (status {response.status_code}): trying again in {asked} seconds")
            time.sleep(max(wait, asked))


def response_of(error: BaseException | None):
    """The Hub's response that an exception or one of its causes is about; None if there is none."""
    while error is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__
    return getattr(error, "response", None)


def _seconds_to_wait(headers) -> int:
    """What a response asks for, in seconds; 0 if nothing."""
    after, rate = headers.get("Retry-After", ""), parse_ratelimit_headers(headers)
    return int(after) if after.isdecimal() else rate.reset_in_seconds if rate and not rate.remaining else 0


def _download(source: str, subfolder: str, variant: str | None, options: dict) -> Path:
    """The folder of a repository's snapshot in the cache, with the configurations and weights but no code."""

    def fetch(*names: str) -> Path:
        patterns = [str(PurePosixPath(subfolder) / name) for name in names]
        try:
            return Path(retried(lambda: snapshot_download(source, allow_patterns=patterns, **options)))
        except Exception as error:  # no network, no such repository, no access, no space: many types
            reason = " ".join(str(error).split())[:MOST_SHOWN]
            raise OSError(f"{show(source)} is not a local folder, and downloading it failed: {reason}") from None

    index, whole = _weight_names(variant)
    configs = [INDEX, "scheduler/scheduler_config.json", "unet/config.json", f"unet/{index}"]
    path = fetch(*configs) / subfolder / "unet" / index  # first, because it names the files of weights
    _check_names(source, options)
    shards = _shards_of(path) if path.is_file() else [whole]
    return fetch(*configs, *(f"unet/{name}" for name in shards))


def _check_names(source: str, options: dict) -> None:
    try:
        tree = get_cached_repo_tree(source, revision=options["revision"], cache_dir=options["cache_dir"])
    except CachedRepoTreeNotFoundError:  # a cache that an older client filled
        return
    for name in (file.path for file in tree):
        parts = PurePosixPath(name.replace("\\", "/")).parts
        if ".." in parts or parts[:1] == ("/",):
            raise ValueError(f"{source!r} has a file named {name!r}, a path outside of the repository")


def _weight_names(variant: str | None) -> tuple[str, str]:
    """File names of the index of sharded weights, and of weights in a single file."""
    dot = f".{variant}" if variant else ""
    return f"{WEIGHTS}.safetensors.index{dot}.json", f"{WEIGHTS}{dot}.safetensors"


def _shards_of(index: Path) -> list[str]:
    """File names of the shards in an index of weights."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{index}: weight_map must map each weight to its file")
    shards = sorted(set(names.values()))
    for name in shards:
        if PurePosixPath(name.replace("\\", "/")).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index}: {name!r} must be a safetensors file in the same folder")
    return shards


def _is_component(entry) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and entry[0] is not None


def _class_of(index: dict, name: str, folder: Path) -> type:
    entry = index.get(name)
    if not _is_component(entry) or not all(isinstance(word, str) for word in entry):
        raise ValueError(f"{folder / INDEX}: {name}={entry!r} must be a list of a library and a class name")
    library, class_name = entry
    kind = OURS.get(class_name) or (getattr(diffusers, class_name, None) if library == "diffusers" else None)
    if not isinstance(kind, type) or not issubclass(kind, KINDS[name]):
        ours = ", ".join(n for n, cls in OURS.items() if issubclass(cls, KINDS[name]))
        raise ValueError(f"{folder / INDEX}: {name}={entry!r} must be {ours}, or a {name} class of diffusers")
    return kind


# ---------------------------------------------------------------- checks of untrusted files


def is_hub_id(name: str) -> bool:
    """Whether a name is a valid repository id of the Hub and not a local path."""
    try:
        validate_repo_id(name)
    except ValueError:
        return False
    return not Path(name).exists()


def root_of(folder: Path) -> Path:
    """The folder that links in `folder` may point into: `folder`, or for a snapshot its repository in the cache."""
    cached = folder.resolve().parent.name == "snapshots" and folder.resolve().parents[1].name.startswith("models--")
    return folder.resolve().parents[1] if cached else folder


def check_inside(path: Path, root: Path) -> None:
    """Raise ValueError if a file does not exist or is a link out of `root`."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist, so this is not the folder of a pipeline")
    if root.resolve() not in path.resolve().parents:
        raise ValueError(f"{path} is a link to {path.resolve()}, outside of {root}; replace it by the file")


def _defaults(kind: type) -> dict:
    return {name: parameter.default for name, parameter in inspect.signature(kind.__init__).parameters.items()}


def _check_keys(path: Path, config: dict, kind: type, others: Iterable[type] = ()) -> None:
    """Raise ValueError for keys that are arguments neither of `kind` nor of `others`."""
    known = set().union(*(_defaults(each) for each in (kind, *others)))
    if unknown := sorted(key for key in config.keys() - known if key[:1] != "_"):
        hint = did_you_mean(unknown[0], known) or "; a newer version may have written them"
        raise ValueError(f"{path}: unknown settings {', '.join(unknown)[:MOST_SHOWN]}{hint}")


def read_scheduler_config(path: Path) -> dict:
    """The configuration in a file, in which Infinity is a number. Raises ValueError for more than 10^6 timesteps."""
    config = read_json(path, constants=INFINITE)
    timesteps, betas = config.get("num_train_timesteps", 1000), config.get("trained_betas") or ()
    if type(timesteps) is not int or not 1 <= timesteps <= MOST_TIMESTEPS or len(betas) > MOST_TIMESTEPS:
        raise ValueError(f"{path}: num_train_timesteps={timesteps!r} must be an integer in 1 ... {MOST_TIMESTEPS:,}")
    for name, value in config.items():  # includes settings of solvers that may be built from this config
        if type(value) is int and abs(value) > MOST_TIMESTEPS:
            raise ValueError(f"{path}: {name}={value!r} must be at most {MOST_TIMESTEPS:,}")
    return config


def _check_scheduler(path: Path, kind: type, root: Path) -> None:
    check_inside(path, root)
    config = read_scheduler_config(path)
    if kind in OURS.values():
        _check_keys(path, config, kind, kind()._get_compatibles())  # `from_config` keeps settings of other solvers
    kind.from_config(config)


def _check_unet(folder: Path, kind: type, variant: str | None, root: Path) -> None:
    path = folder / "config.json"
    check_inside(path, root)
    config = read_json(path)
    tensors = {}
    for file in _weight_files(folder, variant, root):
        tensors |= _header(file)
    _check_keys(path, config, kind)
    if kind is DDPMUNet:
        check_all(config, ARGUMENTS)
    else:  # in diffusers, the types of valid values differ from those of the defaults
        tensors = {_renamed(name): shape for name, shape in tensors.items()}
    _check_sizes(path, config, kind, tensors)
    with torch.device("meta"):  # allocates no memory
        network = kind.from_config(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    for name in sorted(wanted.keys() | tensors.keys()):
        if wanted.get(name) != tensors.get(name):
            shapes = f"{tensors.get(name)} in the weights and {wanted.get(name)} in config.json (None: missing)"
            raise ValueError(f"{folder}: {name} has shape {shapes}")


def _renamed(name: str) -> str:
    for old, new in OLD_NAMES.items():
        name = name.replace(old, new)
    return name


def _weight_files(folder: Path, variant: str | None, root: Path) -> list[Path]:
    index, whole = (folder / name for name in _weight_names(variant))
    if index.is_file():
        check_inside(index, root)
    files = [folder / name for name in _shards_of(index)] if index.is_file() else [whole]
    if not files[0].exists():
        there = sorted(file.name for file in folder.glob(f"{WEIGHTS}*"))
        pickled = [name for name in there if name.endswith((".bin", ".ckpt", ".pt", ".pth"))]
        why = "; pickle files are not loaded, because they can run any code" if pickled else ""
        raise ValueError(f"{folder} has no {files[0].name}; its weights are: {', '.join(there) or 'none'}{why}")
    for file in files:
        check_inside(file, root)
    return files


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor. safetensors checks that the header matches the length of the file."""
    try:
        with safe_open(file, "pt") as tensors:
            names = list(tensors.keys())
            if len(names) > MOST_TENSORS:
                raise ValueError(f"{file} has {len(names):,} tensors; it must have at most {MOST_TENSORS:,}")
            parts = {name: tensors.get_slice(name) for name in names}
            for name, part in parts.items():
                if part.get_dtype() not in FLOATS:
                    raise ValueError(f"{file}: {name} has type {part.get_dtype()}; it must be {', '.join(FLOATS)}")
            return {name: tuple(part.get_shape()) for name, part in parts.items()}
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or not a safetensors file: {error}") from error


def _check_sizes(path: Path, config: dict, kind: type, tensors: dict) -> None:
    """Raise ValueError if a configuration asks for a larger network than the weights, before it is built."""
    shapes = [shape for shape in tensors.values() if math.prod(shape)]
    largest = max((max(shape, default=1) for shape in shapes), default=1)
    for name, value in config.items():
        if name == "value_range":  # pixel values, not sizes
            continue
        numbers = value if isinstance(value, list) else [value]
        limit = LARGEST_SIDE if name == "sample_size" else max(largest, 32)
        too_large = [n for n in numbers if isinstance(n, int | float) and not -limit <= n <= limit]
        if too_large or len(numbers) > (largest if name == "class_names" else len(shapes)):
            shown = ascii(too_large[0])[:40] if too_large else f"a list of {len(numbers)}"
            sizes = f"{len(shapes)} weights whose largest dimension is {largest}"
            raise ValueError(f"{path}: {name} is {shown}, too large for {sizes}")
    asked = {**_defaults(kind), **config}
    layers = max(n for name, n in asked.items() if name.endswith("layers_per_block") and isinstance(n, int))
    stages = sum(len(asked[name]) for name in asked if name.endswith("block_out_channels"))
    if layers * stages > len(shapes):  # a layer has several weights
        raise ValueError(f"{path}: layers_per_block={layers} in {stages} stages is too large for {len(shapes)} weights")

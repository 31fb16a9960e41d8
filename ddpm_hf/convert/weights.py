"""Reading weights from files of any layout without running code in them, and loading them with checks."""

import itertools
import pickle
import pickletools
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from ddpm_hf.convert.source import Weights
from ddpm_hf.models.unet import DDPMUNet
from ddpm_hf.utils.arguments import limit, shorten

WRAPPERS = ("ema_state_dict", "ema", "model_ema", "model_state_dict", "state_dict", "model", "unet")
PREFIXES = ("module.", "_orig_mod.", "ema_model.")
# Tensors, characters of a name and operations of a pickle: far above those of any network
MOST_WEIGHTS, MOST_NAME, MOST_OPERATIONS = 10**5, 500, 10**7
COUNTERS = ("n_averaged", "initted", "step")  # of torch.optim.swa_utils.AveragedModel and ema_pytorch


def load_weights(path: Path) -> Weights:
    """The tensors of a file by name, without wrappers such as `{"model": ...}` and prefixes such as `module.`.

    Raises:
        ValueError: the file is damaged, has no named tensors, or contains pickled objects, which could run code.
    """
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            _check_pickles(path)
            content = torch.load(path, map_location="cpu", weights_only=True)
        weights = _unwrapped(content)
        if weights is not None:
            _check_memory(weights)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is not loaded, because it contains more than tensors: {first_line(error)}") from error
    except Exception as error:  # damaged files raise various exceptions
        raise ValueError(f"{path} cannot be read as weights: {first_line(error)}") from error
    if weights is None:
        raise ValueError(f"{path} has no named weights")
    return weights


def _check_pickles(path: Path) -> None:
    """Raise ValueError for a file that torch.load needs far more memory or time for than for one of torch.save."""
    with open(path, "rb") as file:
        head = file.read(2)
        if head[:1] == b"\x80":  # of versions before 1.6: number, version, system, content, keys; then the storages
            file.seek(0)
            return _check_operations(itertools.chain.from_iterable(pickletools.genops(file) for _ in range(5)))
    if head != b"PK":
        raise ValueError("it is neither a .safetensors file nor one that torch.save wrote")
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        limit("its records have {} bytes", sum(record.file_size for record in records), path.stat().st_size,
              "the size of the file, because torch.save compresses nothing")  # fmt: skip
        for record in records:
            if record.filename.endswith("data.pkl"):
                _check_operations(pickletools.genops(archive.read(record)))


def _check_operations(operations) -> None:
    for number, (operation, name, _) in enumerate(operations):
        limit("it has {} operations", number, MOST_OPERATIONS, "no checkpoint has so many")
        if operation.name == "GLOBAL":  # torch.load searches the name of one that it refuses, in quadratic time
            limit("it has a global name of {} characters", len(name), MOST_NAME, "no class has such a name")


def _check_memory(weights: Weights) -> None:
    """Raise ValueError for tensors that a copy would make larger than the file: of stride 0, or of shared data."""
    for key, value in weights.items():
        if value.layout != torch.strided or value.is_meta or value.is_quantized:
            raise ValueError(f"{key} is a sparse, quantized or empty tensor; save it as a dense one")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            stored = f"{value.untyped_storage().nbytes():,} bytes in the file; save it with .contiguous()"
            raise ValueError(f"{key} has shape {tuple(value.shape)} but only {stored}")
    stored = sum({v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in weights.values()}.values())
    limit("its tensors have {} bytes", sum(v.nbytes for v in weights.values()), stored, "they share data")


def _unwrapped(content) -> Weights | None:
    """The innermost dict of tensors, preferably EMA weights, with the keys of the network itself."""
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        return None
    limit("it has {} names", len(content), MOST_WEIGHTS, "no network has so many weights")
    limit("it has a name of {} characters", max(map(len, content), default=0), MOST_NAME, "no weight has such a name")
    for wrapper in WRAPPERS:
        if isinstance(content.get(wrapper), dict) and (inner := _unwrapped(content[wrapper])):
            return inner
    weights = {key: value for key, value in content.items() if key not in COUNTERS}
    if any(key.startswith("ema_model.") for key in weights):  # ema_pytorch also stores the training weights
        weights = {key: value for key, value in weights.items() if key.startswith("ema_model.")}
    while prefix := next((p for p in PREFIXES if weights and all(key.startswith(p) for key in weights)), None):
        weights = {key[len(prefix) :]: value for key, value in weights.items() if key[len(prefix) :] not in COUNTERS}
    return weights if weights and all(isinstance(v, torch.Tensor) for v in weights.values()) else None


def load_checked(unet: DDPMUNet, weights: Weights, path) -> None:
    """Load weights into a network after checking all keys and then all shapes.

    Args:
        unet: may be on the device "meta", so that a network that does not fit the weights takes no memory.
        path: the origin of the weights, for messages.

    Raises:
        ValueError: a weight is missing, unexpected or of another shape.
    """
    wanted = unet.state_dict()
    missing, unexpected = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
    for what, keys in (("missing", missing), ("unexpected", unexpected)):
        if keys:
            raise ValueError(f"{path}: {len(keys)} {what} weights, such as {keys[0]} (the name in DDPMUNet)")
    for key, value in weights.items():
        check_shape(path, key, value, wanted[key].shape)
    unet.to_empty(device="cpu").load_state_dict(weights)
    unet.eval()


def check_shape(path, key: str, value: torch.Tensor, wanted: tuple[int, ...]) -> None:
    if value.shape != wanted:
        raise ValueError(f"{path}: {key} has shape {tuple(value.shape)}; it must be {tuple(wanted)}")
    if not value.is_floating_point():
        raise ValueError(f"{path}: {key} has the type {value.dtype}; it must be one of floating-point numbers")


def first_line(error: Exception) -> str:
    return shorten(next(iter(str(error).splitlines()), type(error).__name__))

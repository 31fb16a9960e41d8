"""Reading weights from files of any layout without running code in them, and loading them with checks."""

import pickle
from pathlib import Path

import torch
from safetensors.torch import load_file

from ddpm_hf.convert.source import Weights
from ddpm_hf.models.unet import DDPMUNet

WRAPPERS = ("ema_state_dict", "ema", "model_ema", "model_state_dict", "state_dict", "model", "unet")
PREFIXES = ("module.", "_orig_mod.", "ema_model.")
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
            with open(path, "rb") as file:
                head = file.read(2)
            if head != b"PK" and head[:1] != b"\x80":  # a zip archive, or a pickle of old versions
                raise ValueError("it is neither a .safetensors file nor one that torch.save wrote")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is not loaded, because it contains more than tensors: {first_line(error)}") from error
    except Exception as error:  # damaged files raise various exceptions
        raise ValueError(f"{path} cannot be read as weights: {first_line(error)}") from error
    weights = _unwrapped(content)
    if weights is not None:
        _check_memory(weights, path)
    if weights is None:
        raise ValueError(f"{path} has no named weights")
    return weights


def _check_memory(weights: Weights, path: Path) -> None:
    """Raise ValueError for tensors larger than their storage (a stride of 0), which a copy would write out."""
    for key, value in weights.items():
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            stored = f"{value.untyped_storage().nbytes():,} bytes in the file; save it with .contiguous()"
            raise ValueError(f"{path}: {key[:100]} has shape {tuple(value.shape)} but only {stored}")


def _unwrapped(content) -> Weights | None:
    """The innermost dict of tensors, preferably EMA weights, with the keys of the network itself."""
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        return None
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
    unet.load_state_dict(weights)
    unet.eval()


def check_shape(path, key: str, value: torch.Tensor, wanted: tuple[int, ...]) -> None:
    if value.shape != wanted:
        raise ValueError(f"{path}: {key} has shape {tuple(value.shape)}; it must be {tuple(wanted)}")


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)

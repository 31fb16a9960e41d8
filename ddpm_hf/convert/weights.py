"""Weights out of files of any layout, without running what is in them, and into a network that is checked first."""

import pickle
from pathlib import Path

import torch
from safetensors.torch import load_file

from ddpm_hf.convert.source import Weights
from ddpm_hf.models.unet import DDPMUNet

WRAPPERS = ("ema_state_dict", "ema", "model_ema", "model_state_dict", "state_dict", "model", "unet")
PREFIXES = ("module.", "_orig_mod.", "ema_model.")
COUNTERS = ("n_averaged", "initted", "step")  # of torch's AveragedModel and of ema_pytorch


def load_weights(path: Path) -> Weights:
    """The tensors of a file, without what wraps them: `{"model": ...}`, `module.` and the like.

    Raises:
        ValueError: the file is truncated, holds something else, or wants to run code.
    """
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is refused: it holds more than weights ({first_line(error)})") from error
    except Exception as error:  # what parsing foreign bytes trips over
        raise ValueError(f"{path} can't be read as weights: {first_line(error)}") from error
    weights = _unwrapped(content)
    if weights is None:
        raise ValueError(f"{path} holds no weights by name")
    return weights


def _unwrapped(content) -> Weights | None:
    """The innermost dict of tensors, EMA weights first, under the keys that the network gave them."""
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        return None
    for wrapper in WRAPPERS:
        if isinstance(content.get(wrapper), dict) and (inner := _unwrapped(content[wrapper])):
            return inner
    weights = {key: value for key, value in content.items() if key not in COUNTERS}
    if any(key.startswith("ema_model.") for key in weights):  # beside the model that it averages
        weights = {key: value for key, value in weights.items() if key.startswith("ema_model.")}
    while prefix := next((p for p in PREFIXES if weights and all(key.startswith(p) for key in weights)), None):
        weights = {key[len(prefix) :]: value for key, value in weights.items() if key[len(prefix) :] not in COUNTERS}
    return weights if weights and all(isinstance(v, torch.Tensor) for v in weights.values()) else None


def load_checked(unet: DDPMUNet, weights: Weights, path) -> None:
    """Load weights into a network after checking every key, then every shape.

    Raises:
        ValueError: a weight is missing, is one too many or has another shape; `path` is named as its origin.
    """
    wanted = unet.state_dict()
    missing, over = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
    if missing or over:
        what = f"lacks {len(missing)} weights ({missing[0]})" if missing else f"has {len(over)} too many ({over[0]})"
        raise ValueError(f"{path} {what}, as the network calls them")
    for key, value in weights.items():
        check_shape(path, key, value, wanted[key].shape)
    unet.load_state_dict(weights)
    unet.eval()


def check_shape(path, key: str, value: torch.Tensor, wanted: tuple[int, ...]) -> None:
    if value.shape != wanted:
        raise ValueError(f"{path}: {key} has shape {tuple(value.shape)} and the network wants {tuple(wanted)}")


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)

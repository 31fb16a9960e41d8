import json
import os
import re
import runpy
import shutil
import sys

import diffusers
import pytest
import torch
import yaml
from conftest import tiny_unet
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from ddpm_hf import CosineNoiseScheduler, DDPMCustomPipeline, DDPMUNet, LinearNoiseScheduler, convert
from ddpm_hf.commands.main import main
from ddpm_hf.convert.unet2d import settings_from, to_diffusers, weights_from
from ddpm_hf.convert.weights import load_checked, load_weights

TUTORIALS = {
    "explainingai_gray28": "explainingai",
    "explainingai_rgb32": "explainingai",
    "labml_rgb32": "labml",
    "learnopencv_rgb32": "learnopencv",
}


def predict(folder, io):
    unet = DDPMCustomPipeline.from_pretrained(str(folder)).unet
    with torch.no_grad():
        return unet(io["sample"], io["timestep"]).sample


def error_of(capfd, *argv) -> str:
    assert main(["convert", *map(str, argv)]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    return error


# ---------------------------------------------------------------- reference vectors of the sources


@pytest.mark.parametrize("case", TUTORIALS)
@pytest.mark.parametrize("configured", [True, False])
def test_a_tutorial_checkpoint_predicts_the_same(shared, tmp_path, capfd, case, configured):
    folder = shared / "vectors" / case
    flags = ["--from", TUTORIALS[case], "--source_config", str(folder / "case.json")] if configured else []
    assert main(["convert", str(folder / "checkpoint.pth"), str(tmp_path / "out"), *flags]) == 0
    io = load_file(folder / "io.safetensors")
    assert_close(predict(tmp_path / "out", io), io["noise_pred"], rtol=0, atol=1e-5)
    out = capfd.readouterr().out
    assert out.startswith(TUTORIALS[case])
    assert ("num_heads: 4 in the configuration is ignored: the code of explainingai does not use it" in out) == (
        configured and "explainingai" in case
    )
    if "labml" in case:
        keys = torch.load(folder / "checkpoint.pth", weights_only=True)
        assert all(f"{key} is left out" in out for key in keys if ".attn.norm." in key)
    assert f"({TUTORIALS[case]})" in (tmp_path / "out/README.md").read_text()
    scheduler = LinearNoiseScheduler.from_pretrained(tmp_path / "out", subfolder="scheduler")
    variance = "fixed_small" if "explainingai" in case else "fixed_large"
    assert (scheduler.config.variance_type, scheduler.config.clip_sample) == (variance, False)


def test_a_tutorial_checkpoint_samples_the_same(shared, tmp_path):
    folder = shared / "vectors/explainingai_chain_T50"
    flags = ["--source_config", str(folder / "case.json")]
    assert main(["convert", str(folder / "checkpoint.pth"), str(tmp_path / "out"), *flags]) == 0
    pipeline = DDPMCustomPipeline.from_pretrained(str(tmp_path / "out"))
    assert len(pipeline.scheduler) == 50
    final = pipeline(2, torch.Generator().manual_seed(28), output_type="latent").images
    assert_close(final, load_file(folder / "io.safetensors")["final_sample"], rtol=0, atol=1e-4)


def test_diffusers_there_and_back(shared, tmp_path):
    folder = shared / "vectors/diffusers_ddpm_cifar10_small"
    assert main(["convert", str(folder), str(tmp_path / "ours"), "--from", "diffusers"]) == 0
    io = load_file(folder / "io.safetensors")
    assert_close(predict(tmp_path / "ours", io), io["noise_pred"], rtol=0, atol=1e-5)
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--to", "diffusers"]) == 0
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        assert_close(pipeline.unet(io["sample"], io["timestep"]).sample, io["noise_pred"], rtol=0, atol=1e-5)
    name = "unet/diffusion_pytorch_model.safetensors"
    assert_close(load_file(tmp_path / "theirs" / name), load_file(folder / name), rtol=0, atol=0)
    assert main(["convert", str(tmp_path / "theirs"), str(tmp_path / "again")]) == 0
    assert_close(load_file(tmp_path / "again" / name), load_file(tmp_path / "ours" / name), rtol=0, atol=0)
    ours, again = (DDPMUNet.load_config(tmp_path / f, subfolder="unet") for f in ("ours", "again"))
    assert ours == again


# ---------------------------------------------------------------- random configurations


@st.composite
def unet2d_configs(draw):
    stages = draw(st.integers(1, 4))
    groups = draw(st.sampled_from([1, 2, 4]))
    widths = [4 * draw(st.integers(1, 4)) for _ in range(stages)]
    attention = [draw(st.booleans()) for _ in range(stages)]
    return {
        "sample_size": draw(st.sampled_from([8, 16])),
        "in_channels": (channels := draw(st.integers(1, 3))),
        "out_channels": draw(st.sampled_from([channels, 2 * channels])),
        "block_out_channels": widths,
        "down_block_types": ["AttnDownBlock2D" if a else "DownBlock2D" for a in attention],
        "up_block_types": ["AttnUpBlock2D" if a else "UpBlock2D" for a in attention[::-1]],
        "layers_per_block": draw(st.integers(1, 3)),
        "norm_num_groups": groups,
        "norm_eps": draw(st.sampled_from([1e-6, 1e-5, 0.1])),
        "attention_head_dim": draw(st.sampled_from([None, 2, 4])),
        "downsample_padding": draw(st.sampled_from([0, 1])),
        "flip_sin_to_cos": draw(st.booleans()),
        "freq_shift": draw(st.sampled_from([0, 1])),
    }


@settings(deadline=None, max_examples=40)
@given(unet2d_configs(), st.integers(0, 2**31))
def test_any_unet2d_model_predicts_the_same(config, seed):
    torch.manual_seed(seed)
    theirs = diffusers.UNet2DModel(**config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # also moves norms and biases off their initial values
    ours = DDPMUNet(**settings_from(dict(theirs.config)))
    load_checked(ours, weights_from(theirs.state_dict(), ours.state_dict(), "theirs"), "theirs")
    side = config["sample_size"]
    x, t = torch.randn(2, config["in_channels"], side, side), torch.tensor([3, 700])
    with torch.no_grad():
        expected = theirs(x, t).sample
        scale = max(1.0, expected.abs().max().item())
        assert_close(ours(x, t).sample / scale, expected / scale, rtol=0, atol=1e-5)
    back = to_diffusers(ours)
    assert_close(back.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    same = ("block_out_channels", "down_block_types", "up_block_types", "attention_head_dim", "norm_eps", "freq_shift")
    assert all(back.config[key] == theirs.config[key] for key in same)


def theirs_in(folder, older=False, binary=False, **config):
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), **config,
    ).eval()  # fmt: skip
    unet.save_pretrained(folder / "unet", safe_serialization=not binary)
    if older:
        path = folder / "unet/diffusion_pytorch_model.safetensors"
        weights = load_file(path)
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            weights = {k.replace(f".{new}.", f".{old}."): v for k, v in weights.items()}
        assert any(".proj_attn." in key for key in weights)
        save_file(weights, path)
    return unet


@pytest.mark.parametrize("options", [{}, {"older": True}, {"binary": True}])
def test_weight_formats_of_diffusers(tmp_path, options):
    unet = theirs_in(tmp_path / "theirs", **options)
    diffusers.DDPMScheduler(beta_schedule="scaled_linear", clip_sample=False).save_pretrained(
        tmp_path / "theirs/scheduler"
    )
    assert main(["convert", str(tmp_path / "theirs"), str(tmp_path / "a")]) == 0
    assert main(["convert", str(tmp_path / "theirs/unet"), str(tmp_path / "b")]) == 0
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([5, 6])
    for name in "ab":
        with torch.no_grad():
            got = predict(tmp_path / name, {"sample": x, "timestep": t})
            assert_close(got, unet(x, t).sample, rtol=0, atol=1e-5)
    scheduler = LinearNoiseScheduler.from_pretrained(tmp_path / "a", subfolder="scheduler")
    assert (scheduler.config.beta_schedule, scheduler.config.clip_sample) == ("scaled_linear", False)


def test_the_scheduler_of_a_folder(tmp_path, capfd):
    """A scheduler in the same folder as the weights (google/ddpm-*), in a pipeline folder, or in none."""
    theirs_in(tmp_path / "a")
    diffusers.DDPMScheduler(variance_type="fixed_large").save_pretrained(tmp_path / "a/unet")
    diffusers.DDIMScheduler(beta_end=0.01).save_pretrained(tmp_path / "a/scheduler")
    assert main(["convert", str(tmp_path / "a/unet"), str(tmp_path / "flat")]) == 0
    scheduler = LinearNoiseScheduler.from_pretrained(tmp_path / "flat", subfolder="scheduler")
    assert scheduler.config.variance_type == "fixed_large"
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "ddim")]) == 0
    assert LinearNoiseScheduler.from_pretrained(tmp_path / "ddim", subfolder="scheduler").config.beta_end == 0.01
    assert "the folder uses DDIMScheduler" in capfd.readouterr().out
    diffusers.DDPMScheduler(variance_type="fixed_small_log").save_pretrained(tmp_path / "a/scheduler")
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "log")]) == 0
    pipeline = DDPMCustomPipeline.from_pretrained(str(tmp_path / "log"))
    assert pipeline.scheduler.config.variance_type == "fixed_small_log"
    capfd.readouterr()
    (tmp_path / "a/scheduler/scheduler_config.json").write_text("[]")
    assert "scheduler_config.json is not a valid DDPM scheduler" in error_of(capfd, tmp_path / "a", tmp_path / "out")
    error = error_of(capfd, tmp_path / "a", tmp_path / "out", "--source_config", "x.yaml")
    assert "a diffusers folder has a config.json" in error
    (tmp_path / "file").write_text("")
    shutil.rmtree(tmp_path / "a/scheduler")
    assert "cannot be written" in error_of(capfd, tmp_path / "a", tmp_path / "file/out")


def test_invalid_attention_weights_raise(tmp_path, capfd):
    theirs_in(tmp_path / "a")
    path = tmp_path / "a/unet/diffusion_pytorch_model.safetensors"
    good = load_file(path)
    q, k = (f"mid_block.attentions.0.to_{x}.weight" for x in "qk")
    save_file(good | {q: torch.zeros(12, 8), k: torch.zeros(4, 8)}, path)
    error = error_of(capfd, tmp_path / "a", tmp_path / "out")
    assert "to_q.weight has shape (12, 8); it must be (8, 8)" in error
    save_file({key: value for key, value in good.items() if key != k}, path)
    assert f"lacks {k}" in error_of(capfd, tmp_path / "a", tmp_path / "out")


def test_cosine_schedules_are_kept_and_variants_are_ignored(tmp_path):
    unet = theirs_in(tmp_path / "theirs")
    diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2").save_pretrained(tmp_path / "theirs/scheduler")
    wrong = {k: v + 1 for k, v in unet.state_dict().items()}
    for variant in ("fp16", "ema", "zzz"):
        save_file(wrong, tmp_path / f"theirs/unet/diffusion_pytorch_model.{variant}.safetensors")
    assert main(["convert", str(tmp_path / "theirs"), str(tmp_path / "out")]) == 0
    pipeline = DDPMCustomPipeline.from_pretrained(str(tmp_path / "out"))
    assert type(pipeline.scheduler) is CosineNoiseScheduler
    assert pipeline.scheduler.config.beta_schedule == "squaredcos_cap_v2"
    assert_close(to_diffusers(pipeline.unet).state_dict(), unet.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift='scale_shift' is not supported"),
        ({"center_input_sample": True}, "center_input_sample=True is not supported"),
        ({"num_class_embeds": 10}, "num_class_embeds=10 is not supported"),
    ],
)
def test_unsupported_unet2d_settings_raise(tmp_path, capfd, config, message):
    theirs_in(tmp_path / "theirs", **config)
    assert message in error_of(capfd, tmp_path / "theirs", tmp_path / "out")
    assert os.listdir(tmp_path) == ["theirs"]


def test_trained_betas_are_kept(tmp_path):
    theirs_in(tmp_path / "theirs")
    scheduler = diffusers.DDPMScheduler(10, trained_betas=[0.1] * 10, beta_schedule="squaredcos_cap_v2")
    scheduler.save_pretrained(tmp_path / "theirs/scheduler")
    assert main(["convert", str(tmp_path / "theirs"), str(tmp_path / "out")]) == 0
    pipeline = DDPMCustomPipeline.from_pretrained(str(tmp_path / "out"))
    assert_close(pipeline.scheduler.alphas_cumprod, scheduler.alphas_cumprod)
    with pytest.raises(ValueError, match="trained_betas"):
        CosineNoiseScheduler.from_config(scheduler.config)


def test_class_conditional_networks_are_not_converted_to_diffusers(tmp_path):
    with pytest.raises(ValueError, match="num_classes=3 is not supported: DDPMPipeline has no classes"):
        to_diffusers(tiny_unet(num_classes=3))


# ---------------------------------------------------------------- layouts of checkpoints


def wrapped(kind, weights):
    prefixed = {f"module.{k}": v for k, v in weights.items()}
    return {
        "model": {"model": weights, "epoch": 3, "optimizer": {"state": {}}},
        "state_dict": {"state_dict": prefixed},
        "module": prefixed,
        "ema": {"ema": {f"ema_model.{k}": v for k, v in weights.items()}, "model": {"wrong": torch.zeros(1)}},
        "averaged": {"n_averaged": torch.tensor(5), **prefixed},
        "ema_pytorch": {
            "initted": torch.tensor(True),
            "step": torch.tensor(3),
            **{f"online_model.{k}": v + 1 for k, v in weights.items()},
            **{f"ema_model.{k}": v for k, v in weights.items()},
        },
        "compiled": {f"_orig_mod.module.{k}": v for k, v in weights.items()},
        "shadow": {"ema": {"decay": 0.9, "shadow_params": list(weights.values())}, "model": weights},
    }[kind]


@pytest.mark.parametrize(
    "kind", ["model", "state_dict", "module", "ema", "averaged", "ema_pytorch", "compiled", "shadow"]
)
def test_wrapped_checkpoints(shared, tmp_path, kind):
    folder = shared / "vectors/explainingai_gray28"
    weights = torch.load(folder / "checkpoint.pth", weights_only=True)
    torch.save(wrapped(kind, weights), tmp_path / "a.pth")
    assert main(["convert", str(tmp_path / "a.pth"), str(tmp_path / "out")]) == 0
    io = load_file(folder / "io.safetensors")
    assert_close(predict(tmp_path / "out", io), io["noise_pred"], rtol=0, atol=1e-5)


def test_flat_and_nested_configurations(shared, tmp_path, capfd):
    case = shared / "vectors/learnopencv_rgb32"
    for name, content in {
        "flat.yaml": {"dropout_rate": 0.3, "image_size": 16, "beta_end": 0.01},
        "nested.yaml": {"model_params": {"dropout_rate": 0.3}, "config": {"image_size": 16}, "beta_end": 0.01},
    }.items():
        (tmp_path / name).write_text(yaml.safe_dump(content))
        flags = ["--source_config", str(tmp_path / name)]
        assert main(["convert", str(case / "checkpoint.pth"), str(tmp_path / f"out-{name}"), *flags]) == 0
        pipeline = DDPMCustomPipeline.from_pretrained(str(tmp_path / f"out-{name}"))
        assert (pipeline.unet.config.dropout, pipeline.unet.config.sample_size) == (0.3, 16)
        assert pipeline.scheduler.config.beta_end == 0.01
        assert "is assumed" not in capfd.readouterr().out
    assert main(["convert", str(case / "checkpoint.pth"), str(tmp_path / "out")]) == 0
    assert "dropout_rate: 0.1 is assumed, the default of learnopencv" in capfd.readouterr().out


def test_number_formats_in_configurations(shared, tmp_path, capfd):
    case = shared / "vectors/explainingai_gray28/checkpoint.pth"
    (tmp_path / "a.yaml").write_text("diffusion_params:\n  beta_start: 1e-3\n  num_timesteps: 500\n")
    (tmp_path / "a.json").write_text(json.dumps({"beta_start": 1e-05}))
    for name, start, steps in (("a.yaml", 1e-3, 500), ("a.json", 1e-5, 1000)):
        out = tmp_path / f"out-{name}"
        assert main(["convert", str(case), str(out), "--source_config", str(tmp_path / name)]) == 0
        scheduler = LinearNoiseScheduler.from_pretrained(out, subfolder="scheduler")
        assert (scheduler.config.beta_start, len(scheduler)) == (start, steps)
    (tmp_path / "b.json").write_text('{"beta_start": null}')
    error_of(capfd, case, tmp_path / "out", "--source_config", tmp_path / "b.json")
    (tmp_path / "b.json").write_text('{"dropout_rate": null}')
    case = shared / "vectors/learnopencv_rgb32/checkpoint.pth"
    assert "dropout=None" in error_of(capfd, case, tmp_path / "out", "--source_config", tmp_path / "b.json")


def test_contradictions_raise_with_both_values(shared, tmp_path, capfd):
    case = shared / "vectors/labml_rgb32"
    (tmp_path / "c.json").write_text(json.dumps({"n_channels": 64}))
    error = error_of(capfd, case / "checkpoint.pth", tmp_path / "out", "--source_config", tmp_path / "c.json")
    assert "n_channels is 64 in" in error
    assert "but 32 in the weights of" in error
    (tmp_path / "c.json").write_text(json.dumps({"is_attention": [True, True, True]}))
    error = error_of(capfd, case / "checkpoint.pth", tmp_path / "out", "--source_config", tmp_path / "c.json")
    assert "is_attn is [True, True, True] in" in error
    error = error_of(capfd, case / "checkpoint.pth", tmp_path / "out", "--from", "learnopencv")
    assert "from='learnopencv', but" in error
    assert "is a labml checkpoint" in error
    assert os.listdir(tmp_path) == ["c.json"]


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def damage(kind, good, path):
    if kind.startswith("legacy"):
        torch.save(torch.load(good, weights_only=True), path, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes()[: int(kind.split()[1])])
        return
    weights = torch.load(good, weights_only=True)
    if kind == "hostile":
        torch.save({"model": Hostile(path.with_name("made by a pickle"))}, path)
    elif kind == "truncated":
        path.write_bytes(good.read_bytes()[:20000])
    elif kind == "text":
        path.write_text("no weights")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "numbered":
        torch.save({0: torch.zeros(1)}, path)
    elif kind == "foreign":
        torch.save({"linear.weight": torch.zeros(2, 2)}, path)
    elif kind == "lacks":
        weights.pop("ups.0.resnet_conv_first.0.2.weight")
        torch.save(weights, path)
    elif kind == "extra":
        torch.save(weights | {"something.else": torch.zeros(1)}, path)
    elif kind == "nan":
        torch.save(weights | {"conv_out.bias": torch.full((1,), torch.nan)}, path)
    elif kind == "shape":
        torch.save(weights | {"conv_out.bias": torch.zeros(7)}, path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("hostile", "is not loaded, because it contains more than tensors"),
        ("truncated", "cannot be read as weights"),
        ("text", "cannot be read as weights: it is neither a .safetensors file nor one that torch.save wrote"),
        ("empty", "cannot be read as weights"),
        ("list", "has no named weights"),
        ("numbered", "has no named weights"),
        *[(f"legacy {n}", "cannot be read as weights|is not loaded") for n in (1, 3, 30, 500, 3000)],
        ("foreign", "is a checkpoint of none of explainingai, labml, learnopencv; its first keys are linear.weight"),
        ("lacks", "1 missing weights, such as up.0.layers.0.residual.conv_1.weight"),
        ("extra", "unexpected key something.else; no explainingai network of this size has it"),
        ("nan", "weights are not finite: 1 of 1.. tensors have NaN or infinities, such as conv_out.bias"),
        ("shape", r"conv_out.bias has shape \(7,\); it must be \(1,\)"),
    ],
)
def test_invalid_files_raise_and_leave_nothing(shared, tmp_path, capfd, kind, message):
    damage(kind, shared / "vectors/explainingai_gray28/checkpoint.pth", tmp_path / "a.pth")
    assert re.search(message, error_of(capfd, tmp_path / "a.pth", tmp_path / "out"))
    assert os.listdir(tmp_path) == ["a.pth"]


def test_invalid_folders_raise(shared, tmp_path, capfd):
    assert "does not exist" in error_of(capfd, tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    assert "has neither unet/config.json nor config.json" in error_of(capfd, tmp_path / "empty", tmp_path / "out")
    assert "exists already" in error_of(capfd, tmp_path / "empty", tmp_path / "empty")
    theirs_in(tmp_path / "theirs")
    shutil.copytree(tmp_path / "theirs", tmp_path / "cut")
    path = tmp_path / "cut/unet/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert "cannot be read as weights" in error_of(capfd, tmp_path / "cut", tmp_path / "out")
    (tmp_path / "cut/unet/config.json").write_text("{")
    assert "is not valid JSON" in error_of(capfd, tmp_path / "cut", tmp_path / "out")
    (tmp_path / "cut/unet/config.json").write_text('{"_class_name": "AutoencoderKL"}')
    assert "configures 'AutoencoderKL'; it must be 'UNet2DModel'" in error_of(capfd, tmp_path / "cut", tmp_path / "out")
    (tmp_path / "cut/unet/config.json").write_text('{"block_out_channels": 5}')
    assert "is not a valid UNet2DModel" in error_of(capfd, tmp_path / "cut", tmp_path / "out")
    file = tmp_path / "theirs/unet/diffusion_pytorch_model.safetensors"
    assert "is a file; with from='diffusers' it must be a folder" in error_of(
        capfd, file, tmp_path / "o", "--from", "diffusers"
    )
    error = error_of(capfd, tmp_path / "theirs", tmp_path / "out", "--from", "labml")
    assert "is a folder; with from='labml' it must be a file" in error
    assert not (tmp_path / "out").exists()


def test_settings_that_unet2d_does_not_support_raise(tmp_path, capfd):
    DDPMCustomPipeline(tiny_unet(), LinearNoiseScheduler()).save_pretrained(tmp_path / "ours")
    error = error_of(capfd, tmp_path / "ours", tmp_path / "out", "--to", "diffusers")
    assert "skip_connections='stage' is not supported by UNet2DModel; it must be 'layer'" in error
    assert "to='onnx'; the only choice is diffusers" in error_of(
        capfd, tmp_path / "ours", tmp_path / "o", "--to", "onnx"
    )
    assert os.listdir(tmp_path) == ["ours"]


def test_a_source_is_one_file(tmp_path, monkeypatch):
    code = "from ddpm_hf.convert.labml import SOURCE as labml\nimport dataclasses\n"
    (tmp_path / "mysource.py").write_text(code + "SOURCE = dataclasses.replace(labml, signature='mine.weight')\n")
    monkeypatch.setattr(convert, "__path__", [*convert.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "ddpm_hf.convert.convert", raising=False)
    found = runpy.run_module("ddpm_hf.convert.convert")
    assert found["KINDS"] == ("explainingai", "labml", "learnopencv", "mysource", "diffusers")
    assert found["SOURCES"]["mysource"].signature == "mine.weight"


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path):
    torch.save({"conv.weight": torch.ones(1).expand(2**30)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"conv.weight has shape \(1073741824,\) but only 4 bytes in the file"):
        load_weights(tmp_path / "a.pt")

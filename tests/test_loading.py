"""Saved, pushed and hostile folders: they load unchanged or raise."""

import contextlib
import json
import math
import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_unet
from diffusers import AutoModel, DDIMScheduler, DDPMScheduler, DiffusionPipeline, UNet2DModel
from diffusers.utils import logging
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from ddpm_hf import DDPMCustomPipeline, DDPMUNet, LinearNoiseScheduler
from ddpm_hf.hub.self_contained import code_of
from ddpm_hf.pipelines.loading import OLD_NAMES
from ddpm_hf.pipelines.pipeline import load_pipeline
from ddpm_hf.schedulers.solvers import SOLVERS, make_solver

HERE = Path(__file__).parent
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A saved pipeline, with training weights (variant raw) and half-precision weights."""
    pipeline = DDPMCustomPipeline(tiny_unet(), LinearNoiseScheduler())
    pipeline.save_pretrained(tmp_path / "model")
    raw = tiny_unet()
    with torch.no_grad():
        raw.conv_out.bias += 0.1
    raw.save_pretrained(tmp_path / "model/unet", variant="raw")
    tiny_unet().half().save_pretrained(tmp_path / "model/unet", variant="fp16")
    return tmp_path / "model"


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def sample(pipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(2, torch.Generator().manual_seed(1), num_inference_steps=3, output_type="pt").images


# ---------------------------------------------------------------- valid folders


def test_a_folder_of_classes_saved_by_an_earlier_version_samples_as_it_did():
    """Saved, with what it sampled, by version 0.1.0 of 2026-11-22, before `from_pretrained` was ours."""
    folder = HERE / "conditional_pipeline"
    pipeline = DDPMCustomPipeline.from_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    settings = {"class_labels": ["cat", "dog"], "guidance_scale": 2.0, "num_inference_steps": 10}
    images = pipeline(generator=generator, output_type="np", **settings).images
    assert_close(images, np.load(folder / "samples.npy"), rtol=0, atol=1e-5)


def test_from_the_hub_once_and_then_without_it(hub, folder, monkeypatch):
    hub.plant("me/model", files(folder) | {"notes.txt": b"not needed"})
    wanted = sample(DDPMCustomPipeline.from_pretrained(folder))
    assert_close(sample(DDPMCustomPipeline.from_pretrained("me/model")), wanted, rtol=0, atol=0)
    taken = {path.split("/resolve/")[1].split("/", 1)[1] for _, path in hub.requests if "/resolve/" in path}
    assert taken == {"model_index.json", "unet/config.json", WEIGHTS, "scheduler/scheduler_config.json"}
    hub.requests.clear()
    for offline in ("local_files_only", "HF_HUB_OFFLINE", "the Hub is down"):
        if offline == "HF_HUB_OFFLINE":
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        if offline == "the Hub is down":
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
            hub.fail("GET", times=100, status=503)
        pipeline = DDPMCustomPipeline.from_pretrained("me/model", local_files_only=offline == "local_files_only")
        assert_close(sample(pipeline), wanted, rtol=0, atol=0)
        assert bool(hub.requests) == (offline == "the Hub is down")
    with pytest.raises(OSError, match="'me/other' is not a local folder, and downloading it failed"):
        DDPMCustomPipeline.from_pretrained("me/other", local_files_only=True)


def test_the_parts_from_the_hub(hub, folder):
    hub.plant("me/model", files(folder))
    unet = DDPMUNet.from_pretrained("me/model", subfolder="unet")
    assert_close(unet.state_dict(), tiny_unet().state_dict())
    assert isinstance(AutoModel.from_pretrained("me/model", subfolder="unet"), DDPMUNet)
    assert len(LinearNoiseScheduler.from_pretrained("me/model", subfolder="scheduler")) == 1000
    stock = DiffusionPipeline.from_pretrained("me/model")
    assert isinstance(stock, DDPMCustomPipeline)
    assert_close(sample(stock), sample(DDPMCustomPipeline.from_pretrained("me/model")), rtol=0, atol=0)


def test_revisions(hub, folder):
    first = hub.plant("me/model", files(folder))
    weights = load_file(folder / WEIGHTS)
    weights["conv_out.bias"] += 1
    save_file(weights, folder / WEIGHTS)
    hub.plant("me/model", files(folder), revision="later")
    bias = {
        revision: DDPMCustomPipeline.from_pretrained("me/model", revision=revision).unet.conv_out.bias[0].item()
        for revision in (None, "main", first, "later")
    }
    assert bias[None] == bias["main"] == bias[first] == pytest.approx(bias["later"] - 1)
    with pytest.raises(OSError, match="never"):
        DDPMCustomPipeline.from_pretrained("me/model", revision="never")


def test_a_pipeline_in_a_subfolder(hub, folder, tmp_path):
    hub.plant("me/models", {f"digits/small/{name}": content for name, content in files(folder).items()})
    shutil.copytree(folder, tmp_path / "models/digits/small")
    for source in ("me/models", tmp_path / "models"):
        pipeline = DDPMCustomPipeline.from_pretrained(source, subfolder="digits/small")
        assert_close(pipeline.unet.state_dict(), tiny_unet().state_dict())


def test_variants_and_types(hub, folder):
    hub.plant("me/model", files(folder))
    for source in (folder, "me/model"):
        raw = DDPMCustomPipeline.from_pretrained(source, variant="raw")
        assert_close(raw.unet.conv_out.bias - tiny_unet().conv_out.bias, torch.tensor([0.1]))
        half = DDPMCustomPipeline.from_pretrained(source, variant="fp16", torch_dtype=torch.float16)
        assert half.unet.dtype == torch.float16
        assert_close(half.unet.state_dict(), tiny_unet().half().state_dict())
        assert DDPMCustomPipeline.from_pretrained(source, variant="fp16").unet.dtype == torch.float32
        assert DDPMCustomPipeline.from_pretrained(source, dtype=torch.bfloat16).unet.dtype == torch.bfloat16
        with pytest.raises(ValueError, match=r"has no diffusion_pytorch_model.bf16.safetensors; its weights are: "):
            DDPMCustomPipeline.from_pretrained(source, variant="bf16")


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_weights_in_several_files(hub, folder, variant):
    for file in (folder / "unet").glob("*.safetensors"):
        file.unlink()
    tiny_unet().save_pretrained(folder / "unet", variant=variant, max_shard_size="40KB")
    assert len(list((folder / "unet").glob("*-of-*.safetensors"))) > 2
    hub.plant("me/model", files(folder))
    for source in (folder, "me/model"):
        loaded = DDPMCustomPipeline.from_pretrained(source, variant=variant).unet
        assert_close(loaded.state_dict(), tiny_unet().state_dict())


def test_a_pipeline_of_stock_parts_and_parts_that_are_given(folder, tmp_path):
    unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 8),
                       norm_num_groups=4, down_block_types=("DownBlock2D",) * 2,
                       up_block_types=("UpBlock2D",) * 2)  # fmt: skip
    DDPMCustomPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "stock")
    loaded = DDPMCustomPipeline.from_pretrained(tmp_path / "stock")
    assert (type(loaded.unet), type(loaded.scheduler)) == (UNet2DModel, DDPMScheduler)
    scheduler = DDIMScheduler()
    given = DDPMCustomPipeline.from_pretrained(folder, scheduler=scheduler)
    assert given.scheduler is scheduler
    shutil.rmtree(folder / "unet")
    assert DDPMCustomPipeline.from_pretrained(folder, unet=unet).unet is unet


def test_a_loaded_network_computes_the_same_bits_as_the_saved_one(folder):
    """Whatever the length of the header, which shifts the weights in the file."""
    x, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(500)
    weights = load_file(folder / WEIGHTS)
    outputs = []
    for padding in ("", "x", "xyz" * 5):
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt", "padding": padding})
        unet = DDPMCustomPipeline.from_pretrained(folder).unet
        assert all(p.data_ptr() % 16 == 0 for p in unet.parameters())
        outputs.append(unet(x, t).sample)
    assert_close(outputs, [tiny_unet()(x, t).sample] * 3, rtol=0, atol=0)


# ---------------------------------------------------------------- invalid and hostile folders


class Evil:
    """An object whose unpickling creates a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_no_pickle_is_loaded(hub, folder, tmp_path):
    touched = tmp_path / "touched"
    for file in (folder / "unet").glob("*.safetensors"):
        file.unlink()
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Evil(touched)))
    hub.plant("me/model", files(folder))
    with pytest.raises(ValueError, match=r"\.bin; pickle files are not loaded, because they can run any code"):
        DDPMCustomPipeline.from_pretrained(folder)
    with pytest.raises(ValueError, match="has no diffusion_pytorch_model.safetensors"):
        DDPMCustomPipeline.from_pretrained("me/model")
    for load in (lambda: DDPMUNet.from_pretrained(folder, subfolder="unet"),
                 lambda: DiffusionPipeline.from_pretrained(folder)):  # fmt: skip
        with pytest.raises(OSError, match="safetensors"):
            load()
    for load in (lambda: DDPMUNet.from_pretrained(folder, subfolder="unet", use_safetensors=False),
                 lambda: DDPMCustomPipeline.from_pretrained(folder, use_safetensors=False)):  # fmt: skip
        with pytest.raises(ValueError, match="use_safetensors=False is not supported: loading a pickle"):
            load()
    assert not touched.exists()


def test_code_beside_a_model_is_not_run(hub, folder, tmp_path):
    touched = tmp_path / "touched"
    evil = f"open({str(touched)!r}, 'w')\n".encode()
    shipped = {name: evil if name.endswith(".py") else content for name, content in code_of(folder).items()}
    for name, content in shipped.items():
        (folder / name).write_bytes(content)
    hub.plant("me/model", files(folder))
    for source in (folder, "me/model"):
        assert isinstance(DDPMCustomPipeline.from_pretrained(source).unet, DDPMUNet)
        for name in ({"trust_remote_code": True}, {"custom_pipeline": "pipeline"}):
            with pytest.raises(ValueError, match="it never runs code of a repository"):
                DDPMCustomPipeline.from_pretrained(source, **name)
        with pytest.raises(ValueError, match="trust_remote_code"):
            DiffusionPipeline.from_pretrained(source)
    assert not touched.exists()
    assert not any(path.endswith(".py") for _, path in hub.requests)


@pytest.mark.parametrize(
    "name", ["unet/../../evil.json", "../evil", "a/../../evil", "..\\evil.safetensors", "/etc/evil"]
)
def test_path_traversal_in_a_repository(hub, folder, name):
    hub.plant("me/model", files(folder) | {name: b"{}"})
    with pytest.raises((ValueError, OSError), match=r"evil"):
        DDPMCustomPipeline.from_pretrained("me/model")


@pytest.mark.parametrize(
    "name", ["model_index.json", "unet/config.json", WEIGHTS, "scheduler/scheduler_config.json", "unet"]
)
def test_links_out_of_the_folder(folder, tmp_path, name):
    elsewhere = tmp_path / "elsewhere"
    shutil.move(folder / name, elsewhere)
    (folder / name).symlink_to(elsewhere)
    with pytest.raises(ValueError, match="is a link to .*elsewhere.*; replace it by the file"):
        DDPMCustomPipeline.from_pretrained(folder)


def test_links_inside_the_folder_and_to_it_load(folder, tmp_path):
    (folder / WEIGHTS).rename(folder / "weights.safetensors")
    (folder / WEIGHTS).symlink_to(folder / "weights.safetensors")
    (tmp_path / "latest").symlink_to(folder)
    DDPMCustomPipeline.from_pretrained(tmp_path / "latest")


HOSTILE = {
    "unknown": ({"attention_magic": 3}, "unknown settings attention_magic"),
    "wide": (
        {"block_out_channels": [16, 10**12]},
        r"block_out_channels=\[16, 1000000000000\] must be a list .* must be at most 2,147,483,647",
    ),
    "deep": ({"layers_per_block": 10**9}, "layers_per_block=1000000000 must be at most 100: each"),
    "long": (
        {"mid_block_out_channels": [16] * 10**5},
        r"mid_block_out_channels=\[16, .* must be a list of integers of at least 1, one per stage, at most 10",
    ),
    "classes": ({"num_classes": 10**10}, "num_classes=10000000000 must be an integer in 1 ... 1,000,000, or None"),
    "large": ({"sample_size": 10**7}, "sample_size=10000000 must be a side or .* 1 ... 65536"),
    "text": ({"stem_channels": "8"}, "stem_channels='8' must be an integer of at least 1"),
    "negative": ({"stem_channels": -8}, "stem_channels=-8 must be"),
    "object": ({"attention": {"a": 1}}, "attention"),
    "type": ({"freq_shift": "x"}, "config.json: "),
    "null": ({"time_embedding_dim": None}, "time_embedding_dim"),
    "other": ({"time_embedding_dim": 8}, "has shape .* in the weights and"),
    "huge": ({"norm_eps": 10**400}, r"norm_eps=1000.* must be a number in \(0, 1\]"),
    "word": ({"norm_eps": "a"}, r"norm_eps='a' must be a number in \(0, 1\]"),
    "flag": ({"dropout_channels": "no"}, "dropout_channels='no' must be true or false"),
    "escape": ({"\x1b[31mred": 1}, r"unknown settings \\x1b\[31mred"),
    "names": ({"num_classes": 1, "class_names": ["x" * 10**6]}, r"class_names=\['xxx.* must be a list of names"),
    "many": ({"mid_block_out_channels": [16] * 10, "mid_layers_per_block": 8}, "in 14 stages is too large"),
    "wider": ({"time_embedding_dim": 10**6}, "time_embedding_dim is 1000000, too large for 104 weights"),
    "more": ({"num_classes": 3}, "class_embedding.weight has shape None"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_configurations_of_a_network(folder, case):
    changes, message = HOSTILE[case]
    path = folder / "unet/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message) as caught:
        DDPMCustomPipeline.from_pretrained(folder)
    assert "unet" in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_train_timesteps": 10**12}, r"num_train_timesteps=1000000000000 must be an integer in 1 ... 1,000,000"),
        ({"num_train_timesteps": "1000"}, r"num_train_timesteps='1000' must be an integer"),
        ({"beta_end": 1.5}, "beta"),
        ({"prediction_type": "import os"}, "prediction_type='import os'"),
        ({"noise_from": "nowhere"}, "unknown settings noise_from"),
        ({"solver_order": 10**11}, "solver_order=100000000000 must be at most 1,000,000"),
        ({"trained_betas": 5}, "scheduler_config.json: TypeError"),
        ({"beta_start": "x"}, "beta_start='x' must be a number in \\(0, 1\\)"),
        ({"clip_sample_range": None}, "clip_sample_range=None must be a finite number greater than 0"),
    ],
)
def test_hostile_configurations_of_a_scheduler(folder, changes, message):
    path = folder / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        DDPMCustomPipeline.from_pretrained(folder)


STOCK = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 8),
                    norm_num_groups=4, attention_head_dim=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                    up_block_types=("AttnUpBlock2D", "UpBlock2D"))  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_out_channels": [8, 40000]}, "block_out_channels is 40000, too large"),
        ({"layers_per_block": 1000000}, "layers_per_block is 1000000, too large"),
        ({"layers_per_block": 2}, "has shape None in the weights"),
        ({"quantization_config": {"quant_method": "torchao"}}, "unknown settings quantization_config"),
    ],
)
def test_hostile_configurations_of_a_stock_network(tmp_path, changes, message):
    DDPMCustomPipeline(STOCK, LinearNoiseScheduler()).save_pretrained(tmp_path)
    DDPMCustomPipeline.from_pretrained(tmp_path)
    path = tmp_path / "unet/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        DDPMCustomPipeline.from_pretrained(tmp_path)


def test_weights_of_a_stock_network_by_their_older_names(tmp_path):
    DDPMCustomPipeline(STOCK, LinearNoiseScheduler()).save_pretrained(tmp_path)
    older, weights = {new: old for old, new in OLD_NAMES.items()}, load_file(tmp_path / WEIGHTS)
    for new, old in older.items():
        weights = {name.replace(new, old): weight for name, weight in weights.items()}
    assert any(".query." in name for name in weights)
    save_file(weights, tmp_path / WEIGHTS, metadata={"format": "pt"})
    assert_close(DDPMCustomPipeline.from_pretrained(tmp_path).unet.state_dict(), STOCK.state_dict())


def test_padding_tensors_do_not_allow_a_larger_network(folder):
    weights = load_file(folder / WEIGHTS)
    save_file(weights | {"pad": torch.zeros(10**5), "none": torch.zeros(10**9, 0)}, folder / WEIGHTS)
    path = folder / "unet/config.json"
    changes = {"mid_block_out_channels": [16] * 10, "mid_layers_per_block": 20}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match="too large"):
        DDPMCustomPipeline.from_pretrained(folder)


@pytest.mark.parametrize("name", ["ddpm", *SOLVERS])
def test_a_pipeline_with_each_solver_for_its_own(folder, tmp_path, name):
    pipeline = DDPMCustomPipeline.from_pretrained(folder)
    for scheduler in (make_solver(name, pipeline.scheduler), type(make_solver(name, pipeline.scheduler))()):
        DDPMCustomPipeline(pipeline.unet, scheduler).save_pretrained(tmp_path / "again")
        loaded = DDPMCustomPipeline.from_pretrained(tmp_path / "again").scheduler
        assert type(loaded) is type(scheduler)
        ours, theirs = ({k: v for k, v in s.config.items() if k[0] != "_"} for s in (scheduler, loaded))
        assert json.dumps(ours, sort_keys=True) == json.dumps(theirs, sort_keys=True)


@pytest.mark.parametrize("library", ["ddpm_hf.models.unet", "diffusers_modules.local.ddpm_hf_0123_unet", "anything"])
def test_the_module_that_a_class_was_saved_from_does_not_matter(folder, library):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"unet": [library, "DDPMUNet"], "": 1}))
    assert_close(DDPMCustomPipeline.from_pretrained(folder).unet.state_dict(), tiny_unet().state_dict())


def test_arguments_of_diffusers_that_have_no_effect(folder):
    nothing = {"use_safetensors": True, "trust_remote_code": False, "custom_revision": None, "safety_checker": None}
    half = DDPMCustomPipeline.from_pretrained(folder, torch_dtype={"default": torch.float16}, subfolder=None, **nothing)
    assert half.unet.dtype == torch.float16
    given, from_pretrained = [], DDPMUNet.from_pretrained
    with pytest.MonkeyPatch.context() as patch:  # which asks for something, False as it is
        patch.setattr(DDPMUNet, "from_pretrained", lambda *a, **k: given.append(k) or from_pretrained(*a, **k))
        DDPMCustomPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    assert given[0]["low_cpu_mem_usage"] is False
    with pytest.raises(ValueError, match="torch_dtype='auto' must be a torch.dtype"):
        DDPMCustomPipeline.from_pretrained(folder, torch_dtype="auto")
    with pytest.raises(ValueError, match="pretrained_model_name_or_path='' must be a folder, or user/model"):
        DDPMCustomPipeline.from_pretrained("")


def test_settings_that_a_scheduler_keeps_from_another_scheduler(folder):
    from diffusers import DPMSolverMultistepScheduler

    LinearNoiseScheduler.from_config(DPMSolverMultistepScheduler(solver_order=3).config).save_pretrained(
        folder / "scheduler"
    )
    assert "solver_order" in (folder / "scheduler/scheduler_config.json").read_text()
    DDPMCustomPipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (["os", "system"], r"unet=\['os', 'system'\] must be DDPMUNet, or a unet class of diffusers"),
        (["diffusers", "os"], "must be DDPMUNet"),
        (["diffusers", "DDPMScheduler"], "must be DDPMUNet"),
        (["diffusers", "__builtins__"], "must be DDPMUNet"),
        (["diffusers", "ModelMixin"], "must be DDPMUNet"),
        ("DDPMUNet", "must be a list of a library and a class name"),
        ([["x"], {}], "must be a list of a library and a class name"),
        ([None, None], "must be a list of a library and a class name"),
    ],
)
def test_an_index_that_names_something_else(folder, entry, message):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"unet": entry}))
    with pytest.raises(ValueError, match=message):
        DDPMCustomPipeline.from_pretrained(folder)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b'{"a": NaN}', b"[" * 100_000])
@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_invalid_json(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=Path(name).name):
        DDPMCustomPipeline.from_pretrained(folder)


def test_a_pipeline_of_another_kind(folder):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"vae": ["diffusers", "AutoencoderKL"]}))
    with pytest.raises(ValueError, match="unknown components vae; a DDPM has only unet and scheduler"):
        DDPMCustomPipeline.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"model_index.json does not exist, so this is not the folder of a pipeline"):
        DDPMCustomPipeline.from_pretrained(folder / "unet")
    with pytest.raises(ValueError, match="from_pretrained has no argument steps"):
        DDPMCustomPipeline.from_pretrained(folder, steps=3)


def lying(content: bytes, change) -> bytes:
    """A safetensors file whose header `change` has changed."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


LIES = {
    "shape": lambda header: header["conv_out.bias"].update(shape=[10**12]),
    "type": lambda header: header["conv_out.bias"].update(dtype="F64"),
    "integers": lambda header: header["conv_out.bias"].update(dtype="I32"),
    "offsets": lambda header: header["conv_out.bias"].update(data_offsets=[0, 10**15]),
    "overlap": lambda header: header["stem.bias"].update(data_offsets=[0, 32]),
    "backwards": lambda header: header["conv_out.bias"].update(data_offsets=[8, 4]),
    "missing": lambda header: header.pop("conv_out.bias"),
    "name": lambda header: header.update({"other": header.pop("conv_out.bias")}),
}


@pytest.mark.parametrize("lie", LIES)
def test_inconsistent_headers(folder, lie):
    path = folder / WEIGHTS
    path.write_bytes(lying(path.read_bytes(), LIES[lie]))
    with pytest.raises(ValueError, match="diffusion_pytorch_model.safetensors|in the weights and"):
        DDPMCustomPipeline.from_pretrained(folder)


@pytest.mark.parametrize("change", [lambda c: c[:-4], lambda c: c + b"tail", lambda c: b"\xff" * 7 + b"\x7f" + c[8:],
                                    lambda c: b"", lambda c: b"<html>404</html>"])  # fmt: skip
def test_weights_that_are_damaged(folder, change):
    path = folder / WEIGHTS
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model.safetensors is damaged"):
        DDPMCustomPipeline.from_pretrained(folder)


@pytest.mark.parametrize("file", ["../../elsewhere.safetensors", "/etc/passwd", "weights.bin", "a/b.safetensors"])
def test_an_index_of_weights_with_paths_out_of_the_folder(folder, file):
    name = "unet/diffusion_pytorch_model.safetensors.index.json"
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": {"conv_out.bias": file}}))
    with pytest.raises(ValueError, match="must be a safetensors file in the same folder"):
        DDPMCustomPipeline.from_pretrained(folder)


def test_errors_of_downloads_do_not_show_the_token(hub, monkeypatch):
    hub.plant("you/secret", {"model_index.json": b"{}"}, private=True)
    for token in ("hf_secret", "hf_nobody"):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(OSError, match="'you/secret' is not a local folder, and downloading it failed") as caught:
            DDPMCustomPipeline.from_pretrained("you/secret")
        assert token not in str(caught.value)
    with pytest.raises(ValueError, match="'no/such/name' is neither a local folder nor user/model on the Hub"):
        DDPMCustomPipeline.from_pretrained("no/such/name")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_not_loaded(folder, value):
    pipeline = DDPMCustomPipeline.from_pretrained(folder)
    pipeline.unet.conv_out.bias.data[0] = value
    pipeline.unet.stem.weight.data[0] = value
    pipeline.save_pretrained(folder)
    number = len(pipeline.unet.state_dict())
    message = (
        f"weights are not finite: 2 of {number} tensors have NaN or infinities, such as stem.weight .float32.; load"
    )
    with pytest.raises(ValueError, match=rf"model='.*' can't be loaded: .*unet: {message}"):
        load_pipeline(str(folder), "model")
    with pytest.raises(ValueError, match=message):
        DDPMCustomPipeline.from_pretrained(folder)


def test_weights_that_are_too_large_for_their_type_are_not_loaded(folder):
    pipeline = DDPMCustomPipeline.from_pretrained(folder)
    pipeline.unet.conv_out.bias.data[0] = 1e5
    pipeline.save_pretrained(folder)
    DDPMCustomPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"not finite: 1 of .* such as conv_out.bias \(float16\); load weights that are"
    ):
        DDPMCustomPipeline.from_pretrained(folder, torch_dtype=torch.float16)


@pytest.mark.parametrize("source", ["folder", "nowhere"])
def test_load_pipeline_restores_the_logging_and_progress_bars_of_the_caller(folder, source):
    logger = logging.get_logger()
    level, bars = logger.level, logging.is_progress_bar_enabled()
    try:
        for caller_level in (logging.INFO, logging.NOTSET):
            logger.setLevel(caller_level)
            logging.disable_progress_bar()
            with pytest.raises(ValueError, match="nowhere") if source == "nowhere" else contextlib.nullcontext():
                load_pipeline(str(folder) if source == "folder" else "./nowhere", "model")
            assert logger.level == caller_level
            assert not logging.is_progress_bar_enabled()
    finally:
        logger.setLevel(level)
        if bars:
            logging.enable_progress_bar()

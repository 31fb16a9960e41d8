"""Files that anybody may have written: sizes, nesting and names have limits, and errors are one short sentence."""

import ast
import json
import os
import pickle
import shutil
import time
import zipfile
from pathlib import Path

import diffusers
import pytest
import torch
from conftest import tiny_unet
from safetensors.torch import load_file, save_file

import ddpm_hf
from ddpm_hf import DDPMCustomPipeline, LinearNoiseScheduler
from ddpm_hf.commands.sample_folder import sample_to_folder
from ddpm_hf.convert.convert import convert
from ddpm_hf.convert.weights import load_weights
from ddpm_hf.hub.cards import read_facts
from ddpm_hf.hub.contents import files_of
from ddpm_hf.training.checkpoints import Checkpoints, Damaged
from ddpm_hf.utils.arguments import NOT_FINITE, parse_json, read_json
from ddpm_hf.utils.results import read_evaluation

PACKAGE = Path(ddpm_hf.__file__).parent


def refusal(call, *words: str) -> str:
    """The message of the ValueError that a call ends in, at once and in one short line."""
    began = time.monotonic()
    with pytest.raises((ValueError, Damaged)) as caught:
        call()
    message = str(caught.value)
    assert time.monotonic() - began < 5
    assert len(message) <= 500
    assert message.isprintable()
    for word in words:
        assert word in message
    return message


# ---------------------------------------------------------------- JSON


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.name)
def test_json_is_read_within_limits(path):
    """`parse_json` alone calls `json.loads`, except for a copy of what the same line writes."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "json":
            raise AssertionError(f"{path.name}:{node.lineno}: import json, so that this test sees its calls")
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.load", "json.loads", "json.JSONDecoder"):
            is_copy = ast.unparse(node).startswith("json.loads(json.dumps(")
            assert is_copy or path.name == "arguments.py", f"{path.name}:{node.lineno}"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is not valid JSON: Expecting value"),
        (b"{", "it is not valid JSON"),
        (b"[]", "it must hold an object, not list"),
        (b"\xff\xff", "can't decode"),
        (b'{"a": NaN}', "it has the value NaN, which is not valid JSON"),
        (b'{"a": [-Infinity]}', "it has the value -Infinity, which is not valid JSON"),
        (b'{"a": 1, "b": {"c": 1, "d": 2, "c": 3}}', "it has the name 'c' twice"),
        (b'{"a": %s}' % (b"9" * 5000), "4300 digits"),
        (b'{"a": ' + b"[" * 51 + b"]" * 51 + b"}", "its values are nested too deeply"),
        (b'{"a":' * 100_000, "its values are nested too deeply"),
        (b'{"%s": 1, "%s": 2}' % (b"\x1b[31m" * 10**5, b"a" * 10**5), "it is not valid JSON"),
        (b'{"%s": 1, "%s": 2}' % (b"a" * 10**5, b"a" * 10**5), "it has the name 'aaa"),
    ],
)
def test_what_is_no_json_object_is_refused(tmp_path, content, reason):
    (tmp_path / "a.json").write_bytes(content)
    message = refusal(lambda: read_json(tmp_path / "a.json"), f"{tmp_path / 'a.json'} can't be read: ")
    assert reason in message


def test_what_is_no_file_is_refused(tmp_path):
    refusal(lambda: read_json(tmp_path / "a.json"), "a.json can't be read: No such file or directory")
    refusal(lambda: read_json(tmp_path), f"{tmp_path} can't be read: it is not a file")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        refusal(lambda: read_json(tmp_path / "pipe"), "it is not a file")


def test_what_is_json_is_read(tmp_path):
    value = {"a": [1, 2.5, None, True, "Grüße"], "b": {"a": {}}}
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "a.json").write_text(json.dumps(value, ensure_ascii=False), encoding=encoding)
        assert read_json(tmp_path / "a.json") == value
    assert parse_json('{"a": Infinity, "b": -Infinity}', NOT_FINITE) == {"a": float("inf"), "b": -float("inf")}
    assert parse_json('{"a":' + "[" * 49 + "]" * 49 + "}")


@pytest.fixture
def folder(tmp_path) -> Path:
    DDPMCustomPipeline(tiny_unet(), LinearNoiseScheduler(num_train_timesteps=20)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


READERS = {
    "model_index.json": DDPMCustomPipeline.from_pretrained,
    "unet/config.json": DDPMCustomPipeline.from_pretrained,
    "scheduler/scheduler_config.json": DDPMCustomPipeline.from_pretrained,
    "unet/diffusion_pytorch_model.safetensors.index.json": DDPMCustomPipeline.from_pretrained,
    "evaluation.json": lambda folder: read_evaluation(folder / "evaluation.json"),
    "run.json": lambda folder: read_facts(folder / "run.json"),
    "train_config.json": lambda folder: files_of(folder, DDPMCustomPipeline.from_pretrained(folder), "me/model"),
    "checkpoint-4/state.json": lambda folder: Checkpoints(folder, 2)._state(folder / "checkpoint-4"),
    "sampling.json": lambda folder: sample_to_folder(DDPMCustomPipeline.from_pretrained(folder), folder, 1),
    "theirs/config.json": lambda folder: convert(folder / "theirs", folder / "out"),
    "theirs/scheduler_config.json": lambda folder: convert(folder / "theirs", folder / "out"),
}


@pytest.mark.parametrize("name", READERS)
def test_a_file_of_two_gibibytes_is_refused_at_once(folder, name):
    """It is sparse: it takes no room on the disk, but it would take memory."""
    if name.startswith("theirs"):
        diffusers.UNet2DModel(8, 1, 1, block_out_channels=(32,), layers_per_block=1, norm_num_groups=4,
                              down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
                              ).save_pretrained(folder / "theirs")  # fmt: skip
    (folder / name).parent.mkdir(exist_ok=True)
    with open(folder / name, "wb") as file:
        file.truncate(2**31)
    refusal(lambda: READERS[name](folder), Path(name).name, "it has 2,147,483,648 bytes; the limit is")


# ---------------------------------------------------------------- weights of other projects


def archive_of(path: Path, weights: dict, change) -> Path:
    """A file of torch.save whose records `change(name, content)` returns with the way to compress them."""
    torch.save(weights, path.with_suffix(".whole"))
    with zipfile.ZipFile(path.with_suffix(".whole")) as whole, zipfile.ZipFile(path, "w") as archive:
        for name in whole.namelist():
            content, kind = change(name, whole.read(name))
            archive.writestr(name, content, kind)
    return path


def test_a_small_file_that_unpacks_to_a_large_one_is_refused(tmp_path):
    def compress(name, content):
        return content, zipfile.ZIP_DEFLATED

    path = archive_of(tmp_path / "a.pt", {"conv.weight": torch.zeros(2**24)}, compress)
    assert path.stat().st_size < 2**20
    refusal(lambda: load_weights(path), "a.pt cannot be read as weights: its records have 67,", "bytes; the limit is")

    def bomb(name, content):
        return (pickle.dumps("a" * 2**26, 2), zipfile.ZIP_DEFLATED) if name.endswith("data.pkl") else (content, 0)

    path = archive_of(tmp_path / "b.pt", {"conv.weight": torch.zeros(2)}, bomb)
    refusal(lambda: load_weights(path), "b.pt cannot be read as weights: its records have 67,")
    path = archive_of(tmp_path / "c.pt", {"conv.weight": torch.arange(3.0)}, lambda name, content: (content, 0))
    assert load_weights(path)["conv.weight"].tolist() == [0, 1, 2]


def looped() -> dict:
    content = {}
    content["model"] = content
    return content


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda: {"a": torch.ones(4).to_sparse()}, "a is a sparse, quantized or empty tensor"),
        (lambda: {"a": torch.ones(4, device="meta")}, "a is a sparse, quantized or empty tensor"),
        (lambda: dict.fromkeys("abcd", torch.ones(100)), "its tensors have 1600 bytes; the limit is 400"),
        (lambda: {"a" * 10**7: torch.ones(1)}, "it has a name of 10,000,000 characters; the limit is 500"),
        (lambda: {"module." * 10**6: torch.ones(1)}, "it has a name of 7,000,000 characters"),
        (lambda: {str(k): k for k in range(10**5 + 1)}, "it has 100,001 names; the limit is"),
        (looped, "maximum recursion depth exceeded"),
        (lambda: {"\x1b[31m\n": torch.ones(1), "b": 1}, "has no named weights"),
    ],
)
def test_hostile_weights_are_refused(tmp_path, content, reason):
    torch.save(content(), tmp_path / "a.pt")
    refusal(lambda: load_weights(tmp_path / "a.pt"), str(tmp_path / "a.pt"), reason)


def test_names_in_files_do_not_make_errors_long(tmp_path):
    torch.save({"\x1b[31m" + "a" * 400: torch.ones(1)}, tmp_path / "a.pt")
    message = refusal(lambda: convert(tmp_path / "a.pt", tmp_path / "out"), "is a checkpoint of none of")
    assert r"\x1b[31maaa" in message
    hostile = b"\x80\x02c" + b"m" * 10**7 + b"\nname\n."  # 91 million characters were in one error
    (tmp_path / "b.pt").write_bytes(hostile)
    archive_of(tmp_path / "c.pt", {}, lambda name, content: (hostile if name.endswith("data.pkl") else content, 0))
    for name in ("b.pt", "c.pt"):
        refusal(lambda: convert(tmp_path / name, tmp_path / "out"), name, "global name of 10,000,005 characters")  # noqa: B023


@pytest.mark.parametrize("steps", [10**7, 10**12])
@pytest.mark.parametrize("kind", ["tutorial", "scheduler"])
def test_a_configuration_of_many_timesteps_is_refused(shared, tmp_path, folder, kind, steps):
    if kind == "tutorial":
        (tmp_path / "a.yaml").write_text(f"diffusion_params:\n  num_timesteps: {steps}\n", encoding="utf-8")
        source, more = shared / "vectors/explainingai_gray28/checkpoint.pth", {"source_config": tmp_path / "a.yaml"}
    else:
        shutil.copytree(shared / "vectors/diffusers_ddpm_cifar10_small", tmp_path / "theirs")
        source, more = tmp_path / "theirs", {}
        (source / "scheduler").mkdir()
        path = source / "scheduler/scheduler_config.json"
        path.write_text(json.dumps({"_class_name": "DDPMScheduler", "variance_type": "fixed_small_log",
                                    "num_train_timesteps": steps}), encoding="utf-8")  # fmt: skip
    refusal(lambda: convert(source, tmp_path / "out", **more), "num_train_timesteps=1000000", "1,000,000")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layers_per_block": 10**6}, "layers_per_block=1000000 must be at most 100"),
        ({"block_out_channels": [32] * 10**5}, "block_out_channels=[32, 32"),
        ({"block_out_channels": [2000] * 4, "norm_num_groups": 4}, "has shape"),
        ({"_class_name": "x" * 10**6}, "configures 'xxx"),
        ({"down_block_types": ["\x1b[31m" * 10**5] * 2}, r"\x1b[31m"),
    ],
)
def test_a_configuration_of_a_large_network_is_refused(shared, tmp_path, changes, reason):
    shutil.copytree(shared / "vectors/diffusers_ddpm_cifar10_small", tmp_path / "theirs")
    (path,) = (p for p in tmp_path.rglob("config.json"))
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")
    refusal(lambda: convert(tmp_path / "theirs", tmp_path / "out"), reason)


def test_weights_that_are_no_floating_point_numbers_are_refused(shared, tmp_path):
    shutil.copytree(shared / "vectors/diffusers_ddpm_cifar10_small", tmp_path / "theirs")
    (path,) = tmp_path.rglob("*model.safetensors")
    weights = load_file(path)
    save_file(weights | {"conv_in.bias": weights["conv_in.bias"].to(torch.int64)}, path)
    refusal(lambda: convert(tmp_path / "theirs", tmp_path / "out"), "has the type torch.int64")

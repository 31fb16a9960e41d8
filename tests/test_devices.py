"""Which device the commands compute on."""

import pytest
import torch
from conftest import tiny_config

from ddpm_hf.commands.main import main
from ddpm_hf.training import batch as batches
from ddpm_hf.training.loss import Batch
from ddpm_hf.utils.devices import choose_device


def accelerator_is(monkeypatch, kind):
    found = None if kind is None else torch.device(kind)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: found)


def test_the_accelerator_of_the_machine_is_chosen(monkeypatch):
    for kind in ("cuda", "mps", None):
        accelerator_is(monkeypatch, kind)
        assert choose_device().type == (kind or "cpu")
        assert choose_device("cpu") == torch.device("cpu")
    accelerator_is(monkeypatch, "cuda")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert choose_device() == torch.device("cuda:3")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert choose_device() == torch.device("cpu")


@pytest.mark.parametrize("command", ["train", "sample", "evaluate", "demo"])
def test_a_device_that_is_missing(monkeypatch, capfd, command, trained):
    accelerator_is(monkeypatch, "mps")
    assert main([command, *([] if command == "train" else [str(trained)]), "--device", "cuda"]) == 2
    message = "device='cuda' is no device that PyTorch finds on this machine; choose mps or cpu"
    assert capfd.readouterr().err.splitlines()[-1] == f"ddpm-hf: error: {message}"


def test_the_cpu_can_be_named(tmp_path, trained, capfd):
    settings = tmp_path / "train_config.json"
    tiny_config(tmp_path / "run", max_train_steps=1).save(settings)
    assert main(["train", "--config", str(settings), "--device", "cpu"]) == 0
    flags = ["--num_samples", "10", "--num_inference_steps", "2", "--metrics", "drift", "--device", "cpu"]
    assert main(["evaluate", str(trained), "--output", str(tmp_path / "e.json"), *flags]) == 0
    assert '"device"' not in (tmp_path / "run/train_config.json").read_text()


def test_no_float64_goes_to_mps(monkeypatch):
    """MPS has no float64. The largest float64 below 1 must not become 1, which would be timestep T."""
    monkeypatch.setattr(batches, "to_device", lambda tensor, device: tensor)
    zeros = torch.zeros(1, 1, 2, 2)
    moved = batches.on_device(Batch(zeros, zeros, torch.tensor([1 - 2**-53]).double(), None), torch.device("mps"))
    assert moved.uniform.dtype == torch.float32
    assert (moved.uniform * 1000).long() == 999

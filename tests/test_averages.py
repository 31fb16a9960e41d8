"""Averages of the weights by their closed form, and those of other lengths that are made after the training."""

import copy
import math
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import tiny_config
from safetensors.torch import load_file, save_file
from test_training import flip_a_bit, weights
from torch import nn
from torch.testing import assert_close

from ddpm_hf import DDPMCustomPipeline
from ddpm_hf.commands.main import main
from ddpm_hf.training import train
from ddpm_hf.training.checkpoints import thin
from ddpm_hf.training.ema import EMA, POST_HOC, power_decay
from ddpm_hf.training.plan import at_rest, image_shape, network
from ddpm_hf.training.post_hoc import coefficients, combine, make_average

POST = {"max_train_steps": 80, "checkpointing_steps": 5, "post_hoc_ema": True, "ema_sigma_rel": 0.15}
POST |= {"checkpoints_total_limit": 2, "preview_time_share": 0.0}


@pytest.mark.parametrize("sigma_rel", [0.03, 0.05, 0.1, 0.2, 0.28])
def test_a_power_function_average_counts_each_update_by_its_formula(sigma_rel):
    n, counts = 400, np.zeros(400)
    for step in range(1, n + 1):
        decay = power_decay(sigma_rel, step)
        counts *= decay
        counts[step - 1] += 1 - decay
    assert counts.sum() == pytest.approx(1)
    middles = (np.arange(n) + 0.5) / n
    deviation = math.sqrt(counts @ middles**2 - (counts @ middles) ** 2)
    assert deviation == pytest.approx(sigma_rel, rel=2e-3)


class Walk:
    """A random walk of some weights, with its power-function averages of all lengths."""

    def __init__(self, *sigmas, size=2000):
        self.network = nn.Linear(size, 1, bias=False)
        self.generator = torch.Generator().manual_seed(0)
        self.kept = {sigma: EMA(self.network, 0.9, sigma) for sigma in sigmas}
        self.post_hoc = EMA(self.network, 0.9, post_hoc=True)

    def step(self, number):
        with torch.no_grad():
            self.network.weight += torch.randn(self.network.weight.shape, generator=self.generator)
        for average in (*self.kept.values(), self.post_hoc):
            average.update(self.network, number)


def distance(a, b):
    return (a - b).square().mean().sqrt().item()


def test_the_two_averages_are_those_that_are_kept_alone():
    walk = Walk(*POST_HOC, size=5)
    for step in range(1, 50):
        walk.step(step)
    for sigma, kept in walk.kept.items():
        assert torch.equal(walk.post_hoc.averages()[f"{sigma}/weight"], kept.model.weight)
    before = copy.deepcopy(walk.post_hoc.averages())
    walk.post_hoc.update(walk.network, 50, torch.tensor(False))
    assert_close(walk.post_hoc.averages(), before, rtol=0, atol=0)


def test_an_average_of_another_length_is_that_which_is_kept_from_the_start(tmp_path):
    """Of a random walk, which moves by far more than a training does, in units of the distance to its last place."""
    walk, files, lengths = Walk(0.03, 0.075, 0.1, 0.15, 0.2), {}, {}
    for step in range(1, 1601):
        walk.step(step)
        if step % 50 == 0:
            files[step] = tmp_path / f"{step}.safetensors"
            save_file({name: w.half() for name, w in walk.post_hoc.averages().items()}, files[step])
    for sigma, kept in walk.kept.items():
        made, error = combine(files, sigma)
        off = distance(made["weight"], kept.model.weight) / distance(walk.network.weight, kept.model.weight)
        lengths[sigma] = off, error
    print(lengths)
    assert lengths[0.1][1] < 1e-6
    assert max(off for off, _ in lengths.values()) < 0.01


def test_the_combination_is_an_average_of_least_squares():
    """Of densities on a fine grid, with the sum of the coefficients as a condition."""
    steps, grid = [30, 50, 80, 100], (np.arange(200_000) + 0.5) / 2000
    gammas = {sigma: _gamma(sigma) for sigma in (*POST_HOC, 0.2)}

    def density(sigma, end):
        inside = np.where(grid < end, grid, 0.0)
        return (gammas[sigma] + 1) * (inside / end) ** gammas[sigma] / end

    parts = np.stack([density(sigma, step) for step in steps for sigma in POST_HOC])
    found, error = coefficients(steps, 0.2)
    assert found.sum() == pytest.approx(1)
    wanted = density(0.2, 100)
    # without the condition: differences to the last one, whose coefficients are free
    free = np.linalg.lstsq((parts[:-1] - parts[-1]).T, wanted - parts[-1], rcond=None)[0]
    assert_close(found.flatten()[:-1], free, rtol=1e-3, atol=1e-3)
    left = wanted - found.flatten() @ parts
    assert error == pytest.approx(math.sqrt((left**2).mean() / (wanted**2).mean()), rel=1e-3)


def _gamma(sigma, low=0.0, high=1e6):
    """By bisection of the formula of the standard deviation."""
    for _ in range(200):
        middle = (low + high) / 2
        wide = (middle + 1) ** 0.5 / (middle + 2) / (middle + 3) ** 0.5 > sigma
        low, high = (middle, high) if wide else (low, middle)
    return low


def test_saves_are_kept_evenly():
    kept = []
    for step in range(10, 1010, 10):
        kept = thin([*kept, step], 8)
        assert len(kept) == min(8, step // 10)
        assert kept[-1] == step
    gaps = np.diff([0, *kept])
    assert max(gaps[:-1]) <= 2 * min(gaps[:-1])
    assert thin([5, 1, 3], 3) == [1, 3, 5]


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with averages at 16 saves."""
    folder = tmp_path_factory.mktemp("averages") / "run"
    train(tiny_config(folder, **POST))
    return folder


def test_a_runs_average_is_made_again_from_its_saves(run, tmp_path, capsys):
    assert main(["ema", str(run), "--sigma_rel", "0.15", "--output_dir", str(tmp_path / "same")]) == 0
    printed = capsys.readouterr().out
    assert "sigma_rel=0.15 after update 80, made of the averages of 16 saves" in printed
    made, kept, raw = weights(tmp_path / "same"), weights(run), weights(run, "raw")
    off = sum(distance(made[name], kept[name]) ** 2 for name in kept) ** 0.5
    moved = sum(distance(raw[name], kept[name]) ** 2 for name in kept) ** 0.5
    assert off < 0.05 * moved  # 0.037 was measured: mostly half precision, because 80 updates move the weights little
    pipeline = DDPMCustomPipeline.from_pretrained(tmp_path / "same")
    assert len(pipeline(2, num_inference_steps=2).images) == 2
    assert (tmp_path / "same/train_config.json").read_bytes() == (run / "train_config.json").read_bytes()
    assert main(["ema", str(run), "--sigma_rel", "0.1", "--output_dir", str(tmp_path / "same")]) == 2
    assert "same' exists already; it must be a new folder" in capsys.readouterr().err


def test_the_lengths_that_are_kept_are_made_to_half_precision(run, tmp_path):
    for sigma in POST_HOC:
        make_average(run, sigma, tmp_path / str(sigma))
        kept = load_file(run / "checkpoint-80/post_hoc.safetensors")
        for name, weight in weights(tmp_path / str(sigma)).items():
            assert_close(weight, kept[f"{sigma}/{name}"], rtol=2**-10, atol=1e-6)


def test_the_default_folder_is_beside_the_run(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    lines = make_average(".", 0.25)
    assert (tmp_path / "run-ema-0.25/model_index.json").is_file()
    assert lines[0].startswith(f"{tmp_path / 'run-ema-0.25'}: ")


def test_checkpoints_share_the_files_of_averages(run):
    folders = [run / f"checkpoint-{step}/averages" for step in (75, 80)]
    names = [{path.name for path in folder.iterdir()} for folder in folders]
    assert names[1] == {f"{step}.safetensors" for step in range(5, 81, 5)} == names[0] | {"80.safetensors"}
    assert os.path.samefile(folders[0] / "40.safetensors", folders[1] / "40.safetensors")
    parameters = sum(w.numel() for w in weights(run).values())
    assert (folders[0] / "40.safetensors").stat().st_size == pytest.approx(4 * parameters, rel=0.3)  # and names


def test_a_file_system_without_links_has_copies(tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    train(tiny_config(tmp_path, **{**POST, "max_train_steps": 4, "checkpointing_steps": 2}))
    files = [tmp_path / f"checkpoint-{step}/averages/2.safetensors" for step in (2, 4)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not os.path.samefile(*files)


def test_averages_that_are_damaged_or_missing(run, tmp_path, caplog, capsys):
    shutil.copytree(run, tmp_path / "run")
    flip_a_bit(tmp_path / "run/checkpoint-80/averages/40.safetensors")
    lines = make_average(tmp_path / "run", 0.15, tmp_path / "made")
    assert "after update 75, made of the averages of 15 saves" in lines[0]
    assert "checkpoint-80 is damaged (averages/40.safetensors is missing or has a wrong checksum)" in caplog.text
    (tmp_path / "run/checkpoint-75/averages/20.safetensors").unlink()
    assert main(["ema", str(tmp_path / "run"), "--sigma_rel", "0.15", "--output_dir", str(tmp_path / "none")]) == 2
    assert "has no checkpoint with averages: they are kept by training with --post_hoc_ema" in capsys.readouterr().err
    assert main(["ema", str(tmp_path / "run"), "--sigma_rel", "0.3"]) == 2
    assert "sigma_rel=0.3 must be" in capsys.readouterr().err
    # training goes on without the save whose file is gone
    shutil.rmtree(tmp_path / "run/checkpoint-80")
    train(tiny_config(tmp_path / "run", **POST, resume_from_checkpoint="latest"))
    assert "averages/20.safetensors is gone: averages of other lengths are made without that save" in caplog.text
    assert "made of the averages of 15 saves" in make_average(tmp_path / "run", 0.15, tmp_path / "later")[0]


def test_averages_do_not_begin_in_the_middle(tmp_path):
    train(tiny_config(tmp_path))
    again = tiny_config(tmp_path, max_train_steps=5, resume_from_checkpoint="latest", post_hoc_ema=True)
    with pytest.raises(ValueError, match="post_hoc_ema=True, and the checkpoint's run did not keep these averages"):
        train(again)


def test_the_planned_memory_has_the_averages(tmp_path):
    config = tiny_config(tmp_path, post_hoc_ema=True)
    unet = network(config, image_shape(config))
    assert at_rest(unet, config) == 6 * sum(p.nbytes for p in unet.parameters())

import functools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import diffusers
import numpy as np
import psutil
import pytest
import tifffile
import torch
from accelerate import Accelerator
from conftest import TINY_UNET, calls, tiny_config, tiny_unet
from PIL import Image
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddpm_hf import DDPMCustomPipeline, LinearNoiseScheduler
from ddpm_hf.commands.main import main
from ddpm_hf.data.dataset import ImageData, load_images
from ddpm_hf.schedulers.bound import bound_terms
from ddpm_hf.schedulers.solvers import scheduler_class
from ddpm_hf.training import Batch, DenoisingLoss, Losses, Run, checkpoints, guards, loop, saving, setup, train
from ddpm_hf.training.batch import draw_random
from ddpm_hf.training.checkpoints import Checkpoints
from ddpm_hf.training.config import recipe_names, resolve
from ddpm_hf.training.ema import EMA
from ddpm_hf.training.guards import Skips, stop_asked
from ddpm_hf.training.log import TrainingLog, read_log
from ddpm_hf.training.loop import learning_rate, step_if_finite
from ddpm_hf.training.model import signal_left
from ddpm_hf.training.optimizer import build_optimizer
from ddpm_hf.training.pictures import draw_data, draw_pictures
from ddpm_hf.training.previews import Previews
from ddpm_hf.training.saving import held_out_loss
from ddpm_hf.utils.pictures import Film
from ddpm_hf.utils.signals import StopSignals


def at(timesteps, T=1000):  # noqa: N803
    """The `uniform` of a batch that stands for these timesteps."""
    return (timesteps + 0.5).double() / T


def weights(folder, variant=None):
    return load_file(folder / f"unet/diffusion_pytorch_model.{variant + '.' if variant else ''}safetensors")


def quietly(path):
    """log.csv without its clock columns."""
    return [{k: v for k, v in row.items() if k not in TrainingLog.CLOCKED} for row in read_log(path / "log.csv")]


# ---------------------------------------------------------------- the parts


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_the_loss_is_zero_for_the_right_answer_only(prediction_type):
    scheduler = LinearNoiseScheduler(prediction_type=prediction_type)
    images, noise = torch.randn(2, 5, 1, 4, 4, generator=torch.Generator().manual_seed(0)).unbind()
    t = torch.tensor([0, 10, 500, 900, 999])
    answers = {"epsilon": noise, "sample": images, "v_prediction": scheduler.get_velocity(images, noise, t)}

    def network(off):
        def forward(noisy, timesteps):
            assert_close(noisy, scheduler.add_noise(images, noise, t))
            assert torch.equal(timesteps, t)
            return type("Output", (), {"sample": answers[prediction_type] + off})

        return forward

    for off, error in ((0.0, 0.0), (0.5, 0.25)):
        losses = DenoisingLoss()(network(off), scheduler, Batch(images, noise, at(t)))
        assert torch.equal(losses.timesteps, t)
        assert torch.equal(losses.loss, losses.errors)
        assert_close(losses.errors, torch.full((5,), error))


def draws(config, step, batch=4000, shape=(1, 4, 4)):
    """The random numbers of a whole global batch."""
    return draw_random(config, step, torch.arange(batch), batch, shape)


def test_the_draw_is_a_function_of_seed_and_update(tmp_path):
    config = tiny_config(tmp_path, random_flip=True, random_vertical_flip=True, random_rotate90=True)
    drawn = draws(config, 3)
    for a, b in zip(draws(config, 3), drawn, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(draws(config, 4).noise, drawn.noise)
    assert not torch.equal(draws(tiny_config(tmp_path, seed=1), 3).noise, drawn.noise)
    # within 5 standard errors of the moments of normal and of uniform numbers, and of both ends
    assert abs(drawn.noise.mean()) < 5 / math.sqrt(drawn.noise.numel())
    assert abs(drawn.noise.square().mean() - 1) < 5 * math.sqrt(2 / drawn.noise.numel())
    assert abs(drawn.uniform.mean() - 0.5) < 5 / math.sqrt(12 * 4000)
    assert 0 <= drawn.uniform.min() < 0.01
    assert 0.99 < drawn.uniform.max() < 1
    assert abs(drawn.flips.double().mean() - 0.5) < 5 * 0.5 / math.sqrt(4000)
    assert not draws(tiny_config(tmp_path), 3).flips.any()
    assert abs(drawn.drops.double().mean() - 0.1) < 5 * math.sqrt(0.09 / 4000)
    assert not draws(tiny_config(tmp_path, label_dropout=0), 3).drops.any()


@pytest.mark.parametrize("antithetic", [False, True])
def test_a_part_of_the_global_batch_draws_what_the_whole_draws_there(tmp_path, antithetic):
    turns = {"random_flip": True, "random_vertical_flip": True, "random_rotate90": True}
    config = tiny_config(tmp_path, **turns, antithetic_timesteps=antithetic)
    whole = draws(config, 7, 100)
    for positions in (torch.arange(100), torch.arange(37, 41), torch.tensor([0, 1, 2, 3, 48, 49, 50, 51, 99])):
        part = draw_random(config, 7, positions, 100, (1, 4, 4))
        for a, b in zip(part, whole, strict=True):
            assert torch.equal(a, b[positions])


@pytest.mark.parametrize("batch_size", [1, 7, 64, 1500])
def test_antithetic_timesteps_are_even_over_the_batch_and_uniform_alone(tmp_path, batch_size):
    config = tiny_config(tmp_path, antithetic_timesteps=True)
    drawn = torch.stack([draws(config, step, batch_size, (1, 1, 1)).uniform for step in range(300)])
    gaps = drawn.sort(1).values.diff(dim=1)
    assert_close(gaps, torch.full_like(gaps, 1 / batch_size))
    assert ((drawn >= 0) & (drawn < 1)).all()
    for place in {0, batch_size // 2}:
        quarters = torch.bincount((4 * drawn[:, place]).long(), minlength=4)
        assert (quarters - 75).abs().max() < 5 * math.sqrt(300 * 3 / 16)
    plain = draws(tiny_config(tmp_path), 0, batch_size, (1, 1, 1))
    assert torch.equal(draws(config, 0, batch_size, (1, 1, 1)).noise, plain.noise)  # the noise is what it was


def test_learning_rate(tmp_path):
    config = tiny_config(tmp_path, learning_rate=1.0, lr_warmup_steps=4)
    assert [learning_rate(config, k, 10) for k in range(6)] == [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]
    config.lr_scheduler = "linear"
    assert [learning_rate(config, k, 8) for k in range(4, 9)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    config.lr_scheduler = "cosine"
    assert_close([learning_rate(config, k, 8) for k in (4, 6, 8)], [1.0, 0.5, 0.0])
    config.lr_scheduler, config.lr_decay_share = "wsd", 0.4  # of 20 updates the last 8
    assert [learning_rate(config, k, 20) for k in (0, 3, 4, 11, 12)] == [0.2, 0.8, 1.0, 1.0, 1.0]
    assert [learning_rate(config, k, 20) for k in (14, 16, 18, 19, 20)] == [0.75, 0.5, 0.25, 0.125, 0.0]
    config.lr_decay_share = 1.0
    linear = tiny_config(tmp_path, learning_rate=1.0, lr_warmup_steps=4, lr_scheduler="linear")
    assert [learning_rate(config, k, 20) for k in range(20)] == [learning_rate(linear, k, 20) for k in range(20)]


def test_ema_is_the_weighted_mean_of_its_formula():
    network = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(network.weight, 1.0)
    ema = EMA(network, max_decay=0.25)
    expected = 1.0
    for step in range(1, 6):
        torch.nn.init.constant_(network.weight, float(step))
        ema.update(network, step)
        decay = min(0.25, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert_close(ema.model.weight.item(), expected, rtol=1e-6, atol=0)
    assert not ema.model.weight.requires_grad


def test_the_average_follows_without_being_told_on_the_host_whether_an_update_took_place():
    networks = [torch.nn.Linear(3, 2) for _ in range(2)]
    looking, blind = (EMA(networks[0], max_decay=0.9) for _ in range(2))
    for step in range(1, 9):
        looking.update(networks[1], step)
        blind.update(networks[1], step, torch.tensor(True))
    assert_close(blind.model.state_dict(), looking.model.state_dict())
    before = {name: value.clone() for name, value in blind.model.state_dict().items()}
    assert not torch.equal(before["weight"], networks[0].weight)
    blind.update(networks[0], 9, torch.tensor(False))
    looking.update(networks[0], 9, False)
    assert_close(looking.model.state_dict(), before)
    assert_close(blind.model.state_dict(), before, rtol=0, atol=0)


# ---------------------------------------------------------------- whole runs


def test_what_a_run_leaves(trained):
    files = {str(path.relative_to(trained)) for path in trained.rglob("*") if path.is_file()}
    assert files == {
        "log.csv", "train_config.json", "model_index.json", "scheduler/scheduler_config.json", "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.raw.safetensors",
        *(f"checkpoint-{n}/{f}" for n in (20, 25) for f in
          ("unet.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json")),
    }  # fmt: skip
    log = read_log(trained / "log.csv")
    assert [row["step"] for row in log] == [10, 20, 25]
    assert [row["images_seen"] for row in log] == [160, 320, 400]
    assert log[-1]["loss"] < log[0]["loss"] < 1.5
    assert all(0 < row["held_out_loss"] < 1.5 for row in log)


def test_the_pipeline_holds_the_average_and_the_raw_weights(trained):
    average, raw = (load_file(trained / "checkpoint-25" / f"{name}.safetensors") for name in ("ema", "unet"))
    for variant, expected in ((None, average), ("raw", raw)):
        unet = DDPMCustomPipeline.from_pretrained(trained, variant=variant).unet
        assert_close(unet.state_dict(), expected, rtol=0, atol=0)
    assert not torch.equal(average["stem.weight"], raw["stem.weight"])


def test_a_training_leaves_the_random_state_and_the_threads_of_its_process_as_they_were(tmp_path):
    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    train(tiny_config(tmp_path, unet={**TINY_UNET, "dropout": 0.1}))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_an_objective_of_ones_own_is_trained_and_belongs_to_its_checkpoint(tmp_path):
    def absolute_error(network, scheduler, batch):
        timesteps = (batch.uniform * len(scheduler)).long()
        noisy = scheduler.add_noise(batch.images, batch.noise, timesteps)
        errors = (network(noisy, timesteps).sample - batch.noise).abs().mean(dim=(1, 2, 3))
        return Losses(errors, errors, timesteps)

    run = train(tiny_config(tmp_path, max_train_steps=40), objective=absolute_error)
    assert 0.2 < run.log_history[-1]["loss"] < run.log_history[0]["loss"] < 1  # the mean of |N(0, 1)| is 0.8
    again = tiny_config(tmp_path, max_train_steps=41, resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match="another objective .*loss='DenoisingLoss' was 'absolute_error'"):
        train(again)
    assert train(again, objective=absolute_error).step == 41


def test_two_runs_with_one_seed_give_the_same_bytes(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(tiny_config(tmp_path / name, seed=seed, unet={**tiny_config(tmp_path).unet, "dropout": 0.1}))
    files = [(tmp_path / n / "unet/diffusion_pytorch_model.safetensors").read_bytes() for n in "abc"]
    assert files[0] == files[1] != files[2]
    assert quietly(tmp_path / "a") == quietly(tmp_path / "b")


def test_the_resolved_configuration_runs_again_to_the_same_bytes(trained, tmp_path):
    from ddpm_hf.training.config import resolve

    config = resolve({"config": str(trained / "train_config.json"), "output_dir": str(tmp_path / "again")})
    train(config)
    assert_close(weights(tmp_path / "again"), weights(trained), rtol=0, atol=0)


def test_a_resumed_run_ends_with_the_same_bytes(trained, tmp_path):
    settings = {"max_train_steps": 25, "checkpointing_steps": 10}

    class Dies(Exception):  # noqa: N818
        pass

    def die_at_20(run):
        if run.step == 20:
            raise Dies

    with pytest.raises(Dies):
        train(tiny_config(tmp_path, **settings), callbacks=[calls(on_save=die_at_20)])
    with pytest.raises(ValueError, match="contains an unfinished run .checkpoint-20 of 25.: resume it with"):
        train(tiny_config(tmp_path, **settings))
    run = train(tiny_config(tmp_path, **settings, resume_from_checkpoint="latest"))
    assert run.step == 25
    for variant in (None, "raw"):
        assert_close(weights(tmp_path, variant), weights(trained, variant), rtol=0, atol=0)
    moments = "checkpoint-25/optimizer.safetensors"
    assert_close(load_file(tmp_path / moments), load_file(trained / moments), rtol=0, atol=0)
    assert quietly(tmp_path) == quietly(trained)


def test_a_checkpoint_can_be_named(trained, tmp_path):
    settings = {"max_train_steps": 25, "checkpointing_steps": 10}
    train(tiny_config(tmp_path, **settings, resume_from_checkpoint=str(trained / "checkpoint-20")))
    assert_close(weights(tmp_path), weights(trained), rtol=0, atol=0)
    with pytest.raises(ValueError, match="'checkpoint-7' is not a checkpoint; the checkpoints in .*: checkpoint-25"):
        train(tiny_config(tmp_path, **settings, resume_from_checkpoint="checkpoint-7"))


def test_an_unfinished_run_is_not_trained_over(trained, tmp_path):
    def stop(run):
        raise KeyboardInterrupt

    settings = {"max_train_steps": 9, "checkpointing_steps": 4}
    with pytest.raises(KeyboardInterrupt):
        train(tiny_config(tmp_path, **settings), callbacks=[calls(on_save=stop)])
    (tmp_path / "checkpoint-best").mkdir()  # somebody else's
    (tmp_path / "checkpoint-7").mkdir()
    for resume in (None, str(trained / "checkpoint-20")):
        with pytest.raises(ValueError, match=r"contains an unfinished run .checkpoint-4 of 9.: resume it with"):
            train(tiny_config(tmp_path, **settings, resume_from_checkpoint=resume))
    assert (tmp_path / "checkpoint-4/state.json").exists()
    train(tiny_config(tmp_path, **settings, overwrite_output_dir=True))
    assert [row["step"] for row in read_log(tmp_path / "log.csv")] == [4, 8, 9]


def test_a_run_resumed_behind_its_end_changes_nothing(tmp_path):
    train(tiny_config(tmp_path))
    before = quietly(tmp_path), weights(tmp_path)
    saved = []
    train(
        tiny_config(tmp_path, resume_from_checkpoint="latest"),
        callbacks=[calls(on_save=lambda run: saved.append(run.finished))],
    )
    assert saved == [True]  # what follows the last save can be repeated so
    assert quietly(tmp_path) == before[0]
    assert_close(weights(tmp_path), before[1], rtol=0, atol=0)


FILES = ("unet.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json")


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    "damage",
    [lambda p: p.unlink(), lambda p: p.write_bytes(b""), lambda p: p.write_bytes(p.read_bytes()[:-7]), flip_a_bit],
    ids=["gone", "empty", "truncated", "a bit"],
)
def test_of_a_damaged_checkpoint_the_one_before_is_taken(trained, tmp_path, file, damage, caplog):
    settings = {"max_train_steps": 25, "checkpointing_steps": 10}
    shutil.copytree(trained, tmp_path / "run")
    damage(tmp_path / "run/checkpoint-25" / file)
    with pytest.raises(ValueError, match="checkpoint-25'? is (damaged|not a checkpoint)"):
        train(tiny_config(tmp_path / "run", **settings, resume_from_checkpoint=str(tmp_path / "run/checkpoint-25")))
    train(tiny_config(tmp_path / "run", **settings, resume_from_checkpoint="latest"))
    assert f"checkpoint-25 is damaged ({file} " in caplog.text
    assert "trying the previous one" in caplog.text
    for name in FILES:
        again, before = ((folder / "checkpoint-25" / name).read_bytes() for folder in (tmp_path / "run", trained))
        assert again == before
    assert quietly(tmp_path / "run") == quietly(trained)


def test_if_all_checkpoints_are_damaged_nothing_is_done(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    for path in (tmp_path / "run").glob("checkpoint-*/ema.safetensors"):
        flip_a_bit(path)
    with pytest.raises(
        ValueError,
        match="is damaged .* no other checkpoint to resume from: .* start from scratch with --overwrite_output_dir",
    ):
        train(tiny_config(tmp_path / "run", max_train_steps=25, resume_from_checkpoint="latest"))
    with pytest.raises(ValueError, match="contains an unfinished run|is damaged"):
        train(tiny_config(tmp_path / "run", resume_from_checkpoint=str(tmp_path / "run/checkpoint-25")))


@pytest.mark.parametrize("fails_at", [1, 2, 3, 4])
def test_a_checkpoint_that_can_not_be_written_whole_is_none(trained, tmp_path, monkeypatch, fails_at):
    """The disk is full at each of its files in turn."""
    settings, written = {"max_train_steps": 25, "checkpointing_steps": 10}, []

    def full(*args, write):
        written.append(args)
        if len(written) == 4 + fails_at:  # in the second checkpoint
            if len(args) == 2:
                args[1].write_bytes(b"half a file")
            raise OSError(28, "No space left on device")
        return write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_tensors", functools.partial(full, write=checkpoints.save_tensors))
        patch.setattr(checkpoints, "_seal", functools.partial(full, write=checkpoints._seal))
        with pytest.raises(OSError, match="No space left"):
            train(tiny_config(tmp_path, **settings))
    assert [path.name for path in Checkpoints(tmp_path, 9).found()] == ["checkpoint-10"]
    assert not (tmp_path / ".checkpoint-20").exists()  # half a checkpoint would take what little room there is
    train(tiny_config(tmp_path, **settings, resume_from_checkpoint="latest"))
    assert not list(tmp_path.glob(".*"))
    for name in FILES:
        assert (tmp_path / "checkpoint-25" / name).read_bytes() == (trained / "checkpoint-25" / name).read_bytes()
    assert quietly(tmp_path) == quietly(trained)


def test_a_run_from_elsewhere_takes_nothing_from_what_was_in_the_folder(trained, tmp_path):
    train(tiny_config(tmp_path, max_train_steps=15, checkpointing_steps=5, seed=1))
    stopped = []

    def stop(run):
        stopped.append([path.name for path in Checkpoints(tmp_path, 9).found()])
        raise KeyboardInterrupt

    settings = {"max_train_steps": 25, "checkpointing_steps": 10}
    settings["resume_from_checkpoint"] = str(trained / "checkpoint-20")
    with pytest.raises(ValueError, match="contains a finished run"):
        train(tiny_config(tmp_path, **settings))
    with pytest.raises(KeyboardInterrupt):
        train(tiny_config(tmp_path, **settings, overwrite_output_dir=True), callbacks=[calls(on_save=stop)])
    assert stopped == [["checkpoint-25"]]
    assert [row["step"] for row in read_log(tmp_path / "log.csv")] == [25]


def test_other_images_are_noticed(tmp_path, caplog):
    folder = tmp_path / "in"
    folder.mkdir()
    for k in range(20):
        Image.new("L", (8, 8), k).save(folder / f"{k}.png")
    settings = {"train_data_dir": str(folder), "checkpointing_steps": 2}
    train(tiny_config(tmp_path / "out", **settings, max_train_steps=2))
    caplog.clear()
    train(tiny_config(tmp_path / "out", **settings, max_train_steps=3, resume_from_checkpoint="latest"))
    assert "but its results will differ" not in caplog.text
    Image.new("L", (8, 8), 99).save(folder / "0.png")
    Image.new("L", (8, 8), 99).save(folder / "1.png")
    train(tiny_config(tmp_path / "out", **settings, max_train_steps=4, resume_from_checkpoint="latest"))
    assert "are not those of the checkpoint (18 images " in caplog.text


def test_a_log_that_ends_in_half_a_row_is_cut_back(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoint-25")
    with open(tmp_path / "run/log.csv", "a") as file:
        file.write("26,4")
    train(tiny_config(tmp_path / "run", max_train_steps=25, checkpointing_steps=10, resume_from_checkpoint="latest"))
    assert quietly(tmp_path / "run") == quietly(trained)


# ---------------------------------------------------------------- images of all sorts


def kinds(folder):
    """A file of every kind that colour can be made of, of several sizes."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8))
    deep = rng.integers(0, 65536, (20, 20), dtype=np.uint16)
    deep_rgb = rng.integers(0, 65536, (20, 20, 3), dtype=np.uint16)
    alpha = Image.fromarray(rng.integers(0, 256, (20, 20), dtype=np.uint8))
    rotated = Image.Exif()
    rotated[0x0112] = 6
    colour.convert("L").save(folder / "gray.png")
    colour.convert("1").save(folder / "bit.png")
    Image.merge("LA", (colour.convert("L"), alpha)).save(folder / "gray_alpha.png")
    colour.quantize(16).save(folder / "palette.png")
    colour.quantize(16).save(folder / "transparent_palette.png", transparency=0)
    colour.convert("CMYK").save(folder / "cmyk.jpg")
    colour.save(folder / "rgb.webp")
    Image.merge("RGBA", (*colour.split(), alpha)).save(folder / "rgba.png")
    Image.fromarray(deep).save(folder / "deep.png")
    tifffile.imwrite(folder / "deep.tif", deep)
    tifffile.imwrite(folder / "deep_rgb.tif", deep_rgb, photometric="rgb")
    tifffile.imwrite(folder / "float.tif", deep.astype(np.float32))
    np.save(folder / "array.npy", deep_rgb.astype(np.float64))
    colour.crop((0, 0, 20, 12)).save(folder / "rotated.jpg", exif=rotated)
    colour.crop((0, 0, 17, 11)).save(folder / "odd.png")
    colour.resize((2, 3)).save(folder / "tiny.png")
    colour.resize((2000, 1500)).save(folder / "huge.png")
    return folder


def test_a_folder_of_every_kind_trains(tmp_path):
    folder = kinds(tmp_path / "in")
    (folder / "broken.png").write_bytes(b"")
    deep = tmp_path / "deep"  # images of more than 8 bits can't be in one data set with the others
    deep.mkdir()
    for name in ("deep.png", "deep.tif", "deep_rgb.tif", "float.tif", "array.npy"):
        (folder / name).rename(deep / name)
    settings = {"channels": 3, "resolution": 8, "background": [0.5], "max_bad_fraction": 0.1}
    for source, out, more in ((folder, "out", {}), (deep, "deep_out", {"value_range": [0, 65535]})):
        run = train(tiny_config(tmp_path / out, train_data_dir=str(source), **settings, **more))
        assert len(run.images) + len(run.held_out) == len(list(source.iterdir())) - (source == folder)
        assert read_log(tmp_path / out / "log.csv")[-1]["skipped_updates"] == 0
        assert DDPMCustomPipeline.from_pretrained(tmp_path / out)(1, num_inference_steps=2).images[0].mode == "RGB"
    assert (tmp_path / "out/quarantine.csv").read_text().splitlines() == [
        "path,reason",
        f"{folder}/broken.png,is empty",
    ]


def test_five_bands_train(tmp_path):
    rng = np.random.default_rng(0)
    for k in range(6):
        bands = rng.integers(0, 4096, (8, 12, 5), dtype=np.uint16)
        if k % 2:
            np.save(tmp_path / f"{k}.npy", bands)
        else:
            tifffile.imwrite(tmp_path / f"{k}.tif", bands, photometric="minisblack", planarconfig="contig")
    run = train(tiny_config(tmp_path / "out", train_data_dir=str(tmp_path), value_range=[0, 4095]))
    assert run.images.shape == (5, 8, 12)
    pipeline = DDPMCustomPipeline.from_pretrained(tmp_path / "out")
    assert pipeline(2, num_inference_steps=2, output_type="np").images.shape == (2, 8, 12, 5)
    assert pipeline.unet.config.value_range == [0, 4095]  # which files of samples have again


@pytest.mark.parametrize("kind", ["tif", "npy", "alpha.tif", "png"])
def test_the_fourth_channel_is_a_band_or_alpha(tmp_path, kind):
    """As the file says; a model keeps it, for its pictures and for the files of its samples."""
    rng, data = np.random.default_rng(0), tmp_path / "data"
    data.mkdir()
    for k in range(6):
        array, path = rng.integers(0, 256, (8, 12, 4), dtype=np.uint8), data / f"{k}.{kind.removeprefix('alpha.')}"
        if kind == "npy":
            np.save(path, array)
        elif kind == "png":
            Image.fromarray(array).save(path)
        else:  # near infrared has no name among the extra samples of TIFF
            extra = "unassalpha" if "alpha" in kind else "unspecified"
            tifffile.imwrite(path, array, photometric="rgb", extrasamples=[extra])
    out, are_bands = tmp_path / "out", kind in ("tif", "npy")
    run = train(tiny_config(out, train_data_dir=str(data), max_train_steps=2), callbacks=[Previews(draw_pictures)])
    draw_data(run)
    assert run.images.has_alpha == run.held_out.has_alpha == (not are_bands)
    pipeline = DDPMCustomPipeline.from_pretrained(out)
    assert pipeline.unet.config.has_alpha is (False if are_bands else None)
    assert main(["sample", str(out), "--num_images", "2", "--num_inference_steps", "2"]) == 0
    assert sorted(path.suffix for path in (out / "samples").glob("0*")) == [".npy" if are_bands else ".png"] * 2
    film, pictures = Film(), [f"{name}.png" for name in ("data", "samples", "first_samples", "forward", "neighbours")]
    pipeline(2, num_inference_steps=2, output_type="np", callback_on_step_end=film)
    for picture in [Image.open(out / name) for name in pictures] + [film.contact_sheet()]:
        assert picture.mode == ("L" if are_bands else "RGB")  # all bands are gray
    if not are_bands:
        assert pipeline(2, num_inference_steps=2).images[0].mode == "RGBA"
        return
    with pytest.raises(
        ValueError, match="output_type='pil' needs gray or RGB, perhaps with alpha, not 4 bands; choose"
    ):
        pipeline(2)
    with pytest.raises(ValueError, match="image has mode 'RGBA'; this model needs an array or a tensor of 4 bands"):
        pipeline(image=Image.new("RGBA", (12, 8)), strength=0.5)
    Image.new("RGBA", (12, 8), "red").save(data / "6.png")
    with pytest.raises(ValueError, match="6.png has alpha as its last channel and the first image has a band there"):
        train(tiny_config(tmp_path / "mixed", train_data_dir=str(data)))
    for decides in (True, False):
        images, _ = load_images(tiny_config(out, train_data_dir=str(data), alpha_channel=decides))
        assert (images.has_alpha, images.shape) == (decides, (4, 8, 12))
        red = [image for image in images.pixels if (image[0] == 255).all()]
        assert all(image[:, 0, 0].tolist() == [255, 0, 0, 255] for image in red)


def test_a_run_that_did_not_know_its_last_channel_is_resumed(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for k in range(6):
        np.save(tmp_path / f"{k}.npy", rng.integers(0, 256, (8, 8, 4), dtype=np.uint8))
    settings = {"train_data_dir": str(tmp_path)}
    read = setup.open_images
    monkeypatch.setattr(setup, "open_images", lambda *args: [replace(part, has_alpha=True) for part in read(*args)])
    assert train(tiny_config(tmp_path / "out", max_train_steps=2, **settings)).pipeline.unet.config.has_alpha is None
    monkeypatch.undo()
    run = train(tiny_config(tmp_path / "out", max_train_steps=3, resume_from_checkpoint="latest", **settings))
    assert run.pipeline.unet.config.has_alpha is False


def test_too_many_broken_files_stop_the_run_with_their_list(tmp_path):
    for k in range(4):
        Image.new("L", (8, 8), k).save(tmp_path / f"{k}.png")
    (tmp_path / "4.png").write_text("<html>")
    with pytest.raises(ValueError, match=r"1 of 5 images .*quarantine.csv lists all of them"):
        train(tiny_config(tmp_path / "out", train_data_dir=str(tmp_path)))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["quarantine.csv"]
    assert (
        "4.png,is not in a known image format: it begins with b'<html>'"
        in (tmp_path / "out/quarantine.csv").read_text()
    )
    (tmp_path / "4.png").unlink()
    train(tiny_config(tmp_path / "out", train_data_dir=str(tmp_path)))
    assert not (tmp_path / "out/quarantine.csv").exists()  # they are mended


@pytest.mark.parametrize(("images", "warned"), [(499, True), (500, False)])
def test_few_images_are_warned_of(tmp_path, monkeypatch, caplog, images, warned):
    data = ImageData(torch.zeros(images, 1, 8, 8, dtype=torch.uint8))
    monkeypatch.setattr(setup, "open_images", lambda *args: (data, None))
    train(tiny_config(tmp_path, max_train_steps=1))
    assert ("499 images are fewer than 500: the network is likely to memorise them" in caplog.text) == warned


# ---------------------------------------------------------------- trackers and launchers


def test_tensorboard_gets_the_log_and_the_pictures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tiny_config(tmp_path, max_train_steps=20, logger="tensorboard"), callbacks=[Previews(draw_pictures)])
    events = EventAccumulator(str(tmp_path / "ddpm_hf"))
    events.Reload()
    losses = [row["loss"] for row in read_log(tmp_path / "log.csv")]
    assert_close([event.value for event in events.Scalars("loss")], losses)
    assert [event.step for event in events.Scalars("loss")] == [10, 20]
    assert events.Images("samples")[0].step == 20


def test_a_tracker_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(setup.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="logger='trackio' is not installed: `pip install trackio`"):
        train(tiny_config(tmp_path / "run", logger="trackio"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_what_nobody_has_tested_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(ValueError, match=f"^{name} has not been tested with this training loop, .* --multi_gpu`$"):
        train(tiny_config(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- classes and objectives


def test_a_run_of_classes_learns_them(digits_model):
    """The loss with the right label is smaller than with the next, and the null label is learnt too."""
    pipeline = DDPMCustomPipeline.from_pretrained(digits_model)
    config, unet, scheduler = tiny_config(digits_model, class_conditional=True), pipeline.unet, pipeline.scheduler
    run = Run(config, pipeline, unet, *load_images(config), 600, Accelerator())
    assert (unet.config.num_classes, unet.config.class_names) == (10, [str(k) for k in range(10)])
    x, labels, n = run.held_out.batch(torch.arange(180)), run.held_out.labels, 180
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    t = torch.full((n,), 400)
    with torch.no_grad():
        right, wrong, none = (
            DenoisingLoss()(unet, scheduler, Batch(x, noise, at(t), y)).errors.mean()
            for y in (labels, (labels + 1) % 10, torch.full((n,), 10))
        )
    assert right < none < wrong
    assert_close(held_out_loss(run, DenoisingLoss()), read_log(digits_model / "log.csv")[-1]["held_out_loss"])


def test_dropped_labels_become_the_null_label(tmp_path, monkeypatch):
    seen = []

    def loss(network, scheduler, batch):
        seen.append(batch.labels)
        return DenoisingLoss()(network, scheduler, batch)

    monkeypatch.setattr(saving, "held_out_loss", lambda *_: None)
    config = tiny_config(tmp_path, class_conditional=True, label_dropout=0.3, max_train_steps=3)
    run = train(config, objective=loss)
    for step, labels in enumerate(seen):
        drops = draws(config, step, 16, (1, 8, 8)).drops
        of_images = run.images.batch_for_step(0, step, 16, torch.arange(16))[1]
        assert labels.tolist() == torch.where(drops, 10, of_images).tolist()
    assert (torch.cat(seen) == 10).sum() > 3


def test_a_run_of_classes_resumes_to_the_same_bytes(tmp_path):
    settings = {"class_conditional": True, "checkpointing_steps": 3, "antithetic_timesteps": True, "snr_gamma": 5}
    train(tiny_config(tmp_path / "whole", max_train_steps=6, **settings))
    train(tiny_config(tmp_path / "parts", max_train_steps=3, **settings))
    train(tiny_config(tmp_path / "parts", max_train_steps=6, resume_from_checkpoint="latest", **settings))
    for variant in (None, "raw"):
        assert_close(weights(tmp_path / "parts", variant), weights(tmp_path / "whole", variant), rtol=0, atol=0)


def test_a_model_of_classes_is_trained_on(tmp_path):
    train(tiny_config(tmp_path / "a", class_conditional=True))
    again = {"pretrained_model_name_or_path": str(tmp_path / "a"), "unet": {}}
    train(tiny_config(tmp_path / "b", class_conditional=True, **again))
    assert DDPMCustomPipeline.from_pretrained(tmp_path / "b")(class_labels="7", num_inference_steps=2).images
    with pytest.raises(ValueError, match=r"the network has 10 classes \(num_classes\): set class_conditional"):
        train(tiny_config(tmp_path / "c", **again))
    for folder in ("x", "y"):
        (tmp_path / "two" / folder).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "two" / folder / "a.png")
    with pytest.raises(ValueError, match=r"images have 2 classes \(x, y\) and the network has 10 \(0, 1, 2, 3"):
        train(tiny_config(tmp_path / "c", class_conditional=True, train_data_dir=str(tmp_path / "two"), **again))
    assert not (tmp_path / "c").exists()


def test_classes_that_are_not_there(tmp_path):
    (tmp_path / "images").mkdir()
    for k in range(3):
        Image.new("L", (8, 8), k).save(tmp_path / f"images/{k}.png")
    zero = {"scheduler": {"rescale_betas_zero_snr": True}, "prediction_type": "v_prediction"}
    with pytest.raises(ValueError, match="snr_gamma=5 with rescale_betas_zero_snr gives the first timestep"):
        train(tiny_config(tmp_path / "run", snr_gamma=5, **zero))
    with pytest.raises(
        ValueError, match="class_conditional=True: the images of .* have no classes; they need a column"
    ):
        train(tiny_config(tmp_path / "run", class_conditional=True, train_data_dir=str(tmp_path / "images")))
    with pytest.raises(ValueError, match="rescale_betas_zero_snr=True needs prediction_type"):
        train(tiny_config(tmp_path / "run", scheduler={"rescale_betas_zero_snr": True}))
    assert not (tmp_path / "run").exists()


def test_a_network_of_diffusers_that_has_classes_is_refused(tmp_path):
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"), num_class_embeds=10,
    )  # fmt: skip
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "theirs")
    message = "num_class_embeds=10 is not supported: only DDPMUNet can be class-conditional"
    for settings in ({}, {"class_conditional": True}):
        with pytest.raises(ValueError, match=message):
            train(
                tiny_config(
                    tmp_path / "run", unet={}, pretrained_model_name_or_path=str(tmp_path / "theirs"), **settings
                )
            )
    assert not (tmp_path / "run").exists()
    for labels in (None, [0]):
        with pytest.raises(ValueError, match=message):
            DDPMCustomPipeline(unet, LinearNoiseScheduler())(class_labels=labels, num_inference_steps=2)


def test_what_the_network_learns_stays_when_a_run_is_resumed(tmp_path):
    train(tiny_config(tmp_path))
    for settings, name in (
        ({"prediction_type": "v_prediction"}, "v_prediction"),
        ({"scheduler": {"beta_end": 0.03}}, "0.03"),
        ({"scheduler": {"beta_schedule": "squaredcos_cap_v2"}}, "squaredcos_cap_v2"),
    ):
        with pytest.raises(ValueError, match=f"another objective than the checkpoint: .*{name}"):
            train(tiny_config(tmp_path, max_train_steps=6, resume_from_checkpoint="latest", **settings))
    assert read_log(tmp_path / "log.csv")[-1]["step"] == 4


@pytest.mark.parametrize("class_conditional", [False, True])
def test_other_classes_are_other_images_where_they_count(tmp_path, caplog, class_conditional):
    for folder in ("a", "b"):
        (tmp_path / "images" / folder).mkdir(parents=True)
        for k in range(3):
            Image.new("L", (8, 8), 20 * k).save(tmp_path / "images" / folder / f"{k}.png")
    settings = {"train_data_dir": str(tmp_path / "images"), "class_conditional": class_conditional}
    train(tiny_config(tmp_path / "run", **settings))
    (tmp_path / "images/a").rename(tmp_path / "images/c")  # the same images in the same order, of other classes
    train(tiny_config(tmp_path / "run", max_train_steps=5, resume_from_checkpoint="latest", **settings))
    assert ("are not those of the checkpoint" in caplog.text) == class_conditional


@pytest.mark.parametrize("settings", [
    {"prediction_type": "sample"},
    {"prediction_type": "v_prediction", "scheduler": {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}},
    {"scheduler": {"beta_schedule": "squaredcos_cap_v2"}, "snr_gamma": 5, "antithetic_timesteps": True},
])  # fmt: skip
def test_objectives_are_trained_and_saved(tmp_path, settings):
    train(tiny_config(tmp_path, max_train_steps=200, **settings))
    pipeline = DDPMCustomPipeline.from_pretrained(tmp_path)
    assert pipeline.scheduler.config.prediction_type == settings.get("prediction_type", "epsilon")
    for key, value in settings.get("scheduler", {}).items():
        assert pipeline.scheduler.config[key] == value
    losses = [row["loss"] for row in read_log(tmp_path / "log.csv")]
    assert sum(losses[-5:]) / 5 < 0.7 * losses[0]
    assert pipeline(2, num_inference_steps=5, output_type="pt").images.isfinite().all()


def test_min_snr_weights_the_loss_and_not_what_is_logged_beside_it(tmp_path):
    """After one update from the same start: the weighted loss, and the plain errors, by hand."""
    rows, one = {}, {}
    for gamma in (None, 0.01):
        folder = tmp_path / str(gamma)
        seen = {}
        note = calls(on_init_end=lambda run, s=seen: s.update(run=run))
        train(tiny_config(folder, max_train_steps=1, snr_gamma=gamma), callbacks=[note])
        rows[gamma], one = read_log(folder / "log.csv")[-1], seen
    run = one["run"]
    torch.manual_seed(0)
    start = tiny_unet().train()
    drawn = draws(run.config, 0, 16, (1, 8, 8))
    x = run.images.batch_for_step(0, 0, 16, torch.arange(16))[0]
    _, errors, t = DenoisingLoss()(start, run.pipeline.scheduler, Batch(x, drawn.noise, drawn.uniform))
    snr = run.pipeline.scheduler.alphas_cumprod[t] / (1 - run.pipeline.scheduler.alphas_cumprod[t])
    assert_close(rows[None]["loss"], errors.mean().item(), rtol=1e-5, atol=0)
    assert_close(rows[0.01]["loss"], (snr.clamp(max=0.01) / snr * errors).mean().item(), rtol=1e-3, atol=0)
    for k in range(10):
        part = errors[t // 100 == k]
        expected = part.mean().item() if len(part) else None
        for row in rows.values():
            got = row[f"loss_t{10 * k:02d}"]
            assert (got is None) if expected is None else abs(got - expected) < 1e-5 * expected


# ---------------------------------------------------------------- numbers that are none


def poisoned(updates, value=math.nan):
    """An objective whose losses in these updates (counted from 0) become `value`."""
    counted = iter(range(10**6))

    def loss(network, scheduler, batch):
        true = DenoisingLoss()(network, scheduler, batch)
        if not network.training or next(counted) not in updates:
            return true
        return true._replace(loss=true.loss * value, errors=true.errors * value)

    return loss


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_update_that_is_not_finite_is_skipped_and_counted(tmp_path, value):
    seen = {}

    def note(run):
        seen[run.step] = (weights(tmp_path), weights(tmp_path, "raw"))

    config = tiny_config(tmp_path, max_train_steps=20, checkpointing_steps=1)
    train(config, callbacks=[calls(on_save=note)], objective=poisoned({3, 4, 12}, value))
    assert [row["skipped_updates"] for row in read_log(tmp_path / "log.csv")] == [
        float(step in (4, 5, 13)) for step in range(1, 21)
    ]
    for step in (4, 5, 13):  # nothing has changed, the average included
        for before, after in zip(seen[step - 1], seen[step], strict=True):
            assert_close(after, before, rtol=0, atol=0)
    assert not torch.equal(seen[6][1]["stem.weight"], seen[5][1]["stem.weight"])
    assert all(w.isfinite().all() for w in seen[20][0].values())


def test_a_gradient_that_is_not_finite_is_skipped_too(tmp_path):
    """x ** 0.5 at 0 has a finite value and an infinite slope."""

    def loss(network, *args):
        losses = DenoisingLoss()(network, *args)
        return losses._replace(loss=losses.loss + (0 * network.stem.weight.sum()).abs() ** 0.5)

    start = {}
    config = tiny_config(tmp_path, max_train_steps=5)
    note = calls(on_init_end=lambda run: start.update({k: v.clone() for k, v in run.unet.state_dict().items()}))
    train(config, callbacks=[note], objective=loss)
    assert read_log(tmp_path / "log.csv")[-1]["skipped_updates"] == 5
    assert_close(weights(tmp_path, "raw"), start, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_optimizer_changes_nothing_where_an_update_is_not_finite(tmp_path, value, name):
    """In its first one too, and its count of steps neither."""
    accelerator, network = Accelerator(), tiny_unet()
    inner = build_optimizer(tiny_config(tmp_path, optimizer=name, learning_rate=0.1, adam_weight_decay=0.1), network)
    network, optimizer = accelerator.prepare(network, inner)

    def everything():
        return [t.clone() for p in network.parameters() for t in (p.detach(), *inner.state.get(p, {}).values())]

    def step(value):
        for parameter in network.parameters():
            parameter.grad = torch.full_like(parameter, value)
        step_if_finite(accelerator, optimizer, torch.tensor(value))
        return everything()

    start = everything()
    step(value)
    assert_close([p.detach() for p in network.parameters()], start, rtol=0, atol=0)
    assert not any(t.any() for state in inner.state.values() for t in state.values())
    before = step(1.0)
    assert_close(step(value), before, rtol=0, atol=0)
    after = step(1.0)
    assert {state["step"].item() for state in inner.state.values() if "step" in state} == {2.0}
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def as_on_cuda(monkeypatch):
    """The host may not read the device each update."""
    for module in (guards, setup):
        monkeypatch.setattr(module, "can_sync_each_step", lambda device: False)


def test_a_run_that_does_not_look_does_what_one_does_that_looks(tmp_path, monkeypatch):
    settings = {"max_train_steps": 25, "checkpointing_steps": 10}
    for name in ("looks", "does_not"):
        with monkeypatch.context() as patch:
            patch.setattr(saving, "held_out_loss", lambda *_: None)  # of averages that differ in their last bits
            if name == "does_not":
                as_on_cuda(patch)
            train(tiny_config(tmp_path / name, **settings), objective=poisoned({0, 3, 4, 12}))
    for n in (20, 25):
        for file in ("unet", "optimizer", "ema"):
            one, other = (load_file(tmp_path / name / f"checkpoint-{n}/{file}.safetensors") for name in
                          ("looks", "does_not"))  # fmt: skip
            exactly = {} if file == "ema" else {"rtol": 0, "atol": 0}  # a difference and a sum in place of a lerp
            assert_close(other, one, **exactly)
    assert [row["skipped_updates"] for row in quietly(tmp_path / "does_not")] == [3, 1, 0]
    assert quietly(tmp_path / "does_not") == quietly(tmp_path / "looks")

    as_on_cuda(monkeypatch)
    shutil.copytree(tmp_path / "does_not/checkpoint-20", tmp_path / "again/checkpoint-20")
    train(tiny_config(tmp_path / "again", **settings, resume_from_checkpoint="latest"), objective=poisoned(()))
    for variant in (None, "raw"):
        assert_close(weights(tmp_path / "again", variant), weights(tmp_path / "does_not", variant), rtol=0, atol=0)


class Reads(TorchFunctionMode):
    """At which updates the loop brings a number to the host."""

    FILES = (
        "loop.py",
        "setup.py",
        "saving.py",
        "guards.py",
        "log.py",
        "ema.py",
        "optimizer.py",
        "loss.py",
    )  # not of the batch, on the CPU
    NAMES = ("__bool__", "__int__", "__float__", "__index__", "item", "tolist", "numpy", "cpu")

    def __init__(self):
        super().__init__()
        self.run, self.at = None, set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        caller = os.path.basename(sys._getframe(1).f_code.co_filename)
        if getattr(function, "__name__", "") in self.NAMES and caller in self.FILES:
            self.at.add(self.run.step if self.run else 0)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("looks", "optimizer"), [(True, "adamw"), (False, "adamw"), (False, "muon")])
def test_the_loop_reads_nothing_between_two_rows_of_the_log(tmp_path, monkeypatch, looks, optimizer):
    if not looks:
        as_on_cuda(monkeypatch)
    with Reads() as reads:
        config = tiny_config(tmp_path, max_train_steps=23, checkpointing_steps=15, optimizer=optimizer)
        train(config, callbacks=[calls(on_init_end=lambda run: setattr(reads, "run", run))])
    assert reads.at - {0} == (set(range(1, 24)) if looks else {10, 15, 20, 23})


class Brought(TorchDispatchMode):
    """What goes from the CPU to `meta`."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given, made = ({t.device.type for t in tree_leaves(tree) if isinstance(t, torch.Tensor)} for tree in
                       ((args, kwargs), result))  # fmt: skip
        if "cpu" in given and "meta" in given | made:
            self.operations.append(str(function))
        return result


@pytest.mark.parametrize("settings", [{}, {"num_classes": 3, "dropout": 0.1}, {"out_channels": 2}])
def test_no_part_of_an_update_waits_for_the_device(tmp_path, monkeypatch, settings):
    """With `meta`, of which no number can be read, in the place of CUDA: nothing goes there but by `to_device`."""

    def copy(tensor, device):
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    monkeypatch.setattr("ddpm_hf.schedulers.noise.to_device", copy)
    variance_type = "learned_range" if "out_channels" in settings else "fixed_small"
    scheduler = LinearNoiseScheduler(variance_type=variance_type, prediction_type="v_prediction")
    unet = tiny_unet(**settings).to("meta").train()
    x, uniform = torch.empty(4, 1, 8, 8, device="meta"), torch.empty(4, dtype=torch.float64, device="meta")
    labels = torch.empty(4, dtype=torch.int64, device="meta") if "num_classes" in settings else None
    ema, accelerator = EMA(unet, 0.9), SimpleNamespace(num_processes=1, device=x.device, scaler=None)
    inner = build_optimizer(tiny_config(tmp_path, optimizer="muon"), unet)
    optimizer = SimpleNamespace(optimizer=inner, step=inner.step, zero_grad=unet.zero_grad)
    config = SimpleNamespace(output_dir=tmp_path, config="")
    run = Run(config, SimpleNamespace(scheduler=scheduler), unet, None, None, 9, accelerator)
    accelerator.is_main_process = False  # which writes no log
    progress, skips = TrainingLog(run, 4, 0), Skips(run, None)
    with progress, Brought() as brought:
        loss, errors, t = DenoisingLoss(snr_gamma=5.0)(unet, scheduler, Batch(x, x, uniform, labels))
        loss.mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        applied = step_if_finite(accelerator, optimizer, loss.mean(), norm)
        ema.update(unet, 1, applied)
        progress.update(loss.mean().detach(), [(t, errors.detach())], applied, 1e-3)
        skips.update(applied)
    assert brought.operations == []
    with Brought() as brought:
        x + torch.ones(1).to("meta")
    assert brought.operations == ["aten._to_copy.default"]


def test_a_run_that_does_not_look_gives_up_at_a_row_of_the_log(tmp_path, monkeypatch):
    as_on_cuda(monkeypatch)
    with pytest.raises(FloatingPointError, match=r"in 27 updates in a row, the last of them 30; .*no checkpoint is"):
        train(tiny_config(tmp_path, max_train_steps=200), objective=poisoned(range(3, 10**6)))
    with pytest.raises(FloatingPointError, match=r"in 22 updates in a row, the last of them 25; "):
        train(tiny_config(tmp_path / "end", max_train_steps=25), objective=poisoned(range(3, 10**6)))


def test_a_run_that_does_not_look_sees_later_that_too_many_were_skipped(tmp_path, monkeypatch):
    """Between two rows of the log there are good updates again."""
    as_on_cuda(monkeypatch)
    many = poisoned({*range(1, 8), *range(11, 39), *range(40, 45)})
    with pytest.raises(FloatingPointError, match=r"in 28 updates in a row, the last of them 39; "):
        train(tiny_config(tmp_path / "many", max_train_steps=200), objective=many)
    fewer = poisoned({*range(11, 30), *range(31, 50)})
    assert train(tiny_config(tmp_path / "fewer", max_train_steps=60), objective=fewer).finished


def test_several_processes_that_do_not_look_ask_for_signals_at_a_row_of_the_log(monkeypatch):
    accelerator = SimpleNamespace(num_processes=2, device=torch.device("cpu"), reduce=lambda asked: 2 * asked)
    run = SimpleNamespace(accelerator=accelerator, step=7, config=SimpleNamespace(checkpointing_steps=15))
    with StopSignals() as stop:
        assert not stop_asked(run)
        stop.name = "SIGTERM"
        assert stop_asked(run)
        as_on_cuda(monkeypatch)
        assert not stop_asked(run)
        for step, asks in ((10, True), (14, False), (15, True), (16, False), (20, True)):
            run.step = step
            assert stop_asked(run) == asks


def test_a_run_gives_up_after_too_many_in_a_row(tmp_path):
    config = tiny_config(tmp_path, max_train_steps=200, checkpointing_steps=25)
    with pytest.raises(
        FloatingPointError, match=r"in 20 updates in a row, the last of them 70; .*checkpoint-50 is whole"
    ):
        train(config, objective=poisoned({*range(30, 49), *range(50, 10**6)}))
    whole = load_file(tmp_path / "checkpoint-50/unet.safetensors")
    assert all(w.isfinite().all() for w in whole.values())


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    def spoil(run):
        with torch.no_grad():
            run.unet.stem.bias[0] = math.inf

    with pytest.raises(FloatingPointError, match=r"after update 4 stem.bias is not finite: .* \(checkpoint-2\)"):
        train(tiny_config(tmp_path, checkpointing_steps=2), callbacks=[calls(on_save=spoil)])
    assert [path.name for path in Checkpoints(tmp_path, 9).found()] == ["checkpoint-2"]


def test_a_finished_folder_is_trained_into_again_if_that_is_asked_for(tmp_path):
    train(tiny_config(tmp_path))
    with pytest.raises(ValueError, match=r"contains a finished run \(checkpoint-4\): resume it with"):
        train(tiny_config(tmp_path))
    train(tiny_config(tmp_path, overwrite_output_dir=True))
    assert [path.name for path in Checkpoints(tmp_path, 9).found()] == ["checkpoint-4"]
    assert [row["step"] for row in read_log(tmp_path / "log.csv")] == [4]


def test_accumulation_equals_one_large_batch(tmp_path):
    train(tiny_config(tmp_path / "large", train_batch_size=16, max_train_steps=50))
    train(tiny_config(tmp_path / "small", train_batch_size=4, gradient_accumulation_steps=4, max_train_steps=50))
    large, small = (quietly(tmp_path / name) for name in ("large", "small"))
    assert [row["step"] for row in small] == [10, 20, 30, 40, 50]
    for a, b in zip(large, small, strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-5
        assert a["learning_rate"] == b["learning_rate"]


def test_micro_batches_see_what_one_large_batch_sees(tmp_path):
    """As the message promises that is told when memory runs out: gradients and weights agree to rounding."""
    settings = {"max_train_steps": 3, "adam_epsilon": 1e-3, "random_flip": True, "class_conditional": True}
    train(tiny_config(tmp_path / "large", train_batch_size=64, **settings))
    train(tiny_config(tmp_path / "small", train_batch_size=16, gradient_accumulation_steps=4, **settings))
    moments = "checkpoint-3/optimizer.safetensors"
    large, small = (load_file(tmp_path / name / moments) for name in ("large", "small"))
    assert_close(small, large, rtol=1e-3, atol=1e-6)
    large, small = (weights(tmp_path / name, "raw") for name in ("large", "small"))
    assert_close(small, large, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "help"),
    [
        ({}, "--train_batch_size 4 --gradient_accumulation_steps 4 sees the same images, .*, and --gradient_checkp"),
        ({"train_batch_size": 6, "gradient_accumulation_steps": 2}, "--train_batch_size 3 --gradient_acc.*steps 4 "),
        ({"train_batch_size": 7, "gradient_checkpointing": True}, "--train_batch_size 1 --gradi.*steps 7 [^-]*$"),
        ({"train_batch_size": 1}, "at once; --gradient_checkpointing true keeps"),
        ({"train_batch_size": 1, "gradient_checkpointing": True}, "at once; make the network or the images smaller"),
    ],
)
def test_where_memory_runs_out_it_is_told_what_to_set(tmp_path, monkeypatch, settings, help):
    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    size = settings.get("train_batch_size", 16)
    for module, where in ((DenoisingLoss, "__call__"), (loop, "step_if_finite")):  # which makes AdamW's moments
        monkeypatch.setattr(module, where, fail)
        with pytest.raises(ValueError, match=f"^train_batch_size={size}: memory does not hold .*{help}") as caught:
            train(tiny_config(tmp_path / where, **settings))
        assert "(CUDA out of memory. Tried to allocate 20.00 MiB.)" in str(caught.value)
        monkeypatch.undo()


@pytest.mark.parametrize("wrapped", [False, True])
def test_what_the_compiler_says_is_told_in_one_line(tmp_path, wrapped):
    from torch._dynamo.exc import BackendCompilerFailed
    from torch._inductor.exc import TritonMissing

    def fail(*args):
        error = TritonMissing(None)
        raise BackendCompilerFailed(print, error, None) if wrapped else error

    with pytest.raises(ValueError, match=r"^compile=True: .*\(Cannot find a working triton.*leave out compile$"):
        train(tiny_config(tmp_path, compile=True), objective=fail)


@pytest.mark.parametrize("message", ["the sky is falling", "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED."])
def test_other_errors_are_told_as_they_are(tmp_path, message):
    def loss(*args):
        raise RuntimeError(message)

    with pytest.raises(RuntimeError, match=f"^{message}$"):
        train(tiny_config(tmp_path), objective=loss)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "message", ["CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`", "[enforce fail] can't allocate memory"]
)
def test_each_of_several_processes_tells_that_its_memory_ran_out(tmp_path, monkeypatch, capsys, rank, message):
    def loss(*args):
        monkeypatch.setenv("RANK", str(rank))  # as cli.main sees it: nothing of a launcher is here
        raise RuntimeError(message)

    monkeypatch.setattr(DenoisingLoss, "__call__", loss)
    tiny_config(tmp_path).save(tmp_path / "config.json")
    assert main(["train", "--config", str(tmp_path / "config.json")]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("ddpm-hf: error: train_batch_size=16: memory does not hold")
    assert message in told


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_gradient_checkpointing_leaves_the_same_bytes(tmp_path, dropout):
    settings = {"unet": {**TINY_UNET, "dropout": dropout}, "max_train_steps": 12}
    plain, run = (train(tiny_config(tmp_path / str(on), gradient_checkpointing=on, **settings)) for on in (False, True))
    assert (plain.unet.is_gradient_checkpointing, run.unet.is_gradient_checkpointing) == (False, True)
    for variant in (None, "raw"):
        assert_close(weights(tmp_path / "True", variant), weights(tmp_path / "False", variant), rtol=0, atol=0)
    assert quietly(tmp_path / "True") == quietly(tmp_path / "False")


SMALLEST_UNET = {**TINY_UNET, "block_out_channels": [8], "attention": [True], "mid_block_out_channels": [8],
                 "up_block_out_channels": [8]}  # fmt: skip


@pytest.mark.slow
def test_a_compiled_network_learns_the_same_and_goes_on_as_a_plain_one(tmp_path, caplog):
    # AdamW would divide gradients that are next to nothing by as little, and make of their rounding a step
    settings = {"unet": SMALLEST_UNET, "max_train_steps": 25, "checkpointing_steps": 10, "adam_epsilon": 1e-3}
    for name, compiled in (("plain", False), ("compiled", True)):
        run = train(tiny_config(tmp_path / name, compile=compiled, **settings))
        assert (run.unet._compiled_call_impl is not None) == compiled
        assert run.pipeline.unet._compiled_call_impl is None
        told = [record.message for record in caplog.records if record.name == setup.__name__]
        if not compiled:
            assert not told
    assert told[0].startswith("compiling the network: the first update takes longer")
    assert re.fullmatch(r"compiled the network in \d+ seconds", told[1])
    assert len(told) == 2
    plain, compiled = (quietly(tmp_path / name) for name in ("plain", "compiled"))
    for a, b in zip(plain, compiled, strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-4
    plain, compiled = (load_file(tmp_path / name / "checkpoint-20/unet.safetensors") for name in ("plain", "compiled"))
    assert plain.keys() == compiled.keys()
    assert any(not torch.equal(plain[name], compiled[name]) for name in plain)  # or it was not compiled

    for origin, goes_on in (("plain", True), ("compiled", False)):
        folder = tmp_path / f"{origin}-goes-on"
        shutil.copytree(tmp_path / origin / "checkpoint-20", folder / "checkpoint-20")
        train(tiny_config(folder, compile=goes_on, resume_from_checkpoint="latest", **settings))
        assert_close(weights(folder), weights(tmp_path / "plain"), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_everything_at_once_compiled(tmp_path):
    """Classes, dropout, bf16, micro-batches, gradient checkpointing and previews of the raw weights."""
    settings = {"class_conditional": True, "mixed_precision": "bf16", "gradient_accumulation_steps": 2}
    settings |= {"unet": {**SMALLEST_UNET, "dropout": 0.1}, "gradient_checkpointing": True, "compile": True}
    torch._dynamo.utils.counters.clear()
    run = train(tiny_config(tmp_path, max_train_steps=12, **settings), callbacks=[Previews(draw_pictures)])
    assert run.finished
    assert (tmp_path / "first_samples.png").exists()
    assert {w.dtype for w in weights(tmp_path).values()} == {torch.float32}
    assert read_log(tmp_path / "log.csv")[-1]["loss"] < 1.5
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # for no other shape, of the previews


@pytest.mark.slow
def test_where_there_is_no_compiler_one_line_says_so(tmp_path):
    command = [sys.executable, script(tmp_path, tmp_path / "run", unet=SMALLEST_UNET, compile=True)]
    environment = {**os.environ, "CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert re.fullmatch(
        r"ddpm_hf.training.guards.UpdateError: compile=True: .*No working C.. compiler.*leave out compile", last
    )


def test_epochs(tmp_path):
    run = train(tiny_config(tmp_path, max_train_steps=None, num_epochs=2, train_batch_size=539))
    assert run.total_steps == 6  # 2 * 1617 / 539


def test_the_callbacks_see_the_run(tmp_path):
    seen = []
    train(
        tiny_config(tmp_path / "run", checkpointing_steps=2),
        callbacks=[
            calls(on_init_end=lambda run: seen.append(("start", run.step, sorted(os.listdir(run.output_dir))))),
            calls(on_train_begin=lambda run: seen.append(("begin", run.step, sorted(os.listdir(run.output_dir))))),
            calls(on_save=lambda run: seen.append(("save", run.step, run.finished))),
        ],
    )
    held = [".train.holder", ".train.lock"]
    begun = [("start", 0, held), ("begin", 0, [*held, "train_config.json"])]
    assert seen == [*begun, ("save", 2, False), ("save", 4, True)]


def test_held_out_loss_is_that_of_the_average_and_always_the_same(trained):
    config = tiny_config(trained)
    pipeline = DDPMCustomPipeline.from_pretrained(trained)
    images, held_out = load_images(config)
    run = Run(config, pipeline, pipeline.unet, images, held_out, 25, Accelerator(), step=25)
    first = held_out_loss(run, DenoisingLoss())
    config.train_batch_size = 50
    assert abs(held_out_loss(run, DenoisingLoss()) - first) < 1e-6  # however it is cut into batches
    logged = read_log(trained / "log.csv")[-1]["held_out_loss"]
    assert abs(logged - first) < 1e-6
    few = held_out_loss(
        run, DenoisingLoss(), 32
    )  # of some of them, for which a process that was asked to stop has time
    assert 0.5 < few / first < 2
    alone = Run(config, pipeline, pipeline.unet, images, None, 1, Accelerator())
    assert held_out_loss(alone, DenoisingLoss()) is None


def test_training_goes_on_from_given_weights(trained, tmp_path):
    start = {}

    def note(run):
        start.update({k: v.clone() for k, v in run.pipeline.unet.state_dict().items()})
        assert run.pipeline.scheduler.config.num_train_timesteps == 1000

    config = tiny_config(tmp_path / "more", unet={}, pretrained_model_name_or_path=str(trained))
    train(config, callbacks=[calls(on_init_end=note)])
    assert_close(start, weights(trained), rtol=0, atol=0)
    moved = weights(tmp_path / "more", "raw")
    assert not torch.equal(moved["stem.weight"], start["stem.weight"])


def test_a_network_of_diffusers_can_be_trained_on(tmp_path):
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "theirs")
    train(tiny_config(tmp_path / "ours", unet={}, pretrained_model_name_or_path=str(tmp_path / "theirs")))
    pipeline = DDPMCustomPipeline.from_pretrained(tmp_path / "ours")
    assert type(pipeline.unet) is diffusers.UNet2DModel
    assert pipeline(1, num_inference_steps=2, output_type="pt").images.isfinite().all()


def test_bf16(tmp_path):
    train(tiny_config(tmp_path, mixed_precision="bf16", max_train_steps=20))
    assert {w.dtype for w in weights(tmp_path).values()} == {torch.float32}
    assert read_log(tmp_path / "log.csv")[-1]["loss"] < 1.5


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGUSR1", 138)])
def test_a_stop_signal_saves_and_ends_cleanly(tmp_path, name, status):
    if not hasattr(signal, name):
        pytest.skip(f"this system has no {name}")
    number = signal.Signals[name]
    usual = signal.signal(number, signal.SIG_DFL)  # pytest may run under nohup

    def ask_to_stop(run):
        def kill():
            while run.step == 0:
                time.sleep(0.01)
            os.kill(os.getpid(), number)

        threading.Thread(target=kill).start()

    run = train(tiny_config(tmp_path, max_train_steps=100_000), callbacks=[calls(on_init_end=ask_to_stop)])
    assert 0 < run.step < 100_000
    assert (run.stopped_by, run.exit_status) == (name, status)
    assert signal.signal(number, usual) is signal.SIG_DFL
    assert (tmp_path / "model_index.json").exists()
    (checkpoint,) = Checkpoints(tmp_path, 9).found()
    assert checkpoint.name == f"checkpoint-{run.step}"
    resumed = train(tiny_config(tmp_path, max_train_steps=run.step + 2, resume_from_checkpoint="latest"))
    assert resumed.step == run.step + 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_data_dir": "/nowhere"}, "train_data_dir='/nowhere' is not a folder"),
        ({"mixed_precision": "fp16"}, "mixed_precision='fp16' needs a CUDA device"),
        ({"unet": {"depth": 3}}, "unet: there is no setting 'depth'"),
        (
            {"scheduler": {"beta_schedul": "x"}},
            "scheduler: there is no setting 'beta_schedul'; did you mean 'beta_schedule'",
        ),
        ({"scheduler": {"beta_schedule": "sigmoid"}}, "beta_schedule='sigmoid' must be one of"),
        (
            {"pretrained_model_name_or_path": "/nowhere", "unet": {}},
            "pretrained_model_name_or_path='/nowhere' can't be",
        ),
        ({"pretrained_model_name_or_path": "/nowhere"}, "must be empty with pretrained_model_name_or_path"),
        ({"resume_from_checkpoint": "checkpoint-3"}, "'checkpoint-3' is not a checkpoint; the checkpoints in .*: none"),
    ],
)
def test_what_cannot_be_trained_leaves_nothing(tmp_path, settings, message):
    if torch.cuda.is_available() and "mixed_precision" in settings:
        pytest.skip("CUDA is available, so fp16 is valid")
    with pytest.raises(ValueError, match=message):
        train(tiny_config(tmp_path / "run", **settings))
    assert not list(tmp_path.iterdir())


def test_weights_of_another_shape_are_refused(trained, tmp_path):
    config = tiny_config(tmp_path / "run", resume_from_checkpoint=str(trained / "checkpoint-20"))
    config.unet = {**config.unet, "stem_channels": 16}
    with pytest.raises(ValueError, match="another network than the checkpoint: stem_channels=16 was 8"):
        train(config)
    # A checkpoint of a version that did not keep the configuration
    shutil.copytree(trained / "checkpoint-20", tmp_path / "checkpoint-20")
    state = json.loads((tmp_path / "checkpoint-20/state.json").read_text(encoding="utf-8"))
    for name in ("seal", "network", "settings", "objective", "batch"):
        state.pop(name)
    old = {**state, "seal": checkpoints._seal(state)}
    (tmp_path / "checkpoint-20/state.json").write_text(json.dumps(old), encoding="utf-8")
    config.resume_from_checkpoint = str(tmp_path / "checkpoint-20")
    with pytest.raises(
        ValueError, match=r"is of another network: size mismatch for up.1.*\[8, 24, 1, 1\].*\[8, 32, 1, 1\]"
    ):
        train(config)
    DDPMCustomPipeline(tiny_unet(in_channels=3), LinearNoiseScheduler()).save_pretrained(tmp_path / "rgb")
    with pytest.raises(ValueError, match="has 3 input channels and the images have 1"):
        train(tiny_config(tmp_path / "run", unet={}, pretrained_model_name_or_path=str(tmp_path / "rgb")))
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- real processes

TRAIN = """
import sys; sys.path.insert(0, {tests!r})
import torch
from conftest import tiny_config
from ddpm_hf.training import train
torch.set_num_threads(1)  # two processes with two each would keep two cores waiting for one another
train(tiny_config({out!r}, **{settings!r}))
"""


def script(tmp_path, out, **settings):
    path = tmp_path / "script.py"
    path.write_text(TRAIN.format(tests=os.path.dirname(__file__), out=str(out), settings=settings))
    return path


def launch(path, processes=1, **settings) -> subprocess.Popen:
    """The script in its own processes."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    several = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", port]
    command = [sys.executable, *(several if processes > 1 else []), path]
    return subprocess.Popen(command, env=environment, **settings)


def finish(path, processes=1) -> None:
    assert launch(path, processes).wait(timeout=300) == 0


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_two_processes_do_what_one_does(tmp_path, dropout):
    """With dropout they do what one does that accumulates as many micro-batches; with classes and weights too."""
    both = {"unet": {**TINY_UNET, "dropout": dropout}, "max_train_steps": 50}
    alone = {"train_batch_size": 8, "gradient_accumulation_steps": 2} if dropout else {"train_batch_size": 16}
    if dropout:
        both |= {"class_conditional": True, "antithetic_timesteps": True, "snr_gamma": 5.0}
    train(tiny_config(tmp_path / "one", **alone, **both))
    finish(script(tmp_path, tmp_path / "two", train_batch_size=8, **both), 2)
    one, two = (quietly(tmp_path / name) for name in ("one", "two"))
    assert [row["step"] for row in two] == [10, 20, 30, 40, 50]
    assert [row["images_seen"] for row in two] == [row["images_seen"] for row in one]  # it was two, of half the batch
    for a, b in zip(one, two, strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-5
        for part in TrainingLog.BY_TIMESTEP:
            assert a[part] == b[part] or abs(a[part] - b[part]) < 1e-4
        assert a["learning_rate"] == b["learning_rate"]
    assert abs(one[-1]["held_out_loss"] - two[-1]["held_out_loss"]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_process_ends_cleanly(tmp_path, number):
    path = script(tmp_path, tmp_path / "run", max_train_steps=100_000)
    process = subprocess.Popen([sys.executable, path], stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "run/log.csv").exists() or not read_log(tmp_path / "run/log.csv"):
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 0
    assert "Traceback" not in error
    assert f"stopped by {number.name} after update" in error
    assert Checkpoints(tmp_path / "run", 9).found()
    assert DDPMCustomPipeline.from_pretrained(tmp_path / "run")


@pytest.mark.slow
def test_processes_whose_launcher_is_killed_save_and_end(tmp_path):
    path = script(tmp_path, tmp_path / "run", max_train_steps=100_000)
    with open(tmp_path / "errors", "w", encoding="utf-8") as errors:
        launcher = launch(path, 2, stderr=errors)
    while not (tmp_path / "run/log.csv").exists() or not read_log(tmp_path / "run/log.csv"):
        time.sleep(0.05)
        assert launcher.poll() is None
    workers = psutil.Process(launcher.pid).children(recursive=True)
    assert len(workers) >= 2
    launcher.kill()
    launcher.wait()
    assert psutil.wait_procs(workers, timeout=60)[1] == []
    error = (tmp_path / "errors").read_text(encoding="utf-8")
    assert f"the launcher (process {launcher.pid}) has ended" in error
    assert re.search("stopped by (SIGHUP|another process) after update", error)  # which of them notices it first
    assert "Traceback" not in error
    assert Checkpoints(tmp_path / "run", 9).found()
    assert DDPMCustomPipeline.from_pretrained(tmp_path / "run")


# Epochs that do not end with an update; accumulated, with dropout and flips, so that all that is drawn counts.
KILLED = {
    "max_train_steps": 150,
    "checkpointing_steps": 3,
    "train_batch_size": 16,
    "gradient_accumulation_steps": 2,
    "unet": {**TINY_UNET, "dropout": 0.1},
    "random_flip": True,
    "random_vertical_flip": True,
    "random_rotate90": True,
    "class_balance": 1.0,
    "lr_scheduler": "cosine",
}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_at_random_moments_ends_with_the_same_bytes(tmp_path, processes):
    """SIGKILL, five times, wherever it is: 150 updates of 32 or 64 images are almost 3 or 6 epochs. Each time another
    training is started on the folder first."""
    seed = random.randrange(10**6)
    print(f"moments of seed {seed}")
    moments, killed_at = random.Random(seed), []
    whole = tmp_path / "whole"
    finish(script(tmp_path, whole, **KILLED), processes)
    path = script(tmp_path, tmp_path / "killed", **KILLED, resume_from_checkpoint="latest")
    while len(killed_at) < 5:
        process, last = (
            launch(path, processes),
            max([*map(Checkpoints._step, Checkpoints(tmp_path / "killed", 9).found()), 0]),
        )
        # Until it has got on by a checkpoint, and then for as long as a few updates and a save take
        while max([*map(Checkpoints._step, Checkpoints(tmp_path / "killed", 9).found()), 0]) <= last:
            time.sleep(0.005)
            assert process.poll() is None
        with pytest.raises(ValueError, match=r"killed is in use by process \d+ on "):
            train(tiny_config(tmp_path / "killed", overwrite_output_dir=True))
        time.sleep(moments.uniform(0, 0.3))
        assert process.poll() is None, f"ended before it was killed; seed {seed}"
        for each in [*psutil.Process(process.pid).children(recursive=True), process]:
            each.kill()
        process.wait()
        killed_at.append(len(read_log(tmp_path / "killed/log.csv")))
    finish(path, processes)
    assert killed_at == sorted(killed_at)
    for name in FILES:
        again, before = ((tmp_path / run / "checkpoint-150" / name).read_bytes() for run in ("killed", "whole"))
        assert again == before, f"{name}, seed {seed}"
    for file in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.raw.safetensors"):
        assert (tmp_path / "killed/unet" / file).read_bytes() == (whole / "unet" / file).read_bytes()
    assert quietly(tmp_path / "killed") == quietly(whole)
    texts = [
        [line.split(",")[: len(TrainingLog.COUNTED)] for line in (path / "log.csv").read_text().splitlines()]
        for path in (tmp_path / "killed", whole)
    ]
    assert texts[0] == texts[1]


# ---------------------------------------------------------------- a learned variance


def test_a_learned_variance_is_trained_beside_the_mean_and_leaves_it_alone(tmp_path):
    """The bound teaches the variance only (arXiv:2102.09672, section 3.1), so of the prediction nothing changes."""
    scheduler = LinearNoiseScheduler(variance_type="learned_range")
    unet = tiny_unet(out_channels=2)
    images, noise = torch.rand(5, 1, 8, 8) * 2 - 1, torch.randn(5, 1, 8, 8)
    t = torch.tensor([0, 1, 10, 500, 999])
    loss, errors, timesteps = DenoisingLoss()(unet, scheduler, Batch(images, noise, at(t)))
    assert torch.equal(timesteps, t)
    bounds = loss - errors
    (of_bounds,) = torch.autograd.grad(bounds.sum(), unet.conv_out.weight, retain_graph=True)
    (of_errors,) = torch.autograd.grad(errors.sum(), unet.conv_out.weight)
    assert (of_bounds[0] == 0).all()
    assert (of_bounds[1] != 0).any()
    assert (of_errors[1] == 0).all()
    terms = bound_terms(scheduler, images, scheduler.add_noise(images, noise, t), t, unet(
        scheduler.add_noise(images, noise, t), t
    ).sample, 256)  # fmt: skip
    # of one timestep drawn evenly, the sum over all 1,000, a thousandth of which is minimised
    assert_close(bounds, terms, rtol=1e-4, atol=1e-5)


def test_a_run_with_a_learned_variance(tmp_path):
    settings = {"learned_variance": True, "max_train_steps": 40, "checkpointing_steps": 20}
    run = train(tiny_config(tmp_path / "whole", **settings))
    assert run.unet.config.out_channels == 2
    assert run.pipeline.scheduler.config.variance_type == "learned_range"
    assert run.images.levels == 17
    start, end = tiny_unet(out_channels=2).conv_out, run.unet.conv_out
    assert (end.weight[1] - start.weight[1]).abs().max() > 1e-3
    pipeline = DDPMCustomPipeline.from_pretrained(tmp_path / "whole")
    assert pipeline(2, num_inference_steps=3).images[0].size == (8, 8)

    again = tiny_config(tmp_path / "again", **settings)
    shutil.copytree(tmp_path / "whole" / "checkpoint-20", tmp_path / "again" / "checkpoint-20")
    again.resume_from_checkpoint = "latest"
    train(again)
    assert_close(weights(tmp_path / "again"), weights(tmp_path / "whole"), rtol=0, atol=0)
    again = tiny_config(tmp_path / "again", **{**settings, "learned_variance": False, "max_train_steps": 50})
    again.resume_from_checkpoint = "latest"
    with pytest.raises(ValueError, match="another network than the checkpoint: out_channels=None was 2"):
        train(again)

    fine = {"pretrained_model_name_or_path": str(tmp_path / "whole"), "unet": {}, "max_train_steps": 2}
    assert train(tiny_config(tmp_path / "fine", **fine)).unet.config.out_channels == 2
    plain = train(tiny_config(tmp_path / "plain", max_train_steps=1))
    fine = {**fine, "pretrained_model_name_or_path": str(plain.output_dir), "learned_variance": True}
    with pytest.raises(ValueError, match="learned_variance=True: the network predicts 1 channels for images of 1"):
        train(tiny_config(tmp_path / "no", **fine))
    for settings in ({"scheduler": {"variance_type": "learned_range"}}, {"unet": {**TINY_UNET, "out_channels": 2}}):
        with pytest.raises(ValueError, match="learned_variance=False.*leave it out"):
            train(tiny_config(tmp_path / "no", **settings))


@pytest.mark.parametrize(("scheduler", "signal"), [
    ({"num_train_timesteps": 10}, "0.95"),
    ({"num_train_timesteps": 100}, "0.60"),
    ({}, None),
    ({"num_train_timesteps": 10, "beta_schedule": "squaredcos_cap_v2"}, None),
    ({"num_train_timesteps": 10, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, None),
])  # fmt: skip
def test_a_schedule_that_leaves_signal_is_told(tmp_path, caplog, scheduler, signal):
    train(tiny_config(tmp_path, max_train_steps=1, scheduler=scheduler))
    told = [record.getMessage() for record in caplog.records if "alpha_bar" in record.getMessage()]
    assert len(told) == (signal is not None)
    if signal:
        assert told[0].startswith(f"sqrt(alpha_bar_T)={signal}: after all {scheduler['num_train_timesteps']} timesteps")
        assert "squaredcos_cap_v2" in told[0]
        assert "rescale_betas_zero_snr" in told[0]


@pytest.mark.parametrize("name", recipe_names())
def test_the_schedules_of_recipes_leave_no_signal(name):
    settings = resolve({"config": name}).scheduler
    assert signal_left(scheduler_class(settings).from_config(settings)) is None

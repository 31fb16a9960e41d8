"""Nothing of anyone is lost: folders, checkpoints, logs and models through mistakes, damage, signals, divergence."""

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_UNET, calls, tiny_config, tiny_unet
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.testing import assert_close

from ddpm_hf import DDPMCustomPipeline, LinearNoiseScheduler
from ddpm_hf.commands import main as cli
from ddpm_hf.commands import push
from ddpm_hf.commands.train_callbacks import write_facts_and_card
from ddpm_hf.data.decoding import Decoder
from ddpm_hf.evaluation import evaluate as evaluation
from ddpm_hf.hub import cards
from ddpm_hf.training import DenoisingLoss, checkpoints, pictures, previews, train
from ddpm_hf.training.checkpoints import REPLACED, Checkpoints
from ddpm_hf.training.guards import divergence
from ddpm_hf.training.log import read_log
from ddpm_hf.training.previews import Previews
from ddpm_hf.training.resume import check_same
from ddpm_hf.utils.files import locked
from ddpm_hf.utils.signals import LAUNCHED, Stopped, StopSignals, exit_status, raise_if_stopped, stop_requested


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def steps_of(folder: Path) -> list[str]:
    return [path.name for path in Checkpoints(folder, 9).found()]


def die(run):
    raise KeyboardInterrupt


# ---------------------------------------------------------------- folders that hold something


def finished_run(folder):
    train(tiny_config(folder))


def pipeline(folder):
    DDPMCustomPipeline(tiny_unet(), LinearNoiseScheduler()).save_pretrained(folder)


def weights_of_another_program(folder):
    (folder / "checkpoint-500").mkdir(parents=True)
    (folder / "checkpoint-500" / "model.safetensors").write_bytes(b"theirs")


def pictures_of_somebody(folder):
    folder.mkdir()
    Image.new("L", (8, 8)).save(folder / "samples.png")


@pytest.mark.parametrize("resume", [None, "latest", "elsewhere"])
@pytest.mark.parametrize("held", [finished_run, pipeline, weights_of_another_program, pictures_of_somebody])
def test_what_a_folder_holds_is_not_replaced_unasked(tmp_path, trained, held, resume):
    held(tmp_path / "run")
    before = contents(tmp_path / "run")
    if held is finished_run and resume == "latest":
        return  # which goes on with it
    resume = str(trained / "checkpoint-20") if resume == "elsewhere" else resume
    with pytest.raises(ValueError, match=r"output_dir='.*run' contains .*, or give --overwrite_output_dir"):
        train(tiny_config(tmp_path / "run", max_train_steps=25, resume_from_checkpoint=resume))
    assert contents(tmp_path / "run") == before


def test_a_run_that_failed_before_its_first_checkpoint_is_begun_again_without_a_question(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tiny_config(tmp_path), callbacks=[calls(on_train_begin=pictures.draw_data), calls(on_train_begin=die)])
    assert (tmp_path / "data.png").exists()
    train(tiny_config(tmp_path))
    assert steps_of(tmp_path) == ["checkpoint-4"]


def test_what_is_replaced_waits_for_the_first_new_checkpoint(tmp_path):
    train(tiny_config(tmp_path, checkpointing_steps=2), callbacks=[calls(on_train_begin=pictures.draw_data)])
    before = contents(tmp_path)

    def look(run):
        assert steps_of(tmp_path) == []
        assert (tmp_path / "model_index.json").exists()  # the old model, until there is a new one
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(
                tiny_config(tmp_path, seed=1, overwrite_output_dir=True),
                callbacks=[calls(on_train_begin=pictures.draw_data), calls(on_train_begin=look)],
            )
        assert contents(tmp_path) == before
    train(tiny_config(tmp_path, max_train_steps=6, resume_from_checkpoint="latest"))
    assert steps_of(tmp_path) == ["checkpoint-4", "checkpoint-6"]
    assert [row["step"] for row in read_log(tmp_path / "log.csv")] == [2, 4, 6]

    train(tiny_config(tmp_path, seed=1, overwrite_output_dir=True))
    assert steps_of(tmp_path) == ["checkpoint-4"]
    assert not (tmp_path / REPLACED).exists()
    assert json.loads((tmp_path / "checkpoint-4/state.json").read_text(encoding="utf-8"))["settings"]["seed"] == 1


class Killed(BaseException):
    """Nothing is done after it, as after SIGKILL."""


@pytest.mark.parametrize("kind", ["run", "pipeline"])
def test_a_process_that_is_killed_at_any_rename_loses_nothing_of_what_it_replaces(tmp_path, trained, monkeypatch, kind):
    shutil.copytree(trained, tmp_path / "whole") if kind == "run" else pipeline(tmp_path / "whole")
    before = contents(tmp_path / "whole")

    def dying_after(number):
        left = [number]

        def replace(*names, rename=os.replace):
            if not left[0]:
                raise Killed
            left[0] -= 1
            rename(*names)

        return replace

    for first in range(9):
        for second in range(9):
            shutil.copytree(tmp_path / "whole", tmp_path / "run")
            at_once = Checkpoints(tmp_path / "run", 2)
            for number, work in ((first, lambda c=at_once: c.make_room(None)), (second, at_once.roll_back)):
                with monkeypatch.context() as patch, contextlib.suppress(Killed):
                    patch.setattr(checkpoints.os, "replace", dying_after(number))
                    work()
                    if work != at_once.roll_back:
                        (tmp_path / "run/log.csv").write_text("of the run that replaces", encoding="utf-8")
            at_once.roll_back()
            shutil.rmtree(tmp_path / "run/.removed-.replaced", ignore_errors=True)
            assert contents(tmp_path / "run") == before, (first, second)
            shutil.rmtree(tmp_path / "run")


def test_a_process_that_is_killed_after_its_first_checkpoint_keeps_that_one(tmp_path, trained):
    shutil.copytree(trained, tmp_path / "run")
    at_once = Checkpoints(tmp_path / "run", 2)
    at_once.make_room(None)
    shutil.copytree(trained / "checkpoint-20", tmp_path / "run/checkpoint-20")  # of the run that replaces
    at_once.roll_back()
    assert steps_of(tmp_path / "run") == ["checkpoint-20"]
    assert not (tmp_path / "run" / REPLACED).exists()


def test_a_checkpoint_may_be_a_link_to_where_there_is_room(tmp_path):
    settings = {"checkpointing_steps": 2, "checkpoints_total_limit": 1}
    train(tiny_config(tmp_path / "run", **settings))
    shutil.move(tmp_path / "run/checkpoint-4", tmp_path / "elsewhere")
    (tmp_path / "run/checkpoint-4").symlink_to(tmp_path / "elsewhere")
    kept = contents(tmp_path / "elsewhere")
    train(tiny_config(tmp_path / "run", **settings, max_train_steps=6, resume_from_checkpoint="latest"))
    assert steps_of(tmp_path / "run") == ["checkpoint-6"]
    assert [row["step"] for row in read_log(tmp_path / "run/log.csv")] == [2, 4, 6]
    assert contents(tmp_path / "elsewhere") == kept
    assert not list((tmp_path / "run").glob(".*"))


def test_models_in_other_folders_below_are_nobodys_concern(tmp_path):
    (tmp_path / "project").mkdir()
    (tmp_path / "project/vgg.pth").write_bytes(b"theirs")
    train(tiny_config(tmp_path))
    assert (tmp_path / "project/vgg.pth").read_bytes() == b"theirs"


def test_a_list_of_ones_own_is_not_taken_for_ours(tmp_path):
    (tmp_path / "quarantine.csv").write_text("my,own", encoding="utf-8")
    with pytest.raises(ValueError, match="contains quarantine.csv, which training would replace"):
        train(tiny_config(tmp_path))
    (tmp_path / "quarantine.csv").write_text("path,reason\r\na.png,is empty", encoding="utf-8")
    train(tiny_config(tmp_path))  # the list that a run wrote which ended for its sake
    assert not (tmp_path / "quarantine.csv").exists()


def test_a_model_in_several_files_does_not_hide_the_one_that_replaces_it(tmp_path):
    DDPMCustomPipeline(tiny_unet(), LinearNoiseScheduler()).save_pretrained(tmp_path, max_shard_size="40KB")
    assert (tmp_path / "unet/diffusion_pytorch_model.safetensors.index.json").exists()
    run = train(tiny_config(tmp_path, overwrite_output_dir=True))
    loaded = DDPMCustomPipeline.from_pretrained(tmp_path).unet
    assert_close(loaded.state_dict(), run.pipeline.unet.state_dict(), rtol=0, atol=0)


# ---------------------------------------------------------------- resuming


def test_a_named_checkpoint_is_that_of_the_output_folder_and_newer_ones_stay(tmp_path, trained, monkeypatch):
    settings = {"max_train_steps": 8, "checkpointing_steps": 4}
    train(tiny_config(tmp_path / "run", **settings))
    kept = contents(tmp_path / "run/checkpoint-8")
    shutil.copytree(trained / "checkpoint-20", tmp_path / "elsewhere" / "checkpoint-4")
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(KeyboardInterrupt):
        train(
            tiny_config(tmp_path / "run", **settings, resume_from_checkpoint="checkpoint-4"),
            callbacks=[calls(on_train_begin=die)],
        )
    assert steps_of(tmp_path / "run") == ["checkpoint-4"]
    assert contents(tmp_path / "run/superseded/checkpoint-8") == kept
    assert [row["step"] for row in read_log(tmp_path / "run/superseded/log.csv")] == [4, 8]
    train(tiny_config(tmp_path / "run", **settings, resume_from_checkpoint="checkpoint-4"))
    assert contents(tmp_path / "run/checkpoint-8") == kept  # it was this run, and not the one elsewhere
    train(tiny_config(tmp_path / "run", **settings, resume_from_checkpoint="checkpoint-4"))
    assert sorted(os.listdir(tmp_path / "run/superseded")) == ["checkpoint-8", "checkpoint-8-2", "log.csv", "log.csv-2"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train_batch_size": 8}, "sees 8 images and one of the checkpoint's saw 16 .train_batch_size=8 was 16."),
        ({"gradient_accumulation_steps": 2}, "sees 32 .* saw 16 .gradient_accumulation_steps=2 was 1."),
        ({"seed": 5}, "seed=5, and the checkpoint's run had seed=0"),
        ({"unet": {**TINY_UNET, "num_attention_heads": 4}}, "another network .*num_attention_heads=4 was 2"),
        ({"unet": {**TINY_UNET, "norm_num_groups": 4}}, "another network .*norm_num_groups=4 was 8"),
        ({"unet": {**TINY_UNET, "freq_shift": 1}}, "another network .*freq_shift=1 was 0"),
        ({"prediction_type": "sample"}, "another objective .*prediction_type='sample' was 'epsilon'"),
        ({"scheduler": {"variance_type": "fixed_large"}}, "another objective .*'fixed_large' was 'fixed_small'"),
        ({"snr_gamma": 5.0}, "another objective .*snr_gamma=5.0 was None"),
    ],
)
def test_another_network_objective_or_batch_is_no_resume(tmp_path, trained, changed, message):
    config = {"max_train_steps": 25, "resume_from_checkpoint": str(trained / "checkpoint-20"), **changed}
    with pytest.raises(ValueError, match=message):
        train(tiny_config(tmp_path / "run", **config))
    assert not (tmp_path / "run").exists()


def test_another_number_of_processes_is_no_resume(tmp_path, trained):
    config = tiny_config(tmp_path / "run", max_train_steps=21, resume_from_checkpoint=str(trained / "checkpoint-20"))
    run = train(config)
    state = json.loads((trained / "checkpoint-20/state.json").read_text(encoding="utf-8"))
    state["batch"]["processes"] = 2
    with pytest.raises(ValueError, match="sees 16 images and one of the checkpoint's saw 32 .processes=1 was 2."):
        check_same(state, run, DenoisingLoss())
    state["batch"]["train_batch_size"] = 8  # the same product
    check_same(state, run, DenoisingLoss())


def folder_of_images(folder: Path, value: int) -> str:
    folder.mkdir(parents=True)
    for k in range(20):
        Image.fromarray(np.full((8, 8), value + k, np.uint8)).save(folder / f"{k}.png")
    return str(folder)


def test_a_run_on_data_of_the_same_name_is_another_run(tmp_path):
    folders = [folder_of_images(tmp_path / name / "photos", value) for name, value in (("a", 0), ("b", 100))]
    train(tiny_config(tmp_path / "run", train_data_dir=folders[0]))
    settings = {"max_train_steps": 6, "resume_from_checkpoint": "latest"}
    with pytest.raises(ValueError, match=r"holds a run on other data .*a/photos', 18 images .*b/photos', 18 images"):
        train(tiny_config(tmp_path / "run", **settings, train_data_dir=folders[1]))
    shutil.move(folders[0], tmp_path / "moved")  # the same data
    assert train(tiny_config(tmp_path / "run", **settings, train_data_dir=str(tmp_path / "moved"))).step == 6


def test_the_lowest_held_out_loss_is_that_of_the_same_images(tmp_path):
    folder = Path(folder_of_images(tmp_path / "in", 0))
    settings = {"train_data_dir": str(folder), "checkpointing_steps": 2, "learning_rate": 1e-9}
    first = train(tiny_config(tmp_path / "run", **settings))
    assert first.best
    shutil.rmtree(folder)
    folder_of_images(folder, 100)
    seen = []
    again = {**settings, "max_train_steps": 8, "resume_from_checkpoint": "latest"}
    train(tiny_config(tmp_path / "run", **again), callbacks=[calls(on_train_begin=lambda run: seen.append(run.best))])
    assert seen == [{}]


def test_other_changed_settings_are_told_in_one_line(tmp_path, trained, caplog):
    settings = {"max_train_steps": 21, "resume_from_checkpoint": str(trained / "checkpoint-20")}
    network = {**TINY_UNET, "dropout": 0.1}
    batch = {"train_batch_size": 8, "gradient_accumulation_steps": 2}
    train(tiny_config(tmp_path / "run", **settings, **batch, learning_rate=5e-4, unet=network, random_flip=True))
    (line,) = [r.message for r in caplog.records if "changed settings" in r.message]
    for part in ("learning_rate=0.0005 was 0.001", "random_flip=True was False", "max_train_steps=21 was 25",
                 "dropout=0.1 was 0.0", "train_batch_size=8 was 16"):  # fmt: skip
        assert part in line
    caplog.clear()
    settings["max_train_steps"] = 25
    train(tiny_config(tmp_path / "same", **settings, checkpointing_steps=10))
    assert "changed settings" not in caplog.text


# ---------------------------------------------------------------- damage

LOG_DAMAGES = {
    "a word": lambda lines: [*lines[:2], "oops", *lines[2:]],
    "a cell": lambda lines: [lines[0], "x" + lines[1], *lines[2:]],
    "cells are missing": lambda lines: [lines[0], lines[1][:20], *lines[2:]],
    "cells too many": lambda lines: [lines[0], lines[1] + ",1,2", *lines[2:]],
    "zeros of a lost block": lambda lines: [lines[0], "\0" * 200, *lines[2:]],
    "no text": lambda lines: [lines[0], b"\xff\xfe\x80".decode("latin-1"), *lines[2:]],
    "an empty line": lambda lines: [*lines[:2], "", *lines[2:]],
    "no header": lambda lines: lines[1:],
    "another header": lambda lines: ["a,b,c", *lines[1:]],
    "a quote": lambda lines: [*lines[:2], '"', *lines[2:]],
    "half a step": lambda lines: [lines[0], "1.5" + lines[1][lines[1].index(",") :], *lines[2:]],
}


@pytest.mark.parametrize("damage", LOG_DAMAGES)
def test_a_damaged_log_is_set_aside_and_the_run_goes_on(tmp_path, trained, damage, caplog):
    shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoint-25")
    path = tmp_path / "run/log.csv"
    lines = path.read_text(encoding="utf-8").splitlines()
    damaged = "".join(f"{line}\n" for line in LOG_DAMAGES[damage](lines)).encode("latin-1")
    path.write_bytes(damaged)
    config = {"max_train_steps": 25, "checkpointing_steps": 10, "resume_from_checkpoint": "latest"}
    train(tiny_config(tmp_path / "run", **config), callbacks=[calls(on_save=write_facts_and_card)])
    assert (tmp_path / "run/log.csv.damaged").read_bytes() == damaged
    assert f"{path} is damaged (line " in caplog.text
    assert read_log(path)[-1]["step"] == 25
    steps = [row["step"] for row in read_log(path)]
    assert set(steps) <= {10, 20, 25}
    assert (tmp_path / "run/run.json").exists()


@pytest.mark.parametrize("name", ["run.json", "evaluation.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"5", b'{"data": 1}', b"[" * 100_000, b"null"])
def test_damaged_facts_are_set_aside_and_made_anew(tmp_path, name, content, caplog):
    train(tiny_config(tmp_path), callbacks=[calls(on_save=write_facts_and_card)])
    (tmp_path / name).write_bytes(content)
    settings = {"max_train_steps": 6, "resume_from_checkpoint": "latest"}
    train(tiny_config(tmp_path, **settings), callbacks=[calls(on_save=write_facts_and_card)])
    assert (tmp_path / f"{name}.damaged").read_bytes() == content
    assert f"{name} is damaged" in caplog.text
    assert "no card" not in caplog.text
    assert cards.read_facts(tmp_path / cards.FACTS)["training"]["updates"] == 6


@pytest.mark.parametrize("content", [b"[]", b"5", b"null", b'"a"', b"{}", b"[" * 100_000])
def test_a_state_of_another_kind_is_damaged(tmp_path, trained, content, caplog):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run/checkpoint-25/state.json").write_bytes(content)
    settings = {"max_train_steps": 25, "checkpointing_steps": 10, "resume_from_checkpoint": "latest"}
    assert train(tiny_config(tmp_path / "run", **settings)).step == 25
    assert "checkpoint-25 is damaged" in caplog.text


# ---------------------------------------------------------------- a training that diverges


def explode(run):
    """The average, which is what is measured and saved: its outputs are large, or not finite."""
    with torch.no_grad():
        run.unet.conv_out.weight.mul_(1e3)
        run.pipeline.unet.conv_out.weight.mul_(1e3)


def after(step, spoil, seen):
    def callback(run):
        seen.append(run.step)
        if run.step == step:
            spoil(run)

    return callback


def test_a_run_that_diverges_neither_drops_nor_replaces_what_is_good(tmp_path, caplog):
    seen, drawn = [], []
    settings = {"max_train_steps": 60, "checkpointing_steps": 10, "checkpoints_total_limit": 1}
    settings |= {"preview_time_share": 0.99, "eval_batch_size": 1}
    # Few updates and a small rate do not bring the weights back
    with pytest.raises(FloatingPointError, match=r"update 60 the held-out loss .* times its lowest .*checkpoint-20 is"):
        train(
            tiny_config(tmp_path, **settings, learning_rate=1e-9),
            callbacks=[calls(on_save=after(20, explode, seen)), Previews(lambda run: drawn.append(run.step))],
        )
    assert seen == [10, 20]
    assert set(drawn) <= {10, 20}
    assert steps_of(tmp_path) == ["checkpoint-20"]
    assert caplog.text.count("the training has diverged") == 3  # at 30, 40 and 50; at 60 it is the error
    saved = load_file(tmp_path / "unet/diffusion_pytorch_model.safetensors")
    assert_close(saved, load_file(tmp_path / "checkpoint-20/ema.safetensors"), rtol=0, atol=0)


def test_a_held_out_loss_that_is_not_finite_ends_a_run(tmp_path):
    settings = {"max_train_steps": 60, "checkpointing_steps": 10, "checkpoints_total_limit": 1}

    def spoil(run):
        with torch.no_grad():
            run.pipeline.unet.norm_out.weight.fill_(1e30)
            run.pipeline.unet.conv_out.weight.fill_(1e30)

    with pytest.raises(FloatingPointError, match=r"held-out loss is (inf|nan), .*checkpoint-10 is from before it"):
        train(tiny_config(tmp_path, **settings), callbacks=[calls(on_save=after(10, spoil, []))])
    assert steps_of(tmp_path) == ["checkpoint-10"]
    saved = load_file(tmp_path / "unet/diffusion_pytorch_model.safetensors")
    assert_close(saved, load_file(tmp_path / "checkpoint-10/ema.safetensors"), rtol=0, atol=0)


def test_a_run_that_is_stopped_after_it_has_diverged_replaces_nothing(tmp_path, caplog):
    def spoil_and_stop(run):
        if run.step == 10:
            explode(run)

            def kill():
                while run.step < 13:
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGTERM)

            threading.Thread(target=kill).start()

    settings = {"max_train_steps": 100_000, "checkpointing_steps": 10, "learning_rate": 1e-9}
    run = train(tiny_config(tmp_path, **settings), callbacks=[calls(on_save=spoil_and_stop)])
    assert run.stopped_by == "SIGTERM"
    assert steps_of(tmp_path) == ["checkpoint-10"]
    assert "the training has diverged" in caplog.text
    saved = load_file(tmp_path / "unet/diffusion_pytorch_model.safetensors")
    assert_close(saved, load_file(tmp_path / "checkpoint-10/ema.safetensors"), rtol=0, atol=0)


def test_what_is_learnt_by_heart_has_not_diverged(tmp_path):
    """The held-out loss grows and the training loss falls: that run is saved as ever."""
    run = train(tiny_config(tmp_path, max_train_steps=2))
    checkpoints = Checkpoints(tmp_path, 2)
    run.best = {"step": 1, "held_out_loss": 0.1, "loss": 0.1}
    assert divergence(run, checkpoints, 0.9, 0.02) is None
    assert "more than 3 times its lowest (0.1 after update 1)" in divergence(run, checkpoints, 0.9, 0.3)
    assert divergence(run, checkpoints, 0.29, 0.3) is None
    assert divergence(run, checkpoints, None, math.inf) is None  # nothing was held out


def test_the_best_loss_is_kept_with_the_checkpoint(tmp_path):
    train(tiny_config(tmp_path, max_train_steps=10))
    run = train(tiny_config(tmp_path, max_train_steps=11, resume_from_checkpoint="latest", learning_rate=1e-9))
    first = read_log(tmp_path / "log.csv")[0]
    assert run.best["held_out_loss"] <= first["held_out_loss"]
    state = json.loads((tmp_path / "checkpoint-10/state.json").read_text(encoding="utf-8"))
    assert state["best"] == {"step": 10, "held_out_loss": first["held_out_loss"], "loss": first["loss"]}


# ---------------------------------------------------------------- signals


def test_a_stop_is_seen_within_a_preview(tmp_path, caplog):
    """The preview would take many minutes."""

    def preview(run):
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        previews.sample_together(run.accelerator, run.pipeline, 16, 1000, 0)
        raise AssertionError("all of it was drawn")

    began = time.monotonic()
    settings = {"max_train_steps": 8, "checkpointing_steps": 4, "preview_time_share": 0.99}
    for resume in (None, "latest"):
        run = train(tiny_config(tmp_path, **settings, resume_from_checkpoint=resume), callbacks=[Previews(preview)])
        assert run.exit_status == 143
        if run.finished:
            break
    assert time.monotonic() - began < 60
    assert "no samples drawn at update" in caplog.text
    assert steps_of(tmp_path)[-1] == f"checkpoint-{run.step}"


def test_a_stop_is_seen_while_images_are_decoded(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    for k in range(40):
        Image.fromarray(np.full((8, 8), k, np.uint8)).save(folder / f"{k:02d}.png")
    decoded = []

    def slowly(decoder, item, frame=None, decode=Decoder.__call__):
        decoded.append(item)
        if len(decoded) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return decode(decoder, item)

    monkeypatch.setattr(Decoder, "__call__", slowly)
    with pytest.raises(Stopped, match="stopped by SIGTERM") as caught:
        train(tiny_config(tmp_path / "run", train_data_dir=str(folder)))
    assert caught.value.status == 143
    assert len(decoded) == 5
    assert not (tmp_path / "run").exists()
    decoded.clear()
    words = ["train", "--train_data_dir", str(folder), "--output_dir", str(tmp_path / "run"), "--config", "digits"]
    assert cli.main(words) == 143
    assert capsys.readouterr().err.strip().endswith("ddpm-hf: stopped by SIGTERM")


def test_a_stop_while_a_stream_is_read_keeps_the_place_after_the_last_update(tmp_path, monkeypatch):
    import datasets

    images = []
    for k in range(60):
        path = tmp_path / f"{k}.png"
        Image.fromarray(np.full((8, 8), 4 * k, np.uint8)).save(path)
        images.append({"bytes": path.read_bytes(), "path": None})
    (tmp_path / "in").mkdir()
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": images}, features=features).to_parquet(tmp_path / "in/train-0.parquet")
    settings = {"train_data_dir": str(tmp_path / "in"), "streaming": True, "max_train_steps": 12}
    train(tiny_config(tmp_path / "whole", **settings))
    seen, decode = [], Decoder.__call__

    def stop_within_a_batch(decoder, item, frame=None):
        return stop_at(60, seen, decoder, item, decode)

    monkeypatch.setattr(Decoder, "__call__", stop_within_a_batch)
    run = train(tiny_config(tmp_path / "run", **settings))
    assert 0 < run.step < 12
    monkeypatch.setattr(Decoder, "__call__", decode)
    train(tiny_config(tmp_path / "run", **settings, resume_from_checkpoint="latest"))
    one, two = (load_file(tmp_path / name / "checkpoint-12/unet.safetensors") for name in ("whole", "run"))
    assert_close(two, one, rtol=0, atol=0)
    states = [
        json.loads((tmp_path / name / "checkpoint-12/state.json").read_text(encoding="utf-8"))["streams"]
        for name in ("whole", "run")
    ]
    assert states[0] == states[1]


def stop_at(number, seen, decoder, item, decode):
    seen.append(item)
    if len(seen) == number:
        os.kill(os.getpid(), signal.SIGTERM)
    return decode(decoder, item)


def test_a_signal_that_comes_twice_at_once_is_one(tmp_path):
    """A scheduler sends it to all processes, and the launcher passes it on."""
    with StopSignals() as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.name == "SIGTERM"
        stop.noted -= 10
        usual = []
        stop.usual[signal.SIGTERM] = lambda *_: usual.append("later")
        os.kill(os.getpid(), signal.SIGTERM)
        assert usual == ["later"]


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_under_nohup_a_closed_terminal_stops_nothing(tmp_path):
    usual = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert (stop.name, stop_requested()) == (None, False)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, usual)


def test_the_end_of_the_launcher_stops_the_processes_that_it_started(monkeypatch, caplog):
    monkeypatch.setattr(os, "getppid", lambda: 10)
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    with StopSignals():  # of a shell, say, which may end
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert not stop_requested()
    for name in LAUNCHED:
        monkeypatch.setattr(os, "getppid", lambda: 10)
        with monkeypatch.context() as launched:
            launched.setenv(name, "0")
            with StopSignals() as stop:
                assert not stop_requested()
                monkeypatch.setattr(os, "getppid", lambda: 1)
                assert stop_requested()
                with pytest.raises(Stopped, match="stopped by SIGHUP"):
                    raise_if_stopped()
                assert exit_status(stop.name) == 129
    assert caplog.text.count("the launcher (process 10) has ended") == len(LAUNCHED)


def test_the_usual_handlers_come_back(tmp_path):
    usual = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopSignals():
        assert signal.getsignal(signal.SIGTERM) != usual[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == usual
    assert StopSignals.active is None


# ---------------------------------------------------------------- two at once


def test_a_folder_in_use_is_refused_and_its_run_unharmed(tmp_path):
    told = []

    def train_beside(run):
        for overwrite in (False, True):
            with pytest.raises(ValueError, match=rf"is in use by process {os.getpid()} on ") as caught:
                train(tiny_config(tmp_path, overwrite_output_dir=overwrite))
            told.append(caught.value)

    train(tiny_config(tmp_path), callbacks=[calls(on_train_begin=train_beside)])
    assert len(told) == 2
    assert steps_of(tmp_path) == ["checkpoint-4"]
    assert not list(tmp_path.glob(".*"))


def test_sample_and_evaluate_hold_their_folders(tmp_path, trained, capsys):
    with locked(tmp_path / "samples", "sample"):
        words = ["sample", str(trained), "--output_dir", str(tmp_path / "samples"), "--num_images", "1"]
        assert cli.main([*words, "--num_inference_steps", "2"]) == 2
        assert "samples is in use by process" in capsys.readouterr().err
    with locked(tmp_path, "evaluation.json"), pytest.raises(ValueError, match="is in use by process"):
        evaluation.evaluate(str(trained), output=tmp_path / "evaluation.json", metrics=("loss",))


# ---------------------------------------------------------------- what a user is told


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(28, "No space left on device", "runs/a/log.csv"), "No space left on device: 'runs/a/log.csv'"),
        (OSError(30, "Read-only file system", "runs"), "Read-only file system: 'runs'"),
        (FileNotFoundError(2, "No such file or directory", "runs/a"), "No such file or directory: 'runs/a'"),
        (OSError(36, "File name too long", "a" * 300), "File name too long"),
        (BrokenPipeError(32, "Broken pipe"), "Broken pipe"),
        (MemoryError(), "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "can't allocate memory"),
        (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
        (SafetensorError("Error while deserializing header: header too large"), "header too large"),
        (ValueError("two\nlines"), "two lines"),
        (FloatingPointError("diverged"), "diverged"),
    ],
)
def test_what_the_machine_can_not_do_is_one_line_and_status_2(monkeypatch, capsys, error, told):
    def fail(args):
        raise error

    monkeypatch.setattr(push, "run", fail)
    assert cli.main(["push", "a", "b"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("ddpm-hf: error: ")
    assert told in lines[0]


@pytest.mark.parametrize("error", [TypeError("a fault of ours"), RuntimeError("another"), KeyError("x")])
def test_faults_of_ours_keep_their_traceback(monkeypatch, error):
    def fail(args):
        raise error

    monkeypatch.setattr(push, "run", fail)
    with pytest.raises(type(error)):
        cli.main(["push", "a", "b"])


def test_ctrl_c_is_no_traceback(monkeypatch, capsys):
    def fail(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(push, "run", fail)
    assert cli.main(["push", "a", "b"]) == 130
    assert capsys.readouterr().err == "ddpm-hf: stopped by SIGINT\n"


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM")
def test_a_run_that_is_stopped_stops_what_follows_it(tmp_path):
    words = f"{sys.executable} -m ddpm_hf train --max_train_steps 100000 --output_dir {tmp_path / 'run'}"
    shell = subprocess.Popen(["sh", "-c", f"{words} && touch {tmp_path / 'pushed'}"], start_new_session=True)
    while not (tmp_path / "run/log.csv").exists() or not read_log(tmp_path / "run/log.csv"):
        time.sleep(0.05)
        assert shell.poll() is None
    import psutil

    (child,) = psutil.Process(shell.pid).children()
    child.send_signal(signal.SIGTERM)
    assert shell.wait(timeout=120) == 143
    assert not (tmp_path / "pushed").exists()
    assert DDPMCustomPipeline.from_pretrained(tmp_path / "run")

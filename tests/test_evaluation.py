"""`ddpm-hf evaluate`, from a model to its numbers."""

import errno
import json
import logging
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from conftest import tiny_config, tiny_unet
from huggingface_hub import constants
from PIL import Image
from torch.testing import assert_close

from ddpm_hf import DDPMCustomPipeline, LinearNoiseScheduler
from ddpm_hf.commands.main import main
from ddpm_hf.data.dataset import load_images
from ddpm_hf.evaluation import evaluate as evaluation
from ddpm_hf.evaluation import reference as evaluation_data
from ddpm_hf.evaluation.context import Context, channel_moments
from ddpm_hf.evaluation.evaluate import evaluate
from ddpm_hf.evaluation.features.extractor import Extractor
from ddpm_hf.evaluation.metrics import by_timestep, likelihood
from ddpm_hf.evaluation.metrics.drift import mean_and_std
from ddpm_hf.evaluation.metrics.structure import neighbour_correlation
from ddpm_hf.evaluation.registry import METRICS, Estimate, Findings, Metric, record
from ddpm_hf.training import train
from ddpm_hf.training.config import TrainConfig
from ddpm_hf.utils.results import number

# Other people's scripts read these keys of evaluation.json.
NAMES = [
    "bpd", "bpd_floor", "bpd_uniform", "bpd_fast", "bpd_fast_train", "loss_held_out", "loss_train",
    "fd_train", "fd_held_out", "fd_real", "kid_train", "kid_held_out", "kid_real",
    "precision_train", "recall_train", "density_train", "coverage_train",
    "precision_held_out", "recall_held_out", "density_held_out", "coverage_held_out",
    "inception_score", "inception_score_real", "memorization_pixels", "memorization_features",
    "neighbour_correlation", "channel_mean_drift", "channel_std_drift",
]  # fmt: skip
MORE = {
    "bpd": {"total_nats", "total_nats_stderr", "prior", "kl", "decoder"},
    "fd": {"n_reference"}, "kid": {"n_reference"}, "inception": {"splits"},
    "memorization": {"p_value", "median_ratio", "n_held_out", "copies", "copies_held_out"},
    "channel": {"channels", "samples", "train"}, "neighbour": {"training_images"},
}  # fmt: skip
PROTOCOL = {
    "model", "weights", "dtype", "seed", "reference", "num_samples", "solver", "num_inference_steps", "guidance_scale",
    "class_labels", "features", "prdc", "bpd", "loss", "memorization", "versions",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _few(monkeypatch):
    monkeypatch.setattr(by_timestep, "MOST_BY_TIMESTEP", 8)
    monkeypatch.setattr(likelihood, "MOST_ESTIMATED", 40)


def quick(model, folder, **settings):
    """An evaluation of some seconds."""
    defaults = {"num_samples": 40, "num_inference_steps": 2, "bpd_images": 3, "cache": folder / "cache"}
    return evaluate(str(model), output=folder / "evaluation.json", **{**defaults, **settings})


@pytest.fixture
def evaluated(trained, tmp_path):
    return quick(trained, tmp_path), tmp_path


def test_evaluation_json_has_all_keys(evaluated):
    found, folder = evaluated
    assert found == json.loads((folder / "evaluation.json").read_text())
    assert list(found) == ["protocol", "metrics"]
    assert list(found["metrics"]) == NAMES
    for name, metric in found["metrics"].items():
        more = MORE.get(name, MORE.get(name.split("_")[0], set()) if not name.startswith("bpd_") else set())
        assert metric.keys() == {"name", "value", "stderr", "n"} | more, name
        assert isinstance(metric["value"], float), name
        assert metric["stderr"] is None or metric["stderr"] >= 0, name
    protocol = found["protocol"]
    assert protocol.keys() == PROTOCOL
    assert protocol["model"].keys() == {"name", "sha256", "parameters", "scheduler"}
    assert protocol["model"]["scheduler"]["variance_type"] == "fixed_small"
    assert protocol["solver"] == "ddpm"
    assert protocol["features"].keys() == {"name", "sha256", "resize", "pixels"}
    assert protocol["reference"]["train"].keys() == {"n", "sha256", "shape"}
    assert protocol["reference"]["held_out"]["n"] == 180
    assert protocol["reference"]["as_trained"] is True
    assert protocol["versions"].keys() >= {"ddpm-hf", "torch", "diffusers", "scipy"}
    assert (protocol["weights"], protocol["num_samples"], protocol["num_inference_steps"]) == ("ema", 40, 2)
    assert protocol["bpd"]["levels"] == 17
    assert sorted(os.listdir(folder)) == ["by_timestep.csv", "cache", "evaluation.json", "report.html"]
    curves = np.genfromtxt(folder / "by_timestep.csv", delimiter=",", names=True)
    assert curves.dtype.names == (
        "timestep", "loss_held_out", "loss_train", "bits", "x0_rmse", "x0_slope", "x0_bias",
    )  # fmt: skip
    assert len(curves) == 50
    assert number(found["metrics"]["bpd"]) in (folder / "report.html").read_text()


def test_only_the_selected_metrics_are_measured(trained, tmp_path):
    found = quick(trained, tmp_path, metrics=("kid", "drift"))
    assert list(found["metrics"]) == [
        "kid_train", "kid_held_out", "kid_real", "neighbour_correlation", "channel_mean_drift", "channel_std_drift",
    ]  # fmt: skip
    assert "bpd" not in found["protocol"]
    assert not (tmp_path / "by_timestep.csv").exists()
    found = quick(trained, tmp_path, metrics=("bpd",))
    assert "num_samples" not in found["protocol"]
    assert list(found["metrics"]) == ["bpd", "bpd_floor", "bpd_uniform", "bpd_fast", "bpd_fast_train"]
    assert found["metrics"]["bpd_uniform"]["value"] == math.log2(17)  # the gray levels of digits


def test_the_whole_bound_agrees_with_its_estimate(digits_model, tmp_path, monkeypatch):
    monkeypatch.setattr(likelihood, "MOST_ESTIMATED", 180)
    found = quick(digits_model, tmp_path, metrics=("bpd",), bpd_images=12)["metrics"]
    whole, estimate = found["bpd"], found["bpd_fast"]
    assert whole["prior"] + whole["kl"] + whole["decoder"] == pytest.approx(whole["value"])
    assert whole["total_nats"] == pytest.approx(whole["value"] * 64 * np.log(2))
    error = np.hypot(whole["stderr"], estimate["stderr"])
    assert abs(whole["value"] - estimate["value"]) < 4 * error
    assert error < 0.1 * whole["value"]


# ---------------------------------------------------------------- samples whose metrics are known


def replace_samples(monkeypatch, images):
    """Let the pipeline return these images, one after the other, in place of samples."""
    position = iter(range(10**6))

    def call(self, batch_size, *args, **settings):
        batch = images.batch(torch.tensor([next(position) for _ in range(batch_size)]))
        return SimpleNamespace(images=(batch + 1) / 2)

    monkeypatch.setattr(DDPMCustomPipeline, "__call__", call)


def test_samples_that_are_the_training_images(trained, tmp_path, monkeypatch):
    replace_samples(monkeypatch, load_images(TrainConfig())[0])
    metrics = ("fd", "kid", "prdc", "memorization", "drift")
    found = quick(trained, tmp_path, num_samples=1617, metrics=metrics)["metrics"]
    assert found["fd_train"]["value"] < 1e-8
    assert found["fd_held_out"]["value"] > 1
    assert found["precision_train"]["value"] == found["recall_train"]["value"] == found["coverage_train"]["value"] == 1
    assert found["precision_held_out"]["value"] < 1
    assert found["memorization_pixels"]["value"] < -15
    assert found["memorization_features"]["value"] < -15
    assert found["memorization_pixels"]["median_ratio"] < 1e-4
    assert found["channel_mean_drift"]["value"] < 1e-7
    assert found["channel_std_drift"]["value"] < 1e-7


def test_samples_that_are_the_held_out_images(trained, tmp_path, monkeypatch):
    """A perfect model without memorisation has these values."""
    replace_samples(monkeypatch, load_images(TrainConfig())[1])
    metrics = ("fd", "kid", "prdc", "memorization", "is")
    found = quick(trained, tmp_path, num_samples=180, metrics=metrics)["metrics"]
    assert found["fd_held_out"]["value"] < 1e-8
    assert found["fd_train"]["value"] == pytest.approx(found["fd_real"]["value"], rel=1e-9)
    assert found["kid_train"]["value"] == pytest.approx(found["kid_real"]["value"], rel=1e-9)
    assert found["fd_train"]["value"] > 1
    assert found["inception_score"]["value"] == pytest.approx(found["inception_score_real"]["value"])
    assert found["precision_held_out"]["value"] == found["coverage_held_out"]["value"] == 1
    assert found["memorization_pixels"]["value"] == pytest.approx(0, abs=1e-9)
    assert found["memorization_pixels"]["median_ratio"] == pytest.approx(1)


def test_a_shift_of_colour_is_measured(trained, tmp_path, monkeypatch):
    images = load_images(TrainConfig())[0]
    replace_samples(monkeypatch, SimpleNamespace(batch=lambda i: (0.8 * images.batch(i) + 0.1).clamp(-1, 1)))
    found = quick(trained, tmp_path, num_samples=400, metrics=("drift",))["metrics"]
    pixels = images.batch(torch.arange(len(images)))
    shift = (0.8 * pixels + 0.1).mean() - pixels.mean()
    mean, std = found["channel_mean_drift"], found["channel_std_drift"]
    assert mean["channels"] == pytest.approx([shift.item()], abs=4 * mean["stderr"])
    assert mean["value"] == abs(mean["channels"][0]) > 10 * mean["stderr"]
    assert std["channels"] == pytest.approx([-0.2 * pixels.std().item()], abs=4 * std["stderr"])


def test_standard_errors_of_mean_and_standard_deviation():
    generator = torch.Generator().manual_seed(0)
    tries = torch.randn(300, 50, 1, 4, 4, generator=generator) * 0.3 + 0.5 * torch.rand(
        300, 50, 1, 1, 1, generator=generator
    )
    found = [mean_and_std(channel_moments(images)) for images in tries]
    for k in (0, 1):
        values = torch.stack([one[k][0] for one in found])
        stderr = torch.stack([one[k][1] for one in found]).mean()
        assert stderr.item() == pytest.approx(values.std().item(), rel=0.15)
    assert_close(found[0][1][0][0], tries[0].double().std(correction=0), rtol=1e-6, atol=0)


# ---------------------------------------------------------------- settings


def test_batch_size_and_cache_do_not_change_the_values(trained, tmp_path):
    first = quick(trained, tmp_path)
    (cached, *others) = sorted((tmp_path / "cache").iterdir())
    stamp = cached.stat().st_mtime_ns
    again = quick(trained, tmp_path, batch_size=7)
    assert len(others) == 1
    assert cached.stat().st_mtime_ns == stamp
    assert_alike(first, again)


def assert_alike(a, b):
    """Up to rounding, which may move a pixel to the next of the 256 levels."""
    assert a["protocol"] == b["protocol"]
    assert a["metrics"].keys() == b["metrics"].keys()
    for name, metric in a["metrics"].items():
        assert b["metrics"][name]["value"] == pytest.approx(metric["value"], rel=1e-3, abs=1e-4), name


def test_training_weights_differ_from_ema_weights(trained, tmp_path):
    ema, raw = (quick(trained, tmp_path, weights=weights, metrics=("loss",)) for weights in ("ema", "raw"))
    assert ema["protocol"]["model"]["sha256"] != raw["protocol"]["model"]["sha256"]
    assert ema["metrics"]["loss_train"]["value"] != raw["metrics"]["loss_train"]["value"]
    assert raw["protocol"]["weights"] == "raw"


def test_classes_of_samples_are_as_frequent_as_in_the_data(digits_model, tmp_path, monkeypatch):
    asked, predicted = [], []
    call, forward = DDPMCustomPipeline.__call__, Context.predict

    def spy(self, *args, **settings):
        asked.extend(settings["class_labels"])
        return call(self, *args, **settings)

    def predict(self, sample, timesteps, labels):
        predicted.extend(labels.tolist())
        return forward(self, sample, timesteps, labels)

    monkeypatch.setattr(DDPMCustomPipeline, "__call__", spy)
    monkeypatch.setattr(Context, "predict", predict)
    found = quick(digits_model, tmp_path, metrics=("loss", "drift"), num_samples=1617, num_inference_steps=1)
    images, held_out = load_images(TrainConfig())
    assert sorted(asked) == sorted(images.labels.tolist())
    assert found["protocol"]["class_labels"] == "as in the training images"
    chosen = torch.linspace(0, 179, 8).round().long()
    assert predicted[: 8 * 50 : 50] == held_out.labels[chosen].tolist()


def test_the_training_data_are_the_default_references(tmp_path, monkeypatch):
    """A folder of images with its own settings: they are decoded as for training."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for k in range(24):
        pixels = np.random.default_rng(k).integers(0, 255, (12, 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")
    settings = {"train_data_dir": str(folder), "resolution": 8, "channels": 3, "max_train_steps": 1}
    train(tiny_config(tmp_path / "run", **settings))
    metrics = ("bpd", "loss", "drift", "memorization")
    found = quick(tmp_path / "run", tmp_path, metrics=metrics, num_samples=12)
    assert found["protocol"]["reference"]["name"] == "photos"
    assert found["protocol"]["reference"]["train"]["shape"] == [3, 8, 8]
    assert len(found["metrics"]["channel_mean_drift"]["channels"]) == 3
    assert "memorization_features" not in found["metrics"]
    assert found["protocol"]["bpd"]["levels"] == 256
    os.rename(folder, tmp_path / "moved")
    with pytest.raises(ValueError, match="photos"):
        quick(tmp_path / "run", tmp_path)
    moved = quick(tmp_path / "run", tmp_path, metrics=metrics, num_samples=12, train_data_dir=str(tmp_path / "moved"))
    assert moved["metrics"] == found["metrics"]
    with pytest.raises(ValueError, match=r"\(1, 8, 8\).*\(3, 8, 8\)"):
        quick(tmp_path / "run", tmp_path, dataset_name="digits")


@pytest.mark.parametrize(("layout", "out"), [
    (("",), "runs/photos"), (("",), "photos/runs/x"), (("a", "b"), "photos/runs/x"), (("train", "test"), "runs/photos"),
])  # fmt: skip
def test_training_and_evaluation_see_the_same_images_from_any_folder(tmp_path, monkeypatch, layout, out):
    monkeypatch.chdir(tmp_path)
    for k in range(24):
        path = tmp_path / "photos" / layout[k % len(layout)] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(k).integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(path)
    settings = {"train_data_dir": "photos", "max_train_steps": 1}
    run = train(tiny_config(out, **settings))
    Image.new("RGB", (9, 9)).save(tmp_path / out / "samples.png")
    quickly = {"metrics": ("drift",), "num_samples": 12}
    found = evaluate(out, num_inference_steps=2, **quickly)["protocol"]["reference"]
    assert (tmp_path / out / "evaluation.json").exists()
    assert (found["train"]["n"], found["held_out"]["n"]) == (len(run.images), len(run.held_out))
    again = train(tiny_config(out, **{**settings, "max_train_steps": 2}, resume_from_checkpoint="latest"))
    assert again.images.fingerprint == run.images.fingerprint
    assert train(tiny_config("photos/second", **settings)).images.fingerprint == run.images.fingerprint

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(
        ValueError, match=r"was trained on train_data_dir='photos', which does not exist .*elsewhere\): give"
    ):
        quick(f"../{out}", tmp_path, **quickly)
    named = quick(f"../{out}", tmp_path, train_data_dir="../photos", **quickly)["protocol"]["reference"]
    assert named["train"] == found["train"]


@pytest.mark.parametrize("output", ["e.json", "a/e.json", "new/folder/e.json"])
def test_an_output_among_the_images_raises(trained, tmp_path, output):
    """The next evaluation would read its files as images."""
    (tmp_path / "a").mkdir()
    for k in range(24):
        Image.fromarray(np.full((8, 8), k, np.uint8)).save(tmp_path / "a" / f"{k}.png")
    settings = {"train_data_dir": str(tmp_path), "metrics": ("drift",), "num_samples": 12, "num_inference_steps": 1}
    with pytest.raises(ValueError, match=f"output='.*{output}' lies among the images of train_data_dir="):
        evaluate(str(trained), output=tmp_path / output, **settings)
    assert not list(tmp_path.rglob("*.json"))
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples/sampling.json").write_text("{}")
    for _ in range(2):
        found = evaluate(str(trained), output=tmp_path / "samples" / "e.json", **settings)
        assert found["protocol"]["reference"]["train"]["n"] == 22


def test_a_model_without_train_config(tmp_path):
    DDPMCustomPipeline(tiny_unet(), LinearNoiseScheduler()).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="has no train_config.json.*--dataset_name"):
        quick(tmp_path / "model", tmp_path)
    found = quick(tmp_path / "model", tmp_path, dataset_name="digits", metrics=("is", "fd"))
    assert found["protocol"]["features"]["name"] == "digits"
    with pytest.raises(ValueError, match="weights='raw'|variant|raw"):
        quick(tmp_path / "model", tmp_path, dataset_name="digits", weights="raw")


def test_a_model_of_the_hub_is_evaluated_offline(hub, trained, tmp_path, monkeypatch, caplog):
    """Its pipeline is in the cache, but its train_config.json is not."""
    files = {path.relative_to(trained).as_posix(): path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    hub.plant("me/model", files)
    DDPMCustomPipeline.from_pretrained("me/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = quick("me/model", tmp_path, dataset_name="digits", metrics=("drift",))
    assert found["protocol"]["weights"] == "as saved"
    assert "train_config.json could not be downloaded" in caplog.text
    with pytest.raises(ValueError, match="train_config.json could not be downloaded"):
        quick("me/model", tmp_path, metrics=("drift",))


@pytest.mark.parametrize(("settings", "message"), [
    ({"metrics": ("fid",)}, r"metrics=\('fid',\) must be a list of metrics; each must be one of bpd, loss, fd, kid"),
    ({"metrics": ()}, r"metrics=\(\) must be a list of metrics"),
    ({"weights": "best"}, "weights='best' must be one of ema, raw"),
    ({"num_samples": 3}, "num_samples=3 must be an integer of at least"),
    ({"bpd_images": 1}, "bpd_images=1 must be an integer of at least 2"),
    ({"batch_size": 0}, "batch_size=0 must be an integer"),
    ({"seed": -1}, "seed=-1 must be an integer in 0"),
    ({"num_inference_steps": 2000}, "num_inference_steps=2000"),
    ({"scheduler": "magic"}, "scheduler='magic'"),
    ({"guidance_scale": 2.0}, "guidance_scale=2"),
    ({"features": "nothing"}, "features='nothing'"),
    ({"dataset_name": "no/such set"}, "dataset_name='no/such set'"),
])  # fmt: skip
def test_invalid_arguments_raise_before_anything_is_measured_or_written(
    trained, tmp_path, settings, message, monkeypatch
):
    monkeypatch.setattr(DDPMCustomPipeline, "__call__", lambda *args, **settings: pytest.fail("sampled"))
    monkeypatch.setattr(Context, "predict", lambda *args: pytest.fail("predicted"))
    with pytest.raises(ValueError, match=message):
        quick(trained, tmp_path, **settings)
    assert not (tmp_path / "evaluation.json").exists()


def test_an_output_that_cannot_be_written(trained, tmp_path):
    with pytest.raises(ValueError, match="is a folder; name a file"):
        evaluate(str(trained), output=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file"):
        evaluate(str(trained), output=tmp_path / "file" / "evaluation.json")


def test_a_report_that_fails_loses_no_numbers(trained, tmp_path, monkeypatch, caplog):
    quick(trained, tmp_path, metrics=("loss",))
    assert (tmp_path / "by_timestep.csv").exists()
    monkeypatch.setattr(evaluation, "write_report", lambda *args: 1 / 0)
    found = quick(trained, tmp_path, metrics=("drift",))
    assert "its report could not be: ZeroDivisionError" in caplog.text
    assert json.loads((tmp_path / "evaluation.json").read_text()) == found
    assert sorted(os.listdir(tmp_path)) == ["evaluation.json"]  # no file of the earlier evaluation


def test_the_command_prints_the_numbers_whatever_could_not_be_written(trained, tmp_path, monkeypatch, capsys):
    output = tmp_path / "a.json"
    flags = [str(trained), "--output", str(output), "--num_samples", "20", "--num_inference_steps", "2"]
    flags += ["--metrics", "drift"]
    assert main(["evaluate", *flags]) == 0
    assert f"-> {output} and {tmp_path / 'a-report.html'}\n" in capsys.readouterr().out
    monkeypatch.setattr(evaluation, "write_report", lambda *args: 1 / 0)
    assert main(["evaluate", *flags]) == 0
    assert f"-> {output}\n" in capsys.readouterr().out

    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(evaluation, "write", full)
    assert main(["evaluate", *flags]) == 2
    out, err = capsys.readouterr()
    assert "channel_mean_drift" in out
    assert "could not be written: [Errno 28] No space left on device" in err


def test_a_picture_of_an_older_version_is_removed(trained, tmp_path):
    """Older versions drew report.png, which would contradict the new report."""
    (tmp_path / "report.png").touch()
    quick(trained, tmp_path, metrics=("drift",))
    assert sorted(os.listdir(tmp_path)) == ["evaluation.json", "report.html"]


def test_a_new_metric_is_one_function(trained, tmp_path, monkeypatch):
    def brightness(context):
        pixels = context.samples.pixels.mean((1, 2, 3))
        value = Estimate(pixels.mean().item(), pixels.std().item() / len(pixels) ** 0.5, len(pixels))
        return Findings({"brightness": record("Mean brightness of samples", value)}, {"range": [-1, 1]})

    monkeypatch.setitem(METRICS, "brightness", Metric(brightness, ("samples",)))
    found = quick(trained, tmp_path, metrics=("brightness",))
    assert list(found["metrics"]) == ["neighbour_correlation", "brightness"]  # the first is measured of all samples
    assert -1 <= found["metrics"]["brightness"]["value"] <= 1
    assert found["protocol"]["brightness"] == {"range": [-1, 1]}
    assert "Mean brightness of samples" in (tmp_path / "report.html").read_text()


def test_two_evaluations_in_one_folder(trained, tmp_path):
    for name in ("a", "b"):
        evaluate(str(trained), metrics=("loss",), output=tmp_path / f"{name}.json")
    files = ("a.json", "a-by_timestep.csv", "a-report.html")
    assert sorted(os.listdir(tmp_path)) == sorted([*files, *(f"b{name[1:]}" for name in files)])


def test_biased_metrics_have_a_value_for_equally_many_samples(trained, tmp_path):
    found = quick(trained, tmp_path, metrics=("fd", "is"), num_samples=300)["metrics"]
    assert list(found) == ["fd_train", "fd_held_out", "fd_train_matched", "fd_real",
                           "inception_score", "inception_score_matched", "inception_score_real",
                           "neighbour_correlation"]  # fmt: skip
    for name in ("fd_train_matched", "fd_real", "inception_score_matched", "inception_score_real"):
        assert found[name]["n"] == 180
    assert found["inception_score_matched"]["splits"] == found["inception_score_real"]["splits"]


def test_classes_are_matched_by_name(digits_model, tmp_path, monkeypatch):
    """A data set may number its classes differently, or have other classes."""
    images, held_out = load_images(TrainConfig())
    backwards = [9 - images.labels, 9 - held_out.labels]
    names = images.label_names[::-1]

    def load(config, test_limit):
        found = load_images(config)
        for each, labels in zip(found, backwards, strict=True):
            each.labels, each.label_names = labels.clone(), list(names)
        return found

    plain = quick(digits_model, tmp_path, metrics=("loss",))
    monkeypatch.setattr(evaluation_data, "load_images", load)
    assert quick(digits_model, tmp_path, metrics=("loss",))["metrics"] == plain["metrics"]
    names[3] = "eel"
    with pytest.raises(ValueError, match="classes that the model was not trained on: eel"):
        quick(digits_model, tmp_path, metrics=("loss",))


@pytest.mark.parametrize(
    "kind",
    [
        "DDIMScheduler",
        *(pytest.param(f"{k}Scheduler", marks=pytest.mark.slow) for k in ("DPMSolverMultistep", "EulerDiscrete")),
    ],
)
def test_a_model_that_samples_by_a_solver_of_diffusers(tmp_path, kind):
    solver = getattr(diffusers, kind).from_config(LinearNoiseScheduler().config)
    pipeline = DDPMCustomPipeline(tiny_unet(), solver)
    pipeline.save_pretrained(tmp_path / "model")
    metrics = ("loss", "bpd", "drift")
    found = quick(tmp_path / "model", tmp_path, dataset_name="digits", metrics=metrics)
    ours = DDPMCustomPipeline(tiny_unet(), LinearNoiseScheduler())
    ours.save_pretrained(tmp_path / "ours")
    expected = quick(tmp_path / "ours", tmp_path, dataset_name="digits", metrics=metrics)
    for name in ("bpd", "loss_held_out"):
        assert found["metrics"][name] == expected["metrics"][name]
    assert found["protocol"]["weights"] == "as saved"


def test_features_that_do_not_fit_raise_before_anything_is_measured(trained, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def features(images):\n    return images.mean((2, 3, 1))\n")
    monkeypatch.setattr(Context, "predict", lambda *args: pytest.fail("predicted"))
    with pytest.raises(ValueError, match="must be"):
        quick(trained, tmp_path, features=f"{tmp_path / 'mine.py'}:features")
    (tmp_path / "mine.py").write_text("def features(images):\n    return images.flatten(1)\n")
    with pytest.raises(ValueError, match="'is' needs a classifier"):
        quick(trained, tmp_path, features=f"{tmp_path / 'mine.py'}:features", metrics=("is",))


def test_a_cache_that_cannot_be_written(trained, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file")
    found = quick(trained, tmp_path, metrics=("kid",))
    assert "can't write the cache of features" in caplog.text
    assert "kid_train" in found["metrics"]


def test_the_command(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(evaluation, "HF_HOME", str(tmp_path / "hf"))
    output = tmp_path / "a.json"
    flags = ["--num_samples", "20", "--num_inference_steps", "2", "--metrics", "fd,prdc"]
    assert main(["evaluate", str(trained), "--output", str(output), *flags]) == 0
    out, err = capsys.readouterr()
    value = json.loads(output.read_text())["metrics"]["fd_train"]
    assert f"{number(value)} " in out
    assert "precision_train" in out
    assert "recall_train" in out
    assert "20 samples are fewer than 10,000" in err
    assert main(["evaluate", str(trained), "--output", str(tmp_path / "b.json"), *flags, "--seed", "1"]) == 0
    capsys.readouterr()
    assert main(["evaluate", "--compare", str(output), str(tmp_path / "b.json")]) == 2
    assert "seed is 0 in" in capsys.readouterr().err
    assert main(["evaluate", "--compare", str(output), str(tmp_path / "b.json"), "--across", "seed"]) == 0
    assert "fd_train" in capsys.readouterr().out
    assert main(["evaluate"]) == 2
    assert main(["evaluate", str(trained), "--across", "seed"]) == 2
    assert main(["evaluate", str(trained), "--compare", str(output)]) == 2


def test_all_metrics_are_documented():
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    for name in METRICS:
        assert f"`{name}`" in readme, name


@pytest.mark.slow
def test_two_processes_measure_what_one_does(digits_model, tmp_path):
    """With separate caches, so that both compute the features of the references."""
    base = ["ddpm_hf", "evaluate", str(digits_model), "--num_samples", "50", "--num_inference_steps", "3",
            "--bpd_images", "4", "--guidance_scale", "2"]  # fmt: skip
    several = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29583", "-m"]
    for name, how in (("one", ["-m"]), ("two", several)):
        environment = {**os.environ, "HF_HOME": str(tmp_path / name), "OMP_NUM_THREADS": "1"}
        environment["ACCELERATE_USE_CPU"] = "true"
        command = [sys.executable, *how, *base, "--output", str(tmp_path / name / "evaluation.json")]
        process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
        assert process.returncode == 0, process.stderr[-2000:]
        assert process.stdout.count("fd_train") == 1
    one, two = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("one", "two"))
    assert_alike(one, two)


@pytest.mark.parametrize("features", [None, "digits"])
@pytest.mark.parametrize("count", [1, 5])
def test_few_training_images_have_no_distances(tmp_path, caplog, count, features):
    rng = np.random.default_rng(0)
    for split, images in (("train", count), ("test", 12)):
        (tmp_path / "data" / split).mkdir(parents=True)
        for k in range(images):
            Image.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8)).save(tmp_path / "data" / split / f"{k}.png")
    tiny = DDPMCustomPipeline(tiny_unet(), LinearNoiseScheduler())
    tiny.save_pretrained(tmp_path / "model")
    settings = {"train_data_dir": str(tmp_path / "data"), "num_samples": 12, "features": features}
    with caplog.at_level(logging.WARNING):
        found = quick(tmp_path / "model", tmp_path, metrics=("memorization", "drift"), **settings)
    assert list(found["metrics"]) == ["neighbour_correlation", "channel_mean_drift", "channel_std_drift"]
    assert "Fewer than 10 training images were found" in caplog.text
    with pytest.raises(ValueError, match=f"but there are {count}; these metrics need no distances: bpd,loss"):
        quick(tmp_path / "model", tmp_path, **settings)


def test_few_images_have_no_distances(tmp_path, caplog):
    """Of 30 images 3 are held out: a warning is logged, and the other metrics are measured."""
    folder = tmp_path / "few"
    folder.mkdir()
    for k in range(30):
        Image.fromarray(np.random.default_rng(k).integers(0, 255, (8, 8), dtype=np.uint8)).save(folder / f"{k}.png")
    train(tiny_config(tmp_path / "run", train_data_dir=str(folder), max_train_steps=1))
    with caplog.at_level(logging.WARNING):
        found = quick(tmp_path / "run", tmp_path, features="digits", num_samples=12)
    assert "Fewer than 10 images were held out" in caplog.text
    assert {"fd_train", "precision_train", "bpd", "loss_held_out"} <= found["metrics"].keys()
    assert not [name for name in found["metrics"] if name.endswith(("_held_out", "real")) and name != "loss_held_out"]
    assert not [name for name in found["metrics"] if name.startswith("memorization")]


# ---------------------------------------------------------------- samples that are noise, and images of any channels


def test_neighbours_are_correlated_in_images_and_not_in_noise():
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(200, 2, 16, 16, generator=g)
    found = neighbour_correlation(noise)
    assert abs(found.value) < 4 * found.stderr < 0.04
    smooth = torch.nn.functional.avg_pool2d(noise, 2, 1)  # neighbours share half of their pixels
    found = neighbour_correlation(smooth)
    assert abs(found.value - 0.5) < 4 * found.stderr < 0.04
    mean = torch.linspace(-1, 1, 16).expand(16, 16)
    assert abs(neighbour_correlation(0.1 * noise + mean).value) < 0.04  # a mean image plus noise is noise
    assert neighbour_correlation(mean.expand(20, 1, 16, 16)).value == 0  # so are copies of one image
    means = [neighbour_correlation(torch.randn(50, 1, 8, 8, generator=g)) for _ in range(200)]
    assert 0.8 < torch.tensor([each.value for each in means]).std() / means[0].stderr < 1.25


@pytest.mark.parametrize("metrics", [("prdc", "memorization"), ("drift",)])
def test_noise_is_called_noise(trained, tmp_path, capsys, metrics):
    """Whichever metrics of samples are selected."""
    flags = ["--metrics", ",".join(metrics), "--num_samples", "40", "--num_inference_steps", "2"]
    pipeline = DDPMCustomPipeline.from_pretrained(trained)
    for weight in pipeline.unet.parameters():
        weight.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    pipeline.save_pretrained(tmp_path / "noise")
    shutil.copy(trained / "train_config.json", tmp_path / "noise")
    assert main(["evaluate", str(tmp_path / "noise"), *flags]) == 0
    assert "These samples are not images yet: the correlation of neighbouring pixels is" in capsys.readouterr().err
    page = (tmp_path / "noise/report.html").read_text()
    assert "These samples are not images yet" in page
    assert 'class="good"' not in page


@pytest.mark.parametrize(
    ("channels", "size", "are_bands"), [(1, 12, False), (2, 8, False), (4, 10, False), (4, 10, True), (5, 8, True)]
)
def test_images_of_any_channels_are_evaluated(tmp_path, caplog, capsys, channels, size, are_bands):
    """Alpha is blended with gray for the default features; for bands, what needs features is left out and told."""
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for k in range(24):
        pixels = rng.integers(0, 256, (size, size, channels), dtype=np.uint8)
        if are_bands:
            np.save(tmp_path / f"data/{k}.npy", pixels)
        else:
            Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(tmp_path / f"data/{k}.png")
    model = DDPMCustomPipeline(tiny_unet(in_channels=channels, sample_size=size), LinearNoiseScheduler())
    model.save_pretrained(tmp_path / "model")
    settings = {"train_data_dir": str(tmp_path / "data"), "num_samples": 12, "num_inference_steps": 1}
    with caplog.at_level(logging.WARNING):
        found = quick(tmp_path / "model", tmp_path, **settings)
    assert ("kid_train" in found["metrics"]) == (not are_bands)
    assert "memorization_pixels" not in found["metrics"]  # too few are held out
    assert "neighbour_correlation" in found["metrics"]
    if are_bands:
        what = f"a network for images of {channels} bands"
        assert f"fd, kid, prdc, is are left out, because they need {what}" in caplog.text
        with pytest.raises(ValueError, match=f"metrics: kid needs {what}, .* --features"):
            quick(tmp_path / "model", tmp_path, metrics=("kid", "drift"), **settings)
        with pytest.raises(ValueError, match=f"features='imagenet': .* 3 channels, but these have {channels}"):
            quick(tmp_path / "model", tmp_path, metrics=("kid", "drift"), features="imagenet", **settings)
    else:
        assert found["protocol"]["features"]["name"] == "imagenet"
        assert ("alpha blended with mid-gray" in found["protocol"]["features"]["pixels"]) == (channels != 1)


def test_transparent_pixels_have_no_colour_for_features():
    seen = []
    of = Extractor("spy", "0", "none", lambda images: seen.append(images) or images.flatten(1), 3)
    image = torch.rand(2, 4, 3, 3)
    image[:, 3] = torch.tensor([0.0, 1.0])[:, None, None]
    of(image)
    assert torch.equal(seen[0][0], torch.full((3, 3, 3), 0.5))
    assert torch.equal(seen[0][1], (255 * image[1, :3]).round() / 255)


def test_references_of_more_than_8_bits(tmp_path):
    """A model without train_config.json knows the values of its training images; other data have flags of their own."""
    rng = np.random.default_rng(0)
    for name, most in (("same", 4096), ("other", 1000)):
        (tmp_path / name).mkdir()
        for k in range(12):
            np.save(tmp_path / name / f"{k}.npy", rng.integers(0, most, (8, 8), dtype=np.uint16))
    model = DDPMCustomPipeline(tiny_unet(value_range=[0, 4095]), LinearNoiseScheduler())
    model.save_pretrained(tmp_path / "model")
    command = ["evaluate", str(tmp_path / "model"), "--num_samples", "10", "--num_inference_steps", "1"]
    command += ["--metrics", "drift", "--output", str(tmp_path / "out.json"), "--train_data_dir"]
    means = []
    for more in ([str(tmp_path / "same")], [str(tmp_path / "other"), "--value_range", "0", "999"]):
        assert main([*command, *more]) == 0
        means += json.loads((tmp_path / "out.json").read_text())["metrics"]["channel_mean_drift"]["train"]
    assert max(map(abs, means)) < 0.2  # each has its own black and white
    with pytest.raises(ValueError, match="evaluate: there is no setting 'value_ranges'; did you mean 'value_range'?"):
        evaluate(str(tmp_path / "model"), value_ranges=[0, 1])

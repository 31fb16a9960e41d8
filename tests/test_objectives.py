"""Training with each objective: what the losses are, and a run from its first update to evaluation.json."""

import math
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY_UNET, tiny_config, tiny_unet
from safetensors.torch import load_file
from scipy import stats
from torch.testing import assert_close

from ddpm_hf import DDPMCustomPipeline, EDMScheduler, FlowMatchScheduler, LinearNoiseScheduler
from ddpm_hf.commands.main import main
from ddpm_hf.evaluation.evaluate import evaluate
from ddpm_hf.hub.cards import model_card
from ddpm_hf.hub.self_contained import code_of
from ddpm_hf.schedulers.solvers import scheduler_class
from ddpm_hf.training import train
from ddpm_hf.training.config import resolve
from ddpm_hf.training.edm import EDMLoss
from ddpm_hf.training.flow import FlowMatchingLoss
from ddpm_hf.training.log import TrainingLog
from ddpm_hf.training.loss import Batch
from ddpm_hf.training.model import signal_left

OBJECTIVES = {"ddpm": LinearNoiseScheduler, "flow": FlowMatchScheduler, "edm": EDMScheduler}


def batch_of(n: int, valid=None) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images, noise = torch.randn(2, n, 1, 4, 4, generator=generator).unbind()
    return Batch(images, noise, (torch.arange(n).double() + 0.5) / n, valid=valid)


class Recorder:
    """A network that keeps what it is given and predicts `output`."""

    def __init__(self, output=0.0):
        self.output = output

    def __call__(self, sample, timesteps, **classes):
        self.sample, self.timesteps, self.classes = sample, timesteps, classes
        return SimpleNamespace(sample=torch.zeros_like(sample) + self.output)


def test_flow_matching_loss_written_out():
    batch, network = batch_of(50), Recorder(0.3)
    losses = FlowMatchingLoss()(network, FlowMatchScheduler(), batch)
    t = network.timesteps.reshape(-1, 1, 1, 1) / 1000
    assert_close(network.sample, (1 - t) * batch.images + t * batch.noise)
    errors = (0.3 - (batch.noise - batch.images)).square().mean((1, 2, 3))
    assert_close(losses.loss, errors)
    assert_close(losses.errors, errors)


def test_edm_loss_is_the_weighted_error_of_the_denoiser():
    """lambda(sigma) |D(x; sigma) - x_0|^2 with lambda = (sigma^2 + d^2) / (sigma d)^2 (arXiv:2206.00364, table 1)."""
    batch, network, d = batch_of(50), Recorder(0.3), 0.7
    losses = EDMLoss()(network, EDMScheduler(sigma_data=d), batch)
    sigma = (4 * network.timesteps.double()).exp().reshape(-1, 1, 1, 1)
    total = sigma**2 + d**2
    x = batch.images + sigma * batch.noise
    assert_close(network.sample.double(), x / total.sqrt(), rtol=1e-5, atol=1e-5)
    denoised = d**2 / total * x + sigma * d / total.sqrt() * 0.3
    errors = (total / (sigma * d) ** 2 * (denoised - batch.images) ** 2).mean((1, 2, 3))
    assert_close(losses.loss.double(), errors, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("loss", "law"),
    [
        (FlowMatchingLoss(), lambda t: stats.norm.cdf(torch.logit(t / 1000))),
        (FlowMatchingLoss(mean=-1.0, std=0.5), lambda t: stats.norm.cdf((torch.logit(t / 1000) + 1) / 0.5)),
        (FlowMatchingLoss("uniform"), lambda t: t / 1000),
        (EDMLoss(), lambda c: stats.norm.cdf((4 * c + 1.2) / 1.2)),
        (EDMLoss(0.5, 2.0), lambda c: stats.norm.cdf((4 * c - 0.5) / 2)),
    ],
)
def test_the_distribution_of_noise_levels(loss, law):
    """Evenly spread `uniform` gives the quantiles of the distribution."""
    batch, network = batch_of(200), Recorder()
    scheduler = FlowMatchScheduler() if isinstance(loss, FlowMatchingLoss) else EDMScheduler()
    loss(network, scheduler, batch)
    assert_close(torch.as_tensor(law(network.timesteps.double())), batch.uniform, rtol=0, atol=1e-4)
    assert loss(network, scheduler, batch._replace(uniform=0 * batch.uniform)).loss.isfinite().all()


@pytest.mark.parametrize(("loss", "kind"), [(FlowMatchingLoss(), FlowMatchScheduler), (EDMLoss(), EDMScheduler)])
def test_missing_values_are_left_out(loss, kind):
    valid = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(1)) < 0.6
    batch, network = batch_of(6, valid), Recorder(0.2)
    found = loss(network, kind(), batch)
    target = kind().target(batch.images, batch.noise, network.timesteps)
    for k in range(6):
        assert_close(found.loss[k], (0.2 - target[k][valid[k]]).square().mean())
    spoiled = batch._replace(images=torch.where(valid, batch.images, 50.0))
    assert_close(loss(network, kind(), spoiled).loss, found.loss)


def test_parts_of_the_log():
    flow, edm = FlowMatchScheduler(), EDMScheduler()
    assert flow.part_of(torch.tensor([0.0, 99.0, 301.0, 999.9, 1000.0]), 10).tolist() == [0, 0, 3, 9, 9]
    assert edm.part_of(edm.midpoints(10), 10).tolist() == list(range(10))
    beyond = torch.tensor([1e-4, 1000.0]).log() / 4
    assert edm.part_of(beyond, 10).tolist() == [0, 9]
    assert LinearNoiseScheduler().part_of(torch.tensor([0, 99, 100, 999]), 10).tolist() == [0, 0, 1, 9]


def weights(folder) -> dict:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_objective_from_training_to_evaluation(objective, tmp_path):
    settings = {"objective": objective, "max_train_steps": 6, "checkpointing_steps": 3, "class_conditional": True}
    whole, half = tmp_path / "whole", tmp_path / "half"
    run = train(tiny_config(whole, **settings))
    kind = type(run.pipeline.scheduler)
    assert kind is OBJECTIVES[objective]
    for row in run.log_history:
        assert math.isfinite(row["loss"])
        assert math.isfinite(row["held_out_loss"])
        assert any(row[name] for name in TrainingLog.BY_TIMESTEP)
    shutil.copytree(whole, half)
    shutil.rmtree(sorted(half.glob("checkpoint-*"))[-1])  # what a run leaves that ends after update 3
    train(tiny_config(half, **settings, resume_from_checkpoint="latest"))
    for name, weight in weights(whole).items():
        assert torch.equal(weights(half)[name], weight), name

    pipeline = DDPMCustomPipeline.from_pretrained(whole)
    pipeline.set_progress_bar_config(disable=True)
    assert scheduler_class(pipeline.scheduler.config) is kind
    for solver in (None, *kind.solvers):
        images = pipeline(class_labels=[1, 2], scheduler=solver, num_inference_steps=5, output_type="pt").images
        assert images.shape == (2, 1, 8, 8)
    evaluation = evaluate(str(whole), num_samples=20, num_inference_steps=4, bpd_images=2, cache=tmp_path / "cache")
    assert ("bpd" in evaluation["metrics"]) == (objective == "ddpm")
    assert math.isfinite(evaluation["metrics"]["loss_held_out"]["value"])
    assert evaluation["protocol"]["solver"] == kind.own
    header = (whole / "by_timestep.csv").read_text().splitlines()[0]
    assert ("bits" in header) == (objective == "ddpm")
    assert (whole / "report.html").is_file()


def test_bpd_of_a_flow_is_left_out_or_an_error(tmp_path, caplog):
    settings = {"max_train_steps": 1, "objective": "flow"}
    train(tiny_config(tmp_path / "run", **settings))
    arguments = {"num_samples": 20, "num_inference_steps": 2, "cache": tmp_path / "cache"}
    with pytest.raises(
        ValueError, match="metrics: bpd needs a variational bound, .* not defined .* FlowMatchScheduler"
    ):
        evaluate(str(tmp_path / "run"), metrics=("bpd", "loss"), **arguments)
    assert "loss_held_out" in evaluate(str(tmp_path / "run"), metrics=("loss",), **arguments)["metrics"]


def test_sigma_data_is_measured_and_kept(tmp_path):
    run = train(tiny_config(tmp_path / "a", objective="edm", max_train_steps=1))
    values = run.images.batch(torch.arange(len(run.images)))
    assert abs(run.pipeline.scheduler.config.sigma_data / values.std().item() - 1) < 1e-3
    chosen = train(tiny_config(tmp_path / "b", objective="edm", max_train_steps=1, scheduler={"sigma_data": 0.4}))
    assert chosen.pipeline.scheduler.config.sigma_data == 0.4
    tuned = tiny_config(
        tmp_path / "c", objective="edm", max_train_steps=1, unet={}, pretrained_model_name_or_path=str(tmp_path / "b")
    )
    assert train(tuned).pipeline.scheduler.config.sigma_data == 0.4
    tuned.objective, tuned.output_dir = "flow", str(tmp_path / "d")
    with pytest.raises(ValueError, match="objective='flow': the pipeline .* was trained with objective='edm'"):
        train(tuned)


def test_a_run_does_not_resume_with_another_objective(tmp_path):
    train(tiny_config(tmp_path, objective="flow", max_train_steps=1))
    for changed, what in (
        ({"objective": "edm"}, "loss='EDMLoss' was 'FlowMatchingLoss'"),
        ({"objective": "flow", "noise_level_mean": 0.5}, "noise_level_mean=0.5 was None"),
        ({"objective": "flow", "flow_times": "uniform"}, "flow_times='uniform' was None"),
    ):
        config = tiny_config(tmp_path, max_train_steps=2, resume_from_checkpoint="latest", **changed)
        with pytest.raises(ValueError, match=f"another objective than the checkpoint: .*{what}"):
            train(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "gan"}, "objective='gan' must be one of ddpm, flow, edm"),
        ({"objective": "flow", "prediction_type": "epsilon"}, "prediction_type='epsilon' needs objective='ddpm'"),
        ({"objective": "edm", "learned_variance": True}, "learned_variance=True needs objective='ddpm'"),
        ({"objective": "edm", "snr_gamma": 5.0}, "snr_gamma=5.0 needs objective='ddpm'"),
        ({"objective": "edm", "flow_times": "uniform"}, "flow_times='uniform' needs objective='flow'"),
        ({"noise_level_std": 1.0}, "noise_level_std=1.0 needs objective='flow' or 'edm'"),
        (
            {"objective": "flow", "flow_times": "uniform", "noise_level_mean": 0.0},
            "noise_level_mean=0.0 must be None with flow_times='uniform'",
        ),
        ({"objective": "flow", "scheduler": {"beta_start": 0.1}}, "scheduler: there is no setting 'beta_start'"),
        ({"objective": "edm", "scheduler": {"sigma_max": -1}}, "sigma_max=-1 must be a finite number greater than 0"),
    ],
)
def test_settings_that_do_not_fit_the_objective(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        tiny_config(tmp_path, **settings)


def test_a_network_of_integer_timesteps(tmp_path):
    with pytest.raises(ValueError, match="time_table_size=1000: the network knows integer timesteps only"):
        train(tiny_config(tmp_path, objective="flow", unet={**TINY_UNET, "time_table_size": 1000}))


def test_another_objective_than_the_recipes_drops_its_settings():
    config = resolve({"config": "ddpm-cifar10", "objective": "flow"})
    assert config.scheduler == {}
    assert resolve({"config": "ddpm-cifar10"}).scheduler != {}
    assert resolve({"config": "ddpm-cifar10", "objective": "ddpm"}) == resolve({"config": "ddpm-cifar10"})


@pytest.mark.parametrize("objective", ["flow", "edm"])
def test_the_card_names_the_objective(objective, tmp_path):
    pipeline = DDPMCustomPipeline(tiny_unet(), OBJECTIVES[objective]())
    text = str(model_card(pipeline, {}, tmp_path))
    name, process = {
        "flow": ("This is a flow matching model", "x_t = (1 - t) x_0 + t noise, predicts the velocity"),
        "edm": (
            "This is a diffusion model with the preconditioning of EDM",
            "x = x_0 + sigma noise, preconditioned with sigma_data = 0.5",
        ),
    }[objective]
    assert name in text
    assert f"`{OBJECTIVES[objective].__name__}`, {process}" in text
    assert "betas" not in text
    assert f"tags:\n- {objective}\n" in text


@pytest.mark.parametrize("objective", ["flow", "edm"])
def test_the_code_of_a_self_contained_repository_has_the_scheduler(objective, tmp_path):
    """The one file of the scheduler defines the same class without this package."""
    DDPMCustomPipeline(tiny_unet(), OBJECTIVES[objective]()).save_pretrained(tmp_path)
    files = code_of(tmp_path)
    (source,) = (content for name, content in files.items() if name.startswith("scheduler/"))
    assert b"ddpm_hf." not in source.replace(b"`ddpm_hf.", b"")
    module = type(sys)("scheduler_of_a_repository")
    sys.modules[module.__name__] = module
    try:
        exec(compile(source, "scheduler.py", "exec"), vars(module))
    finally:
        del sys.modules[module.__name__]
    kind = OBJECTIVES[objective]
    alone, ours = getattr(module, kind.__name__)(), kind()
    for each in (alone, ours):
        each.set_timesteps(4)
    assert type(alone) is not kind
    assert_close(alone.levels, ours.levels, rtol=0, atol=0)


def test_diffusers_pipelines_and_our_flows(tmp_path, capsys):
    DDPMCustomPipeline(tiny_unet(), FlowMatchScheduler()).save_pretrained(tmp_path / "flow")
    assert main(["convert", str(tmp_path / "flow"), str(tmp_path / "out"), "--to", "diffusers"]) == 2
    assert "was trained with objective='flow'; only a DDPM can be sampled" in capsys.readouterr().err


def test_little_noise_at_the_end_is_warned_of():
    assert signal_left(EDMScheduler()) is None
    assert signal_left(FlowMatchScheduler()) is None
    found = signal_left(EDMScheduler(sigma_max=2.0, sigma_data=0.5))
    assert found.startswith("sigma_data / sqrt(sigma_data^2 + sigma_max^2)=0.24: at sigma_max an image still has 24%")
    assert found.endswith("""Use --scheduler '{"sigma_max": 80}'""")

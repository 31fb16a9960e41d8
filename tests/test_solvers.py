"""Every solver by its name, against the closed form for Gaussian data."""

import json
import math

import diffusers
import numpy as np
import pytest
import torch
from conftest import tiny_config, tiny_unet
from diffusers import DDIMScheduler
from torch.testing import assert_close

from ddpm_hf import CosineNoiseScheduler, DDPMCustomPipeline, LinearNoiseScheduler
from ddpm_hf.schedulers.solvers import SOLVERS, make_solver, set_timesteps_checked
from ddpm_hf.training import train
from ddpm_hf.training.config import resolve

ODE_SOLVERS = [name for name in SOLVERS if name not in ("euler-a", "sa")]  # the two add noise
ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}


def error_of(name: str, steps: int, variance: float, **settings) -> float:
    """The error of x_0 with the optimal network for N(0, variance), against the exact flow from the same noise."""
    trained_with = LinearNoiseScheduler(clip_sample=False, **settings)
    solver = make_solver(name, trained_with)
    set_timesteps_checked(solver, steps, "cpu")
    abar = trained_with.alphas_cumprod_float64
    odds = torch.log(abar / (1 - abar)).numpy()  # smooth in t: KDPM2 looks between timesteps

    def at(timestep):
        return 1 / (1 + math.exp(-np.interp(float(timestep), np.arange(1000), odds)))

    x = torch.ones(1, 1, 1, 1, dtype=torch.float64) * solver.init_noise_sigma
    start = solver.scale_model_input(x, solver.timesteps[0]).item()
    first = at(solver.timesteps[0])
    for t in solver.timesteps:
        a, model_input = at(t), solver.scale_model_input(x, t)
        x = solver.step(math.sqrt(1 - a) * model_input / (a * variance + 1 - a), t, x).prev_sample
    exact = start * math.sqrt(variance / (first * variance + 1 - first))
    return abs(x.item() - exact)


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("dpm++", 2), ("heun", 2)])
def test_the_order_of_the_error(name, order):
    """From 25 to 100 steps, with data N(0, 0.04)."""
    slope = math.log(error_of(name, 25, 0.04) / error_of(name, 100, 0.04)) / math.log(4)
    assert abs(slope - order) < 0.3


@pytest.mark.parametrize("name", ODE_SOLVERS)
def test_the_error_falls_with_the_steps(name):
    """At 5, 10, 20 and 40 steps, with data N(0, 0.25)."""
    errors = [error_of(name, steps, 0.25) for steps in (5, 10, 20, 40)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.2 * errors[0]


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", ODE_SOLVERS)
def test_any_number_of_steps_is_accurate_or_raises(name, spacing):
    """From 50 steps on, all are near the exact x_0, which is about 0.5."""
    taken, invalid = {}, {}
    for steps in (1, 2, 3, 4, 7, 50, 100, 300, 501, 999, 1000):
        try:
            taken[steps] = error_of(name, steps, 0.25, timestep_spacing=spacing)
        except ValueError as error:
            invalid[steps] = str(error)
    assert all(message.startswith(f"num_inference_steps={steps}: ") for steps, message in invalid.items())
    assert all(math.isfinite(error) for error in taken.values())
    assert all(error < 0.08 for steps, error in taken.items() if steps >= 50), taken
    if name not in ("ddim", "pndm"):
        assert set(taken) >= {1, 2, 3, 4, 7, 50, 100, 300, 501, 999}
    elif spacing != "linspace":
        assert set(taken) >= {4, 50, 100, 1000}


@pytest.mark.parametrize("name", SOLVERS)
def test_the_default_number_of_steps(name):
    pipeline = DDPMCustomPipeline(tiny_unet(), LinearNoiseScheduler(20, clip_sample=False))
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(scheduler=name, output_type="pt").images.isfinite().all()


def test_default_settings_are_passed_on():
    """Heun and DDIM have different default betas."""
    theirs = diffusers.HeunDiscreteScheduler()
    for name in ("ddpm", "ddim", "unipc"):
        assert_close(make_solver(name, theirs).alphas_cumprod, theirs.alphas_cumprod, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", [LinearNoiseScheduler, CosineNoiseScheduler])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_keeps_every_setting(name, kind):
    trained_with = kind(prediction_type="sample", timestep_spacing="trailing")
    solver = make_solver(name, trained_with)
    assert type(solver) is getattr(diffusers, SOLVERS[name])
    assert_close(solver.alphas_cumprod, trained_with.alphas_cumprod, rtol=1e-4, atol=1e-7)
    for key, value in trained_with.config.items():
        assert key.startswith("_") or solver.config.get(key, value) == value, key


@pytest.mark.parametrize("name", SOLVERS)
def test_zero_terminal_snr_is_kept_or_raises(name):
    if name in ("ddim", "dpm++", "unipc", "euler", "euler-a"):
        solver = make_solver(name, LinearNoiseScheduler(**ZERO_SNR))
        assert solver.alphas_cumprod[-1] < 1e-7
    else:
        with pytest.raises(ValueError, match=f"scheduler='{name}' does not support the betas of this model"):
            make_solver(name, LinearNoiseScheduler(**ZERO_SNR))


def test_a_solver_for_one_call(digits_model):
    pipeline = DDPMCustomPipeline.from_pretrained(digits_model)
    pipeline.set_progress_bar_config(disable=True)
    own = pipeline.scheduler

    def samples(**settings):
        settings = {
            "class_labels": [3, 4],
            "guidance_scale": 2,
            "output_type": "pt",
            "num_inference_steps": 10,
        } | settings
        return pipeline(generator=torch.Generator().manual_seed(0), **settings).images

    plain = samples()
    seen = {"ddpm": samples(scheduler="ddpm")}
    assert_close(seen["ddpm"], plain, rtol=0, atol=1e-6)
    for name in SOLVERS:
        seen[name] = samples(scheduler=name)
        assert seen[name].isfinite().all()
        by_hand = getattr(diffusers, SOLVERS[name]).from_config(own.config)
        assert_close(samples(scheduler=by_hand), seen[name], rtol=0, atol=1e-6)
        assert not torch.allclose(seen[name], plain, atol=1e-3)
    assert pipeline.scheduler is own
    assert not torch.allclose(samples(scheduler="ddim", clip_sample=False), seen["ddim"], atol=1e-5)


def test_invalid_solvers():
    pipeline = DDPMCustomPipeline(tiny_unet(), LinearNoiseScheduler())
    with pytest.raises(ValueError, match="scheduler='dpm' must be one of ddpm, ddim, pndm, .*unipc"):
        pipeline(scheduler="dpm")
    with pytest.raises(ValueError, match="clip_sample=False needs the name of a scheduler: ddpm, ddim, heun"):
        pipeline(clip_sample=False)
    with pytest.raises(ValueError, match=r"clip_sample=True is not supported by scheduler='dpm\+\+'; choose"):
        pipeline(clip_sample=True, scheduler="dpm++")
    for wrong in (5, diffusers.DDIMScheduler):
        with pytest.raises(ValueError, match="scheduler=.* must be one of ddpm, ddim, .* or a scheduler object"):
            pipeline(scheduler=wrong)


# ---------------------------------------------------------------- the solver that a pipeline keeps


def test_a_pipeline_keeps_the_solver_and_the_number_of_its_steps(tmp_path):
    unet = tiny_unet()
    plain = DDPMCustomPipeline(unet, LinearNoiseScheduler(timestep_spacing="trailing"))
    kept = DDPMCustomPipeline(unet, plain.scheduler, sampling_scheduler="unipc", sampling_steps=5)
    kept.save_pretrained(tmp_path)
    loaded = DDPMCustomPipeline.from_pretrained(tmp_path)
    for pipeline in (plain, kept, loaded):
        pipeline.set_progress_bar_config(disable=True)

    def images(pipeline, **call):
        return pipeline(2, torch.Generator().manual_seed(0), output_type="pt", **call).images

    for pipeline in (kept, loaded):
        assert pipeline.sampler() == ("unipc", 5)
        assert pipeline.sampler(None, 9) == ("unipc", 9)
        assert pipeline.sampler(None, 1000) == (None, 1000)  # all timesteps are those of training
        assert pipeline.sampler("ddpm", 9) == ("ddpm", 9)
        assert torch.equal(images(pipeline), images(plain, scheduler="unipc", num_inference_steps=5))
        in_four = images(plain, scheduler="unipc", num_inference_steps=4)
        assert torch.equal(images(pipeline, num_inference_steps=4), in_four)
        assert torch.equal(images(pipeline, scheduler="ddpm"), images(plain, num_inference_steps=5))
    loaded.scheduler = DDIMScheduler.from_config(loaded.scheduler.config)  # whoever replaces it wants that one
    assert torch.equal(images(loaded), images(plain, scheduler="ddim", num_inference_steps=5))


def test_settings_of_the_kept_solver_are_checked(tmp_path):
    with pytest.raises(ValueError, match="sampling_scheduler='unipcc' must be one of ddpm, ddim"):
        DDPMCustomPipeline(tiny_unet(), LinearNoiseScheduler(), "unipcc")
    with pytest.raises(ValueError, match="sampling_steps=0 must be"):
        DDPMCustomPipeline(tiny_unet(), LinearNoiseScheduler(), sampling_steps=0)
    DDPMCustomPipeline(tiny_unet(), LinearNoiseScheduler()).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert not {"sampling_scheduler", "sampling_steps"} & index.keys()
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "sampling_steps": "many"}))
    with pytest.raises(ValueError, match=r"model_index.json: sampling_steps='many' must be"):
        DDPMCustomPipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="sampling_scheduler='euler-b' must be one of"):
        resolve({"sampling_scheduler": "euler-b"})


def test_training_keeps_the_solver(tmp_path):
    run = train(tiny_config(tmp_path, sampling_scheduler="dpm++", sampling_steps=4, ddpm_num_inference_steps=3))
    assert run.pipeline.sampler() == DDPMCustomPipeline.from_pretrained(tmp_path).sampler() == ("dpm++", 4)
    with pytest.raises(ValueError, match="scheduler='pndm' must be one of euler, heun"):
        train(tiny_config(tmp_path / "flow", objective="flow", scheduler={}, sampling_scheduler="pndm"))

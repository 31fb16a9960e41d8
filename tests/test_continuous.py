"""Flow matching and EDM: the schedulers against closed forms for Gaussian data and against diffusers' schedulers."""

import inspect
import math

import diffusers
import pytest
import torch
from conftest import tiny_unet
from torch.testing import assert_close

from ddpm_hf import DDPMCustomPipeline, EDMScheduler, FlowMatchScheduler, LinearNoiseScheduler
from ddpm_hf.schedulers.solvers import make_solver, own_scheduler, scale_model_input, scheduler_class, start_scale

STOCK = {
    FlowMatchScheduler: diffusers.FlowMatchEulerDiscreteScheduler,
    EDMScheduler: diffusers.EDMEulerScheduler,
}
EVERY = [(kind, name) for kind in STOCK for name in kind.solvers]
SETTINGS = [
    (FlowMatchScheduler, {}),
    (FlowMatchScheduler, {"shift": 3.0, "num_train_timesteps": 100}),
    (EDMScheduler, {}),
    (EDMScheduler, {"sigma_data": 0.3, "sigma_max": 40.0, "prediction_type": "v_prediction"}),
    (EDMScheduler, {"sigma_schedule": "exponential", "sigma_min": 0.01}),
]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def best(kind, variance: float, level, model_input, d: float = 0.5):
    """The best network for data N(0, variance), written out: a velocity, or F of table 1 of arXiv:2206.00364."""
    s2, level = variance, float(level)
    if kind is FlowMatchScheduler:
        return model_input * (level - (1 - level) * s2) / ((1 - level) ** 2 * s2 + level**2)
    total = level**2 + d**2
    x = model_input * math.sqrt(total)
    denoised = x * s2 / (s2 + level**2)
    return (denoised - d**2 / total * x) / (level * d / math.sqrt(total))


def variance_of_samples(scheduler, steps: int, variance: float, start: float) -> float:
    """The variance of the samples, by the linear recursion through our `step` from N(0, start^2)."""
    scheduler.set_timesteps(steps)
    x = torch.full((1, 1, 1, 1), start, dtype=torch.float64)
    for timestep, level in zip(scheduler.timesteps, scheduler.levels):
        scaled = x / math.sqrt(level**2 + 0.25) if isinstance(scheduler, EDMScheduler) else x
        x = scheduler.step(best(type(scheduler), variance, level, scaled), timestep, x).prev_sample
    return x.square().item()


@pytest.mark.parametrize(
    ("steps", "unit", "quarter"),
    [(10, 0.7726135376, 0.1855736527), (50, 0.9498767217, 0.2356099935), (1000, 0.9974325044, 0.2492602224)],
)
def test_variance_of_euler_samples_of_a_flow(steps, unit, quarter):
    """Times are even where there are as many steps as training timesteps; computed independently of this package."""
    scheduler = FlowMatchScheduler(num_train_timesteps=steps)
    assert abs(variance_of_samples(scheduler, steps, 1.0, 1.0) - unit) < 1e-8
    assert abs(variance_of_samples(scheduler, steps, 0.25, 1.0) - quarter) < 1e-8


@pytest.mark.parametrize(
    ("steps", "unit", "quarter"), [(18, 0.7386636269, 0.1789555962), (50, 0.9001340894, 0.2226089155)]
)
def test_variance_of_euler_samples_of_edm(steps, unit, quarter):
    """From N(0, 80^2); computed independently of this package."""
    assert abs(variance_of_samples(EDMScheduler(), steps, 1.0, 80.0) - unit) < 1e-8
    assert abs(variance_of_samples(EDMScheduler(), steps, 0.25, 80.0) - quarter) < 1e-8


def test_variance_of_heun_samples_of_a_flow():
    """At 10 and 50 even times, the last step being Euler's; diffusers computes in float32."""
    for steps, exact in ((10, 0.9876658022), (50, 0.9995812564)):
        solver = make_solver("heun", FlowMatchScheduler(num_train_timesteps=steps))
        solver.set_timesteps(steps)
        x = torch.ones(1, 1, 1, 1)
        for timestep in solver.timesteps:
            x = solver.step(best(FlowMatchScheduler, 1.0, timestep / steps, x), timestep, x).prev_sample
        assert abs(x.square().item() - exact) < 1e-5


@pytest.mark.parametrize(("kind", "settings"), SETTINGS)
def test_target_is_the_output_whose_x0_is_the_image(kind, settings):
    scheduler = kind(**settings)
    x0, noise = torch.randn(2, 7, 2, 4, 4, generator=seeded(0), dtype=torch.float64).unbind()
    timesteps = scheduler.midpoints(7)
    x = scheduler.add_noise(x0, noise, timesteps)
    target = scheduler.target(x0, noise, timesteps)
    assert_close(scheduler.predicted_original(target, timesteps, x), x0, rtol=0, atol=1e-9)
    level = scheduler.level_of(timesteps.double()).reshape(-1, 1, 1, 1)
    if kind is FlowMatchScheduler:
        assert_close(x, (1 - level) * x0 + level * noise)
        assert_close(target, noise - x0)
        assert_close(scheduler.scale_model_input(x, timesteps), x)
    else:
        d, sign = scheduler.config.sigma_data, -1 if settings.get("prediction_type") == "v_prediction" else 1
        total = level**2 + d**2
        assert_close(x, x0 + level * noise)
        assert_close(target, sign * (x0 - d**2 / total * x) / (level * d / total.sqrt()), rtol=1e-5, atol=1e-7)
        assert_close(scheduler.scale_model_input(x, timesteps), x / total.sqrt())


def test_input_and_target_of_the_edm_network_have_variance_1():
    """Of data of mean 0 and standard deviation sigma_data (arXiv:2206.00364, appendix B.6)."""
    scheduler = EDMScheduler(sigma_data=0.7)
    x0, noise = torch.randn(2, 9, 40000, 1, 1, generator=seeded(0), dtype=torch.float64).unbind()
    timesteps = scheduler.midpoints(9)
    x = scheduler.scale_model_input(scheduler.add_noise(0.7 * x0, noise, timesteps), timesteps)
    target = scheduler.target(0.7 * x0, noise, timesteps)
    for values in (x, target):
        assert_close(values.flatten(1).var(1), torch.ones(9, dtype=torch.float64), rtol=0, atol=0.04)


@pytest.mark.parametrize(("kind", "settings"), SETTINGS)
@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_samples_of_diffusers_scheduler_are_ours(kind, settings, steps):
    """In both directions: diffusers' scheduler from our configuration, and ours from that of diffusers'."""
    ours = kind(**settings)
    theirs = STOCK[kind].from_config(ours.config)
    again = kind.from_config(theirs.config)
    assert again.config == ours.config
    assert type(own_scheduler(theirs)) is kind
    assert own_scheduler(theirs).config.items() >= {k: v for k, v in ours.config.items() if k[0] != "_"}.items()
    found = []
    for scheduler in (ours, theirs, again):
        pipeline = DDPMCustomPipeline(tiny_unet(), scheduler)
        pipeline.set_progress_bar_config(disable=True)
        found.append(pipeline(2, seeded(1), steps, output_type="latent").images)
    assert_close(found[1], found[0], rtol=0, atol=1e-4)
    assert_close(found[2], found[0], rtol=0, atol=0)


@pytest.mark.parametrize("kind", STOCK)
def test_settings_are_those_of_diffusers(kind):
    ours, theirs = (inspect.signature(each.__init__).parameters for each in (kind, STOCK[kind]))
    assert {name: p.default for name, p in ours.items()} == {name: p.default for name, p in theirs.items()}


def error_of(kind, name: str, steps: int, variance: float = 0.25) -> float:
    """The error of a sample with the best network, against the exact solution of the ODE from the same noise."""
    solver = make_solver(name, kind())
    solver.set_timesteps(steps)
    x = torch.full((1, 1, 1, 1), start_scale(solver))
    start, largest = x.item(), 1.0 if kind is FlowMatchScheduler else 80.0
    for timestep in solver.timesteps:
        level = timestep / 1000 if kind is FlowMatchScheduler else (4 * timestep).exp()
        output = best(kind, variance, level, scale_model_input(solver, x, timestep))
        x = solver.step(output, timestep, x).prev_sample
    of_data = 0 if kind is FlowMatchScheduler else variance  # the noise is all that there is at t = 1
    return abs(x.item() - start * math.sqrt(variance / (largest**2 + of_data)))


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_the_error_of_every_solver_falls_with_the_steps(kind, name):
    """The exact sample is about 0.5."""
    errors = [error_of(kind, name, steps) for steps in (5, 20, 80)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < (0.02 if name == "euler" else 0.004)


@pytest.mark.parametrize(("kind", "settings"), SETTINGS)
def test_renoising_twice_is_renoising_once(kind, settings):
    """The gain and the variance of x_b given x_a, by the way of a level in between."""
    scheduler = kind(**settings)
    scheduler.set_timesteps(10)
    low, middle, high = scheduler.timesteps[[8, 5, 2]].tolist()
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    gains = [scheduler.renoise(one, a, b, zero) for a, b in ((low, middle), (middle, high), (low, high))]
    stds = [scheduler.renoise(zero, a, b, one) for a, b in ((low, middle), (middle, high), (low, high))]
    assert_close(gains[0] * gains[1], gains[2])
    assert_close((gains[1] * stds[0]) ** 2 + stds[1] ** 2, stds[2] ** 2)
    x0 = scheduler.add_noise(one, zero, torch.tensor([low]))  # and x_b of x_a of x_0 is x_b of x_0
    assert_close(scheduler.renoise(x0, low, high, zero), scheduler.add_noise(one, zero, torch.tensor([high])))
    with pytest.raises(ValueError, match="the second must have more noise"):
        scheduler.renoise(one, high, low, zero)


@pytest.mark.parametrize("kind", STOCK)
def test_inverse_step_inverts_the_step(kind):
    scheduler = kind()
    scheduler.set_timesteps(6)
    x, output = torch.randn(2, 3, 1, 4, 4, generator=seeded(0), dtype=torch.float64).unbind()
    for timestep, to in ((scheduler.timesteps[1], scheduler.timesteps[2]), (scheduler.timesteps[5], None)):
        after = scheduler.step(output, timestep, x).prev_sample
        assert_close(scheduler.inverse_step(output, timestep, to, x, after), x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_every_use_of_a_pipeline(kind, name, tmp_path):
    """Classes, guidance, SDEdit, inpainting, interpolation, inversion and the predicted x_0, also after saving."""
    DDPMCustomPipeline(tiny_unet(num_classes=3), kind()).save_pretrained(tmp_path)
    pipeline = DDPMCustomPipeline.from_pretrained(tmp_path)
    assert type(pipeline.scheduler) is kind
    pipeline.set_progress_bar_config(disable=True)
    images, kept = torch.rand(2, 1, 8, 8, generator=seeded(0)), []

    def keep(pipeline, step, timestep, tensors):
        kept.append(tensors["pred_original_sample"])

    of_call = {"scheduler": name, "output_type": "pt", "class_labels": [1, 2], "guidance_scale": 2.0}
    samples = pipeline(generator=seeded(1), num_inference_steps=8, callback_on_step_end=keep, **of_call).images
    assert len(kept) == 8 * make_solver(name, kind()).order - (name == "heun")
    assert_close((kept[-1] / 2 + 0.5).clamp(0, 1), samples, rtol=0, atol=0.01)
    nearest = []
    for strength in (0.1, 0.9):
        varied = pipeline(image=images, strength=strength, num_inference_steps=10, generator=seeded(2), **of_call)
        nearest.append((varied.images - images).abs().mean())
    assert nearest[0] < nearest[1]
    of_call |= {"class_labels": 1}
    ends = pipeline.interpolate(
        images[:1], images[1:], 40, 3, num_inference_steps=60, generator=seeded(3), **of_call
    ).images
    assert_close(ends[[0, 2]], images, rtol=0, atol=0.25)
    assert pipeline.interpolate(method="slerp", steps=3, num_inference_steps=3, **of_call).images.isfinite().all()
    if name == kind.deterministic:
        mask = torch.zeros(8, 8, dtype=torch.bool)
        mask[2:5] = True
        del of_call["scheduler"]
        painted = pipeline.inpaint(images, mask, 12, 3, 2, seeded(4), **of_call).images
        assert_close(painted[..., ~mask], images[..., ~mask], rtol=0, atol=0)
        assert painted[..., mask].isfinite().all()
        noise = pipeline.invert(images, 40, iterations=5, class_labels=1, guidance_scale=2.0)
        back = pipeline(latents=noise, num_inference_steps=40, **of_call).images
        assert_close(back, images, rtol=0, atol=5e-3)


@pytest.mark.parametrize("kind", STOCK)
def test_invalid_arguments(kind):
    scheduler = kind()
    scheduler.set_timesteps(4)
    x = torch.zeros(2, 1, 4, 4)
    with pytest.raises(ValueError, match="timestep=0.3.* must be one of scheduler.timesteps"):
        scheduler.step(x, 0.3, x)
    with pytest.raises(ValueError, match="num_inference_steps=0 must be an integer"):
        scheduler.set_timesteps(0)
    pipeline = DDPMCustomPipeline(tiny_unet(), scheduler)
    with pytest.raises(ValueError, match="scheduler='ddim' must be one of euler, .*dpm"):
        pipeline(scheduler="ddim")
    for solver in ("euler", None):
        with pytest.raises(ValueError, match=f"clip_sample=True is not supported by models of {kind.__name__}"):
            pipeline(clip_sample=True, scheduler=solver)
    with pytest.raises(ValueError, match="num_train_timesteps='x' must be an integer"):
        kind(num_train_timesteps="x")


def test_settings_that_are_not_supported():
    with pytest.raises(ValueError, match="use_karras_sigmas=True is not supported; it must be False"):
        FlowMatchScheduler(use_karras_sigmas=True)
    with pytest.raises(ValueError, match="final_sigmas_type='sigma_min' is not supported; it must be 'zero'"):
        EDMScheduler(final_sigmas_type="sigma_min")
    with pytest.raises(ValueError, match="sigma_min=3 must be less than sigma_max=2"):
        EDMScheduler(sigma_min=3, sigma_max=2)


def test_the_class_of_a_configuration():
    for kind, stock in STOCK.items():
        assert scheduler_class(stock().config) is scheduler_class(kind().config) is kind
    flows = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 2.0}
    theirs = diffusers.UniPCMultistepScheduler(**flows)
    assert own_scheduler(theirs).config.shift == 2.0
    assert make_solver("dpm++", theirs).config.flow_shift == 2.0
    assert scheduler_class(diffusers.DPMSolverMultistepScheduler().config) is LinearNoiseScheduler

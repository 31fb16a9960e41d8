import json
import math

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_hf import CosineNoiseScheduler, LinearNoiseScheduler
from ddpm_hf.schedulers.noise import draw_noise, to_device

F64 = torch.float64


# ---------------------------------------------------------------- closed forms


def test_constants_of_the_linear_schedule():
    scheduler = LinearNoiseScheduler()
    expected = {  # t: (abar, SNR, posterior variance), computed independently
        0: (9.9990000000e-1, 9.9990000e3, 0.0),
        1: (9.9978009207e-1, 4.5463576575e3, 5.4531876613e-5),
        99: (8.9701814567e-1, 8.7104485694, 2.0345962595e-3),
        499: (7.8587242882e-2, 8.5289944463e-2, 1.0031355415e-2),
        999: (4.0358297654e-5, 4.0359926512e-5, 1.9999983527e-2),
    }
    t, (abar, snr, variance) = list(expected), torch.tensor(list(expected.values()), dtype=F64).unbind(1)
    found = scheduler.alphas_cumprod_float64
    assert_close(found[t], abar, rtol=1e-10, atol=0)
    assert_close((found / (1 - found))[t], snr, rtol=1e-9, atol=0)
    std = scheduler.step_coefficients(scheduler.timesteps).std.flip(0)
    assert_close(std[t] ** 2, variance, rtol=1e-9, atol=1e-20)
    assert_close(scheduler.alphas_cumprod, diffusers.DDPMScheduler().alphas_cumprod, rtol=1e-4, atol=0)


VARIANCES = {  # of samples, for data N(0, s2) and the optimal network; (s2, steps): fixed_small, fixed_large, DDIM
    (1.0, 1000): (0.99106738, 0.99990000, 0.99625211),
    (1.0, 50): (0.85743391, 0.99990000, 0.92944884),
    (0.25, 1000): (0.24612521, 0.25075208, 0.24849755),
    (0.25, 50): (0.19724511, 0.26752601, 0.22319872),
}


def optimal_epsilon(x, abar, s2):
    """The best prediction of the noise for data N(0, s2)."""
    return math.sqrt(1 - abar) * x / (abar * s2 + 1 - abar)


def final_variance(scheduler, s2: float, steps: int) -> float:
    """Variance of x_0 by recursion: `step` is linear in x_t, so two points and the noise determine it."""
    scheduler.set_timesteps(steps)
    abar, variance = LinearNoiseScheduler().alphas_cumprod_float64, 1.0
    x = torch.tensor([[0.0], [1.0]], dtype=F64)
    for t in scheduler.timesteps:
        kwargs = {"generator": torch.Generator().manual_seed(0)}
        prev = scheduler.step(optimal_epsilon(x, float(abar[t]), s2), t, x, **kwargs).prev_sample
        z = torch.randn(2, 1, generator=torch.Generator().manual_seed(0), dtype=F64)
        # prev = gain * x + std * z
        std = (prev[0] / z[0]).item()
        gain = (prev[1] - std * z[1]).item()
        variance = gain**2 * variance + std**2
    return variance


@pytest.mark.parametrize(("s2", "steps"), VARIANCES)
@pytest.mark.parametrize("column", [0, 1])
def test_exact_variance_of_sampling(s2, steps, column):
    kind = ("fixed_small", "fixed_large")[column]
    scheduler = LinearNoiseScheduler(variance_type=kind, clip_sample=False)
    assert abs(final_variance(scheduler, s2, steps) - VARIANCES[s2, steps][column]) < 1e-8


def test_exact_variance_distinguishes_the_variance_types():
    scheduler = LinearNoiseScheduler(variance_type="fixed_large", clip_sample=False)
    wrong = final_variance(scheduler, 1.0, 50)
    assert abs(wrong - VARIANCES[1.0, 50][0]) > 0.1
    scheduler = LinearNoiseScheduler(variance_type="fixed_small", clip_sample=False)
    wrong = final_variance(scheduler, 1.0, 50)
    assert abs(wrong - VARIANCES[1.0, 50][1]) > 0.1


@pytest.mark.parametrize(("s2", "steps"), VARIANCES)
def test_exact_variance_of_ddim_built_from_ours(s2, steps):
    ddim = diffusers.DDIMScheduler.from_config(LinearNoiseScheduler(clip_sample=False).config)
    variance = final_variance(ddim, s2, steps)
    assert abs(variance - VARIANCES[s2, steps][2]) < 1e-4


def test_sampling_gaussian_data_gives_its_variance():
    scheduler = LinearNoiseScheduler(clip_sample=False)
    scheduler.set_timesteps(50)
    generator = torch.Generator().manual_seed(0)
    x = draw_noise((100_000, 1), generator, dtype=F64)
    for t in scheduler.timesteps:
        output = optimal_epsilon(x, float(scheduler.alphas_cumprod_float64[t]), 1.0)
        x = scheduler.step(output, t, x, generator).prev_sample
    variance = VARIANCES[1.0, 50][0]
    standard_error = variance * math.sqrt(2 / len(x))
    assert abs(x.var().item() - variance) < 4 * standard_error


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
@pytest.mark.parametrize("clip_sample", [False, True])
@pytest.mark.parametrize("kind", [LinearNoiseScheduler, CosineNoiseScheduler])
def test_every_prediction_type_makes_the_same_samples(prediction_type, clip_sample, kind):
    """The optimal networks of all three predict the same x_0."""
    schedulers = [kind(prediction_type=p, clip_sample=clip_sample) for p in ("epsilon", prediction_type)]
    samples = []
    for scheduler in schedulers:
        scheduler.set_timesteps(50)
        generator = torch.Generator().manual_seed(0)
        x = draw_noise((64, 1), generator, dtype=F64)
        for t in scheduler.timesteps:
            abar = float(scheduler.alphas_cumprod_float64[t])
            epsilon = optimal_epsilon(x, abar, 0.25)
            x0 = (x - math.sqrt(1 - abar) * epsilon) / math.sqrt(abar)
            v = math.sqrt(abar) * epsilon - math.sqrt(1 - abar) * x0
            output = {"epsilon": epsilon, "sample": x0, "v_prediction": v}[scheduler.config.prediction_type]
            x = scheduler.step(output, t, x, generator).prev_sample
        samples.append(x)
    assert_close(*samples, rtol=0, atol=1e-10)


def test_constants_of_the_cosine_schedule(tmp_path):
    scheduler = CosineNoiseScheduler()
    for t, abar in {0: 9.9995871578e-1, 499: 4.9384359044e-1, 999: 2.4287669070e-9}.items():  # computed independently
        assert_close(float(scheduler.alphas_cumprod_float64[t]), abar, rtol=1e-9, atol=0)
    scheduler.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["beta_schedule"] == "squaredcos_cap_v2"
    loaded = CosineNoiseScheduler.from_pretrained(tmp_path)
    for built_from in (scheduler.config, loaded.config):
        ddim = diffusers.DDIMScheduler.from_config(built_from)
        assert_close(ddim.alphas_cumprod, scheduler.alphas_cumprod, rtol=2e-5, atol=1e-9)
    again = CosineNoiseScheduler.from_config(diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2").config)
    assert torch.equal(again.alphas_cumprod_float64, scheduler.alphas_cumprod_float64)
    with pytest.raises(ValueError, match="beta_schedule='linear' must be one of squaredcos_cap_v2"):
        CosineNoiseScheduler.from_config(LinearNoiseScheduler().config)


@pytest.mark.parametrize("name", ["DDIM", "DDPM", "DEISMultistep", "DPMSolverMultistep", "UniPCMultistep",
                                  "EulerDiscrete", "HeunDiscrete", "PNDM"])  # fmt: skip
def test_solvers_built_from_the_cosine_schedule_have_it(name):
    solver = getattr(diffusers, f"{name}Scheduler").from_config(CosineNoiseScheduler().config)
    assert_close(solver.alphas_cumprod, CosineNoiseScheduler().alphas_cumprod, rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("kind", [LinearNoiseScheduler, CosineNoiseScheduler])
def test_zero_terminal_snr(kind):
    settings = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    plain, scheduler = kind(), kind(**settings, clip_sample=False)
    assert scheduler.alphas_cumprod_float64[-1] == 0
    assert_close(scheduler.alphas_cumprod_float64[0], plain.alphas_cumprod_float64[0])
    ddim = diffusers.DDIMScheduler.from_config(scheduler.config)
    assert_close(ddim.alphas_cumprod, scheduler.alphas_cumprod, rtol=1e-4, atol=1e-7)
    # Bright images, N(0.8, 0.01): their mean is found although sampling starts from pure noise.
    scheduler.set_timesteps(500)
    assert scheduler.timesteps[0] == 999
    generator = torch.Generator().manual_seed(0)
    x = draw_noise((20_000, 1), generator, dtype=F64)
    for t in scheduler.timesteps:
        signal, sigma = scheduler.alphas_cumprod_float64[t].sqrt(), (1 - scheduler.alphas_cumprod_float64[t]).sqrt()
        total = signal**2 * 0.01 + sigma**2
        epsilon = sigma * (x - signal * 0.8) / total
        x0 = 0.8 + signal * 0.01 * (x - signal * 0.8) / total
        x = scheduler.step(signal * epsilon - sigma * x0, t, x, generator).prev_sample
    assert abs(x.mean() - 0.8) < 5 * math.sqrt(0.01 / 20_000)
    assert 0.008 < x.var() < 0.0105


@pytest.mark.parametrize("gamma", [1.0, 5.0, 1e9])
def test_min_snr_weights(gamma):
    """Against the formula with independently computed SNRs, and as one error in three prediction types."""
    snr = {0: 9.9990000000e3, 1: 4.5463576575e3, 99: 8.7104485694, 499: 8.5289944463e-2, 999: 4.0359926512e-5}
    t = torch.tensor(list(snr))
    r = torch.tensor(list(snr.values()), dtype=F64)
    per = {"epsilon": r, "sample": 1.0, "v_prediction": r + 1}
    x0, noise, wrong = torch.randn(3, len(t), 4, dtype=F64, generator=torch.Generator().manual_seed(0)).unbind()
    losses = []
    for prediction_type, divisor in per.items():
        scheduler = LinearNoiseScheduler(prediction_type=prediction_type)
        weights = scheduler.min_snr_weight(t, gamma)
        assert weights.dtype == torch.float32
        assert_close(weights.double(), r.clamp(max=gamma) / divisor, rtol=1e-6, atol=0)
        # a wrong x_0 and the noise that gives the same x_t
        noise_of_wrong = noise + r.sqrt()[:, None] * (x0 - wrong)
        error = scheduler.target(wrong, noise_of_wrong, t) - scheduler.target(x0, noise, t)
        losses.append(weights * error.square().mean(1))
    assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    assert_close(losses[2], losses[1], rtol=1e-5, atol=0)


def test_one_step_chain_equals_the_jump():
    scheduler = LinearNoiseScheduler()
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=F64)
    signal, variance = 1.0, 0.0
    for t, beta in enumerate(betas.tolist()):
        signal, variance = signal * math.sqrt(1 - beta), variance * (1 - beta) + beta
        abar = scheduler.alphas_cumprod_float64[t].item()
        assert abs(signal - math.sqrt(abar)) < 1e-14
        assert abs(math.sqrt(variance) - math.sqrt(1 - abar)) < 1e-14


def test_velocity_is_the_derivative_of_x_along_the_angle():
    """v = d x_t / d phi for x_t = cos(phi) x_0 + sin(phi) noise (Salimans & Ho 2022)."""
    scheduler = LinearNoiseScheduler()
    x0, noise = torch.randn(2, 4, 3, dtype=F64, generator=torch.Generator().manual_seed(0)).unbind()
    t = torch.tensor([0, 300, 700, 999])
    phi = torch.acos(scheduler.alphas_cumprod_float64[t, None].sqrt())
    phi.requires_grad_()
    for k in range(3):
        x = phi.cos() * x0 + phi.sin() * noise
        (gradient,) = torch.autograd.grad(x[:, k].sum(), phi)
        assert_close(scheduler.get_velocity(x0, noise, t)[:, k : k + 1], gradient, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------- the sources' vectors


def test_vectors(shared):
    vectors = load_file(shared / "vectors/scheduler/linear_T1000.safetensors")
    for kind, key in (("fixed_small", "prev_sample_fixed_small"), ("fixed_large", "prev_sample_fixed_large_labml")):
        scheduler = LinearNoiseScheduler(variance_type=kind, clip_sample=False)
        noisy = scheduler.add_noise(vectors["original_samples"], vectors["noise"], vectors["timesteps"])
        assert_close(noisy, vectors["noisy_samples"], rtol=0, atol=1e-5)
        for row, t in enumerate(vectors["timesteps"]):
            torch.manual_seed(1000 + row)
            sample, output = vectors["noisy_samples"][row], vectors["model_output"][row]
            step = scheduler.step(output, t, sample)
            x0 = vectors["pred_original_sample_clamped"][row]
            assert_close(step.pred_original_sample.clamp(-1, 1), x0, rtol=0, atol=1e-5)
            if t == 0 and kind == "fixed_large":  # labml adds noise here, a slip: ours is the mean without it
                torch.manual_seed(1000 + row)
                std = math.sqrt(1e-4)
                expected = vectors[key][row] - std * torch.randn(sample.shape)
            else:
                expected = vectors[key][row]
            assert_close(step.prev_sample, expected, rtol=0, atol=1e-5)


# ---------------------------------------------------------------- sampling timesteps


def spaced(spacing, steps, **config):
    scheduler = LinearNoiseScheduler(timestep_spacing=spacing, **config)
    scheduler.set_timesteps(steps)
    return scheduler.timesteps


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 2, 7, 50, 300, 999, 1000])
def test_spacings_are_those_of_diffusers(spacing, steps):
    theirs = diffusers.DDPMScheduler(timestep_spacing=spacing)
    theirs.set_timesteps(steps)
    assert_close(spaced(spacing, steps), theirs.timesteps)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(["leading", "trailing", "linspace"]), st.integers(1, 200), st.data())
def test_timesteps_descend_within_the_schedule(spacing, total, data):
    steps = data.draw(st.integers(1, total))
    timesteps = spaced(spacing, steps, num_train_timesteps=total)
    assert len(timesteps) == steps
    assert (timesteps.diff() < 0).all()
    assert timesteps.min() >= 0
    assert timesteps.max() < total


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("kind", ["fixed_small", "fixed_large"])
def test_no_noise_at_the_last_step(spacing, kind):
    scheduler = LinearNoiseScheduler(variance_type=kind, timestep_spacing=spacing, clip_sample=False)
    scheduler.set_timesteps(4)
    x, output = torch.randn(2, 2, 5, generator=torch.Generator().manual_seed(0)).unbind()
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    last = scheduler.step(output, scheduler.timesteps[-1], x, generator)
    assert_close(last.prev_sample, last.pred_original_sample)  # abar_prev = 1: the mean is x_0 itself
    assert_close(generator.get_state(), before)
    first = [scheduler.step(output, scheduler.timesteps[0], x, torch.Generator().manual_seed(s))[0] for s in (1, 2)]
    assert not torch.equal(*first)


def test_fewer_timesteps_are_the_ddpm_of_their_own_betas():
    short = LinearNoiseScheduler(clip_sample=False)
    short.set_timesteps(20)
    abar = short.alphas_cumprod_float64[short.timesteps.flip(0)]
    betas = 1 - abar / torch.cat([torch.ones(1, dtype=F64), abar[:-1]])
    whole = LinearNoiseScheduler(20, trained_betas=betas.tolist(), clip_sample=False)
    found, expected = (s.step_coefficients(s.timesteps) for s in (short, whole))
    assert_close(found, expected, rtol=1e-9, atol=1e-12)
    x, output = torch.randn(2, 1, 4, dtype=F64, generator=torch.Generator().manual_seed(0)).unbind()
    for t_short, t_whole in zip(short.timesteps, whole.timesteps, strict=True):
        a, b = (
            s.step(output, t, x, torch.Generator().manual_seed(1)).prev_sample
            for s, t in ((short, t_short), (whole, t_whole))
        )
        assert_close(a, b, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------- the step


class OnADevice(torch.Tensor):
    """A CPU tensor that claims to be on the meta device and raises if the host reads it."""

    device = torch.device("meta")

    def tolist(self):
        raise AssertionError("copied to the host")

    item = __int__ = __index__ = __bool__ = cpu = tolist


class Recorder(TorchDispatchMode):
    """Records the names of operations, and turns copies to the meta device into copies to the CPU."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.append(str(operation))
        kwargs = dict(kwargs or {})
        if "_to_copy" in str(operation) and kwargs.get("device") == torch.device("meta"):
            kwargs["device"] = torch.device("cpu")
        return operation(*args, **kwargs)

    def reads(self) -> list[str]:
        return [name for name in self.names if "item" in name or "local_scalar" in name]


@pytest.mark.parametrize("timestep", [500, torch.tensor(500)])
def test_step_reads_no_value_through_the_dispatcher(timestep):
    scheduler = LinearNoiseScheduler()
    x = torch.zeros(1, 3, 8, 8)
    with Recorder() as recorder:
        scheduler.step(x, timestep, x)
    assert not recorder.reads()
    assert len(recorder.names) < 15


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
def test_step_with_a_timestep_on_a_device_reads_no_value(variance_type):
    scheduler = LinearNoiseScheduler(variance_type=variance_type)
    scheduler.set_timesteps(50)
    x, output = torch.randn(2, 2, 4, 3, generator=torch.Generator().manual_seed(0)).unbind()
    sample = x[:, :2] if variance_type == "learned_range" else x
    for t in (980, 500, 0, 7):
        timestep = torch.Tensor._make_subclass(OnADevice, torch.tensor(t))
        with Recorder() as recorder:
            found = scheduler.step(output, timestep, sample, torch.Generator().manual_seed(1)).prev_sample
        assert not recorder.reads()
        found = found.as_subclass(torch.Tensor)
        if t == 7:  # not one of the timesteps, which are multiples of 20
            assert found.isnan().all()
        else:
            expected = scheduler.step(output, t, sample, torch.Generator().manual_seed(1)).prev_sample
            assert_close(found, expected)


def test_the_table_of_steps_is_copied_to_a_device_once():
    scheduler, x, t = LinearNoiseScheduler(), torch.zeros(1, 4, device="meta"), torch.tensor(500, device="meta")
    scheduler.step(x, t, x)
    with Recorder() as recorder:
        scheduler.step(x, t, x)
    assert not [name for name in recorder.names if "copy" in name]


def test_clipping():
    x, output = torch.full((1, 4), 3.0), torch.full((1, 4), -3.0)
    clipped = LinearNoiseScheduler(clip_sample_range=0.5).step(output, 999, x)
    free = LinearNoiseScheduler(clip_sample=False).step(output, 999, x)
    assert_close(clipped.pred_original_sample, torch.full((1, 4), 0.5))
    assert free.pred_original_sample.min() > 100


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_noise(dtype):
    scheduler = LinearNoiseScheduler()
    x0 = torch.zeros(1000, 2, dtype=dtype)
    noisy = scheduler.add_noise(x0, torch.ones_like(x0), torch.arange(1000))
    assert noisy.dtype == dtype
    assert_close(noisy[:, 0].double(), (1 - scheduler.alphas_cumprod_float64).sqrt(), rtol=2**-8, atol=0)


def test_copies_go_to_cuda_from_pinned_memory_and_on_the_cpu_nothing_is_copied():
    tensor, done = torch.ones(2), []
    assert to_device(tensor, "cpu") is to_device(tensor, torch.device("cpu")) is tensor
    assert to_device(tensor.to("meta"), "meta").device.type == to_device(tensor, "meta").device.type == "meta"

    class Watched:
        def __init__(self, device):
            self.device = torch.device(device)

        def pin_memory(self):
            done.append("pinned")
            return self

        def to(self, device, non_blocking=False):
            done.append((device, non_blocking))

    to_device(Watched("cpu"), "cuda:1")
    to_device(Watched("cuda"), "cuda")
    assert done == ["pinned", ("cuda:1", True), ("cuda", False)]


def test_noise_of_a_list_of_generators_does_not_depend_on_the_batch():
    def generators(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    together = draw_noise((3, 2, 2), generators(5, 6, 7))
    assert_close(together[1:2], draw_noise((1, 2, 2), generators(6)), rtol=0, atol=0)
    half = draw_noise((3, 2, 2), generators(5, 6, 7), dtype=torch.bfloat16)
    assert_close(half, together.bfloat16(), rtol=0, atol=0)


# ---------------------------------------------------------------- interchange

SOLVERS = [
    "DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler",
    "EulerAncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LCMScheduler", "TCDScheduler", "SASolverScheduler",
]  # fmt: skip


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"beta_start": 0.001, "beta_end": 0.01, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction"},
        {"num_train_timesteps": 10, "trained_betas": [0.01 * (k + 1) for k in range(10)]},
    ],
)
def test_solvers_built_from_ours_and_back(name, config):
    ours = LinearNoiseScheduler(**config)
    theirs = getattr(diffusers, name).from_config(ours.config)
    assert_close(theirs.alphas_cumprod, ours.alphas_cumprod, rtol=1e-4, atol=0)
    assert theirs.config.prediction_type == ours.config.prediction_type
    assert_close(LinearNoiseScheduler.from_config(theirs.config).alphas_cumprod, ours.alphas_cumprod)


def test_the_defaults_are_those_of_ddpm_scheduler():
    theirs = {k: v for k, v in diffusers.DDPMScheduler().config.items() if not k.startswith("_")}
    assert {k: v for k, v in LinearNoiseScheduler().config.items() if not k.startswith("_")} == theirs


def test_step_agrees_with_ddpm_scheduler():
    for config in ({}, {"prediction_type": "sample"}, {"prediction_type": "v_prediction", "clip_sample": False}):
        ours, theirs = LinearNoiseScheduler(**config), diffusers.DDPMScheduler(**config)
        ours.set_timesteps(25)
        theirs.set_timesteps(25)
        x, output = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).unbind()
        for t in ours.timesteps[::6]:
            a, b = (s.step(output, t, x, generator=torch.Generator().manual_seed(1)) for s in (ours, theirs))
            assert_close(a.prev_sample, b.prev_sample, rtol=1e-4, atol=1e-4)
            assert_close(a.pred_original_sample, b.pred_original_sample, rtol=1e-4, atol=1e-4)


def test_a_saved_spacing_that_is_unknown_raises(tmp_path):
    LinearNoiseScheduler().save_pretrained(tmp_path)
    path = tmp_path / "scheduler_config.json"
    path.write_text(path.read_text().replace('"leading"', '"quadratic"'))
    with pytest.raises(ValueError, match="timestep_spacing='quadratic' must be one of leading, trailing, linspace"):
        LinearNoiseScheduler.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"beta_schedule": "squaredcos_cap_v2"},
            "beta_schedule='squaredcos_cap_v2' must be one of linear, scaled_linear; CosineNoiseScheduler has",
        ),
        (
            {"variance_type": "fixed_large_log"},
            "variance_type='fixed_large_log' must be one of fixed_small, fixed_large",
        ),
        ({"prediction_type": "x0"}, "prediction_type='x0' must be one of epsilon, sample, v_prediction"),
        ({"timestep_spacing": "even"}, "timestep_spacing='even' must be one of leading, trailing, linspace"),
        ({"thresholding": True}, "thresholding=True is not supported; it must be False"),
        ({"sample_max_value": 1.5}, "sample_max_value=1.5 is not supported"),
        ({"dynamic_thresholding_ratio": 0.9}, "dynamic_thresholding_ratio=0.9 is not supported"),
        (
            {"rescale_betas_zero_snr": True},
            "rescale_betas_zero_snr=True needs prediction_type='v_prediction' or 'sample': .*'epsilon'",
        ),
        (
            {"rescale_betas_zero_snr": True, "prediction_type": "sample", "num_train_timesteps": 1},
            "rescale_betas_zero_snr=True needs num_train_timesteps of at least 2",
        ),
        ({"num_train_timesteps": 0}, "num_train_timesteps=0 must be"),
        (
            {"beta_start": 0.5, "beta_end": 0.1},
            "beta_start=0.5 must be at most beta_end",
        ),
        (
            {"trained_betas": [0.1, 0.2]},
            r"trained_betas=\[0.1, 0.2\] must have num_train_timesteps=1000 entries",
        ),
        (
            {"num_train_timesteps": 2, "trained_betas": [0.1, 1.2]},
            r"trained_betas=\[0.1, 1.2\] must be a list of betas; each must be a number in \(0, 1\)",
        ),
        ({"steps_offset": -1}, "steps_offset=-1 must be an integer of at least 0"),
        ({"steps_offset": 1.5}, "steps_offset=1.5 must be an integer of at least 0"),
        ({"clip_sample_range": 0}, "clip_sample_range=0 must be a finite number greater than 0"),
        ({"clip_sample": "false"}, "clip_sample='false' must be true or false"),
        ({"beta_start": math.nan}, "beta_start=nan must be a number in"),
        ({"num_train_timesteps": 10**12}, "num_train_timesteps=1000000000000 must be at most 1,000,000: the scheduler"),
        ({"beta_start": 1e-17}, "the least beta, 1e-17, is too small: 1 - beta is 1 in float32"),
        ({"num_train_timesteps": 100_000}, "100000 betas of up to 0.02 leave nothing of the image"),
        ({"num_train_timesteps": 2, "trained_betas": [0.1, 1e-20]}, "the least beta, 1e-20, is too small"),
    ],
)
def test_invalid_settings(config, message):
    with pytest.raises(ValueError, match=message):
        LinearNoiseScheduler(**config)


def test_invalid_calls():
    scheduler = LinearNoiseScheduler()
    x = torch.zeros(2, 3)
    for steps in (0, -1, 1001, 2.5, None):
        with pytest.raises(ValueError, match=r"num_inference_steps=.* must be an integer in 1 ... 1000"):
            scheduler.set_timesteps(steps)
    for timesteps in (1000, -1, torch.tensor([0, 1000]), torch.tensor([0.5, 1.0])):
        with pytest.raises(ValueError, match=r"must be integers in 0 ... 999"):
            scheduler.add_noise(x, x, timesteps)
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match="timestep=5 must be one of scheduler.timesteps"):
        scheduler.step(x, 5, x)
    with pytest.raises(ValueError, match=r"model_output has shape \(2, 6\); sample has shape \(2, 3\); they"):
        scheduler.step(torch.zeros(2, 6), 0, x)
    with pytest.raises(ValueError, match="a list of 1 for a batch of 2"):
        scheduler.step(x, 100, x, generator=[torch.Generator()])
    offset = LinearNoiseScheduler(steps_offset=1)
    with pytest.raises(ValueError, match="steps_offset=1 moves a schedule of 1000 steps beyond timestep 999"):
        offset.set_timesteps(1000)


# ---------------------------------------------------------------- a learned variance


def test_a_learned_variance_is_that_of_diffusers():
    ours, theirs = (kind(variance_type="learned_range") for kind in (LinearNoiseScheduler, diffusers.DDPMScheduler))
    generator = torch.Generator().manual_seed(0)
    x, output = torch.randn(2, 3, 4, 4, generator=generator), torch.randn(2, 6, 4, 4, generator=generator)
    for t in (999, 500, 20, 2, 1, 0):
        ours.set_timesteps(1000)
        a, b = (s.step(output, t, x, generator=torch.Generator().manual_seed(1)) for s in (ours, theirs))
        assert_close(a.prev_sample, b.prev_sample, rtol=2e-4, atol=2e-5)
        assert_close(a.pred_original_sample, b.pred_original_sample, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("end", "variance_type"), [(-1.0, "fixed_small"), (1.0, "fixed_large")])
@pytest.mark.parametrize("steps", [1, 2, 7, 50, 1000])
def test_the_ends_of_a_learned_variance_are_the_fixed_ones(end, variance_type, steps):
    """Also with fewer timesteps, whose variances are those of their own betas."""
    learned, fixed = (LinearNoiseScheduler(variance_type=kind) for kind in ("learned_range", variance_type))
    for scheduler in (learned, fixed):
        scheduler.set_timesteps(steps)
    x, output = torch.randn(2, 1, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    both = torch.cat([output, torch.full_like(output, end)], dim=1)
    for t in learned.timesteps.tolist():
        a = learned.step(both, t, x, generator=torch.Generator().manual_seed(1)).prev_sample
        b = fixed.step(output, t, x, generator=torch.Generator().manual_seed(1)).prev_sample
        assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_outputs_of_the_wrong_width_raise():
    learned, fixed, x = (
        LinearNoiseScheduler(variance_type="learned_range"),
        LinearNoiseScheduler(),
        torch.zeros(1, 3, 2, 2),
    )
    with pytest.raises(ValueError, match=r"\(1, 3, 2, 2\).*'learned_range' needs \(1, 6, 2, 2\)"):
        learned.step(x, 5, x)
    with pytest.raises(ValueError, match=r"model_output has shape \(1, 6, 2, 2\); sample has shape \(1, 3, 2, 2\)"):
        fixed.step(torch.zeros(1, 6, 2, 2), 5, x)


def test_the_posterior_is_bayes_rule():
    """q(x_{t-1} | x_t, x_0) is proportional to q(x_t | x_{t-1}) q(x_{t-1} | x_0), all Gaussian."""
    scheduler = LinearNoiseScheduler()
    abar, t = scheduler.alphas_cumprod_float64, torch.arange(1, 1000)
    alpha = abar[t] / abar[t - 1]
    precision = alpha / (1 - alpha) + 1 / (1 - abar[t - 1])
    x0, xt = torch.randn(2, 999, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    mean = (alpha.sqrt() * xt[:, 0] / (1 - alpha) + abar[t - 1].sqrt() * x0[:, 0] / (1 - abar[t - 1])) / precision
    found, log_variance = scheduler.posterior(x0, xt, t)
    assert_close(found[:, 0], mean, rtol=1e-9, atol=1e-9)
    assert_close(log_variance[:, 0], -precision.log(), rtol=1e-9, atol=1e-9)


def test_one_image_takes_several_noises():
    scheduler = LinearNoiseScheduler()
    image, noise = torch.rand(1, 1, 4, 4), torch.randn(3, 1, 4, 4)
    noisy = scheduler.add_noise(image, noise, torch.tensor(500))
    assert_close(noisy, scheduler.add_noise(image.expand(3, 1, 4, 4), noise, torch.tensor(500)), rtol=0, atol=0)
    assert scheduler.add_noise(noise, image, 500).shape == noisy.shape


def test_set_timesteps_reads_clip_sample():
    scheduler, x = LinearNoiseScheduler(), torch.full((1, 1, 2, 2), 30.0)
    for changed, most in (({"clip_sample": False}, 30), ({"clip_sample": True, "clip_sample_range": 2.0}, 2)):
        scheduler.register_to_config(**changed)
        scheduler.set_timesteps(1000)
        x0 = scheduler.step(torch.zeros_like(x), 0, x).pred_original_sample
        assert_close(x0, torch.full_like(x, most), rtol=1e-3, atol=0)


@pytest.mark.parametrize("timestep", [[5], np.array(5), {}])
def test_a_timestep_of_a_step_is_one_number(timestep):
    scheduler, x = LinearNoiseScheduler(), torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="timestep=.* must be an integer or a tensor of one"):
        scheduler.step(x, timestep, x)
    assert scheduler.step(x, np.int64(5), x).prev_sample.shape == x.shape

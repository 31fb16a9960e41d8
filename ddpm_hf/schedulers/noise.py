"""All the mathematics of diffusion: the noise schedule, q(x_t | x_0) and the reverse step.

Timesteps count from 0: x_0 is nearly the image, x_{T-1} nearly pure noise. With alpha_t = 1 - beta_t and
abar_t = alpha_0 * ... * alpha_t (and abar_{-1} = 1), equations are those of Ho et al. 2020,
"Denoising Diffusion Probabilistic Models", arXiv:2006.11239. Every table is computed in float64 and cast where
it is used: 1 - abar_t formed from a float32 abar_t would be wrong by 2e-4 at t = 0.
"""

import math
from numbers import Integral
from typing import NamedTuple

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin

BETA_SCHEDULES = ("linear", "scaled_linear")
COSINE_SCHEDULE = "squaredcos_cap_v2"
VARIANCE_TYPES = ("fixed_small", "fixed_large", "learned_range")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")
# Keys of diffusers' schedulers that ours does not implement: any other value raises a ValueError, none is ignored.
INTERCHANGE_ONLY = {
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
}


def draw_noise(shape, generator=None, device="cpu", dtype=torch.float32, std: float = 1.0) -> torch.Tensor:
    """Normal noise of mean 0 and `shape` (B, ...).

    Args:
        generator: `None` (torch's global one), one generator for the whole batch, or a list with one an image: an
            image then does not depend on the batch it is in. The noise is drawn on the generator's device.
        dtype: what to return. Half precisions are drawn in float32, so that every dtype sees the same noise.
        std: its standard deviation, which scales the same draws.
    """
    if isinstance(generator, (list, tuple)):
        if len(generator) != shape[0]:
            raise ValueError(f"generator: a list of {len(generator)} for a batch of {shape[0]}; give one an image")
        noise = torch.cat([draw_noise((1, *shape[1:]), each, each.device, dtype, std) for each in generator])
    else:
        drawn_on = device if generator is None else generator.device
        drawn_as = torch.promote_types(dtype, torch.float32)
        noise = torch.normal(0.0, std, shape, generator=generator, dtype=drawn_as, device=drawn_on)
        if drawn_on == device and drawn_as == dtype:
            return noise
    return to_device(noise, device).to(dtype)


def to_device(tensor: torch.Tensor, device) -> torch.Tensor:
    """`tensor` on `device`. It is copied to CUDA from pinned memory, without the host waiting for the copy.

    Kernels wait for the copy by themselves, and PyTorch keeps the pinned memory until the copy is done.
    """
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class StepCoefficients(NamedTuple):
    """The reverse step p(x_{t-1} | x_t) as affine maps: each field a float, or a tensor with one entry a timestep."""

    x0_from_sample: torch.Tensor | float  # x_0 = x0_from_sample x_t + x0_from_output output, by `prediction_type`
    x0_from_output: torch.Tensor | float
    mean_from_x0: torch.Tensor | float  # mean = mean_from_x0 x_0 + mean_from_sample x_t, of q(x_{t-1} | x_t, x_0)
    mean_from_sample: torch.Tensor | float
    std: torch.Tensor | float  # of the noise that a step adds, by `variance_type`; 0 at the last step, and only there
    log_variance_min: torch.Tensor | float  # that of q(x_{t-1} | x_t, x_0)
    log_variance_max: torch.Tensor | float  # log beta_t

    def original(self, model_output, sample):
        return _plus(sample * self.x0_from_sample, self.x0_from_output, model_output)

    def mean(self, original, sample, noise=0.0):
        """The mean of q(x_{t-1} | x_t, x_0) plus `noise`, whose memory is reused."""
        return _plus(_plus(noise, self.mean_from_sample, sample), self.mean_from_x0, original)

    def log_variance(self, share):
        """The learned one: log beta~_t at a `share` of 0 and log beta_t at 1."""
        return share * self.log_variance_max + (1 - share) * self.log_variance_min


class NoiseScheduler(SchedulerMixin, ConfigMixin):
    """The forward process q(x_t | x_0) and the reverse step p(x_{t-1} | x_t), whatever the betas are.

    It has the interface and the config keys of diffusers' schedulers, so `DDIMScheduler.from_config(ours.config)` and
    `LinearNoiseScheduler.from_config(theirs.config)` both work. `LinearNoiseScheduler` and `CosineNoiseScheduler` add
    `_make_betas`: beta_0 ... beta_{T-1}, float64 (T,), each in (0, 1).

    `alphas_cumprod_float64` (T,) holds abar_t without the rounding of `alphas_cumprod`, which is float32.
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers]
    order = 1  # one call of the network a step

    def _set_up(self) -> None:
        """Check the registered settings and compute the tables."""
        config = self.config
        # diffusers drops what was left at its default when it builds another scheduler from a config; the other may
        # have another default, as Heun's has for the betas. Nothing counts as left at its default here.
        self.register_to_config(_use_default_values=[])
        _check_choice("variance_type", config.variance_type, VARIANCE_TYPES)
        _check_choice("prediction_type", config.prediction_type, PREDICTION_TYPES)
        _check_choice("timestep_spacing", config.timestep_spacing, TIMESTEP_SPACINGS)
        for key, default in INTERCHANGE_ONLY.items():
            if config[key] != default:
                raise ValueError(f"{key}={config[key]!r} is not supported; it must be {default!r}")
        if not isinstance(config.steps_offset, Integral) or config.steps_offset < 0:
            raise ValueError(f"steps_offset={config.steps_offset!r} must be an integer of at least 0")
        if not config.clip_sample_range > 0:
            raise ValueError(f"clip_sample_range={config.clip_sample_range!r} must be greater than 0")
        if not isinstance(config.num_train_timesteps, Integral) or config.num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps={config.num_train_timesteps!r} must be an integer of at least 1")

        betas = self._make_betas()
        if config.rescale_betas_zero_snr:
            if config.num_train_timesteps == 1:
                raise ValueError("rescale_betas_zero_snr=True needs num_train_timesteps of at least 2")
            if config.prediction_type == "epsilon":
                raise ValueError(
                    "rescale_betas_zero_snr=True with prediction_type='epsilon' gives black images: x_{T-1} is nothing "
                    "but noise then, and to predict that says nothing of the image; use prediction_type='v_prediction'"
                )
            betas = _with_zero_terminal_snr(betas)
        self.alphas_cumprod_float64 = abar = torch.cumprod(1 - betas, dim=0)
        # What diffusers' own training code reads; our own computations start from the float64 table.
        self.betas = betas.float()
        self.alphas = (1 - betas).float()
        self.alphas_cumprod = abar.float()
        # sqrt(abar_t), sqrt(1 - abar_t): how much image and how much noise is in x_t
        self._signal_and_noise = torch.stack([abar.sqrt(), (1 - abar).sqrt()], dim=1)

        self.init_noise_sigma = 1.0
        self.num_inference_steps = None
        self._use_timesteps(torch.arange(config.num_train_timesteps - 1, -1, -1))
        self._all_steps = self._step_table  # of `posterior` and `reverse`, whatever timesteps are chosen later

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    # ------------------------------------------------------------------ forward process

    def add_noise(self, original_samples, noise, timesteps) -> torch.Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise (equation 4).

        Args:
            original_samples, noise: (B, ...), of one shape, or of shapes that broadcast.
            timesteps: int or integer tensor, () or (B,), each in 0 ... T-1.
        """
        signal, sigma = self._rows_at(self._signal_and_noise, timesteps, original_samples)
        image, noise = signal * original_samples, sigma * noise
        noisy = image.add_(noise) if image.shape == noise.shape else image + noise
        return noisy.to(original_samples.dtype)

    def get_velocity(self, sample, noise, timesteps) -> torch.Tensor:
        """v = sqrt(abar_t) noise - sqrt(1 - abar_t) x_0 (arXiv:2202.00512, appendix D); arguments as `add_noise`."""
        signal, sigma = self._rows_at(self._signal_and_noise, timesteps, sample)
        return (signal * noise - sigma * sample).to(sample.dtype)

    def target(self, original_samples, noise, timesteps) -> torch.Tensor:
        """What the network should predict, by `prediction_type`: the noise, x_0 or v; arguments as `add_noise`."""
        if self.config.prediction_type == "epsilon":
            return noise
        if self.config.prediction_type == "sample":
            return original_samples
        return self.get_velocity(original_samples, noise, timesteps)

    def min_snr_weight(self, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
        """Weight of the squared error of the prediction at `timesteps` (B,): float32 (B,).

        Min-SNR-gamma (Hang et al. 2023, arXiv:2303.09556, section 3.4): min(SNR, gamma) for the error of x_0, where
        SNR = abar_t / (1 - abar_t). The same mistake, squared, is SNR times as large in epsilon and SNR + 1 times as
        large in v, so there the weight is divided by that.
        """
        snr = self.alphas_cumprod_float64 / (1 - self.alphas_cumprod_float64)
        per = {"epsilon": snr, "sample": torch.ones_like(snr), "v_prediction": snr + 1}[self.config.prediction_type]
        return to_device((snr.clamp(max=gamma) / per).float(), timesteps.device)[timesteps]

    def posterior(self, original_samples, sample, timesteps) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean (B, ...) and log variance (B, 1, ...) of q(x_{t-1} | x_t, x_0) (equation 7).

        Args:
            original_samples, sample: x_0 and x_t, (B, ...).
            timesteps: (B,). At 0, where x_0 is known, the log variance is that of 1.
        """
        coefficients = StepCoefficients(*self._rows_at(self._all_steps, timesteps, sample))
        return coefficients.mean(original_samples, sample), coefficients.log_variance_min

    def reverse(self, model_output, sample, timesteps) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean and log variance of p(x_{t-1} | x_t) in the process of all T timesteps, and the x_0 that it assumes.

        Args:
            model_output: (B, C, ...), or with a learned variance (B, 2 C, ...).
            sample: x_t, (B, C, ...).
            timesteps: (B,). At 0, the log variance of a fixed variance is that of the posterior, as in `posterior`.

        Returns:
            mean (B, C, ...), log variance (B, 1, ...) or, if learned, (B, C, ...), and x_0 (B, C, ...).
        """
        model_output, share = self.split_output(model_output, sample)
        coefficients = StepCoefficients(*self._rows_at(self._all_steps, timesteps, sample))
        original = self._clamp_(coefficients.original(model_output, sample))
        if share is not None:
            log_variance = coefficients.log_variance(share)
        elif self.config.variance_type == "fixed_small":
            log_variance = coefficients.log_variance_min
        else:
            smallest, largest = coefficients.log_variance_min, coefficients.log_variance_max
            log_variance = torch.where(coefficients.std > 0, largest, smallest)
        return coefficients.mean(original, sample), log_variance, original

    def split_output(self, model_output, sample):
        """The prediction (B, C, ...), and with a learned variance the share of log beta_t in its logarithm.

        log variance = share log beta_t + (1 - share) log beta~_t (Nichol & Dhariwal 2021, arXiv:2102.09672, equation
        15); a network whose output is -1 ... 1 gives shares of 0 ... 1. `None` if the variance is not learned.
        """
        if self.config.variance_type != "learned_range":
            if model_output.shape != sample.shape:
                raise ValueError(f"model_output is {tuple(model_output.shape)} and sample {tuple(sample.shape)}")
            return model_output, None
        wanted = (sample.shape[0], 2 * sample.shape[1], *sample.shape[2:])
        if model_output.shape != wanted:
            raise ValueError(
                f"model_output is {tuple(model_output.shape)} for a sample of {tuple(sample.shape)}; "
                f"variance_type='learned_range' takes {wanted}"
            )
        prediction, range_ = model_output.chunk(2, dim=1)
        return prediction, (range_ + 1) / 2

    def _rows_at(self, table, timesteps, sample):
        """Columns of the float64 `table` (T, n) at `timesteps` () or (B,), to be multiplied with `sample` (B, ...)."""
        timesteps = torch.as_tensor(timesteps)
        if timesteps.device.type == "cpu" and (  # elsewhere looking at the values would stop the device
            timesteps.is_floating_point() or timesteps.min() < 0 or timesteps.max() >= len(self)
        ):
            raise ValueError(f"timesteps={timesteps.tolist()} must be integers in 0 ... {len(self) - 1}")
        # Half precisions are computed in float32: in bf16, sqrt(1 - abar_t) and the sum would lose the noise.
        dtype = torch.promote_types(sample.dtype, torch.float32)
        rows = to_device(table.to(dtype), sample.device)[to_device(timesteps.reshape(-1), sample.device)]
        return rows.reshape(-1, table.shape[1], *(1,) * (sample.ndim - 1)).unbind(1)

    # ------------------------------------------------------------------ between timesteps

    def predicted_original(self, model_output, timestep, sample) -> torch.Tensor:
        """The x_0 that `model_output` (B, ...) says is in `sample` (B, ...), not clamped.

        Args:
            timestep: one for all, or a tensor (B,).
        """
        return StepCoefficients(*self._rows_at(self._all_steps, timestep, sample)).original(model_output, sample)

    def renoise(self, sample, timestep: int, to_timestep: int, noise) -> torch.Tensor:
        """A draw from q(x_to | x_timestep), which adds noise; `timestep` may be -1, the image itself."""
        if not -1 <= timestep < to_timestep < len(self):
            raise ValueError(
                f"timestep={timestep}, to_timestep={to_timestep}: must be -1 <= timestep < to < {len(self)}"
            )
        before = self.alphas_cumprod_float64[timestep].item() if timestep >= 0 else 1.0
        alpha = self.alphas_cumprod_float64[to_timestep].item() / before
        return math.sqrt(alpha) * sample + math.sqrt(1 - alpha) * noise

    def ddim_start(self, model_output, timestep: int, to_timestep: int, sample, prev_sample) -> torch.Tensor:
        """The x_t that one DDIM step maps to `prev_sample` at `to_timestep`; -1 is the image.

        x_to = a x_t + b epsilon (arXiv:2010.02502, equation 12 with sigma = 0), solved for x_t, with the noise epsilon
        that `model_output` says is in `sample` at `timestep`.
        """
        signal, sigma = self._signal_and_noise[timestep].tolist()
        to_signal, to_sigma = self._signal_and_noise[to_timestep].tolist() if to_timestep >= 0 else (1.0, 0.0)
        epsilon = (sample - signal * self.predicted_original(model_output, timestep, sample)) / sigma
        return signal / to_signal * (prev_sample - to_sigma * epsilon) + sigma * epsilon

    # ------------------------------------------------------------------ reverse process

    def set_timesteps(self, num_inference_steps: int, device=None) -> None:
        """Choose the timesteps that sampling visits: `timesteps`, int64 (num_inference_steps,), descending.

        Fewer than T of them are sampled by the exact DDPM of these timesteps: its betas are recomputed from their abar
        (Nichol & Dhariwal 2021, arXiv:2102.09672, equation 19). The network still sees the original timesteps.
        `clip_sample` and `clip_sample_range` are read here.
        """
        T, n = len(self), num_inference_steps
        if not isinstance(n, Integral) or not 1 <= n <= T:
            raise ValueError(f"num_inference_steps={n!r} must be an integer in 1 ... {T}")
        i = torch.arange(n, dtype=torch.float64)
        if self.config.timestep_spacing == "leading":
            ascending = i * (T // n) + self.config.steps_offset
        elif self.config.timestep_spacing == "trailing":
            ascending = (T - T / n * i).round().flip(0) - 1
        else:
            ascending = torch.linspace(0, T - 1, n, dtype=torch.float64).round()
        if ascending[-1] >= T:
            offset = self.config.steps_offset
            raise ValueError(f"steps_offset={offset} moves a schedule of {n} steps beyond timestep {T - 1}")
        self.num_inference_steps = n
        self._use_timesteps(ascending.flip(0).long(), device)

    def step_coefficients(self, timesteps: torch.Tensor) -> StepCoefficients:
        """Of each step through `timesteps`, int64 (n,), descending, the last of which gives x_0: float64 (n,)."""
        abar = self.alphas_cumprod_float64[timesteps.cpu()]
        abar_prev = torch.cat([abar[1:], torch.ones(1, dtype=torch.float64)])  # no noise is left after the last step
        alpha = abar / abar_prev
        beta = 1 - alpha
        signal, sigma = abar.sqrt(), (1 - abar).sqrt()
        x0_from_sample, x0_from_output = {
            "epsilon": (1 / signal, -sigma / signal),  # equation 4 solved for x_0
            "sample": (torch.zeros_like(abar), torch.ones_like(abar)),
            "v_prediction": (signal, -sigma),
        }[self.config.prediction_type]
        posterior_variance = beta * (1 - abar_prev) / (1 - abar)  # equation 7
        variance = posterior_variance if self.config.variance_type == "fixed_small" else beta.clone()
        variance[-1] = 0.0  # algorithm 2: z = 0 at the last step, whatever its timestep
        # The posterior of the last step has no variance and takes that of the step before (arXiv:2102.09672).
        nonzero = torch.cat([posterior_variance[:-1], posterior_variance[-2:-1] if len(beta) > 1 else beta])
        return StepCoefficients(
            x0_from_sample,
            x0_from_output,
            mean_from_x0=abar_prev.sqrt() * beta / (1 - abar),  # equation 7
            mean_from_sample=alpha.sqrt() * (1 - abar_prev) / (1 - abar),
            std=variance.sqrt(),
            log_variance_min=nonzero.log(),
            log_variance_max=beta.log(),
        )

    def _use_timesteps(self, timesteps: torch.Tensor, device=None) -> None:
        """Make these (n,), descending and on the CPU, the timesteps that `step` takes, and compute its tables."""
        self.timesteps = timesteps.to(device)
        self._clip = self.config.clip_sample_range if self.config.clip_sample else None
        rows = torch.stack(self.step_coefficients(timesteps), dim=1)
        self._steps = {t: StepCoefficients(*row) for t, row in zip(timesteps.tolist(), rows.tolist(), strict=True)}
        # The same for timesteps that live on a device, by timestep; NaN where there is no step.
        self._step_table = torch.full((len(self), rows.shape[1]), math.nan, dtype=torch.float64)
        self._step_table[timesteps] = rows
        self._step_table_on_device = self._step_table

    def scale_model_input(self, sample: torch.Tensor, timestep=None) -> torch.Tensor:
        """`sample` itself: a variance-preserving process needs no scaling."""
        return sample

    def step(self, model_output, timestep, sample, generator=None, return_dict: bool = True):
        """One draw from p(x_{t-1} | x_t) (algorithm 2, with x_0 predicted and clamped first).

        Args:
            model_output: (B, C, ...), the network's prediction at `timestep`; with a learned variance (B, 2 C, ...).
            timestep: int, 0-d tensor or tensor of one element: one of `timesteps`. Any other gives a ValueError, or, as
                a tensor on a device, whose value is never copied to the host, NaN.
            sample: x_t, (B, C, ...).
            generator: as in `draw_noise`. Nothing is drawn at the last step (with a timestep on a device, where
                looking which step it is would stop the device, something is drawn and not used).

        Returns:
            `DDPMSchedulerOutput` with `prev_sample` and `pred_original_sample`, or the tuple of both.
        """
        model_output, share = self.split_output(model_output, sample)
        coefficients = self._coefficients_at(timestep, sample)
        pred_original_sample = self._clamp_(coefficients.original(model_output, sample))
        std = coefficients.std
        on_device = isinstance(std, torch.Tensor)
        if not on_device and std == 0:  # the last step
            noise = torch.zeros_like(sample)
        elif not on_device and share is None:
            noise = draw_noise(sample.shape, generator, sample.device, sample.dtype, std)
        else:
            if share is not None:
                learned = (0.5 * coefficients.log_variance(share)).exp()
                std = torch.where(std > 0, learned, 0.0) if on_device else learned
            noise = std * draw_noise(sample.shape, generator, sample.device, sample.dtype)
        prev_sample = coefficients.mean(pred_original_sample, sample, noise)

        if not return_dict:
            return prev_sample, pred_original_sample
        return DDPMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=pred_original_sample)

    def _clamp_(self, original: torch.Tensor) -> torch.Tensor:
        return original if self._clip is None else original.clamp_(-self._clip, self._clip)

    def _coefficients_at(self, timestep, sample) -> StepCoefficients:
        if isinstance(timestep, torch.Tensor) and timestep.device.type != "cpu":
            dtype = torch.promote_types(sample.dtype, torch.float32)
            table = self._step_table_on_device
            if (table.device, table.dtype) != (timestep.device, dtype):
                table = self._step_table_on_device = self._step_table.to(dtype).to(timestep.device)
            # 0-d tensors scale the sample without changing its dtype
            return StepCoefficients(*table.index_select(0, timestep.reshape(1)).squeeze(0).unbind())
        if isinstance(timestep, torch.Tensor):
            timestep = (timestep.reshape(()) if timestep.ndim else timestep).tolist()
        if timestep not in self._steps:
            raise ValueError(f"timestep={timestep!r} is not one that set_timesteps chose: {self.timesteps}")
        return self._steps[timestep]


class LinearNoiseScheduler(NoiseScheduler):
    """A DDPM whose betas grow linearly, or their square roots do (Ho et al. 2020, section 4).

    Args:
        num_train_timesteps: T.
        beta_start, beta_end: the ends of the schedule beta_0 ... beta_{T-1}.
        beta_schedule: `"linear"` in beta (the paper, section 4) or `"scaled_linear"`, linear in sqrt(beta).
        trained_betas: the T betas themselves, each in (0, 1), in place of the three arguments above.
        variance_type: variance of p(x_{t-1} | x_t): `"fixed_small"`, the posterior's (equation 7), or
            `"fixed_large"`, beta_t (section 3.2), or `"learned_range"`: between the two, where the second half of the
            network's output says (Nichol & Dhariwal 2021, arXiv:2102.09672, equation 15).
        clip_sample: clamp the predicted x_0 to [-clip_sample_range, clip_sample_range] before the posterior mean is
            formed (the authors' code). Without it `pred_original_sample` is returned unclamped too.
        prediction_type: what the network predicts: `"epsilon"` (the noise), `"sample"` (x_0) or `"v_prediction"`
            (Salimans & Ho 2022, arXiv:2202.00512, appendix D).
        timestep_spacing: which timesteps sampling in fewer than T steps visits: `"leading"`, `"trailing"` or
            `"linspace"`, as in diffusers.
        steps_offset: added to the timesteps of `"leading"`.
        rescale_betas_zero_snr: have no image left in x_{T-1} (Lin et al. 2023, arXiv:2305.08891, algorithm 1), for
            `"sample"` and `"v_prediction"`; sampling should begin there, as with `"trailing"` and `"linspace"`. Of
            diffusers' solvers, DDIM, DDPM, DPMSolverMultistep, UniPC and EulerDiscrete support it; others silently
            take the betas without it.
        thresholding, dynamic_thresholding_ratio, sample_max_value: there for interchange only; any value but the
            default is a ValueError.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: list[float] | None = None,
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        clip_sample_range: float = 1.0,
        prediction_type: str = "epsilon",
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        rescale_betas_zero_snr: bool = False,
    ):
        others = f" ({COSINE_SCHEDULE} is CosineNoiseScheduler's)"
        _check_choice("beta_schedule", beta_schedule, BETA_SCHEDULES, others)
        self._set_up()

    def _make_betas(self) -> torch.Tensor:
        config = self.config
        if config.trained_betas is not None:
            betas = torch.as_tensor(config.trained_betas, dtype=torch.float64)
            if betas.shape != (config.num_train_timesteps,):
                raise ValueError(
                    f"trained_betas has shape {tuple(betas.shape)}; num_train_timesteps={config.num_train_timesteps} "
                    f"asks for ({config.num_train_timesteps},)"
                )
        else:
            power = 1.0 if config.beta_schedule == "linear" else 0.5
            ends = config.beta_start, config.beta_end
            if not 0 < ends[0] <= ends[1] < 1:
                raise ValueError(f"beta_start={ends[0]!r}, beta_end={ends[1]!r}: must be 0 < start <= end < 1")
            steps = config.num_train_timesteps
            betas = torch.linspace(ends[0] ** power, ends[1] ** power, steps, dtype=torch.float64) ** (1 / power)
        if not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError("trained_betas: each must lie between 0 and 1, ends excluded")
        return betas


class CosineNoiseScheduler(NoiseScheduler):
    """A DDPM whose abar_t falls like a squared cosine: slowly at both ends (Nichol & Dhariwal 2021, arXiv:2102.09672).

    abar_t = f(t + 1) / f(0), f(i) = cos^2((i / T + s) / (1 + s) * pi / 2) with s = 0.008 (equation 17); no beta is
    larger than 0.999.

    Args:
        beta_schedule: diffusers' name of this schedule, so that a solver built from the config has it too.
        trained_betas: there for interchange only; any value but `None` is a ValueError.
        num_train_timesteps and all others: as `LinearNoiseScheduler`'s.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_schedule: str = COSINE_SCHEDULE,
        trained_betas: None = None,
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        clip_sample_range: float = 1.0,
        prediction_type: str = "epsilon",
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        rescale_betas_zero_snr: bool = False,
    ):
        _check_choice("beta_schedule", beta_schedule, (COSINE_SCHEDULE,))
        if trained_betas is not None:
            raise ValueError("trained_betas: betas of your own are LinearNoiseScheduler's, without this beta_schedule")
        self._set_up()

    def _make_betas(self) -> torch.Tensor:
        T, s = self.config.num_train_timesteps, 0.008
        f = (((torch.arange(T + 1, dtype=torch.float64) / T + s) / (1 + s)) * math.pi / 2).cos() ** 2
        return (1 - f[1:] / f[:-1]).clamp(max=0.999)


def _plus(total: torch.Tensor, a, x: torch.Tensor) -> torch.Tensor:
    """total + a x, in the memory of `total`, which nobody else may have, where a is a number."""
    if isinstance(a, float) and total.dtype == x.dtype:
        return total.add_(x, alpha=a)
    return total + a * x


def _check_choice(name: str, value, choices, hint: str = "") -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r}; choose from {', '.join(choices)}{hint}")


def _with_zero_terminal_snr(betas: torch.Tensor) -> torch.Tensor:
    """sqrt(abar_t), shifted to end at 0 and stretched to begin as before (Lin et al. 2023, algorithm 1)."""
    signal = torch.cumprod(1 - betas, dim=0).sqrt()
    abar = ((signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])) ** 2
    return 1 - abar / torch.cat([torch.ones(1, dtype=abar.dtype), abar[:-1]])

"""The mathematics of DDPM: the noise schedule, the forward process and the reverse step.

Equations are those of Ho et al. 2020, "Denoising Diffusion Probabilistic Models", arXiv:2006.11239, with
alpha_t = 1 - beta_t and abar_t = alpha_0 * ... * alpha_t. x_0 is the image. Timesteps count from 0 (in the paper from
1), so timestep 0 has the least noise, T-1 the most, and the step from timestep 0 leads to the image: abar_{-1} = 1.

    add_noise  x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) epsilon                                       (4)
    step       x_0 = (x_t - sqrt(1 - abar_t) epsilon) / sqrt(abar_t), with the predicted epsilon       (4)
               mean = (sqrt(abar_{t-1}) beta_t x_0 + sqrt(alpha_t) (1 - abar_{t-1}) x_t) / (1 - abar_t)   (7)
               x_{t-1} = mean + sigma_t z, z ~ N(0, 1)                                         (algorithm 2)

Every table is computed in float64 and cast where it is used: 1 - abar_t of a float32 abar_t has an error of 2e-4 at
t = 0.
"""

import math
from typing import NamedTuple

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin

from ddpm_hf.schedulers.timesteps import IntegerTimesteps
from ddpm_hf.utils.arguments import (
    any_of,
    boolean,
    check,
    check_all,
    explained,
    integer,
    list_of,
    matching,
    number,
    one_of,
    optional,
    require,
)

BETA_SCHEDULES = ("linear", "scaled_linear")
COSINE_SCHEDULE = "squaredcos_cap_v2"
VARIANCE_TYPES = ("fixed_small", "fixed_large", "learned_range")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")
# Settings of diffusers' schedulers that ours do not implement: any value but this default raises ValueError.
INTERCHANGE_ONLY = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
MOST_TIMESTEPS = 10**6


def only(default):
    """A rule that allows nothing but the default."""
    return matching(lambda value: value == default, f"is not supported; it must be {default!r}")


_BETA = number(above=0, below=1)
SETTINGS = {
    "num_train_timesteps": integer(1, MOST_TIMESTEPS, "the scheduler keeps tables of this length"),
    "beta_start": _BETA,
    "beta_end": _BETA,
    "beta_schedule": one_of(*BETA_SCHEDULES, hint=f"; CosineNoiseScheduler has {COSINE_SCHEDULE}"),
    "trained_betas": optional(list_of(_BETA, "betas", most=MOST_TIMESTEPS)),
    "variance_type": one_of(*VARIANCE_TYPES),
    "clip_sample": boolean,
    "clip_sample_range": number(above=0),
    "prediction_type": one_of(*PREDICTION_TYPES),
    "timestep_spacing": one_of(*TIMESTEP_SPACINGS),
    "steps_offset": integer(0),
    **{name: only(default) for name, default in INTERCHANGE_ONLY.items()},
    "rescale_betas_zero_snr": boolean,
}
_GENERATOR = matching(lambda v: isinstance(v, torch.Generator), "must be a torch.Generator")
GENERATORS = optional(any_of(
    "must be a torch.Generator, or a list with one per image", _GENERATOR, list_of(_GENERATOR, "generators")
))  # fmt: skip
_TENSOR = matching(lambda v: v.is_floating_point(), "must be a tensor of floating-point numbers")
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_TIMESTEPS = matching(
    lambda v: torch.as_tensor(v).dtype in _INTEGERS and torch.as_tensor(v).numel() > 0,
    "must be an integer, or a tensor of integers with one entry per image",
)
CALL = {
    **dict.fromkeys(("model_output", "original_samples", "sample", "noise", "prev_sample"), _TENSOR),
    **dict.fromkeys(("timesteps", "timestep"), _TIMESTEPS),
    "gamma": number(above=0),
    "generator": GENERATORS,
    "device": optional(matching(lambda v: torch.device(v) is not None, "must be the name of a device of PyTorch")),
}


def draw_noise(shape, generator=None, device="cpu", dtype=torch.float32, std: float = 1.0) -> torch.Tensor:
    """Gaussian noise of mean 0 and `shape` (B, ...).

    Args:
        generator: `None` (PyTorch's global generator), one generator for the whole batch, or a list with one generator
            per image, which makes each image independent of its batch. Noise is drawn on the generator's device.
        dtype: type of the noise. Half precision is drawn in float32, so that every type sees the same noise.
        std: standard deviation; it scales the same draws.
    """
    if isinstance(generator, (list, tuple)):
        if len(generator) != shape[0]:
            raise ValueError(f"generator is a list of {len(generator)} for a batch of {shape[0]}; give one per image")
        noise = torch.cat([draw_noise((1, *shape[1:]), each, each.device, dtype, std) for each in generator])
    else:
        drawn_on = device if generator is None else generator.device
        drawn_as = torch.promote_types(dtype, torch.float32)
        noise = torch.normal(0.0, std, shape, generator=generator, dtype=drawn_as, device=drawn_on)
        if drawn_on == device and drawn_as == dtype:
            return noise
    return to_device(noise, device).to(dtype)


def to_device(tensor: torch.Tensor, device) -> torch.Tensor:
    """`tensor` on `device`, copied to CUDA asynchronously from pinned memory.

    Kernels on the same stream run after the copy, and PyTorch keeps the pinned memory until then.
    """
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class StepCoefficients(NamedTuple):
    """The reverse step p(x_{t-1} | x_t) as affine maps. Each field is a float, or a tensor with one entry per timestep.

    x_0 = x0_from_sample x_t + x0_from_output model_output (by `prediction_type`)
    mean = mean_from_x0 x_0 + mean_from_sample x_t (equation 7)
    """

    x0_from_sample: torch.Tensor | float
    x0_from_output: torch.Tensor | float
    mean_from_x0: torch.Tensor | float
    mean_from_sample: torch.Tensor | float
    std: torch.Tensor | float  # sigma_t, by `variance_type`; 0 at the last step only
    log_variance_min: torch.Tensor | float  # log beta~_t, the variance of q(x_{t-1} | x_t, x_0)
    log_variance_max: torch.Tensor | float  # log beta_t

    def original(self, model_output, sample):
        """The predicted x_0."""
        return _plus(sample * self.x0_from_sample, self.x0_from_output, model_output)

    def mean(self, original, sample, noise=0.0):
        """The mean of q(x_{t-1} | x_t, x_0) plus `noise`, which is overwritten."""
        return _plus(_plus(noise, self.mean_from_sample, sample), self.mean_from_x0, original)

    def log_variance(self, share):
        """The learned variance: log beta~_t for a `share` of 0, log beta_t for 1 (arXiv:2102.09672, equation 15)."""
        return share * self.log_variance_max + (1 - share) * self.log_variance_min


class NoiseScheduler(IntegerTimesteps, SchedulerMixin, ConfigMixin):
    """The forward process q(x_t | x_0) and the reverse step p(x_{t-1} | x_t) for any betas.

    The interface and the config keys are those of diffusers' schedulers, so `DDIMScheduler.from_config(ours.config)`
    and `LinearNoiseScheduler.from_config(theirs.config)` both work. Subclasses define `_make_betas`, which returns
    beta_0 ... beta_{T-1} as float64 (T,), each in (0, 1).

    Attributes:
        alphas_cumprod_float64: abar_t, (T,), without the rounding of the float32 `alphas_cumprod`.
        timesteps: int64 (num_inference_steps,), descending: the timesteps that sampling visits.
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers]
    settings = SETTINGS
    order = 1  # network evaluations per step

    def _set_up(self) -> None:
        """Check the registered settings and compute the tables."""
        # When diffusers builds another scheduler from a config, it drops the settings that were left at their default.
        # The other class may have another default, as Heun's has for the betas, so every setting counts as given.
        self.register_to_config(**check_all(self.config, self.settings), _use_default_values=[])
        _check_relations(self.config)
        betas = self._make_betas()
        _check_betas(betas)
        if self.config.rescale_betas_zero_snr:
            betas = _with_zero_terminal_snr(betas)
        self.alphas_cumprod_float64 = abar = torch.cumprod(1 - betas, dim=0)
        # The float32 tables are for diffusers' training code and solvers.
        self.betas = betas.float()
        self.alphas = (1 - betas).float()
        self.alphas_cumprod = abar.float()
        self._signal_and_noise = torch.stack([abar.sqrt(), (1 - abar).sqrt()], dim=1)  # (T, 2), the factors of (4)

        self.init_noise_sigma = 1.0
        self.num_inference_steps = None
        self._use_timesteps(torch.arange(len(self) - 1, -1, -1))
        self._all_steps = self._step_table  # for `posterior` and `reverse`, which ignore `set_timesteps`

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    # ------------------------------------------------------------------ forward process

    @explained(CALL)
    def add_noise(self, original_samples, noise, timesteps) -> torch.Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise (equation 4).

        Args:
            original_samples, noise: x_0 and epsilon, (B, ...), of shapes that broadcast.
            timesteps: int or integer tensor, () or (B,), each in 0 ... T-1.
        """
        signal, sigma = self._rows_at(self._signal_and_noise, timesteps, original_samples)
        image, noise = signal * original_samples, sigma * noise
        noisy = image.add_(noise) if image.shape == noise.shape else image + noise
        return noisy.to(original_samples.dtype)

    @explained(CALL)
    def get_velocity(self, sample, noise, timesteps) -> torch.Tensor:
        """v = sqrt(abar_t) noise - sqrt(1 - abar_t) x_0 (Salimans & Ho 2022, arXiv:2202.00512, appendix D).

        The arguments are those of `add_noise`.
        """
        signal, sigma = self._rows_at(self._signal_and_noise, timesteps, sample)
        return (signal * noise - sigma * sample).to(sample.dtype)

    @explained(CALL)
    def target(self, original_samples, noise, timesteps) -> torch.Tensor:
        """The training target: the noise, x_0 or v, by `prediction_type`. The arguments are those of `add_noise`."""
        if self.config.prediction_type == "epsilon":
            return noise
        if self.config.prediction_type == "sample":
            return original_samples
        return self.get_velocity(original_samples, noise, timesteps)

    @explained({**CALL, "timesteps": matching(lambda v: v.dtype in _INTEGERS, "must be a tensor of integers")})
    def min_snr_weight(self, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
        """Min-SNR-gamma weight of the squared error at `timesteps` (B,): float32 (B,).

        The weight is min(SNR, gamma) for the error of x_0, with SNR = abar_t / (1 - abar_t) (Hang et al. 2023,
        arXiv:2303.09556, section 3.4). The squared error of epsilon is SNR times that of x_0, and the squared error of
        v is SNR + 1 times that of x_0, so their weights are divided by these factors.
        """
        snr = self.alphas_cumprod_float64 / (1 - self.alphas_cumprod_float64)
        per = {"epsilon": snr, "sample": torch.ones_like(snr), "v_prediction": snr + 1}[self.config.prediction_type]
        return to_device((snr.clamp(max=gamma) / per).float(), timesteps.device)[timesteps]

    @explained(CALL)
    def posterior(self, original_samples, sample, timesteps) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean (B, ...) and log variance (B, 1, ...) of q(x_{t-1} | x_t, x_0) (equation 7).

        Args:
            original_samples, sample: x_0 and x_t, (B, ...).
            timesteps: (B,). The variance at 0 is zero, so its logarithm is replaced by that at 1.
        """
        coefficients = StepCoefficients(*self._rows_at(self._all_steps, timesteps, sample))
        return coefficients.mean(original_samples, sample), coefficients.log_variance_min

    @explained(CALL)
    def reverse(self, model_output, sample, timesteps) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean and log variance of p(x_{t-1} | x_t) in the process of all T timesteps, and the predicted x_0.

        Args:
            model_output: (B, C, ...), or with a learned variance (B, 2 C, ...).
            sample: x_t, (B, C, ...).
            timesteps: (B,). A fixed log variance at 0 is that of `posterior`.

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
        """Split the network's output into the prediction (B, C, ...) and the learned variance's `share` (B, C, ...).

        log variance = share log beta_t + (1 - share) log beta~_t (Nichol & Dhariwal 2021, arXiv:2102.09672, equation
        15). Outputs of -1 ... 1 give shares of 0 ... 1. The share is `None` if the variance is fixed.

        Args:
            model_output: (B, C, ...), or with a learned variance (B, 2 C, ...).
            sample: x_t, (B, C, ...).
        """
        if self.config.variance_type != "learned_range":
            if model_output.shape != sample.shape:
                shapes = f"{tuple(model_output.shape)}; sample has shape {tuple(sample.shape)}"
                raise ValueError(f"model_output has shape {shapes}; they must be equal")
            return model_output, None
        wanted = (sample.shape[0], 2 * sample.shape[1], *sample.shape[2:])
        if model_output.shape != wanted:
            raise ValueError(
                f"model_output has shape {tuple(model_output.shape)} for a sample of shape {tuple(sample.shape)}; "
                f"variance_type='learned_range' needs {wanted}"
            )
        prediction, range_ = model_output.chunk(2, dim=1)
        return prediction, (range_ + 1) / 2

    def _rows_at(self, table, timesteps, sample):
        """The n columns of `table` (T, n) at `timesteps` () or (B,), each (B, 1, ...) to broadcast with `sample`."""
        timesteps = torch.as_tensor(timesteps)
        if timesteps.device.type == "cpu" and (  # on a GPU, reading the values would synchronise
            timesteps.dtype not in _INTEGERS or timesteps.min() < 0 or timesteps.max() >= len(self)
        ):
            require("timesteps", timesteps, False, f"must be integers in 0 ... {len(self) - 1}")
        # Half precision is computed in float32: in bfloat16, the rounding of x_t would exceed the least noise.
        dtype = torch.promote_types(sample.dtype, torch.float32)
        rows = to_device(table.to(dtype), sample.device)[to_device(timesteps.reshape(-1), sample.device)]
        return rows.reshape(-1, table.shape[1], *(1,) * (sample.ndim - 1)).unbind(1)

    # ------------------------------------------------------------------ between timesteps

    @explained(CALL)
    def predicted_original(self, model_output, timestep, sample) -> torch.Tensor:
        """The predicted x_0 (B, ...), not clamped, of `model_output` for `sample` at `timestep`, an int or (B,)."""
        return StepCoefficients(*self._rows_at(self._all_steps, timestep, sample)).original(model_output, sample)

    @explained({**CALL, "timestep": integer(-1), "to_timestep": integer()})
    def renoise(self, sample, timestep: int, to_timestep: int, noise) -> torch.Tensor:
        """A draw from q(x_to | x_timestep), with to_timestep > timestep; timestep -1 is the image (equation 2)."""
        if not -1 <= timestep < to_timestep < len(self):
            rule = f"they must satisfy -1 <= timestep < to_timestep < {len(self)}"
            raise ValueError(f"timestep={timestep}, to_timestep={to_timestep}: {rule}")
        before = self.alphas_cumprod_float64[timestep].item() if timestep >= 0 else 1.0
        alpha = self.alphas_cumprod_float64[to_timestep].item() / before
        return math.sqrt(alpha) * sample + math.sqrt(1 - alpha) * noise

    @explained(CALL)
    def inverse_step(self, model_output, timestep: int, to_timestep: int | None, sample, prev_sample) -> torch.Tensor:
        """The x_t that one DDIM step maps to `prev_sample` at `to_timestep`; None is the image.

        The DDIM step (Song et al. 2021, arXiv:2010.02502, equation 12 with sigma = 0) is solved for x_t, with the noise
        that `model_output` predicts for `sample` at `timestep`.
        """
        signal, sigma = self._signal_and_noise[timestep].tolist()
        to_signal, to_sigma = (1.0, 0.0) if to_timestep is None else self._signal_and_noise[to_timestep].tolist()
        epsilon = (sample - signal * self.predicted_original(model_output, timestep, sample)) / sigma
        return signal / to_signal * (prev_sample - to_sigma * epsilon) + sigma * epsilon

    # ------------------------------------------------------------------ reverse process

    @explained(CALL)
    def set_timesteps(self, num_inference_steps: int, device=None) -> None:
        """Choose the timesteps that sampling visits: `timesteps`, int64 (num_inference_steps,), descending.

        With fewer than T timesteps, `step` samples the DDPM of these timesteps: its betas are recomputed from their
        abar (Nichol & Dhariwal 2021, arXiv:2102.09672, equation 19). The network sees the original timesteps. The
        settings `clip_sample` and `clip_sample_range` are read here.
        """
        T = len(self)
        n = check("num_inference_steps", num_inference_steps, integer(1, T))
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
        """Coefficients, float64 (n,), of the steps through `timesteps`, int64 (n,), descending; the last gives x_0."""
        abar = self.alphas_cumprod_float64[timesteps.cpu()]
        abar_prev = torch.cat([abar[1:], torch.ones(1, dtype=torch.float64)])
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
        # The posterior variance of the last step is 0; its logarithm is that of the step before (arXiv:2102.09672).
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
        """Set `timesteps`, (n,), descending and on the CPU, and compute the coefficients of `step`."""
        self.timesteps = timesteps.to(device)
        self._clip = self.config.clip_sample_range if self.config.clip_sample else None
        rows = torch.stack(self.step_coefficients(timesteps), dim=1)
        self._steps = {t: StepCoefficients(*row) for t, row in zip(timesteps.tolist(), rows.tolist(), strict=True)}
        # The same as a table (T, 7) for timesteps on a GPU; NaN at timesteps that are not visited.
        self._step_table = torch.full((len(self), rows.shape[1]), math.nan, dtype=torch.float64)
        self._step_table[timesteps] = rows
        self._step_table_on_device = self._step_table

    def scale_model_input(self, sample: torch.Tensor, timestep=None) -> torch.Tensor:
        """Return `sample`: a variance-preserving process needs no scaling."""
        return sample

    @explained({**CALL, "timestep": matching(lambda v: hash(v) is not None, "must be an integer or a tensor of one")})
    def step(self, model_output, timestep, sample, generator=None, return_dict: bool = True):
        """Draw x_{t-1} from p(x_{t-1} | x_t) (algorithm 2, with x_0 predicted and clamped first).

        Args:
            model_output: (B, C, ...), the network's prediction at `timestep`; with a learned variance (B, 2 C, ...).
            timestep: one of `timesteps`, as an int or a tensor of one element. The value of a tensor on a GPU is not
                copied to the host.
            sample: x_t, (B, C, ...).
            generator: see `draw_noise`. At the last step no noise is drawn; with a timestep on a GPU it is drawn and
                multiplied by 0.

        Returns:
            `DDPMSchedulerOutput` with `prev_sample` and `pred_original_sample`, or a tuple of both, each (B, C, ...).

        Raises:
            ValueError: `timestep` is not one of `timesteps`; if it is on a GPU, the samples are NaN instead.
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
            # A 0-d tensor does not change the dtype of the sample that it multiplies.
            return StepCoefficients(*table.index_select(0, timestep.reshape(1)).squeeze(0).unbind())
        if isinstance(timestep, torch.Tensor):
            timestep = (timestep.reshape(()) if timestep.ndim else timestep).tolist()
        if timestep not in self._steps:
            visited = f"{self.timesteps[0]} ... {self.timesteps[-1]} ({len(self.timesteps)} steps)"
            require("timestep", timestep, False, f"must be one of scheduler.timesteps, {visited}")
        return self._steps[timestep]


class LinearNoiseScheduler(NoiseScheduler):
    """The DDPM scheduler with a linear noise schedule (Ho et al. 2020, section 4).

    Args:
        num_train_timesteps: T.
        beta_start, beta_end: beta_0 and beta_{T-1}.
        beta_schedule: `"linear"` in beta (the paper, section 4) or `"scaled_linear"`, linear in sqrt(beta).
        trained_betas: the T betas, each in (0, 1); they replace the three arguments above.
        variance_type: variance of p(x_{t-1} | x_t): `"fixed_small"`, beta~_t of equation 7; `"fixed_large"`, beta_t
            (section 3.2); or `"learned_range"`, interpolated between the two by the second half of the network's
            output (Nichol & Dhariwal 2021, arXiv:2102.09672, equation 15).
        clip_sample: clamp the predicted x_0 to [-clip_sample_range, clip_sample_range] before the posterior mean is
            computed, as the authors' code does.
        prediction_type: what the network predicts: `"epsilon"` (the noise), `"sample"` (x_0) or `"v_prediction"`
            (Salimans & Ho 2022, arXiv:2202.00512, appendix D).
        timestep_spacing: spacing of fewer than T timesteps: `"leading"`, `"trailing"` or `"linspace"`, as in
            diffusers.
        steps_offset: added to the timesteps of `"leading"`.
        rescale_betas_zero_snr: rescale the betas so that abar_{T-1} = 0 (Lin et al. 2023, arXiv:2305.08891, algorithm
            1), for the prediction types `"sample"` and `"v_prediction"`. Sampling should start at T-1, as with the
            spacings `"trailing"` and `"linspace"`. Of diffusers' solvers, DDIM, DDPM, DPMSolverMultistep, UniPC and
            EulerDiscrete support it; the others silently ignore it.
        thresholding, dynamic_thresholding_ratio, sample_max_value: not supported, accepted for interchange with
            diffusers; any value but the default raises ValueError.
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
        self._set_up()

    def _make_betas(self) -> torch.Tensor:
        config, steps = self.config, self.config.num_train_timesteps
        if config.trained_betas is not None:
            holds = len(config.trained_betas) == steps
            require("trained_betas", config.trained_betas, holds, f"must have num_train_timesteps={steps} entries")
            return torch.tensor(config.trained_betas, dtype=torch.float64)
        require("beta_start", config.beta_start, config.beta_start <= config.beta_end, "must be at most beta_end")
        power = 1.0 if config.beta_schedule == "linear" else 0.5
        ends = config.beta_start**power, config.beta_end**power
        return torch.linspace(*ends, steps, dtype=torch.float64) ** (1 / power)


class CosineNoiseScheduler(NoiseScheduler):
    """The DDPM scheduler with a cosine noise schedule (Nichol & Dhariwal 2021, arXiv:2102.09672, equation 17).

    abar_t = f(t + 1) / f(0) with f(i) = cos^2((i / T + s) / (1 + s) * pi / 2) and s = 0.008; betas are at most 0.999.

    Args:
        beta_schedule: diffusers' name of this schedule, which its solvers read from the config.
        trained_betas: not supported, accepted for interchange with diffusers; it must be `None`.
        num_train_timesteps and all others: see `LinearNoiseScheduler`.
    """

    settings = {
        **SETTINGS,
        "beta_schedule": one_of(COSINE_SCHEDULE),
        "trained_betas": matching(lambda v: v is None, "must be None; LinearNoiseScheduler takes trained_betas"),
    }

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
        self._set_up()

    def _make_betas(self) -> torch.Tensor:
        T, s = self.config.num_train_timesteps, 0.008
        f = (((torch.arange(T + 1, dtype=torch.float64) / T + s) / (1 + s)) * math.pi / 2).cos() ** 2
        return (1 - f[1:] / f[:-1]).clamp(max=0.999)


def _plus(total: torch.Tensor, a, x: torch.Tensor) -> torch.Tensor:
    """total + a x. If a is a float, `total` is overwritten."""
    if isinstance(a, float) and total.dtype == x.dtype:
        return total.add_(x, alpha=a)
    return total + a * x


def _check_relations(config) -> None:
    """Raise ValueError for settings that contradict one another."""
    if config.rescale_betas_zero_snr and config.num_train_timesteps == 1:
        raise ValueError("rescale_betas_zero_snr=True needs num_train_timesteps of at least 2")
    if config.rescale_betas_zero_snr and config.prediction_type == "epsilon":
        raise ValueError(
            "rescale_betas_zero_snr=True needs prediction_type='v_prediction' or 'sample': x_{T-1} is pure noise, so "
            "with prediction_type='epsilon' the prediction at T-1 says nothing about the image"
        )


def _check_betas(betas: torch.Tensor) -> None:
    """Raise ValueError for betas that float32 can't represent: a timestep without noise, or one without the image."""
    if (1 - betas).float().max() == 1:
        raise ValueError(
            f"the least beta, {betas.min().item():.3g}, is too small: 1 - beta is 1 in float32; use betas above 6e-8"
        )
    if torch.cumprod(1 - betas, dim=0)[-1] < torch.finfo(torch.float32).tiny:
        T, largest = len(betas), betas.max().item()
        raise ValueError(
            f"{T} betas of up to {largest:.3g} leave nothing of the image: abar_{T - 1}, the product of all 1 - beta, "
            "is below 1.2e-38, the smallest float32; use fewer timesteps or smaller betas"
        )


def _with_zero_terminal_snr(betas: torch.Tensor) -> torch.Tensor:
    """The betas whose sqrt(abar_t) is shifted to end at 0 and scaled to start as before (arXiv:2305.08891, 1)."""
    signal = torch.cumprod(1 - betas, dim=0).sqrt()
    abar = ((signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])) ** 2
    return 1 - abar / torch.cat([torch.ones(1, dtype=abar.dtype), abar[:-1]])

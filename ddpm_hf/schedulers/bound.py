"""The variational bound on the negative log-likelihood (Ho et al. 2020, arXiv:2006.11239, equation 5), in bits/dim.

-log2 p(x_0) <= L_T + (the sum of L_{t-1} over t = T-1 ... 1) + L_0. Bits/dim are bits per pixel and channel. Each
`scheduler` here is a `NoiseScheduler`.
"""

import math

import torch

BITS = 1 / math.log(2)  # bits per nat


def bound_terms(
    scheduler, original_samples, sample, timesteps, model_output, levels: int = 256, valid=None
) -> torch.Tensor:
    """One term of the bound for each image, in bits/dim, (B,): L_{t-1} for t > 0 and L_0 for t = 0.

    L_{t-1} is KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)). L_0 is the negative log-likelihood of the discrete decoder
    (section 3.3).

    Args:
        original_samples, sample: x_0 in [-1, 1] and x_t, (B, C, H, W).
        timesteps: (B,).
        model_output: (B, C, H, W), or with a learned variance (B, 2 C, H, W).
        levels: number of values that a pixel can have, evenly spaced in [-1, 1].
        valid: the values to take the mean of, bool (B, C, H, W); None: all.
    """
    mean, log_variance, _ = scheduler.reverse(model_output, sample, timesteps)
    true_mean, true_log_variance = scheduler.posterior(original_samples, sample, timesteps)
    kl = gaussian_kl(true_mean, true_log_variance, mean, log_variance)
    decoder = -log_probability_of_bins(original_samples, mean, (0.5 * log_variance).exp(), 1 / (levels - 1))
    first = (timesteps.to(sample.device) == 0).reshape(-1, *(1,) * (sample.ndim - 1))
    return BITS * mean_over(torch.where(first, decoder, kl), valid)


def mean_over(values: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """The mean of each image's values (B, ...) where `valid`, bool (B, ...), is true, or of all of them: (B,)."""
    if valid is None:
        return values.flatten(1).mean(1)
    return torch.where(valid, values, 0).flatten(1).sum(1) / valid.flatten(1).sum(1).clamp(min=1)


def prior_term(scheduler, original_samples) -> torch.Tensor:
    """L_T of each image, KL(q(x_T | x_0) || N(0, 1)), in bits/dim, (B,)."""
    last = torch.tensor(len(scheduler) - 1)
    zero = torch.zeros_like(original_samples)
    mean = scheduler.add_noise(original_samples, zero, last)
    std = scheduler.add_noise(zero, zero + 1, last)
    return BITS * gaussian_kl(mean, 2 * std.log(), zero, zero).flatten(1).mean(1)


def fixed_variance_floor(scheduler, images, levels: int = 256) -> float | None:
    """The bound, in bits/dim, of a network that predicts x_0 exactly; `None` for a learned variance.

    It shows the cost of the fixed variance alone. Black and white pixels cost less than others, because their bins are
    open, and nothing if the scheduler does not clamp x_0 to [-1, 1].

    Args:
        images: (N, C, H, W) in [-1, 1]; only the share of black and white pixels matters.
    """
    config = scheduler.config
    if config.variance_type == "learned_range":
        return None
    timesteps = torch.arange(len(scheduler))
    beyond = min(config.clip_sample_range, 2.0) if config.clip_sample else 2.0  # the largest x_0 that can be predicted
    costs = []
    for value, guess in ((0.0, 0.0), (1.0, max(beyond, 1.0))):
        x0 = torch.full((len(scheduler), 1, 1, 1), value, dtype=torch.float64)
        sample, noise = scheduler.add_noise(x0, 0 * x0, timesteps), 0 * x0
        output = scheduler.target(x0, noise, timesteps)
        kl = bound_terms(scheduler, x0, sample, timesteps, output, levels)[1:].sum().item()
        _, log_variance, _ = scheduler.reverse(output[:1], sample[:1], timesteps[:1])
        decoder = log_probability_of_bins(x0[:1], x0[:1] * 0 + guess, (0.5 * log_variance).exp(), 1 / (levels - 1))
        costs.append(kl - BITS * decoder.item())
    ends = (images.abs() > 1 - 1 / (levels - 1)).double().mean().item()
    return (1 - ends) * costs[0] + ends * costs[1]


def gaussian_kl(mean_1, log_variance_1, mean_2, log_variance_2):
    """KL(N(mean_1, variance_1) || N(mean_2, variance_2)) for each element, in nats."""
    ratio = log_variance_1 - log_variance_2
    return 0.5 * (torch.expm1(ratio) - ratio + (mean_1 - mean_2).square() * (-log_variance_2).exp())


def log_probability_of_bins(x, mean, std, half_bin: float):
    """Log probability under N(mean, std^2) of each element's bin [x - half_bin, x + half_bin], in nats.

    The bins at -1 and 1 are open outwards.
    """
    upper = torch.where(x > 1 - half_bin, math.inf, (x + half_bin - mean) / std)
    lower = torch.where(x < -1 + half_bin, -math.inf, (x - half_bin - mean) / std)
    # Phi(upper) - Phi(lower) is computed in the tail where both are small, which avoids cancellation.
    flip = (upper + lower > 0) | upper.isinf()
    flip &= ~lower.isinf()
    upper, lower = torch.where(flip, -lower, upper), torch.where(flip, -upper, lower)
    large, small = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    return large + torch.log1p(-(small - large).exp())

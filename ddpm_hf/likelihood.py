"""How many bits a model needs for an image: the variational bound (Ho et al. 2020, arXiv:2006.11239, equation 5)."""

import math

import torch

BITS = 1 / math.log(2)  # a nat
HALF_BIN = 1 / 255  # of the 256 values of a pixel in [-1, 1]


def bound_terms(scheduler, original_samples, sample, timesteps, model_output) -> torch.Tensor:
    """L_{t-1} of each image, L_0 at t = 0, in bits/dim: (B,).

    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for t > 0, and for t = 0 what the discrete decoder (section 3.3)
    takes for x_0.

    Args:
        original_samples, sample: x_0 and x_t, (B, C, H, W), images in [-1, 1].
        timesteps: (B,).
        model_output: (B, C, H, W), or with a learned variance (B, 2 C, H, W).
    """
    mean, log_variance, _ = scheduler.reverse(model_output, sample, timesteps)
    true_mean, true_log_variance = scheduler.posterior(original_samples, sample, timesteps)
    kl = _gaussian_kl(true_mean, true_log_variance, mean, log_variance)
    decoder = -_log_probability_of_bins(original_samples, mean, (0.5 * log_variance).exp())
    first = (timesteps.to(sample.device) == 0).reshape(-1, *(1,) * (sample.ndim - 1))
    return BITS * torch.where(first, decoder, kl).flatten(1).mean(1)


def prior_term(scheduler, original_samples) -> torch.Tensor:
    """L_T of each image, KL(q(x_T | x_0) || N(0, 1)), in bits/dim: (B,)."""
    abar = scheduler._alphas_cumprod[-1].item()
    zero = torch.zeros_like(original_samples)
    kl = _gaussian_kl(abar**0.5 * original_samples, zero + math.log1p(-abar), zero, zero)
    return BITS * kl.flatten(1).mean(1)


def _gaussian_kl(mean_1, log_variance_1, mean_2, log_variance_2):
    """KL(N(mean_1, variance_1) || N(mean_2, variance_2)) of each element, in nats."""
    ratio = log_variance_1 - log_variance_2
    return 0.5 * (torch.expm1(ratio) - ratio + (mean_1 - mean_2).square() * (-log_variance_2).exp())


def _log_probability_of_bins(x, mean, std):
    """log P of each element's bin, of width 2/255 about it, the outer ones open, under N(mean, std), in nats."""
    upper = torch.where(x > 1 - HALF_BIN, math.inf, (x + HALF_BIN - mean) / std)
    lower = torch.where(x < -1 + HALF_BIN, -math.inf, (x - HALF_BIN - mean) / std)
    # Phi(upper) - Phi(lower), on the side of the bell where both are small, so that nothing cancels
    flip = (upper + lower > 0) | upper.isinf()
    flip &= ~lower.isinf()
    upper, lower = torch.where(flip, -lower, upper), torch.where(flip, -upper, lower)
    large, small = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    return large + torch.log1p(-(small - large).exp())

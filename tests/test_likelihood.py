"""The variational bound, against what it is for data whose best network is known."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from ddpm_hf import LinearNoiseScheduler
from ddpm_hf.likelihood import bound_terms, prior_term

T = 1000
NODES, WEIGHTS = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(64))
LEVELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1


def scheduler(variance_type, **settings):
    return LinearNoiseScheduler(variance_type=variance_type, prediction_type="sample", clip_sample=False, **settings)


def expected_bits(made, levels, denoise) -> float:
    """L_T and all terms, of data that is each of `levels` as often, by quadrature over the noise."""
    t, total = torch.arange(T), 0.0
    for level in levels.tolist():
        x0 = torch.full((T, len(NODES), 1, 1), level, dtype=torch.float64)
        xt = made.add_noise(x0, NODES.reshape(1, -1, 1, 1).expand(T, -1, 1, 1), t)
        columns = [x.flatten(0, 1)[:, None] for x in (x0, xt, denoise(xt))]
        terms = bound_terms(made, columns[0], columns[1], t.repeat_interleave(len(NODES)), columns[2])
        total += (terms.reshape(T, -1) @ (WEIGHTS / WEIGHTS.sum())).sum().item()
        total += prior_term(made, x0[:1, :1]).item()
    return total / len(levels)


def best(made, levels):
    """E[x_0 | x_t] of such data, for x_t (T, nodes, 1, 1)."""
    signal, sigma = (row[:, None, None] for row in made._signal_and_noise.unbind(1))

    def denoise(xt):
        x = xt.reshape(T, -1, 1)
        return (torch.softmax(-((x - signal * levels) ** 2) / (2 * sigma**2), dim=-1) @ levels).reshape(xt.shape)

    return denoise


@pytest.mark.parametrize(("variance_type", "bits"), [("fixed_small", 1.30537766), ("fixed_large", 1.79179689)])
@pytest.mark.parametrize("level", [127, 128])
def test_a_constant_pixel(variance_type, bits, level):
    made, t = scheduler(variance_type), torch.arange(T)
    x0 = torch.full((T, 1, 1, 1), level / 127.5 - 1, dtype=torch.float64)
    xt = made.add_noise(x0, torch.randn(x0.shape, dtype=torch.float64), t)
    assert bound_terms(made, x0, xt, t, x0).sum().item() == pytest.approx(bits, abs=1e-8)


@pytest.mark.parametrize(("variance_type", "bits"), [("fixed_small", 1.51666593), ("fixed_large", 1.99700795)])
def test_a_fair_coin(variance_type, bits):
    made, ends = scheduler(variance_type), torch.tensor([-1.0, 1.0], dtype=torch.float64)
    assert expected_bits(made, ends[1:], best(made, ends)) == pytest.approx(bits, abs=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize(("variance_type", "bits"), [("fixed_small", 8.75705638), ("fixed_large", 8.12300673)])
def test_a_pixel_of_any_level(variance_type, bits):
    made = scheduler(variance_type)
    assert expected_bits(made, LEVELS, best(made, LEVELS)) == pytest.approx(bits, abs=1e-6)


def test_the_prior():
    made = scheduler("fixed_small")
    assert prior_term(made, torch.ones(1, 1, 1, 1, dtype=torch.float64)).item() == pytest.approx(
        2.9112945420e-5, abs=1e-14
    )


def test_a_learned_variance_has_the_fixed_ones_for_its_ends():
    learned, x0 = scheduler("learned_range"), torch.rand(T, 2, 3, 3, dtype=torch.float64) * 2 - 1
    t = torch.arange(T)
    xt, guess = learned.add_noise(x0, torch.randn_like(x0), t), torch.rand_like(x0)
    for end, variance_type in ((-1.0, "fixed_small"), (1.0, "fixed_large")):
        fixed = bound_terms(scheduler(variance_type), x0, xt, t, guess)
        ours = bound_terms(learned, x0, xt, t, torch.cat([guess, torch.full_like(guess, end)], dim=1))
        assert_close(ours[1:], fixed[1:], rtol=1e-12, atol=1e-12)  # at t = 0 both have the posterior's of t = 1
        assert (ours[0] == fixed[0]) == (end == -1)
    half = bound_terms(learned, x0, xt, t, torch.cat([guess, torch.zeros_like(guess)], dim=1))
    assert not torch.isclose(half[1:10], ours[1:10]).any()  # where the ends are far from one another


def test_probabilities_of_all_levels_sum_to_one():
    from ddpm_hf.likelihood import _log_probability_of_bins

    for mean, std in ((0.0, 0.5), (0.3, 0.007), (-5.0, 0.1), (1.0, 1e-3)):
        log_p = _log_probability_of_bins(
            LEVELS, torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64), 1 / 255
        )
        assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-12)
        assert log_p.isfinite().all() or std < 0.01
    far = _log_probability_of_bins(
        LEVELS[:1], torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.05, dtype=torch.float64), 1 / 255
    )
    z = (-1 + 1 / 255 - 1) / 0.05
    assert far.item() == pytest.approx(torch.special.log_ndtr(torch.tensor(z, dtype=torch.float64)).item(), rel=1e-9)
    assert math.isfinite(far.item())

"""The variational bound, compared with its value for data with a known best network."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from ddpm_hf import LinearNoiseScheduler
from ddpm_hf.evaluation.metrics.likelihood import estimated_bound, full_bound, timestep_probabilities
from ddpm_hf.schedulers.bound import bound_terms, fixed_variance_floor, log_probability_of_bins, prior_term

T = 1000
LEVELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1


def scheduler(variance_type, **settings):
    return LinearNoiseScheduler(variance_type=variance_type, prediction_type="sample", clip_sample=False, **settings)


def expected_bits(made, levels, denoise, nodes=64) -> float:
    """The expected bound of data with uniformly distributed `levels`, by quadrature over the noise."""
    at, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(nodes))
    t, total = torch.arange(T), 0.0
    for level in levels.tolist():
        x0 = torch.full((T, nodes, 1, 1), level, dtype=torch.float64)
        xt = made.add_noise(x0, at.reshape(1, -1, 1, 1).expand(T, -1, 1, 1), t)
        columns = [x.flatten(0, 1)[:, None] for x in (x0, xt, denoise(xt))]
        terms = bound_terms(made, columns[0], columns[1], t.repeat_interleave(nodes), columns[2])
        total += (terms.reshape(T, -1) @ (weights / weights.sum())).sum().item()
        total += prior_term(made, x0[:1, :1]).item()
    return total / len(levels)


def best(made, levels):
    """The function E[x_0 | x_t] of the same data, for x_t (T, nodes, 1, 1)."""
    abar = made.alphas_cumprod_float64[:, None, None]
    signal, sigma = abar.sqrt(), (1 - abar).sqrt()

    def denoise(xt):
        found = []  # part by part, for all at once would need gigabytes
        for x, a, b in zip(xt.reshape(T, -1, 1).split(50), signal.split(50), sigma.split(50), strict=True):
            found.append(torch.softmax(-((x - a * levels) ** 2) / (2 * b**2), dim=-1) @ levels)
        return torch.cat(found).reshape(xt.shape)

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


@pytest.mark.parametrize(("variance_type", "bits"), [("fixed_small", 8.75705638), ("fixed_large", 8.12300673)])
def test_a_pixel_of_any_level(variance_type, bits):
    made = scheduler(variance_type)
    # Those above the middle mirror those below.
    assert expected_bits(made, LEVELS[:128], best(made, LEVELS), nodes=24) == pytest.approx(bits, abs=1e-8)


def test_the_prior():
    made = scheduler("fixed_small")
    assert prior_term(made, torch.ones(1, 1, 1, 1, dtype=torch.float64)).item() == pytest.approx(
        2.9112945420e-5, abs=1e-14
    )


def test_a_learned_variance_lies_between_the_fixed_variances():
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
    for mean, std in ((0.0, 0.5), (0.3, 0.007), (-5.0, 0.1), (1.0, 1e-3)):
        log_p = log_probability_of_bins(
            LEVELS, torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64), 1 / 255
        )
        assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-12)
        assert log_p.isfinite().all() or std < 0.01
    far = log_probability_of_bins(
        LEVELS[:1], torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.05, dtype=torch.float64), 1 / 255
    )
    z = (-1 + 1 / 255 - 1) / 0.05
    assert far.item() == pytest.approx(torch.special.log_ndtr(torch.tensor(z, dtype=torch.float64)).item(), rel=1e-9)
    assert math.isfinite(far.item())


# ---------------------------------------------------------------- images and networks


ENDS = torch.tensor([-1.0, 1.0], dtype=torch.float64)


def signal_and_noise(made, timesteps):
    """sqrt(abar_t), sqrt(1 - abar_t) at `timesteps` (B,): (B, 1, 1, 1)"""
    abar = made.alphas_cumprod_float64[timesteps][:, None, None, None]
    return abar.sqrt(), (1 - abar).sqrt()


def coin_network(made):
    """`predict` of the best network for pixels that are -1 or 1 with equal probability."""

    def predict(sample, timesteps, labels):
        signal, sigma = signal_and_noise(made, timesteps)
        return torch.tanh(signal * sample / sigma**2)

    return predict


def coins(n, seed=0):
    return 2.0 * torch.randint(2, (n, 1, 8, 8), generator=torch.Generator().manual_seed(seed)) - 1


def bounds(made, images, numbers=None, batch_size=64, predict=None, levels=256):
    numbers = range(len(images)) if numbers is None else numbers
    prior, terms = full_bound(predict or coin_network(made), made, images, None, numbers, 0, levels, batch_size)
    return prior + terms.sum(1)


def assert_mean(values, expected, errors=4):
    error = values.std().item() / len(values) ** 0.5
    assert abs(values.mean().item() - expected) < errors * error, (values.mean(), error, expected)
    return error


@pytest.mark.parametrize(("variance_type", "bits", "other"), [
    ("fixed_small", 1.51666593, 1.99700795),
    ("fixed_large", 1.99700795, 1.51666593),
])  # fmt: skip
def test_the_bound_of_images_is_that_of_the_closed_form(variance_type, bits, other):
    made = scheduler(variance_type)
    found = bounds(made, coins(24))
    error = assert_mean(found, bits)
    assert abs(found.mean().item() - other) > 20 * error  # the variances are distinguished
    estimate = estimated(made, coins(400), best_probabilities(made))
    error = assert_mean(estimate, bits)
    assert abs(estimate.mean().item() - other) > 20 * error


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_the_bound_of_a_constant_image_is_the_floor_of_each_variance(prediction_type):
    """Gray: closed forms. Black and white, whose bins are open: the bound of a network that predicts them exactly."""
    gray, black = (torch.full((2, 1, 4, 4), value, dtype=torch.float64) for value in (127 / 127.5 - 1, -1.0))
    half = torch.cat([gray, -black], dim=3)
    for variance_type, bits in (("fixed_small", 1.30537766), ("fixed_large", 1.79179689)):
        made = LinearNoiseScheduler(variance_type=variance_type, prediction_type=prediction_type)
        assert fixed_variance_floor(made, gray) == pytest.approx(bits, abs=1e-8)
        found = {}
        for x0 in (gray, black):

            def exact(sample, timesteps, labels, x0=x0, made=made):
                image = x0[:1].expand(sample.shape)
                signal, sigma = signal_and_noise(made, timesteps)
                return made.target(image, (sample - signal * image) / sigma, timesteps)

            found[x0] = bounds(made, x0, predict=exact)
        assert found[gray].tolist() == pytest.approx([bits] * 2, abs=3e-8)  # and L_T, 1e-9
        floor = fixed_variance_floor(made, black)
        assert found[black].tolist() == pytest.approx([floor] * 2, abs=5e-5)  # and L_T, 2.9e-5
        assert 0.5 < floor < bits - 0.5
        assert fixed_variance_floor(made, half) == pytest.approx((floor + bits) / 2)
    assert fixed_variance_floor(LinearNoiseScheduler(clip_sample=False), black) < 1e-9
    assert fixed_variance_floor(LinearNoiseScheduler(), gray, levels=2) < 1e-12
    assert fixed_variance_floor(LinearNoiseScheduler(variance_type="learned_range"), gray) is None


def estimated(made, images, probabilities, draws=16, batch_size=64):
    return estimated_bound(
        coin_network(made), made, images, None, range(len(images)), probabilities, draws, 0, 256, batch_size
    )


def best_probabilities(made):
    return timestep_probabilities(coin_network(made), made, coins(32, 1), None, 0, 256)


def test_importance_sampling_is_unbiased_and_reduces_the_error():
    made, images = scheduler("fixed_small"), coins(400)
    even = torch.full((T,), 1 / (T - 1), dtype=torch.float64)
    even[0] = 0
    own = best_probabilities(made)
    assert own.sum().item() == pytest.approx(1)
    assert own[0] == 0
    assert own[1:].min() >= 0.1 / (T - 1)
    errors = [assert_mean(estimated(made, images, p), 1.51666593) for p in (even, own)]
    assert errors[1] < 0.5 * errors[0]


def test_the_noise_of_an_image_depends_only_on_its_number():
    made, images = scheduler("fixed_small"), coins(5)
    together, alone = bounds(made, images), bounds(made, images[[3]], [3], batch_size=7)
    assert_close(together[[3]], alone, rtol=1e-12, atol=0)
    assert bounds(made, images[[3]], [4]) != alone
    p = best_probabilities(made)
    one = estimated_bound(coin_network(made), made, images[[3]], None, [3], p, 16, 0, 256, 5)
    assert_close(estimated(made, images, p)[[3]], one, rtol=1e-12, atol=0)


def test_labels_go_with_their_images():
    made, images, labels = scheduler("fixed_small"), coins(4), torch.tensor([3, 1, 2, 0])
    seen = []

    def predict(sample, timesteps, labels):
        seen.append((len(sample), labels.tolist()))
        return coin_network(made)(sample, timesteps, labels)

    full_bound(predict, made, images[:2], labels[:2], [0, 1], 0, 256, batch_size=500)
    assert {y for n, of in seen[: len(seen) // 2] for y in of} == {3}
    assert {y for n, of in seen[len(seen) // 2 :] for y in of} == {1}
    seen.clear()
    estimated_bound(predict, made, images, labels, range(4), best_probabilities(made), 3, 0, 256, 8)
    assert [of for n, of in seen] == [[3] * 4, [1] * 4, [2] * 4, [0] * 4]


def test_the_estimate_of_one_timestep():
    made = scheduler("fixed_small", num_train_timesteps=1)
    p = timestep_probabilities(coin_network(made), made, coins(2), None, 0, 256)
    found = estimated_bound(coin_network(made), made, coins(2), None, [0, 1], p, 16, 0, 256)
    assert found.isfinite().all()


def test_gradients_of_the_bound_are_finite_at_black_and_white():
    made = LinearNoiseScheduler(variance_type="learned_range")
    x0 = torch.tensor([-1.0, 0.2, 1.0]).expand(T, 1, 1, 3)
    t = torch.arange(T)
    output = torch.randn(T, 2, 1, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    bound_terms(made, x0, made.add_noise(x0, torch.randn(x0.shape), t), t, output, 17).sum().backward()
    assert output.grad.isfinite().all()
    assert (output.grad[:, 1] != 0).any(dim=(1, 2)).all()


@pytest.mark.parametrize("t", [1, 10, 40])
def test_the_best_learned_variance(t):
    """For data from N(0, s^2) it is beta~ + (d mean / d x_0)^2 Var(x_0 | x_t), in all pixels."""
    made = LinearNoiseScheduler(num_train_timesteps=50, beta_start=1e-3, beta_end=0.3, clip_sample=False,
                                variance_type="learned_range", prediction_type="sample")  # fmt: skip
    spread, n = 0.5, 400_000
    x0, noise = torch.randn(2, 1, 1, 1, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    at = torch.tensor([t])
    xt = made.add_noise(x0 * spread, noise, at)
    abar = made.alphas_cumprod_float64[t]
    unsure = spread**2 * (1 - abar) / (abar * spread**2 + 1 - abar)
    step = made.step_coefficients(made.timesteps)
    from_x0, smallest, largest = (
        column.flip(0)[t].item() for column in (step.mean_from_x0, step.log_variance_min, step.log_variance_max)
    )
    best_share = (math.log(math.exp(smallest) + from_x0**2 * unsure) - smallest) / (largest - smallest)
    assert 0 < best_share < 1
    guess = abar.sqrt() * spread**2 / (abar * spread**2 + 1 - abar) * xt

    def slope(share):
        range_ = torch.full((1, 1, 1, 1), 2 * share - 1, dtype=torch.float64, requires_grad=True)
        output = torch.cat([guess, range_.expand_as(guess)], dim=1)
        bound_terms(made, x0 * spread, xt, at, output).sum().backward()
        return range_.grad.item()

    low, high = slope(0.0), slope(1.0)
    assert low < 0 < high
    assert abs(slope(best_share)) < 0.1 * min(-low, high)

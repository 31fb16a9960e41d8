"""Loss, bound and calibration by timestep, for data with a known best network."""

import torch
from torch.testing import assert_close

from ddpm_hf import LinearNoiseScheduler
from ddpm_hf.evaluation.context import channel_moments
from ddpm_hf.evaluation.metrics.by_timestep import TIMESTEPS, columns_by_timestep, measure_by_timestep

SPREAD = 0.5  # standard deviation of the pixels


def gaussian_images(n=40):
    return SPREAD * torch.randn(n, 2, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def best(made, bolder=1.0, shift=0.0):
    """The best network for pixels from N(0, SPREAD^2), with x_0 scaled by `bolder` and shifted."""

    def predict(sample, timesteps, labels):
        abar = made.alphas_cumprod_float64[timesteps].reshape(-1, 1, 1, 1)
        signal, sigma = abar.sqrt(), (1 - abar).sqrt()
        x0 = signal * SPREAD**2 * sample / (signal**2 * SPREAD**2 + sigma**2)
        return (sample - signal * (bolder * x0 + shift)) / sigma

    return predict


def seen(predict, made, images=None, numbers=None, batch_size=64):
    images = gaussian_images() if images is None else images
    numbers = range(len(images)) if numbers is None else numbers
    return measure_by_timestep(predict, made, images, None, numbers, 0, 256, batch_size)


def test_timesteps_are_evenly_spread():
    assert LinearNoiseScheduler().midpoints(TIMESTEPS).tolist() == list(range(10, 1000, 20))
    assert LinearNoiseScheduler(num_train_timesteps=4).midpoints(TIMESTEPS).tolist() == [0, 1, 2, 3]


def test_the_best_network_is_calibrated():
    made = LinearNoiseScheduler(clip_sample=False)
    found = seen(best(made), made)
    columns, t = columns_by_timestep(found), made.midpoints(TIMESTEPS)
    abar = made.alphas_cumprod_float64[t]
    assert_close(columns["loss"], abar * SPREAD**2 / (abar * SPREAD**2 + 1 - abar), rtol=0.1, atol=0)
    explained = abar * SPREAD**2 / (abar * SPREAD**2 + 1 - abar)
    errors = ((1 - explained) / explained / gaussian_images().numel()).sqrt()  # of a slope
    assert errors[:15].max() < 0.04
    assert ((columns["x0_slope"] - 1).abs() < 4 * errors).all()
    assert columns["x0_bias"].abs().max() < 0.05
    rmse = (SPREAD**2 * (1 - abar) / (abar * SPREAD**2 + 1 - abar)).sqrt()
    assert_close(columns["x0_rmse"], rmse, rtol=0.05, atol=0)


def test_slope_and_bias_of_overconfident_and_shifted_predictions():
    made = LinearNoiseScheduler(clip_sample=False)
    columns = columns_by_timestep(seen(best(made, bolder=2.0, shift=0.25), made))
    assert_close(columns["x0_slope"][:15], torch.full((15,), 0.5, dtype=torch.float64), rtol=0.1, atol=0)
    assert_close(columns["x0_bias"], torch.full((50,), 0.25, dtype=torch.float64), rtol=0, atol=0.1)
    honest = columns_by_timestep(seen(best(made), made))
    assert (columns["bits"] > honest["bits"]).all()
    assert (columns["loss"] > honest["loss"]).all()


def test_constant_predictions_have_no_slope():
    made = LinearNoiseScheduler(prediction_type="sample")
    assert columns_by_timestep(seen(lambda sample, t, y: 0 * sample, made))["x0_slope"].isnan().all()


def test_an_image_has_the_same_result_in_any_batch():
    made, images = LinearNoiseScheduler(), gaussian_images(6)
    whole = seen(best(made), made, images)
    even = seen(best(made), made, images[::2], [0, 2, 4], batch_size=9)
    odd = seen(best(made), made, images[1::2], [1, 3, 5])
    assert_close(torch.stack([even, odd], 1).flatten(0, 1), whole, rtol=1e-12, atol=1e-12)
    assert seen(best(made), made, images[:0]).shape == (0, 7, 50)


def test_moments_of_channels():
    images = gaussian_images(3)
    found = channel_moments(images)
    assert_close(found[1, 0, 1], images[1, 1].mean())
    assert_close(found[2, 1, 0], (images[2, 0] ** 2).mean())

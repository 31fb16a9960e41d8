import numpy as np
import pytest
from sklearn.datasets import load_digits

from ddpm_hf.evaluation import digits_legibility


class Gives:
    """A pipeline that gives these images, 0 ... 16."""

    def __init__(self, images):
        self.images = images.reshape(-1, 8, 8, 1) / 16

    def __call__(self, n, generators, steps, output_type):
        assert (len(generators), steps, output_type) == (n, 5, "np")
        return type("Output", (), {"images": self.images[:n]})


@pytest.mark.parametrize(
    ("images", "low", "high", "kinds"),
    [
        (load_digits().data, 0.9, 1.0, 10),
        (load_digits().data[load_digits().target == 3], 0.9, 1.0, 1),
        (np.random.default_rng(0).uniform(0, 16, (256, 64)), 0.0, 0.02, 0),
        (load_digits().data[:, np.random.default_rng(0).permutation(64)], 0.0, 0.02, 0),
    ],
)
def test_real_digits_are_read_and_noise_is_not(images, low, high, kinds):
    told = digits_legibility(Gives(images), 5, seed=0, num_samples=150)
    assert low <= told.samples <= high
    assert told.kinds == kinds
    assert told.held_out > 0.9
    assert f"{told.samples:.1%} of 150 samples" in str(told)

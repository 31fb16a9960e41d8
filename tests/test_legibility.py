from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.datasets import load_digits

from ddpm_hf.legibility import digits_legibility


class Gives:
    """A pipeline that gives these images, 0 ... 16, whatever class is asked for."""

    def __init__(self, images, num_classes=None):
        self.images = images.reshape(-1, 8, 8, 1) / 16
        self.unet = SimpleNamespace(config={"num_classes": num_classes})

    def __call__(self, n, generators, steps, output_type, **classes):
        assert (len(generators), steps, output_type) == (n, 5, "np")
        if self.unet.config["num_classes"]:
            assert classes.pop("guidance_scale") == 3
            assert list(classes.pop("class_labels")[:12]) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
        assert not classes
        return SimpleNamespace(images=self.images[:n])


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


@pytest.mark.parametrize("off", [0, 1])
def test_what_was_asked_for_is_what_is_read(off):
    digits = load_digits()
    of = [np.flatnonzero(digits.target == (k + off) % 10)[k // 10] for k in range(150)]
    told = digits_legibility(Gives(digits.data[of], 10), 5, seed=0, num_samples=150, guidance_scale=3)
    assert (told.as_asked > 0.97) if off == 0 else (told.as_asked < 0.03)
    assert f"{told.as_asked:.1%} of the samples are what was asked for (guidance 3)" in str(told)

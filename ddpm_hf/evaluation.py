"""How good a model is, with the protocol beside each number."""

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import SVC

CERTAIN = 0.8


@dataclass
class Legibility:
    """Shares of images that the classifier reads with more than `CERTAIN` certainty."""

    samples: float
    held_out: float
    num_samples: int
    num_held_out: int
    kinds: int
    num_inference_steps: int

    def __str__(self):
        return (
            f"A support-vector classifier reads {self.samples:.1%} of {self.num_samples} samples with more than "
            f"{CERTAIN} certainty ({self.num_inference_steps} steps, none rejected; {self.kinds} of the ten digits "
            f"among them), and {self.held_out:.1%} of {self.num_held_out} real digits that it was not fitted to."
        )


def digits_legibility(pipeline, num_inference_steps: int, seed: int, num_samples: int = 256) -> Legibility:
    """How many samples of a model of the 8x8 digits can be read.

    Protocol: scikit-learn's `SVC(probability=True)`, fitted to four fifths of its real digits; the last fifth is what
    `held_out` is measured on. Samples are scaled to the digits' 0 ... 16; a digit counts among the kinds if at least
    one certain sample is read as it. The certainties are those of pairwise coupling (Wu, Lin & Weng 2004): this
    classifier is certain of no noise image, where the usual calibration of one class against the rest is certain of
    two thirds of them.
    """
    digits = load_digits()
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    fitted, held_out = next(folds.split(digits.data, digits.target))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # scikit-learn 1.11 drops it, and has nothing in its place
        classifier = SVC(probability=True, random_state=0).fit(digits.data[fitted], digits.target[fitted])

    generators = [torch.Generator().manual_seed(seed * num_samples + k) for k in range(num_samples)]
    samples = pipeline(num_samples, generators, num_inference_steps, output_type="np").images  # (N, 8, 8, 1)
    certainty = classifier.predict_proba(16 * samples.reshape(num_samples, -1))
    real = classifier.predict_proba(digits.data[held_out])
    certain = certainty.max(1) > CERTAIN
    return Legibility(
        samples=float(certain.mean()),
        held_out=float((real.max(1) > CERTAIN).mean()),
        num_samples=num_samples,
        num_held_out=len(held_out),
        kinds=len(np.unique(certainty[certain].argmax(1))),
        num_inference_steps=num_inference_steps,
    )

"""Legibility of samples of the 8x8 digits: the share that a classifier recognises with certainty."""

import warnings
from dataclasses import dataclass

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import SVC

from ddpm_hf.utils.seeds import image_generators
from ddpm_hf.utils.signals import raise_if_stopped

CERTAIN = 0.8


@dataclass
class Legibility:
    """Shares of images that the classifier recognises with a probability above `CERTAIN`.

    Args:
        samples, held_out: the share of `num_samples` samples, and of `num_held_out` digits that it was not fitted to.
        kinds: how many of the ten digits are among the recognised samples.
        accuracy: the share of samples recognised as their class label, with any probability; None without classes.
    """

    samples: float
    held_out: float
    num_samples: int
    num_held_out: int
    kinds: int
    num_inference_steps: int
    accuracy: float | None = None
    guidance_scale: float = 1.0

    def metrics(self) -> list[dict]:
        """Metrics for the model card, in the form of run.json."""
        judge = (
            "scikit-learn's SVC(probability=True), fitted to four fifths of its digits, {}; it recognises "
            f"{self.held_out:.1%} of {self.num_held_out} other real digits with certainty; {self.num_samples} samples, "
            f"{self.num_inference_steps} steps, none rejected"
        )
        if self.accuracy is not None:
            judge += f", guidance {self.guidance_scale:g}"
        found = [("legibility", "Share of samples that a classifier recognises", self.samples,
                  judge.format(f"with a probability above {CERTAIN}"))]  # fmt: skip
        if self.accuracy is not None:
            found.append(("accuracy", "Share of samples that a classifier assigns to their class", self.accuracy,
                          judge.format("with any probability")))  # fmt: skip
        return [
            {"type": kind, "name": name, "value": value, "split": "test", "protocol": protocol}
            for kind, name, value, protocol in found
        ]

    def __str__(self):
        text = (
            f"A support-vector classifier recognises {self.samples:.1%} of {self.num_samples} samples with a "
            f"probability above {CERTAIN} ({self.num_inference_steps} steps, none rejected, {self.kinds} of the ten "
            f"digits), and {self.held_out:.1%} of {self.num_held_out} real digits that it was not fitted to."
        )
        if self.accuracy is not None:
            text += f" It assigns {self.accuracy:.1%} of the samples to their class (guidance {self.guidance_scale:g})."
        return text


def digits_legibility(
    pipeline, num_inference_steps: int, seed: int, num_samples: int = 256, guidance_scale: float = 1.0
) -> Legibility:
    """Measure the legibility of samples of a model of the 8x8 digits.

    The classifier is scikit-learn's `SVC(probability=True)`, fitted to four fifths of its digits; `held_out` is
    measured on the last fifth. Samples are scaled to 0 ... 16, as the digits are. With probabilities by pairwise
    coupling (Wu, Lin & Weng 2004) this classifier is certain of no noise image; with the usual one-against-rest
    calibration it is certain of two thirds of them. In a class-conditional model, sample k has the label k mod 10.

    Raises:
        Stopped: a signal asked the process to stop; the signal is checked after each step.
    """
    digits = load_digits()
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    fitted, held_out = next(folds.split(digits.data, digits.target))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # scikit-learn 1.11 removes it without a replacement
        classifier = SVC(probability=True, random_state=0).fit(digits.data[fitted], digits.target[fitted])

    labels = np.arange(num_samples) % 10 if pipeline.unet.config.get("num_classes") == 10 else None
    classes = {} if labels is None else {"class_labels": labels, "guidance_scale": guidance_scale}
    samples = pipeline(
        num_samples, image_generators(seed, range(num_samples)), num_inference_steps, output_type="np",
        callback_on_step_end=lambda *_: raise_if_stopped(), **classes,
    ).images  # fmt: skip
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
        accuracy=None if labels is None else float((certainty.argmax(1) == labels).mean()),
        guidance_scale=guidance_scale,
    )

"""How many samples of the 8x8 digits a classifier can read, with the protocol beside each number."""

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
    """Shares of images that the classifier reads with a probability of more than `CERTAIN`.

    Args:
        samples, held_out: of `num_samples` samples, and of `num_held_out` real digits that it was not fitted to.
        kinds: how many of the ten digits are among the samples that it reads.
        as_asked: of a class-conditional model, the share of samples read, with any probability, as the digit asked for.
    """

    samples: float
    held_out: float
    num_samples: int
    num_held_out: int
    kinds: int
    num_inference_steps: int
    as_asked: float | None = None
    guidance_scale: float = 1.0

    def metrics(self) -> list[dict]:
        """Metrics for the model card, as training keeps them."""
        judge = (
            "scikit-learn's SVC(probability=True), fitted to four fifths of its real digits, {}; of "
            f"{self.num_held_out} real digits that it was not fitted to it is certain of {self.held_out:.1%}; of "
            f"{self.num_samples} samples, {self.num_inference_steps} steps, none rejected"
        )
        if self.as_asked is not None:
            judge += f", guidance {self.guidance_scale:g}"
        found = [("legibility", "Share of samples that a classifier reads", self.samples,
                  judge.format(f"more than {CERTAIN} certain"))]  # fmt: skip
        if self.as_asked is not None:
            found.append(("accuracy", "Share of samples read as what was asked for", self.as_asked,
                          judge.format("however certain")))  # fmt: skip
        return [
            {"type": kind, "name": name, "value": value, "split": "test", "protocol": protocol}
            for kind, name, value, protocol in found
        ]

    def __str__(self):
        text = (
            f"A support-vector classifier reads {self.samples:.1%} of {self.num_samples} samples with more than "
            f"{CERTAIN} certainty ({self.num_inference_steps} steps, none rejected; {self.kinds} of the ten digits "
            f"among them), and {self.held_out:.1%} of {self.num_held_out} real digits that it was not fitted to."
        )
        if self.as_asked is not None:
            text += f" {self.as_asked:.1%} of the samples are what was asked for (guidance {self.guidance_scale:g})."
        return text


def digits_legibility(
    pipeline, num_inference_steps: int, seed: int, num_samples: int = 256, guidance_scale: float = 1.0
) -> Legibility:
    """How many samples of a model of the 8x8 digits can be read, and as what was asked for if it knows the classes.

    Protocol: scikit-learn's `SVC(probability=True)`, fitted to four fifths of its real digits; `held_out` is measured
    on the last fifth. Samples are scaled to the digits' 0 ... 16; a digit counts among the kinds if at least one
    certain sample is read as it. The probabilities are those of pairwise coupling (Wu, Lin & Weng 2004): this
    classifier is certain of no noise image, where the usual calibration of one class against the rest is certain of
    two thirds of them. Of a class-conditional model, sample k is asked to be digit k mod 10.

    Raises:
        Stopped: a signal asked the process to stop; it is noticed after each step.
    """
    digits = load_digits()
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    fitted, held_out = next(folds.split(digits.data, digits.target))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # scikit-learn 1.11 drops it, and has nothing in its place
        classifier = SVC(probability=True, random_state=0).fit(digits.data[fitted], digits.target[fitted])

    asked = np.arange(num_samples) % 10 if pipeline.unet.config.get("num_classes") == 10 else None
    classes = {} if asked is None else {"class_labels": asked, "guidance_scale": guidance_scale}
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
        as_asked=None if asked is None else float((certainty.argmax(1) == asked).mean()),
        guidance_scale=guidance_scale,
    )

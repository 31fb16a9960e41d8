"""Tables of one evaluation, and of several with the same protocol."""

import math

from ddpm_hf.schedulers.solvers import scheduler_class
from ddpm_hf.utils.results import noise_warning, number, read_evaluation

ENOUGH = 10_000  # samples; with fewer, the bias of a distance exceeds its interval
TINT = 0.05  # of the mean of a channel in [-1, 1]: 6 of 255 values
BIASED = ("fid_", "fd_", "precision_", "recall_", "density_", "coverage_", "inception_score")


def few_samples_warning(evaluation: dict) -> str | None:
    """A warning if the evaluation has metrics that depend on the number of samples, and few samples."""
    n = evaluation["protocol"].get("num_samples", ENOUGH)
    if n >= ENOUGH or not any(key.startswith(BIASED) for key in evaluation["metrics"]):
        return None
    return (
        f"{n:,} samples are fewer than {ENOUGH:,}. With few samples Fréchet distances are biased upwards, and the "
        "intervals (±) do not include this bias. Precision, recall, density, coverage and Inception Score depend on "
        f"the number of samples too. Compare these values only with values of {n:,} samples, or generate more samples."
    )


def tint_warning(evaluation: dict) -> str | None:
    """A warning with what helps if the mean of a channel of the samples differs clearly from that of the data."""
    drift = evaluation["metrics"].get("channel_mean_drift", {})
    value, stderr = drift.get("value"), drift.get("stderr")
    if value is None or stderr is None or value < max(TINT, 3 * stderr) or noise_warning(evaluation["metrics"]):
        return None
    scheduler = evaluation["protocol"].get("model", {}).get("scheduler", {})
    helps = "more sampling steps (--num_inference_steps) or a longer training often help"
    of_ddpm = scheduler_class(scheduler).objective == "ddpm"
    if of_ddpm and scheduler.get("prediction_type", "epsilon") == "epsilon":
        helps = (
            "in the first steps a small error of a predicted noise is a large one of the image, so training with "
            "--prediction_type v_prediction often helps, also with rescale_betas_zero_snr=true in --scheduler"
        )
    return f"The samples are tinted or too bright or dark: the mean of a channel differs by {value:.2g} of 2; {helps}."


def table(evaluation: dict) -> list[str]:
    """One line per metric: its key, its value with its 95 % interval, and its name."""
    width = max(map(len, evaluation["metrics"]), default=0)
    return [f"{key:<{width}}  {number(metric):<24} {metric['name']}" for key, metric in evaluation["metrics"].items()]


def compare(paths: list[str], across: tuple[str, ...] = ()) -> list[str]:
    """Lines of a table with one column per evaluation, and one for the differences from the first evaluation.

    Args:
        paths: two or more files as evaluation.json.
        across: keys of the protocol that may differ, such as weights or num_inference_steps.

    Raises:
        ValueError: a file can't be read, or the protocols differ in more than the model and `across`.
    """
    if len(paths) < 2:
        raise ValueError(f"compare: name at least two files, not {len(paths)}")
    found = [read_evaluation(path) for path in paths]
    first, *others = (dict(_flat(each["protocol"])) for each in found)
    apart = []
    for path, other in zip(paths[1:], others, strict=True):
        for key in sorted(first.keys() | other.keys()):
            a, b = first.get(key, "missing"), other.get(key, "missing")
            allowed = any(key == name or key.startswith(f"{name}.") for name in ("model", *across))
            if a != b and not allowed:
                apart.append(f"{key} is {a!r} in {paths[0]} and {b!r} in {path}")
    if apart:
        keys = " ".join(dict.fromkeys(line.split()[0] for line in apart))
        raise ValueError(
            f"these evaluations have different protocols: {'; '.join(apart)}. To compare them nevertheless, pass "
            f"--across {keys}"
        )
    rows = [["", *paths, ""]]
    for key in found[0]["metrics"]:
        if all(key in each["metrics"] for each in found):
            metrics = [each["metrics"][key] for each in found]
            rows.append([key, *map(number, metrics), ", ".join(_difference(metrics[0], each) for each in metrics[1:])])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _difference(a: dict, b: dict) -> str:
    """b - a, and whether it is within 1.96 of its standard errors; "" if a or b has no standard error."""
    if None in (a["value"], b["value"], a["stderr"], b["stderr"]):
        return ""
    difference = b["value"] - a["value"]
    text = f"{difference:+.3g}".replace("-", "\u2212")
    return text if abs(difference) > 1.96 * math.hypot(a["stderr"], b["stderr"]) else f"{text} (within the error)"


def _flat(value: dict, prefix: str = ""):
    """The (key, value) pairs of a nested dictionary, with keys joined by dots."""
    for key, each in value.items():
        if isinstance(each, dict):
            yield from _flat(each, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", each

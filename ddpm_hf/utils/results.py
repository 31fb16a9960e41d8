"""Reading evaluation.json, and formatting of metrics in reports, charts, tables and model cards."""

import math
from pathlib import Path

from ddpm_hf.utils.arguments import read_json


def read_evaluation(path: str | Path) -> dict:
    """Read an evaluation.json.

    Raises:
        ValueError: the file does not exist, is not JSON, or lacks "protocol" or "metrics".
    """
    found = read_json(path)
    if not all(isinstance(found.get(key), dict) for key in ("protocol", "metrics")):
        raise ValueError(f'{path} is not an evaluation; it must hold {{"protocol": {{...}}, "metrics": {{...}}}}')
    return found


def noise_warning(metrics: dict) -> str | None:
    """A warning if the samples are not images: neighbouring pixels are less than half as alike as in real images."""
    found = metrics.get("neighbour_correlation", {})
    value, real = found.get("value"), found.get("training_images")
    if value is None or real is None or abs(real) < 0.1 or value / real >= 0.5:  # below 0.1 real images are noise too
        return None
    return (
        f"These samples are not images yet: the correlation of neighbouring pixels is {value:.2g}, and {real:.2g} in "
        "training images. No other metric of samples means anything, however good it looks: train longer, or take more "
        "sampling steps."
    ).replace("-", "\u2212")


def number(metric: dict) -> str:
    """Format the value of a metric, with ± its 95 % interval if it has one, to a sensible number of digits."""
    value, stderr = metric.get("value"), metric.get("stderr")
    if value is None or not math.isfinite(value):
        return "no value"
    half = None if stderr is None else 1.96 * stderr
    if half is None:
        text = f"{value:.4g}"
    elif not math.isfinite(half):
        text = f"{value:.4g} ± unknown"
    elif half == 0 or not 1e-6 < half < 1e6:
        text = f"{value:.4g} ± {half:.2g}"
    else:
        digits = max(0, 1 - math.floor(math.log10(half)))
        text = f"{value:,.{digits}f} ± {half:,.{digits}f}"
    return text.replace("-", "\u2212")

"""Evaluations read again and put side by side, if they were measured alike."""

import json
import math
from pathlib import Path

FEW = (
    "{n:,} samples are fewer than 10,000: distances come out larger than those of more samples would, which is no part "
    "of the intervals; compare them with those of as many alone"
)


def read_evaluation(path: str | Path) -> dict:
    """An evaluation.json.

    Raises:
        ValueError: it is not there or is not one.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: can't be read: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(found.get(key), dict) for key in ("protocol", "metrics")):
        raise ValueError(f'{path}: is no evaluation, {{"protocol": ..., "metrics": ...}}')
    return found


def table(evaluation: dict) -> list[str]:
    """A line a metric, with its 95 % interval."""
    width = max(map(len, evaluation["metrics"]), default=0)
    return [f"{name:<{width}}  {number(metric):<24} {metric['name']}"
            for name, metric in evaluation["metrics"].items()]  # fmt: skip


def number(metric: dict) -> str:
    """A metric's value with its 95 % interval, as far as there is one, in as many digits as that bears."""
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


def compare(paths: list[str], across: tuple[str, ...] = ()) -> list[str]:
    """Lines of a table of several evaluations, and of the differences to the first that chance does not explain.

    Args:
        across: parts of the protocol that may differ, such as weights or num_inference_steps.

    Raises:
        ValueError: their protocols differ in more than the model and `across`; it tells in what.
    """
    if len(paths) < 2:
        raise ValueError("compare: name at least two files")
    found = [read_evaluation(path) for path in paths]
    protocols = [dict(_flat(each["protocol"])) for each in found]
    apart = []
    for path, protocol in zip(paths[1:], protocols[1:], strict=True):
        for key in sorted(protocols[0].keys() | protocol.keys()):
            a, b = (p.get(key, "not there") for p in (protocols[0], protocol))
            allowed = any(key == name or key.startswith(f"{name}.") for name in ("model", *across))
            if a != b and not allowed:
                apart.append(f"{key} is {a!r} in {paths[0]} and {b!r} in {path}")
    if apart:
        keys = " ".join(dict.fromkeys(line.split()[0] for line in apart))
        raise ValueError(
            f"these are not measured alike: {'; '.join(apart)}. If that is what to compare, say --across {keys}"
        )
    names = [name for name in found[0]["metrics"] if all(name in each["metrics"] for each in found)]
    rows = [["", *paths], *([name, *(number(each["metrics"][name]) for each in found)] for name in names)]
    for row, name in zip(rows[1:], names, strict=True):
        row.append(_apart([each["metrics"][name] for each in found]))
    rows[0].append("")
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _apart(metrics: list[dict]) -> str:
    """Whether each differs from the first by more than 1.96 standard errors of the difference."""
    marks = []
    for metric in metrics[1:]:
        values = [metrics[0]["value"], metric["value"], metrics[0]["stderr"], metric["stderr"]]
        if any(value is None for value in values):
            marks.append("")
            continue
        error = 1.96 * math.hypot(values[2], values[3])
        difference = values[1] - values[0]
        text = f"{difference:+.3g}".replace("-", "\u2212")
        marks.append(text if abs(difference) > error else f"{text} (within the error)")
    return ", ".join(marks)


def _flat(value: dict, prefix: str = ""):
    for key, each in value.items():
        if isinstance(each, dict):
            yield from _flat(each, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", each

"""Tables of one evaluation, and of several that were measured under the same protocol."""

import math

from ddpm_hf.utils.results import number, read_evaluation

FEW = (
    "{n:,} samples are fewer than 10,000. Distances are biased upwards the more the fewer samples there are, which the "
    "intervals do not include: compare them with distances of as many samples only"
)


def table(evaluation: dict) -> list[str]:
    """A line for each metric: its key, its value with its 95 % interval, and its name."""
    width = max(map(len, evaluation["metrics"]), default=0)
    return [f"{key:<{width}}  {number(metric):<24} {metric['name']}" for key, metric in evaluation["metrics"].items()]


def compare(paths: list[str], across: tuple[str, ...] = ()) -> list[str]:
    """Lines of a table with a column for each evaluation and one for the differences to the first evaluation.

    Args:
        paths: of two or more evaluation.json.
        across: keys of the protocol that may differ, such as weights or num_inference_steps.

    Raises:
        ValueError: a file can't be read, or the protocols differ in more than the model and `across`.
    """
    if len(paths) < 2:
        raise ValueError("compare: name at least two files")
    found = [read_evaluation(path) for path in paths]
    first, *others = (dict(_flat(each["protocol"])) for each in found)
    apart = []
    for path, other in zip(paths[1:], others, strict=True):
        for key in sorted(first.keys() | other.keys()):
            a, b = first.get(key, "not there"), other.get(key, "not there")
            allowed = any(key == name or key.startswith(f"{name}.") for name in ("model", *across))
            if a != b and not allowed:
                apart.append(f"{key} is {a!r} in {paths[0]} and {b!r} in {path}")
    if apart:
        keys = " ".join(dict.fromkeys(line.split()[0] for line in apart))
        raise ValueError(
            f"these evaluations were not measured alike: {'; '.join(apart)}. To compare them nevertheless, pass "
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
    """b - a, and whether it is within 1.96 standard errors of the difference; "" if either has no standard error."""
    if None in (a["value"], b["value"], a["stderr"], b["stderr"]):
        return ""
    difference = b["value"] - a["value"]
    text = f"{difference:+.3g}".replace("-", "\u2212")
    return text if abs(difference) > 1.96 * math.hypot(a["stderr"], b["stderr"]) else f"{text} (within the error)"


def _flat(value: dict, prefix: str = ""):
    """(key, value) of a nested dict, with dots in the keys."""
    for key, each in value.items():
        if isinstance(each, dict):
            yield from _flat(each, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", each

"""The report of an evaluation: report.html, a page that loads no other file."""

import base64
import functools
import io
import json
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from PIL import Image

from ddpm_hf.evaluation.charts import BITS, DISTANCES, DRIFTS, LOSSES, QUALITIES, draw_charts, has
from ddpm_hf.evaluation.comparison import few_samples_warning, tint_warning
from ddpm_hf.utils.files import write
from ddpm_hf.utils.pictures import channel_names
from ddpm_hf.utils.results import noise_warning, number

SETS = {"train": "training images", "held_out": "held-out images"}
MEMORIZATION = {"memorization_features": "by features", "memorization_pixels": "by pixels"}
TOGETHER = (  # metrics that are shown only together
    *(tuple(f"{name}_{of}" for name in QUALITIES) for of in SETS),
    ("inception_score", "inception_score_real"),
)
KNOWN = {
    *(f"{name}_{of}" for name in DISTANCES for of in (*SETS, "train_matched", "real")),
    "inception_score_matched",
    *(name for group in TOGETHER for name in group),
    *(BITS | MEMORIZATION | DRIFTS | LOSSES),
    "neighbour_correlation",
}


def write_report(path: Path, evaluation: dict, pictures: dict[str, Image.Image], by_timestep: list[dict]) -> None:
    """Write the page, atomically.

    Args:
        evaluation: "protocol", any nested dictionary, and "metrics", each {"name", "value", "stderr", "n", ...}. The
            page leaves out missing metrics, and has a table for metrics that are not in `KNOWN`.
        pictures: any of "samples", "real" and "memorization".
        by_timestep: rows {"timestep", "loss_held_out", "loss_train", "bits" (if defined), "x0_rmse", "x0_slope",
            "x0_bias"}.
    """
    protocol, metrics = evaluation["protocol"], dict(evaluation["metrics"])
    withheld = _withhold(metrics)
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters |= {"number": number, "z_score": z_score, "channel_names": channel_names}
    template = resources.files("ddpm_hf.evaluation").joinpath("report.html").read_text(encoding="utf-8")
    page = environment.from_string(template).render(
        name=protocol.get("model", {}).get("name", "A model"),
        summary=_summary(protocol),
        cards=_cards(metrics),
        noise=noise_warning(metrics),
        few=few_samples_warning({"protocol": protocol, "metrics": metrics}),
        tint=tint_warning(evaluation),
        protocol=json.dumps(protocol, indent=2, ensure_ascii=False),
        metrics=metrics,
        tables=_tables(metrics),
        withheld=withheld,
        pictures={name: _uri(_png(picture), "png") for name, picture in pictures.items()},
        charts={
            key: (title, *(_uri(svg.encode(), "svg+xml") for svg in svgs))
            for key, (title, *svgs) in draw_charts(metrics, by_timestep).items()
        },
        memorization=MEMORIZATION,
        verdict=functools.partial(verdict, noise=noise_warning(metrics) is not None),
        drifts=DRIFTS,
    )
    write(path, page)


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def z_score(metric: dict) -> str:
    return f"{metric['value']:.2f}".replace("-", "\u2212")


def verdict(metric: dict, noise: bool = False) -> tuple[str, str]:
    """The result of the nearness test: "good", "unclear" or "bad", and its meaning in words.

    Args:
        noise: whether the samples are noise, of which the test says nothing.
    """
    if noise:
        return "unclear", "not images yet"
    z, copies = metric["value"], metric.get("copies") or 0.0
    if copies > max(0.01, 2 * (metric.get("copies_held_out") or 0.0)):
        return "bad", f"copies of training images in {copies:.1%} of all cases: the second nearest image is far off"
    if z < -3:
        return "unclear", (
            "nearer to the training images than held-out images are: they are copies, or smoother or paler than real "
            "images; look at the pairs"
        )
    if z < -2:
        return "unclear", "perhaps nearer to the training images than held-out images are; look at the pairs"
    if z <= 2:
        return "good", "no nearer to the training images than held-out images are"
    return "unclear", "farther from the training images than held-out images are: no copies, but unlike the data"


def _withhold(metrics: dict) -> list[str]:
    """Remove the metrics that are misleading alone if the others were not measured, and return their names."""
    withheld = []
    for group in TOGETHER:
        missing = [key for key in group if not has(metrics, key)]
        names = [metrics.pop(key)["name"] for key in group if missing and key in metrics]
        if names:
            withheld.append(f"{', '.join(names)} (without {', '.join(missing)})")
    return withheld


def _cards(metrics: dict) -> list[dict]:
    """The most important values, each with a value to compare it with."""
    cards, shown = [], {key: number(metrics[key]) for key in metrics if has(metrics, key)}

    def add(name: str, text: str, detail: str, tone: str = "") -> None:
        cards.append({"name": name, "number": text, "detail": detail, "tone": tone})

    for key in [key for of in SETS for name in DISTANCES if (key := f"{name}_{of}") in shown][:1]:
        family, of = key.split("_", 1)
        real, matched = f"{family}_real", f"{key}_matched"
        detail = f"held-out images: {shown[real]}" if real in shown else ""
        if real in shown and matched in shown:
            detail = f"with {metrics[real]['n']:,} images: samples {shown[matched]}, held-out images {shown[real]}"
        add(f"{DISTANCES[family]} to {SETS[of]}", shown[key], detail)
    if not cards and "precision_train" in shown:
        add("Precision and recall", f"{shown['precision_train']} and {shown['recall_train']}", "with training images")
    for key in [key for key in BITS if key in shown][:1]:
        details = [f"a code without any model needs {shown['bpd_uniform']}"] if "bpd_uniform" in shown else []
        details += [f"{shown['bpd_floor']} of them are due to the fixed variance"] if "bpd_floor" in shown else []
        add(f"Bits per dimension: {BITS[key]}", shown[key], "; ".join(details))
    for key in [key for key in MEMORIZATION if key in shown][:1]:
        tone, words = verdict(metrics[key], noise_warning(metrics) is not None)
        add(f"Memorisation, {MEMORIZATION[key]}", f"z = {z_score(metrics[key])}", f"Samples are {words}.", tone)
    return cards


def _tables(metrics: dict) -> dict[str, tuple[list[str], list[tuple[str, list]]]]:
    """For each table its column heads and its rows: a title, and one metric per column, or None."""
    between = {of: f"samples to {title}" for of, title in SETS.items()}
    between |= {
        "train_matched": "equally many samples as held-out images, to training images",
        "real": "real images: held-out to training",
    }
    families = [name for name in DISTANCES if any(f"{name}_{of}" in metrics for of in between)]
    judged = [of for of in SETS if f"recall_{of}" in metrics]
    tables = {
        "distances": (
            [DISTANCES[name] for name in families],
            {title: [f"{name}_{of}" for name in families] for of, title in between.items()},
        ),
        "qualities": (
            [f"against {SETS[of]}" for of in judged],
            {name: [f"{name}_{of}" for of in judged] for name in QUALITIES},
        ),
        "inception_score": (
            ["samples", "equally many samples as real images", "real images"],
            {"Inception Score": ["inception_score", "inception_score_matched", "inception_score_real"]},
        ),
        "bits": (["bits/dim"], {title: [key] for key, title in BITS.items()}),
        "losses": (["mean squared error, mean over timesteps"], {title: [key] for key, title in LOSSES.items()}),
        "more": (["value"], {metrics[key].get("name", key): [key] for key in metrics if key not in KNOWN}),
    }
    found = {}
    for key, (heads, rows) in tables.items():
        rows = [(title, [metrics.get(name) for name in names]) for title, names in rows.items()]
        found[key] = heads, [(title, cells) for title, cells in rows if any(cells)]
    return {key: table for key, table in found.items() if table[1]}


def _summary(protocol: dict) -> str:
    """The most important settings, such as "2,000 samples · ddpm · 50 steps"."""
    words = {"num_samples": "{:,} samples", "solver": "{}", "num_inference_steps": "{} steps"}
    words |= {"guidance_scale": "guidance {:g}", "weights": "{} weights", "dtype": "{}", "seed": "seed {}"}
    return " · ".join(text.format(protocol[key]) for key, text in words.items() if key in protocol)

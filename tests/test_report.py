"""The report: what the page says, and what it must not say."""

import ast
import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ddpm_hf.evaluation.report
from ddpm_hf.evaluation.charts import CURVES, UNITS, draw_charts
from ddpm_hf.evaluation.comparison import tint_warning
from ddpm_hf.evaluation.report import KNOWN, verdict, write_report
from ddpm_hf.utils.results import noise_warning, number


def metric(value, stderr=None, n=2000, **more):
    return {"name": "in words", "value": value, "stderr": stderr, "n": n, **more}


def full(num_samples=2000):
    """An evaluation with all metrics. No two values are the same."""
    metrics = {
        "bpd": metric(3.7512, 0.011, 500, total_nats=7987.3, total_nats_stderr=23.8, prior=2e-5, kl=1.968, decoder=1.7),
        "bpd_floor": metric(1.4312, None, 500),
        "bpd_uniform": metric(8.0001, None, 500),
        "bpd_fast": metric(3.7623, 0.023, 500),
        "bpd_fast_train": metric(3.6101, 0.024, 500),
        "inception_score": metric(7.913, 0.081),
        "inception_score_matched": metric(7.713, 0.181, 500),
        "inception_score_real": metric(9.871, 0.102, 500),
        "memorization_pixels": metric(0.4123, p_value=0.66, median_ratio=1.0123, n_held_out=497, copies=0.0),
        "memorization_features": metric(-5.3111, p_value=5.4e-8, median_ratio=0.6831, n_held_out=497),
        "channel_mean_drift": metric(0.0123, 0.002, channels=[0.0123, -0.0041], samples=[-0.012, -0.051], train=[0, 1]),
        "channel_std_drift": metric(0.0211, 0.001, channels=[-0.0211, 0.018], samples=[0.47, 0.48], train=[0.5, 0.51]),
        "neighbour_correlation": metric(0.5317, 0.0041, 500, training_images=0.6217),
        "loss_held_out": metric(0.03123, 0.0004, 500),
        "loss_train": metric(0.02987, 0.0005, 500),
    }
    for k, family in enumerate(("fid", "fd", "kid")):
        for j, of in enumerate(("train", "held_out", "train_matched", "real")):
            metrics[f"{family}_{of}"] = metric(8.37 + 1.11 * k + 0.13 * j, 0.05)
    for k, name in enumerate(("precision", "recall", "density", "coverage")):
        for j, of in enumerate(("train", "held_out")):
            metrics[f"{name}_{of}"] = metric(0.6113 + 0.1 * k + 0.013 * j, 0.0102)
    protocol = {
        "model": {"name": "small", "sha256": "9f86d081" * 8, "parameters": 35746307},
        "num_samples": num_samples,
        "seed": 20240,
        "guidance_scale": 1.5,
        "class_labels": list(range(1000)),
        "reference": {"train": {"name": "digits", "n": 1297}},
    }
    return {"protocol": protocol, "metrics": metrics}


def only(*names, **settings):
    evaluation = full(**settings)
    return evaluation | {"metrics": {name: evaluation["metrics"][name] for name in names}}


def picture(mode="RGB"):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)).convert(mode)


ROWS = [
    {"timestep": t, "loss_held_out": 1 / (1 + t), "loss_train": 0.9 / (1 + t), "bits": bits}
    | {"x0_rmse": t / 1000, "x0_slope": 1 - t / 1e4, "x0_bias": 0.0}
    for t, bits in ((0, 1.8), (10, None), (500, 0.01), (999, 1e-4))
]


class Page(HTMLParser):
    """The visible text, the tags and all addresses."""

    def __init__(self, html):
        super().__init__()
        self.html, self.tags, self.text, self.addresses = html, [], "", []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "srcset", "href", "data", "action")]

    def handle_data(self, data):
        if self.tags[-1:] != ["style"]:
            self.text += data


def report(folder, evaluation, pictures=None, rows=()):
    folder.mkdir(exist_ok=True)
    write_report(folder / "report.html", evaluation, pictures or {}, list(rows))
    assert [path.name for path in folder.iterdir()] == ["report.html"]
    return Page((folder / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def full_page(tmp_path_factory):
    pictures = {"samples": picture(), "real": picture("L"), "memorization": picture("RGBA")}
    return report(tmp_path_factory.mktemp("full"), full(), pictures, ROWS)


def test_every_metric_has_its_interval(full_page):
    metrics = full()["metrics"]
    assert metrics.keys() == KNOWN
    for name, each in metrics.items():
        if name.startswith("memorization"):
            continue
        assert number(each) in full_page.text, name
    assert "z = 0.41, p = 0.66; the median distance to the nearest training image is 1.01 times" in full_page.text
    assert "z = \u22125.31, p < 0.001" in full_page.text
    assert (
        "nearer to the training images than held-out images are: they are copies, or smoother or paler"
        in full_page.text
    )
    assert "samples are no nearer to the training images than held-out images are" in full_page.text
    assert "The total is 7,987 ± 47 nats" in full_page.text
    assert "\u22120.0041" in full_page.text  # a channel's drift
    assert "2,000 samples · guidance 1.5 · seed 20240" in full_page.text
    assert full_page.text.index("Samples and real images") < full_page.text.index("Distance of samples")


def test_the_page_loads_no_other_file(full_page):
    assert len(full_page.addresses) == 3 + 2 * 11  # pictures, and charts for light and dark pages
    for address in full_page.addresses:
        kind, data = re.fullmatch(r"data:image/(png|svg\+xml);base64,(\S+)", address).groups()
        assert base64.b64decode(data).startswith(b"\x89PNG" if kind == "png" else b"<?xml")
        if kind != "png":  # an SVG may refer only to itself
            assert all(to.startswith(b"#") for to in re.findall(rb'href="([^"]*)"', base64.b64decode(data)))
    assert not {"script", "link", "iframe", "object", "a"} & set(full_page.tags)


def test_every_picture_has_an_alternative_text(full_page, tmp_path):
    texts = re.findall(r'<img src="[^"]*" alt="([^"]*)">', full_page.html)
    assert len(texts) == full_page.tags.count("img") == 3 + 11
    assert all(len(text) > 10 for text in texts)


def test_every_chart_says_what_its_axes_are():
    for key, (_, light, _) in draw_charts(full()["metrics"], ROWS).items():
        comments = re.findall("<!-- (.*?) -->", light)
        assert any(
            word in comments for word in (*UNITS.values(), "distance", *(each[1] for each in CURVES.values()))
        ), key
        assert key not in CURVES or "timestep (0 has the least noise)" in comments


def test_the_page_has_the_whole_protocol(full_page):
    start = full_page.text.index("{", full_page.text.index("How it was measured"))
    assert json.JSONDecoder().raw_decode(full_page.text[start:])[0] == full()["protocol"]


@pytest.mark.parametrize(
    ("evaluation", "sections"),
    [
        (only("bpd"), ["Bits per dimension"]),
        (only("bpd_fast"), ["Bits per dimension"]),
        (only("fd_train", num_samples=10_000), ["Distance of samples from real images"]),
        (only("memorization_pixels"), ["Memorisation of training images"]),
        (only("channel_std_drift"), ["Colours"]),
        (only("loss_train"), ["By timestep"]),
        (only(), []),
        ({"protocol": {}, "metrics": {}}, []),
    ],
)
def test_missing_metrics_have_no_section(tmp_path, evaluation, sections):
    report(tmp_path, evaluation)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert re.findall("<h2>(.*)</h2>", html) == sections
    for each in evaluation["metrics"].values():
        assert number(each) in html or f"z = {each['value']:.2f}" in html


@pytest.mark.parametrize("given", [["precision_train"], ["recall_held_out"], ["inception_score"]])
def test_metrics_that_are_misleading_alone_are_not_shown_alone(tmp_path, given):
    page = report(tmp_path, only("bpd", *given))
    assert number(full()["metrics"][given[0]]) not in page.text
    assert "these metrics are misleading alone: in words (without " in page.text


def test_an_unknown_metric_and_one_without_a_value(tmp_path):
    evaluation = {
        "protocol": {},
        "metrics": {"news": metric(0.12345), "fd_train": metric(None), "kid_train": metric(0.004)},
    }
    page = report(tmp_path, evaluation)
    assert "More" in page.text
    for text in ("0.1235", "no value", "0.004"):
        assert text in page.text


def test_few_samples_have_a_warning(tmp_path):
    few = "do not include this bias"
    assert few in report(tmp_path / "a", only("fd_train", num_samples=9_999)).text
    assert few not in report(tmp_path / "b", only("fd_train", num_samples=10_000)).text
    assert few not in report(tmp_path / "c", only("bpd")).text  # needs no samples


def test_names_are_escaped(tmp_path):
    hostile = "<script>alert(1)</script>\"'> {{ 7 * 7 }} $\\frac{$"
    evaluation = {
        "protocol": {"model": {"name": hostile}, "solver": hostile, hostile: {hostile: [hostile]}, "sha": hostile},
        "metrics": {"fd_train": metric(1.5, n=7) | {"name": hostile}, "news": metric(2.5) | {"name": hostile}},
    }
    page = report(tmp_path, evaluation)
    assert "script" not in page.tags
    assert page.text.count(hostile) >= 3  # and escaped as JSON in the protocol
    assert "\n49" not in page.text


def test_the_page_is_written_atomically(tmp_path, monkeypatch):
    picture().save(tmp_path / "whole.png")
    cut = (tmp_path / "whole.png").read_bytes()[:-200]
    (tmp_path / "whole.png").write_bytes(cut)
    report(tmp_path / "report", only("bpd"))
    before = {path: path.read_bytes() for path in (tmp_path / "report").iterdir()}
    with pytest.raises(OSError, match="truncated"), Image.open(tmp_path / "whole.png") as broken:
        write_report(tmp_path / "report" / "report.html", full(), {"samples": broken}, [])
    assert {path: path.read_bytes() for path in (tmp_path / "report").iterdir()} == before

    def full_disk(path, data):
        with open(path, "wb") as file:
            file.write(data[:10])
        raise OSError("no space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_report(tmp_path / "report" / "report.html", only("loss_train"), {}, [])
    assert {path: path.read_bytes() for path in (tmp_path / "report").iterdir()} == before


def test_importing_the_report_does_not_import_matplotlib():
    module = ast.parse(Path(ddpm_hf.evaluation.report.__file__).read_text(encoding="utf-8"))
    imports = [ast.unparse(node) for node in module.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert len(imports) > 5
    assert "matplotlib" not in " ".join(imports)


def test_the_verdict_on_nearness():
    assert verdict({"value": -0.4, "copies": 0.0, "copies_held_out": 0.0})[0] == "good"
    tone, words = verdict({"value": -9.0, "copies": 0.0, "copies_held_out": 0.0})
    assert (tone, "smoother or paler" in words) == ("unclear", True)
    tone, words = verdict({"value": -1.0, "copies": 0.25, "copies_held_out": 0.01})
    assert (tone, "copies of training images in 25.0% of all cases" in words) == ("bad", True)
    assert verdict({"value": -1.0, "copies": 0.25, "copies_held_out": 0.2})[0] == "good"  # the data have copies


def test_no_metric_is_good_when_samples_are_noise(tmp_path):
    """Noise can be "no nearer to the training images", and have a precision of 1."""
    evaluation = only("memorization_pixels", "precision_train", "neighbour_correlation")
    page = report(tmp_path / "images", evaluation)
    assert "no nearer to the training images" in page.text
    assert 'class="good"' in page.html
    assert "not images" not in page.text
    evaluation["metrics"]["neighbour_correlation"]["value"] = 0.31
    page = report(tmp_path / "noise", evaluation)
    assert "These samples are not images yet: the correlation of neighbouring pixels is 0.31, and 0.62 in" in page.text
    assert "no nearer to the training images" not in page.text
    assert 'class="good"' not in page.html


@pytest.mark.parametrize(
    ("value", "real", "noise"),
    [(0.01, 0.4, True), (0.3, 0.4, False), (-0.01, 0.4, True), (-0.3, -0.3, False), (0.01, -0.3, True),
     (0.0, 0.09, False), (0.0, None, False), (None, 0.4, False)],
)  # fmt: skip
def test_what_noise_is(value, real, noise):
    """The sign counts: in a chessboard, neighbours are opposites."""
    found = noise_warning({"neighbour_correlation": {"value": value, "training_images": real}})
    assert (found is not None) == noise
    assert noise_warning({}) is None


@pytest.mark.parametrize(("value", "stderr", "prediction_type", "helps"), [
    (0.2, 0.01, "epsilon", "--prediction_type v_prediction often helps, also with rescale_betas_zero_snr=true"),
    (0.2, 0.01, "v_prediction", "more sampling steps (--num_inference_steps) or a longer training often help"),
    (0.04, 0.001, "epsilon", None),
    (0.2, 0.1, "epsilon", None),
    (0.2, None, "epsilon", None),
])  # fmt: skip
def test_a_tint_is_told_with_what_helps(tmp_path, value, stderr, prediction_type, helps):
    evaluation = only("channel_mean_drift")
    evaluation["metrics"]["channel_mean_drift"] |= {"value": value, "stderr": stderr}
    evaluation["protocol"]["model"]["scheduler"] = {"prediction_type": prediction_type}
    told = tint_warning(evaluation)
    assert (told is None) == (helps is None)
    text = report(tmp_path / "report", evaluation).text
    if helps:
        assert f"the mean of a channel differs by {value} of 2" in told
        assert helps in told
        assert told in text
    assert ("tinted" in text) == (helps is not None)


def test_the_tint_of_noise_is_not_told():
    evaluation = only("channel_mean_drift", "neighbour_correlation")
    evaluation["metrics"]["channel_mean_drift"] |= {"value": 0.5}
    assert "tinted" in tint_warning(evaluation)
    evaluation["metrics"]["neighbour_correlation"] |= {"value": 0.01}
    assert tint_warning(evaluation) is None

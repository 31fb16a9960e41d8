"""Comparison of evaluations."""

import copy
import json

import pytest

from ddpm_hf.evaluation.comparison import compare, table
from ddpm_hf.utils.results import number, read_evaluation

EVALUATION = {
    "protocol": {"model": {"name": "a", "sha256": "1"}, "weights": "ema", "num_samples": 2000,
                 "features": {"name": "digits", "sha256": "f"}, "versions": {"torch": "2.13.0"}},
    "metrics": {"fd_train": {"name": "Fréchet distance", "value": 4.0, "stderr": 0.5, "n": 2000},
                "bpd": {"name": "Bits", "value": 5.0, "stderr": 0.1, "n": 64},
                "memorization_pixels": {"name": "z", "value": -0.5, "stderr": None, "n": 1000}},
}  # fmt: skip


@pytest.fixture
def files(tmp_path):
    def write(name, change=lambda evaluation: None):
        evaluation = copy.deepcopy(EVALUATION)
        change(evaluation)
        (tmp_path / name).write_text(json.dumps(evaluation))
        return str(tmp_path / name)

    return write


def test_two_models_with_the_same_protocol(files):
    def other(evaluation):
        evaluation["protocol"]["model"] = {"name": "b", "sha256": "2"}
        evaluation["metrics"]["fd_train"]["value"] = 5.0
        evaluation["metrics"]["bpd"]["value"] = 4.0
        evaluation["metrics"]["more"] = {"name": "only in b", "value": 1.0, "stderr": None, "n": 1}

    a, b = files("a.json"), files("b.json", other)
    head, fd, bits, z = compare([a, b])
    assert head.split() == [a, b]
    assert fd.split() == ["fd_train", "4.00", "±", "0.98", "5.00", "±", "0.98", "+1", "(within", "the", "error)"]
    assert bits.split() == ["bpd", "5.00", "±", "0.20", "4.00", "±", "0.20", "\u22121"]
    assert z.split() == ["memorization_pixels", "\u22120.5", "\u22120.5"]


@pytest.mark.parametrize(("change", "message"), [
    (lambda p: p.update(num_samples=5000), "num_samples is 2000 in .*a.json and 5000 in .*b.json.*pass --across num_"),
    (lambda p: p["features"].update(sha256="g"), "features.sha256 is 'f' in .* and 'g' in .*--across features.sha256"),
    (lambda p: p.pop("weights"), "weights is 'ema' in .* and 'missing' in"),
    (lambda p: p["versions"].update(scipy="1.0"), "versions.scipy is 'missing' in .* and '1.0' in"),
])  # fmt: skip
def test_different_protocols_raise_with_the_differences(files, change, message):
    a, b = files("a.json"), files("b.json", lambda evaluation: change(evaluation["protocol"]))
    with pytest.raises(ValueError, match=f"different protocols: .*{message}"):
        compare([a, b])
    across = ["num_samples", "features", "weights", "versions.scipy"]
    assert len(compare([a, b], across)) == 4
    with pytest.raises(ValueError, match="different protocols"):
        compare([a, b], ["seed"])


def test_files_that_cannot_be_compared(files, tmp_path):
    a = files("a.json")
    with pytest.raises(ValueError, match="at least two files"):
        compare([a])
    with pytest.raises(ValueError, match=r"nothing\.json can't be read"):
        compare([a, str(tmp_path / "nothing.json")])
    for text in ("[]", "{", '{"protocol": 1, "metrics": {}}', '{"metrics": {}}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=r"bad\.json (can't be read|is not an evaluation)"):
            read_evaluation(tmp_path / "bad.json")


def test_a_table_has_every_metric(files):
    lines = table(read_evaluation(files("a.json")))
    assert [line.split()[0] for line in lines] == list(EVALUATION["metrics"])
    assert "4.00 ± 0.98" in lines[0]
    assert lines[0].endswith("Fréchet distance")


@pytest.mark.parametrize(("value", "stderr", "text"), [
    (3.14159, 0.1, "3.14 ± 0.20"), (1234.5, 20.0, "1,234 ± 39"), (None, None, "no value"),
    (float("nan"), 1.0, "no value"), (-0.00004, 0.00021, "\u22120.00004 ± 0.00041"),
    (-0.5, None, "\u22120.5"), (2.0, float("inf"), "2 ± unknown"), (2.0, 0.0, "2 ± 0"),
])  # fmt: skip
def test_a_number_has_as_many_digits_as_its_interval_warrants(value, stderr, text):
    assert number({"value": value, "stderr": stderr}) == text

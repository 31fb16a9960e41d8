"""Hostile arguments end in one short sentence, at once and without memory. `DDPM_HF_FUZZ` is the number of cases."""

import os
import resource
import shutil
import time

import pytest
from hostile import Cases
from huggingface_hub import constants

CASES = int(os.environ.get("DDPM_HF_FUZZ", 1000))
LONGEST, SECONDS, BYTES = 500, 5, 2**30


def fault_of(what, call, capsys) -> str | None:
    """What is wrong with how a call ends; None if it succeeds or is refused in one sentence."""
    started = time.perf_counter()
    try:
        status = call()
        message = ""
        if what.startswith("main ") and status == 2:  # the command line prints its one line
            message = capsys.readouterr().err.removesuffix("\n")
            if not message.startswith("ddpm-hf: error: "):
                return f"no line of error but {message[:200]!r}"
    except ValueError as error:
        message = str(error)
        if not message:
            return "no words"
    except OSError as error:  # only of a download, as `from_pretrained` documents
        message = str(error)
        if "is not a local folder, and downloading it failed" not in message:
            return f"{type(error).__name__}: {message[:200]}"
    except SystemExit as stop:
        return None if stop.code == 0 else f"status {stop.code}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    if len(message) > LONGEST or "\n" in message:
        return f"{len(message)} characters in {message.count(chr(10)) + 1} lines: {message[:200]}"
    seconds = time.perf_counter() - started
    return f"{seconds:.1f} s" if seconds > SECONDS else None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_hostile_arguments_end_in_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cases = Cases(tmp_path / "changed", tmp_path / "saved")
    cases.pipeline.save_pretrained(tmp_path / "saved")
    shutil.copytree(tmp_path / "saved", tmp_path / "changed")
    before, faults = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, {}
    for number, (what, call, changed) in zip(range(CASES), cases):
        if fault := fault_of(what, call, capsys):
            faults[f"{number} {what} {str({k: repr(type(v)) for k, v in changed.items()})[:120]}"] = fault
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    assert not faults, f"{len(faults)} of {CASES}:\n" + "\n".join(f"{what}: {fault}" for what, fault in faults.items())
    assert grown < BYTES

"""Files that are there whole or not at all, their modes and encodings, and locks."""

import ast
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError

from ddpm_hf.utils import files
from ddpm_hf.utils.files import (
    clear_parts,
    free_name,
    locked,
    save_picture,
    save_tensors,
    set_aside,
    write,
    writing_tree,
)
from ddpm_hf.utils.yaml_files import read_yaml

PACKAGE = Path(files.__file__).parents[1]
WRITERS = {
    "text": lambda path: write(path, "Grüße, 画像"),
    "bytes": lambda path: write(path, b"\0" * 100),
    "picture": lambda path: save_picture(Image.new("L", (8, 8)), path),
    "tensors": lambda path: save_tensors({"x": torch.ones(3)}, path),
}


def path_of(folder: Path, kind: str) -> Path:
    return folder / {"picture": "a.png", "tensors": "a.safetensors"}.get(kind, "a.txt")


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_the_mode_of_a_file_is_that_of_the_umask(tmp_path, kind, umask):
    before = os.umask(umask)
    try:
        WRITERS[kind](path_of(tmp_path, kind))
    finally:
        os.umask(before)
    assert stat.S_IMODE(path_of(tmp_path, kind).stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("kind", WRITERS)
def test_a_write_that_fails_leaves_what_was_there(tmp_path, kind, monkeypatch):
    path = path_of(tmp_path, kind)
    path.write_bytes(b"before")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/a\.") as caught:
        WRITERS[kind](path)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == [path.name]


def test_a_full_disk_is_an_os_error_for_tensors_too(tmp_path, monkeypatch):
    def full(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        WRITERS["tensors"](tmp_path / "a.safetensors")
    assert caught.value.errno == 28
    with pytest.raises(OSError, match="No space left"), writing_tree(tmp_path):
        full()


def test_file_systems_that_have_no_fsync_are_written_to(tmp_path, monkeypatch):
    def unknown(*_):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(files.os, "fsync", unknown)
    write(tmp_path / "a.txt", "a")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "a"


def test_text_is_utf_8_in_every_locale(tmp_path):
    code = f"from ddpm_hf.utils.files import write; write({str(tmp_path / 'a.txt')!r}, 'Gr\\u00fc\\u00dfe')"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert (tmp_path / "a.txt").read_bytes() == "Grüße".encode()


def calls(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            yield node, name, {word.arg: word.value for word in node.keywords}


def is_text_of_the_locale(node: ast.Call, name: str, words: dict) -> bool:
    """Whether a call reads or writes text in the encoding of the locale, which differs between machines."""
    if "encoding" in words:
        return False
    if name in ("run", "Popen", "check_output"):
        return "text" in words or "universal_newlines" in words
    if name not in ("open", "fdopen"):
        return name in ("read_text", "write_text", "TextIOWrapper")
    method = isinstance(node.func, ast.Attribute) and name == "open"
    if method and ast.unparse(node.func.value) in ("Image", "fsspec", "os", "zipped"):  # which open as bytes
        return False
    mode = words.get("mode") or next(iter(node.args[0 if method else 1 :]), None)
    return not (isinstance(mode, ast.Constant) and "b" in str(mode.value))


@pytest.mark.parametrize("folder", ["ddpm_hf", "examples", "benchmarks"])
def test_every_text_has_an_encoding(folder):
    for path in (PACKAGE.parent / folder).rglob("*.py"):
        for node, name, words in calls(ast.parse(path.read_text(encoding="utf-8"))):
            assert not is_text_of_the_locale(node, name, words), f"{path}:{node.lineno}"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("open(path)", True),
        ("zipped.open(member)", False),
        ("path.open('w', newline='')", True),
        ("os.fdopen(1, 'w')", True),
        ("path.read_text()", True),
        ("run(command, text=True)", True),
        ("open(path, mode='rb')", False),
        ("path.open('wb')", False),
        ("Image.open(path)", False),
        ("open(path, encoding='utf-8')", False),
    ],
)
def test_calls_without_an_encoding_are_found(line, expected):
    (found,) = calls(ast.parse(line))
    assert is_text_of_the_locale(*found) == expected


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.name)
def test_every_file_has_one_writer(path):
    """Whatever writes goes through files.py."""
    for node, name, _ in calls(ast.parse(path.read_text(encoding="utf-8"))):
        where = f"{path.name}:{node.lineno}"
        if path.name == "files.py":
            continue
        assert name not in ("write_text", "write_bytes", "save_file", "mkstemp", "NamedTemporaryFile"), where
        if name in ("save", "savefig", "savez") and isinstance(node.func, ast.Attribute):
            target = ast.unparse(node.args[0]) if node.args else ""
            buffered = any(word in target for word in ("beside", "buffer", "file"))
            ours = ast.unparse(node.func.value).split(".")[-1] in ("config", "checkpoints", "film")
            assert buffered or ours, f"{where}: {ast.unparse(node)}"


def test_damaged_files_are_set_aside_and_none_is_lost(tmp_path, caplog):
    for content in ("a", "b", "c"):
        (tmp_path / "log.csv").write_text(content, encoding="utf-8")
        set_aside(tmp_path / "log.csv", "line 3 is no row")
    assert sorted(os.listdir(tmp_path)) == ["log.csv.damaged", "log.csv.damaged-2", "log.csv.damaged-3"]
    assert (tmp_path / "log.csv.damaged-2").read_text(encoding="utf-8") == "b"
    assert "log.csv is damaged (line 3 is no row): it was renamed to log.csv.damaged-3" in caplog.text
    assert free_name(tmp_path / "new") == tmp_path / "new"


def test_parts_of_processes_that_are_gone_are_cleared_and_those_of_others_stay(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    here = socket.gethostname()
    for name in (f"{here}-{ended.pid}-a.png", f"{here}-{os.getpid()}-a.png", f"elsewhere-{ended.pid}-a.png"):
        (tmp_path / f".part-{name}").touch()
    clear_parts(tmp_path)
    kept = {f".part-{here}-{os.getpid()}-a.png", f".part-elsewhere-{ended.pid}-a.png"}
    assert set(os.listdir(tmp_path)) == kept


HOLD = """
import sys
from ddpm_hf.utils.files import locked
with locked(sys.argv[1], "train"):
    print("in", flush=True)
    sys.stdin.read()
"""


def test_one_process_holds_a_lock_until_it_ends_however_it_ends(tmp_path):
    for end in ("kill", "close"):
        folder = tmp_path / end / "run"
        other = subprocess.Popen(
            [sys.executable, "-c", HOLD, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert other.stdout.readline() == "in\n"
        with (
            pytest.raises(ValueError, match=rf"{folder} is in use by process {other.pid} on .*: wait until"),
            locked(folder, "train"),
        ):
            pass
        with locked(folder, "evaluate"):  # something else
            pass
        if end == "kill":
            other.kill()
        other.communicate()
    assert os.listdir(tmp_path) == ["kill"]  # the other was made for the lock alone
    with locked(tmp_path / "kill/run", "train"):
        (tmp_path / "kill/run/kept").touch()
    assert os.listdir(tmp_path / "kill/run") == ["kept"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("a: &a [1, 1]\nb: &b [*a, *a]\nc: [*b, *b]\n", "has aliases"),
        ("a: " + "[" * 20_000, "nested too deeply"),
        ("a: " + "x" * 300_000, "300,003 bytes, more than the limit of 262,144"),
    ],
)
def test_hostile_settings_end_in_one_short_sentence(tmp_path, content, reason):
    (tmp_path / "a.yaml").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=reason) as caught:
        read_yaml(tmp_path / "a.yaml", "config")
    assert len(str(caught.value)) <= 500

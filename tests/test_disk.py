"""A disk that is full or read-only, too many open files, a network that is gone: one sentence, nothing half-written."""

import errno
import functools
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_config, tiny_unet
from PIL import Image
from torch.optim import AdamW

from ddpm_hf import DDPMCustomPipeline, LinearNoiseScheduler
from ddpm_hf.commands.main import _in_one_line, _is_expected, main
from ddpm_hf.data.config import DataConfig
from ddpm_hf.data.dataset import load_images
from ddpm_hf.training import train
from ddpm_hf.training.checkpoints import Checkpoints, save_pipeline
from ddpm_hf.training.ema import EMA
from ddpm_hf.utils.files import append, locked, write

SETTINGS = {"max_train_steps": 4, "checkpointing_steps": 2, "checkpoints_total_limit": 1}
CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.fsync")  # audit events, and fsync, which has none
LISTS = ("os.listdir", "os.scandir")
WRITING = os.O_WRONLY | os.O_RDWR


class Disk:
    """A context in which calls of the operating system in a folder fail.

    Args:
        number: the error that they fail with; 0 only counts them.
        first: the first call that fails.
        once: only this one fails, and not all after it.
    """

    current = None

    def __init__(self, folder: Path, number: int = 0, first: int = 10**9, once: bool = False):
        self.folder, self.number, self.first, self.once, self.count = str(folder), number, first, once, 0

    def __enter__(self):
        Disk.current = self
        return self

    def __exit__(self, *_):
        Disk.current = None

    def fails_for(self, event: str, writes: bool) -> bool:
        if self.number in (errno.ENOSPC, errno.EDQUOT):  # what needs room
            return event in ("os.rename", "os.mkdir", "os.fsync") or (event == "open" and writes)
        if self.number == errno.EMFILE:  # what opens
            return event in ("open", *LISTS)
        return event in (*CHANGES, *LISTS, "open")

    def see(self, event: str, args: tuple) -> None:
        path = str(args[0]) if args else ""
        writes = event == "open" and bool((args[2] or 0) & WRITING)
        if (event == "os.fsync" or path.startswith(self.folder)) and self.fails_for(event, writes):
            self.count += 1
            if self.count == self.first or (self.count > self.first and not self.once):
                raise OSError(self.number, os.strerror(self.number), *([path] if path else []))


def _audit(event: str, args: tuple) -> None:
    if Disk.current is not None and (event in (*CHANGES, *LISTS, "open")):
        Disk.current.see(event, args)


sys.addaudithook(_audit)  # which nobody can remove, so without a `Disk` it does nothing


@pytest.fixture(autouse=True)
def _audited_fsync(monkeypatch):
    def fsync(number, call=os.fsync):
        sys.audit("os.fsync")
        return call(number)

    monkeypatch.setattr(os, "fsync", fsync)


def check_whole(folder: Path) -> None:
    """What is in the folder of a run is whole."""
    for path in Checkpoints(folder, 9).found():
        Checkpoints(folder, 9)._state(path)
    if (folder / "model_index.json").exists():
        assert DDPMCustomPipeline.from_pretrained(folder)


def hidden(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.name.startswith(".")]


NUMBERS = ("ENOSPC", "EROFS", "EMFILE", "ESTALE", "EDQUOT")


@pytest.fixture(scope="module")
def half(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("half") / "run"
    train(tiny_config(folder, **{**SETTINGS, "max_train_steps": 2}))
    return folder


def ends(call) -> str | None:
    """The sentence in which a call ends; None if it succeeds."""
    try:
        call()
    except Exception as error:
        if not _is_expected(error):
            raise
        return _in_one_line(error)
    return None


@pytest.mark.parametrize(
    ("name", "once", "every"),
    [("ENOSPC", False, 6), ("ENOSPC", True, 6), ("EMFILE", False, 8), ("ESTALE", True, 8)]
    + [pytest.param(name, once, 1, marks=pytest.mark.slow) for name in NUMBERS for once in (False, True)],
)
def test_a_save_that_fails_leaves_what_was_there(tmp_path, half, name, once, every):
    """Whichever call fails: no half checkpoint, and the pipeline and the checkpoint before are whole."""
    number, unet = getattr(errno, name), tiny_unet()
    pipeline, ema, optimizer = (
        DDPMCustomPipeline(tiny_unet(), LinearNoiseScheduler()),
        EMA(unet, 0.9),
        AdamW(unet.parameters()),
    )
    unet(torch.zeros(1, 1, 8, 8), 3).sample.mean().backward()
    optimizer.step()

    def save(folder: Path) -> None:
        Checkpoints(folder, 1).save(4, 4, unet, ema, optimizer)
        save_pipeline(folder, pipeline, unet)

    shutil.copytree(half, tmp_path / "whole")
    with Disk(tmp_path / "whole", number) as disk:
        save(tmp_path / "whole")
    assert disk.count > 30
    for first in range(1, disk.count + 1, every):
        folder = tmp_path / f"run{first}"
        shutil.copytree(half, folder)
        with Disk(folder, number, first, once):
            sentence = ends(functools.partial(save, folder))
        if sentence is not None:
            assert sentence.startswith(f"[Errno {number}] {os.strerror(number)}: '{folder}"), first
            assert ".saving-" not in sentence  # the temporary name, which is gone
        assert Checkpoints(folder, 9).found()
        check_whole(folder)
        if number in (errno.ENOSPC, errno.EDQUOT):
            assert hidden(folder) == [], first
        save(folder)
        assert Checkpoints(folder, 9).found()[-1].name == "checkpoint-4"
        check_whole(folder)
        shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("name", NUMBERS)
def test_a_run_ends_in_one_sentence_and_leaves_what_is_whole(tmp_path, half, name, once):
    """Whichever call fails, once or from then on, the run can be resumed when the disk is well again."""
    number = getattr(errno, name)
    config = {**SETTINGS, "resume_from_checkpoint": "latest"}
    shutil.copytree(half, tmp_path / "whole")
    with Disk(tmp_path / "whole", number) as disk:
        train(tiny_config(tmp_path / "whole", **config))
    assert disk.count > 10
    for first in range(1, disk.count + 1, max(1, disk.count // 12)):
        folder = tmp_path / f"run{first}"
        shutil.copytree(half, folder)
        with Disk(folder, number, first, once) as failing:
            sentence = ends(functools.partial(train, tiny_config(folder, **config)))
        assert failing.count >= first
        if sentence is not None:
            assert os.strerror(number) in sentence
            assert str(tmp_path) in sentence
        check_whole(folder)
        if number in (errno.ENOSPC, errno.EDQUOT):
            assert hidden(folder) == [], first
        assert train(tiny_config(folder, **config)).finished
        check_whole(folder)
        assert hidden(folder) == []
        shutil.rmtree(folder)


# ---------------------------------------------------------------- single calls


def failing_with(number: int):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EBADF, errno.EACCES, errno.ENOTSUP])
@pytest.mark.parametrize("call", ["fsync", "open"])
def test_network_folders_that_can_not_be_synced_end_nothing(tmp_path, monkeypatch, number, call):
    original, seen = getattr(os, call), []

    def for_folders(target, *args):
        if os.path.isdir(f"/proc/self/fd/{target}" if isinstance(target, int) else target):
            seen.append(target)
            failing_with(number)()
        return original(target, *args)

    monkeypatch.setattr(os, call, for_folders)
    write(tmp_path / "a.txt", "a")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "a"
    assert seen


def test_a_row_that_does_not_fit_leaves_the_file_as_it_was(tmp_path):
    """RLIMIT_FSIZE is a disk with room for 10 bytes."""
    path = tmp_path / "log.csv"
    append(path, "1,2\n")
    usual, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, usual[1]))
        with pytest.raises(OSError, match=r"No space left on device: '.*/log.csv'"):
            append(path, "3,4,5,6,7,8\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_text(encoding="utf-8") == "1,2\n"
    append(path, "3\n")
    assert path.read_text(encoding="utf-8") == "1,2\n3\n"


def test_a_network_without_locks_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("fcntl.flock", failing_with(errno.ENOLCK))
    with pytest.raises(OSError, match=rf"No locks available: '{tmp_path}/run'"), locked(tmp_path / "run", "train"):
        raise AssertionError("it goes on")
    assert not [path for path in (tmp_path / "run").iterdir() if path.stat().st_size]


def test_a_disk_too_small_for_the_decoded_images_is_named(tmp_path, monkeypatch):
    for k in range(40):
        Image.new("L", (8, 8), k).save(tmp_path / f"{k}.png")
    cache = tmp_path.parent / "cache"
    settings = DataConfig(train_data_dir=str(tmp_path), output_dir="elsewhere", cache_dir=str(cache))
    monkeypatch.setattr("datasets.arrow_writer.ArrowWriter.write_table", failing_with(errno.ENOSPC))
    with pytest.raises(OSError, match=f"No space left on device: '{cache}'"):
        load_images(settings)
    monkeypatch.undo()
    assert not list(cache.rglob("*.arrow"))
    assert load_images(settings)[0].shape == (1, 8, 8)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("multiprocessing.synchronize._multiprocessing.SemLock", errno.ENOSPC),  # /dev/shm of 4 kB
        ("multiprocessing.popen_spawn_posix.spawn.get_command_line", errno.EAGAIN),  # too many processes
    ],
)
def test_workers_that_can_not_be_started_say_so(tmp_path, monkeypatch, capsys, name, number):
    for k in range(3):
        Image.new("L", (8, 8), k).save(tmp_path / f"{k}.png")
    monkeypatch.setattr(name, failing_with(number))
    words = ["train", "--train_data_dir", str(tmp_path), "--output_dir", str(tmp_path / "run"), "--config", "digits"]
    assert main([*words, "--dataloader_num_workers", "2"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"dataloader_num_workers=2: worker processes can't be started ([Errno {number}]" in line
    assert "/dev/shm (in a container, --shm-size)" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("file", ["state.json", "unet.safetensors"])
@pytest.mark.parametrize("name", ["EMFILE", "ESTALE"])
def test_a_checkpoint_that_the_machine_can_not_open_is_not_damaged(tmp_path, half, monkeypatch, name, file):
    """An earlier checkpoint in its place would lose updates."""
    number = getattr(errno, name)
    shutil.copytree(half, tmp_path / "run")
    shutil.copytree(tmp_path / "run/checkpoint-2", tmp_path / "run/checkpoint-1")

    class Of(Disk):
        def fails_for(self, event, writes):
            return event == "open"

    with Of(tmp_path / f"run/checkpoint-2/{file}", number, 1):
        sentence = ends(lambda: train(tiny_config(tmp_path / "run", **SETTINGS, resume_from_checkpoint="latest")))
    assert sentence == f"[Errno {number}] {os.strerror(number)}: '{tmp_path}/run/checkpoint-2/{file}'"
    assert [path.name for path in Checkpoints(tmp_path / "run", 9).found()] == ["checkpoint-1", "checkpoint-2"]

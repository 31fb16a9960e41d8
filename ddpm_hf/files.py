"""Files that are there whole or not at all, folders in which one process works at a time, and damaged files set aside.

Everything that the package writes goes through `writing`: the content is written beside its place, brought to the disk
and renamed, so a reader never meets half a file, and a full disk or a kill leaves what was there before.
"""

import contextlib
import errno
import logging
import os
import re
import shutil
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file

PART = ".part-"  # begins the names of files that are being written
NO_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EROFS)  # answers of file systems that have none
log = logging.getLogger(__name__)


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """Gives a path beside `path`, of the same suffix, to write to; renames it to `path` if the block succeeds.

    The mode is that of any new file under the process's umask, whatever the writer gives it. The folder must exist.

    Raises:
        OSError: the disk is full, the folder is read-only and the like; `path` is then as it was before.
    """
    path = Path(path)
    beside = part_of(path)
    try:
        with open(beside, "wb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        with _one_kind_of_error(path):
            yield beside
        _settle(beside, mode)
        os.replace(beside, path)
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        if isinstance(error, OSError) and error.errno is not None:  # of the name that the caller knows
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


@contextlib.contextmanager
def writing_tree(folder: str | Path) -> Iterator[Path]:
    """Around what writes files into a new folder by a library of its own; gives them modes and brings them to the disk.

    Raises:
        OSError: the disk is full and the like.
    """
    folder = Path(folder)
    with _one_kind_of_error(folder):
        yield folder
    probe = part_of(folder / "mode")
    with open(probe, "wb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    probe.unlink()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            _settle(path, mode)


@contextlib.contextmanager
def _one_kind_of_error(path: Path) -> Iterator[None]:
    """safetensors has an error of its own for a full disk."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def _settle(path: Path, mode: int) -> None:
    with contextlib.suppress(PermissionError):  # file systems without modes
        os.chmod(path, mode)  # safetensors gives its files to their owner alone
    with open(path, "rb") as file:
        _sync(file.fileno())


def write(path: str | Path, content: str | bytes) -> None:
    """Write a text, in UTF-8, or bytes."""
    with writing(path) as beside:
        beside.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def save_picture(picture: Image.Image, path: str | Path) -> None:
    """Save a picture in the format that the suffix of `path` names."""
    with writing(path) as beside:
        picture.save(beside)


def save_tensors(tensors: dict[str, torch.Tensor], path: str | Path) -> None:
    """Save tensors as safetensors.

    Raises:
        OSError: the disk is full and the like. (safetensors has an error of its own for that.)
    """
    with writing(path) as beside:
        save_file(tensors, beside)


def sync_folder(folder: Path) -> None:
    """Bring the names of the files of a folder to the disk."""
    if hasattr(os, "O_DIRECTORY"):
        number = os.open(folder, os.O_DIRECTORY)
        try:
            _sync(number)
        finally:
            os.close(number)


def _sync(number: int) -> None:
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in NO_FSYNC:
            raise


def part_of(path: Path) -> Path:
    """Where this process writes what becomes `path` when it is whole."""
    return path.with_name(f"{PART}{socket.gethostname()}-{os.getpid()}-{path.name}")


def clear_parts(folder: Path) -> None:
    """Remove what processes of this machine that were killed left half written in a folder."""
    begin = f"{PART}{socket.gethostname()}-"
    for path in folder.iterdir():
        owner = path.name.removeprefix(begin).partition("-")[0]
        if path.name.startswith(begin) and owner.isdigit() and not _is_running(int(owner)):
            remove(path)


def _is_running(process: int) -> bool:
    if os.name == "nt":  # where signal 0 would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True


def set_aside(path: Path, reason: str) -> Path:
    """Rename a damaged file, so that nothing of it is lost and work goes on without it; log it, and return its name.

    `log.csv` becomes `log.csv.damaged`, or `log.csv.damaged-2` if that is there already.
    """
    aside = free_name(path.with_name(f"{path.name}.damaged"))
    os.replace(path, aside)
    log.warning(f"{path} is damaged ({reason}): it is now {aside.name}, and a new one is made")
    return aside


def free_name(path: Path) -> Path:
    """`path`, or if something is there, the first of `path`-2, `path`-3, ... that is free."""
    number, free = 2, path
    while free.exists():
        number, free = number + 1, path.with_name(f"{path.name}-{number}")
    return free


def remove_tree(folder: Path) -> None:
    """Remove a folder in one step: it loses its name first, so that a kill leaves no half of it under that name."""
    aside = folder.with_name(f".removed-{folder.name}")
    if aside.is_symlink() or aside.exists():
        remove(aside)
    os.replace(folder, aside)
    remove(aside)


def remove(path: Path) -> None:
    """Remove a folder with all that is in it, or a file; of a link, the link alone."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


class Lock:
    """While it is entered, no other process can enter the lock of the same folder and name.

    The operating system releases it when the process ends, however it ends (on a file system without locks, `filelock`
    looks whether the process is still there). A folder that is not there is made, and is
    removed again if it is still empty at the end.

    Args:
        folder: the folder to work in.
        name: what is done there, such as "train".

    Raises:
        ValueError: on entering, if another process holds it; the message names that process.
    """

    def __init__(self, folder: str | Path, name: str):
        self.folder = Path(folder)
        self.path, self.holder = (self.folder / f".{name}.{suffix}" for suffix in ("lock", "holder"))

    def __enter__(self) -> "Lock":
        absolute = self.folder.absolute()
        self.made = [parent for parent in (absolute, *absolute.parents) if not parent.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.path, thread_local=False)
        try:
            self.lock.acquire(blocking=False)
        except Timeout:
            raise ValueError(
                f"{self.folder} is in use by {self._holder()}: wait until that ends, stop it, or choose another folder"
            ) from None
        except BaseException:
            self._remove_empty()
            raise
        with contextlib.suppress(OSError):  # a full disk: the lock holds, and the other process stays nameless
            self.holder.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        return self

    def __exit__(self, *_) -> None:
        self.holder.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.path.unlink()  # while it is held: who waits for this file sees that it is gone, and makes a new one
        self.lock.release()
        self._remove_empty()

    def _remove_empty(self) -> None:
        with contextlib.suppress(OSError):  # not empty
            for folder in self.made:
                folder.rmdir()

    def _holder(self) -> str:
        with contextlib.suppress(OSError):
            return self.holder.read_text(encoding="utf-8") or "another process"
        return "another process"

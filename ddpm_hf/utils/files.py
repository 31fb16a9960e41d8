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
    """Give a path beside `path`, of the same suffix, to write to; rename it to `path` if the block succeeds.

    The mode is that of any new file under the process's umask, whatever the writer gives it. The folder must exist.

    Raises:
        OSError: the disk is full, the folder is read-only and the like; `path` is then as it was before.
    """
    path = Path(path)
    beside = part_of(path)
    try:
        with _os_errors_of(path):
            yield beside
            _finish(beside)
            os.replace(beside, path)
            sync(path.parent)
    finally:
        with contextlib.suppress(OSError):  # it is still there if something failed
            beside.unlink()


@contextlib.contextmanager
def writing_tree(folder: Path) -> Iterator[None]:
    """Around what fills a new folder by a library's own writer: gives its files modes and brings them to the disk.

    Raises:
        OSError: the disk is full and the like.
    """
    with _os_errors_of(folder):
        yield
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                _finish(path)


@contextlib.contextmanager
def _os_errors_of(path: Path) -> Iterator[None]:
    """Raise OSErrors of the block, and the error that safetensors has for a full disk, as OSErrors of `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else getattr(error, "errno", None)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def _finish(path: Path) -> None:
    """Give a file the mode of any new file (safetensors gives its files to their owner alone), and sync it."""
    probe = path.with_name(f"{path.name}.mode")
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    with contextlib.suppress(PermissionError):  # file systems without modes
        os.chmod(path, mode)
    sync(path)


def sync(path: Path) -> None:
    """Bring a file, or the names of the files of a folder, to the disk."""
    if os.name == "nt":  # where this needs a file that is open for writing, and folders can't be opened
        return
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in NO_FSYNC:
            raise
    finally:
        os.close(number)


def write(path: str | Path, content: str | bytes) -> None:
    """Write a text, in UTF-8, or bytes."""
    with writing(path) as beside:
        beside.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def save_picture(picture: Image.Image, path: str | Path) -> None:
    """Save a picture in the format that the suffix of `path` names."""
    with writing(path) as beside:
        picture.save(beside)


def save_tensors(tensors: dict[str, torch.Tensor], path: str | Path) -> None:
    """Save tensors as safetensors."""
    with writing(path) as beside:
        save_file(tensors, beside)


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
    except OSError as error:  # a process of another user may not be signalled
        return not isinstance(error, ProcessLookupError)
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


@contextlib.contextmanager
def locked(folder: str | Path, name: str) -> Iterator[None]:
    """No other process can enter this for the same folder and name until the block ends.

    The operating system releases the lock when the process ends, however it ends (on a file system without locks,
    `filelock` looks whether the process is still there). A folder that does not exist is made, and removed again if it
    is empty at the end.

    Args:
        folder: the folder to work in.
        name: what is done there, such as "train".

    Raises:
        ValueError: another process holds the lock; the message names that process.
    """
    folder = Path(folder)
    lock = FileLock(folder / f".{name}.lock", thread_local=False)
    holder = folder / f".{name}.holder"
    made = [path for path in (folder.absolute(), *folder.absolute().parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        try:
            lock.acquire(blocking=False)
        except Timeout:
            other = holder.read_text(encoding="utf-8") if holder.exists() else "another process"
            advice = "wait until that ends, stop it, or choose another folder"
            raise ValueError(f"{folder} is in use by {other}: {advice}") from None
        try:
            with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
                holder.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
            yield
        finally:
            holder.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                os.unlink(lock.lock_file)  # while it is held: who waits for this file sees that, and makes a new one
            lock.release()
    finally:
        with contextlib.suppress(OSError):  # not empty
            for path in made:
                path.rmdir()

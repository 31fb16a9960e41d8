"""Atomic writes, locks on folders, and renaming of damaged files.

The package writes all files through `writing`: the content goes to a temporary file in the same folder, which is synced
and renamed. A reader never sees half a file, and a full disk or a kill leaves the former file in place.
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

PART = ".part-"  # prefix of the names of temporary files
NO_FSYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EROFS}  # errors of file systems without fsync
NO_FOLDER_FSYNC = NO_FSYNC | {errno.EACCES, errno.EPERM, errno.EBADF, errno.EISDIR}  # or that open no folder
log = logging.getLogger(__name__)


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path with the same suffix, and rename it to `path` if the block succeeds.

    The file gets the mode of a new file under the process's umask. The folder must exist.

    Raises:
        OSError: the file can't be written, for instance because the disk is full. `path` is unchanged.
    """
    path = Path(path)
    beside = part_of(path)
    try:
        with os_errors_of(path):
            yield beside
            _finish(beside)
            os.replace(beside, path)
            sync(path.parent)
    finally:
        with contextlib.suppress(OSError):  # it exists only if something failed
            beside.unlink()


@contextlib.contextmanager
def writing_tree(folder: Path) -> Iterator[None]:
    """Set the modes of the files that the block writes to a new folder, and sync them.

    Raises:
        OSError: a file can't be written, for instance because the disk is full.
    """
    with os_errors_of(folder):
        yield
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                _finish(path)


@contextlib.contextmanager
def os_errors_of(path: Path) -> Iterator[None]:
    """Raise OSErrors, and the error of safetensors for a full disk, as OSErrors that name `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else getattr(error, "errno", None)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def _finish(path: Path) -> None:
    """Give a file the mode of a new file (safetensors makes its files private), and sync it."""
    probe = path.with_name(f"{path.name}.mode")
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    with contextlib.suppress(PermissionError):  # file systems without modes
        os.chmod(path, mode)
    sync(path)


def sync(path: Path) -> None:
    """Flush a file, or the list of files of a folder, to the disk (fsync)."""
    if os.name == "nt":  # fsync needs a writable file there, and folders can't be opened
        return
    harmless = NO_FOLDER_FSYNC if os.path.isdir(path) else NO_FSYNC
    try:
        with os_errors_of(path):
            number = os.open(path, os.O_RDONLY)
            try:
                os.fsync(number)
            finally:
                os.close(number)
    except OSError as error:
        if error.errno not in harmless:
            raise


def write(path: str | Path, content: str | bytes) -> None:
    """Write text, as UTF-8, or bytes."""
    with writing(path) as beside:
        beside.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def append(path: Path, text: str) -> None:
    """Append text, as UTF-8. If that fails, the file is as it was."""
    with os_errors_of(path), open(path, "ab", buffering=0) as file:
        size, content = file.tell(), text.encode("utf-8")
        if file.write(content) < len(content):  # the disk is full
            os.ftruncate(file.fileno(), size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def save_picture(picture: Image.Image, path: str | Path) -> None:
    """Save a picture in the format that the suffix of `path` names."""
    with writing(path) as beside:
        picture.save(beside)


def save_tensors(tensors: dict[str, torch.Tensor], path: str | Path) -> None:
    """Save tensors as safetensors."""
    with writing(path) as beside:
        save_file(tensors, beside)


def part_of(path: Path) -> Path:
    """The temporary path of this process for `path`."""
    return path.with_name(f"{PART}{socket.gethostname()}-{os.getpid()}-{path.name}")


def clear_parts(folder: Path) -> None:
    """Remove the temporary files of processes of this machine that were killed."""
    begin = f"{PART}{socket.gethostname()}-"
    for path in folder.iterdir():
        owner = path.name.removeprefix(begin).partition("-")[0]
        if path.name.startswith(begin) and owner.isdigit() and not _is_running(int(owner)):
            remove(path)


def _is_running(process: int) -> bool:
    if os.name == "nt":  # signal 0 would end the process there
        return True
    try:
        os.kill(process, 0)
    except OSError as error:  # a process of another user may not be signalled
        return not isinstance(error, ProcessLookupError)
    return True


def set_aside(path: Path, reason: str) -> Path:
    """Rename a damaged file to keep its content, log a warning, and return the new path.

    `log.csv` becomes `log.csv.damaged`, or `log.csv.damaged-2` if that exists already.
    """
    aside = free_name(path.with_name(f"{path.name}.damaged"))
    os.replace(path, aside)
    log.warning(f"{path} is damaged ({reason}): it was renamed to {aside.name}, and a new file is written")
    return aside


def link_or_copy(path: Path, new: Path) -> None:
    """Make `new` a hard link to a file that is not written to again, or a copy where the file system has no links."""
    try:
        os.link(path, new)
    except OSError:
        shutil.copyfile(path, new)
        _finish(new)


def free_name(path: Path) -> Path:
    """`path`, or if it exists, the first of `path`-2, `path`-3, ... that does not."""
    number, free = 2, path
    while free.exists():
        number, free = number + 1, path.with_name(f"{path.name}-{number}")
    return free


def remove_tree(folder: Path) -> None:
    """Rename a folder, then remove it, so that a kill never leaves half of it under its name."""
    aside = folder.with_name(f".removed-{folder.name}")
    if aside.is_symlink() or aside.exists():
        remove(aside)
    os.replace(folder, aside)
    remove(aside)


def remove(path: Path) -> None:
    """Remove a file, a folder with its content, or a link without its target."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


@contextlib.contextmanager
def locked(folder: str | Path, name: str) -> Iterator[None]:
    """Hold a lock on a folder, for one kind of work, until the block ends.

    The operating system releases the lock when the process ends for any reason (on a file system without locks,
    `filelock` checks whether the process is alive). The folder is created, and removed if it is empty at the end.

    Args:
        folder: the folder to work in.
        name: the kind of work, such as "train".

    Raises:
        ValueError: another process holds the lock; the message names that process.
    """
    folder = Path(folder)
    lock = FileLock(folder / f".{name}.lock", thread_local=False)
    holder, other = folder / f".{name}.holder", ""
    made = [path for path in (folder.absolute(), *folder.absolute().parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        try:
            with os_errors_of(folder):
                lock.acquire(blocking=False)
        except Timeout:
            with contextlib.suppress(OSError):  # it may end just now
                other = holder.read_text(encoding="utf-8")
            other = other or "another process"  # which has not written its name yet
            advice = "wait until it ends, stop it, or choose another folder"
            raise ValueError(f"{folder} is in use by {other}: {advice}") from None
        try:
            with contextlib.suppress(OSError):  # a full disk does not affect the lock
                holder.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
            yield
        finally:
            with contextlib.suppress(OSError):
                holder.unlink(missing_ok=True)
                os.unlink(lock.lock_file)  # before the release: a process that waits for it makes a new one
            lock.release()
    finally:
        with contextlib.suppress(OSError):  # not empty
            for path in made:
                path.rmdir()

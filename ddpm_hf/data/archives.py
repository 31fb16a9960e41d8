"""Reads files in .zip archives where they are: `photos.zip/cat/1.png` is the path of one. Nothing is unpacked.

Names in an archive are compared and never followed, so that no name can lead out of it.
"""

import errno
import functools
import os
import re
import stat
import zipfile
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ddpm_hf.data.pages import MOST_OF_A_FILE, BadImage
from ddpm_hf.utils.arguments import OF_THE_MACHINE

ZIP = ".zip"
NOT_OF_THE_FILE = (*OF_THE_MACHINE, errno.EIO)  # errors of machine or network


def is_zip(path: Path) -> bool:
    return path.suffix.lower() == ZIP and os.path.isfile(path)


def archive_of(path: str | Path) -> Path | None:
    """The archive that has the file in it; None for a file of its own."""
    path = Path(path)
    if ZIP not in str(path).lower():
        return None
    return next(filter(is_zip, path.parents), None)


def list_files(archive: Path, left_out: Counter) -> list[Path]:
    """The paths of the files in an archive, and in `left_out` the numbers by reason of those that are not taken.

    Raises:
        ValueError: it is not a .zip file, or it is damaged.
    """
    try:
        members = _opened(archive, *_stamp(archive))[1].items()
    except Exception as error:  # zipfile raises many types
        if getattr(error, "errno", None) in NOT_OF_THE_FILE:
            raise
        raise ValueError(f"{str(archive)!r} is not a valid .zip file: {error}") from error
    files = []
    for name, info in members:
        if name.startswith("/") or ".." in name.split("/") or re.match("[A-Za-z]:", name):
            left_out["files with unsafe names in a .zip"] += 1
        elif info.flag_bits & 1:
            left_out["files with a password in a .zip"] += 1
        elif stat.S_ISLNK(info.external_attr >> 16):
            left_out["links in a .zip"] += 1
        else:
            files.append(archive / name)
    return files


def open_file(path: str | Path) -> BinaryIO:
    """Open a file for reading, also one in an archive."""
    archive = archive_of(path)
    if archive is None:
        return open(path, "rb")
    zipped, members = _opened(archive, *_stamp(archive))
    info = members.get(Path(path).relative_to(archive).as_posix())
    if info is None:
        raise FileNotFoundError(f"{str(archive)!r} has no such file any more")
    if info.file_size > MOST_OF_A_FILE:  # it is never read beyond what it says
        raise BadImage(f"is too large: it says that it has {info.file_size:,} bytes when decompressed")
    return zipped.open(info)


def read_bytes(path: str | Path) -> bytes:
    """The content of a file, also of one in an archive."""
    if archive_of(path) is None:
        return Path(path).read_bytes()
    with open_file(path) as file:
        return file.read()


def stamp_of(path: str | Path) -> tuple[int, int]:
    """What changes when the file, or the archive that has it, is written anew."""
    return _stamp(archive_of(path) or path)[:2]


def _stamp(path: str | Path) -> tuple[int, int, int]:
    status = os.stat(path)
    return status.st_mtime_ns, status.st_size, os.getpid()  # processes must not share the position in an open file


@functools.lru_cache(maxsize=8)
def _opened(archive: Path, *stamp: int) -> tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]:
    """An archive that stays open, and its files by their names with `/`, as `pathlib` writes them."""
    file = zipfile.ZipFile(archive)
    names = ((info.filename.replace("\\", "/"), info) for info in file.infolist())
    return file, {str(PurePosixPath(name)): info for name, info in names if not name.endswith("/")}

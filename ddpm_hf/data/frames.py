"""The images in files that hold several: frames of animations, pages of TIFF files, slices of volumes."""

from collections.abc import Iterator, Sequence
from functools import cached_property

from ddpm_hf.data.config import DataConfig
from ddpm_hf.data.reading import count_images


def has_several_a_file(config: DataConfig) -> bool:
    """Whether the settings make images of the frames, pages or slices of a file."""
    return config.frames in ("all", "composite") or config.slices is not None


class Frames(Sequence):
    """The items of a data set, with one item for each frame, page or slice in place of its file.

    They are in the order of the files. Images of one file have its name and, unless they have one, make a group.

    Args:
        items: a sequence of `Item`s, one a file.
    """

    def __init__(self, items, slices: int | None, frames: str | None = None):
        self.items, self.slices, self.frames, self.license = items, slices, frames, getattr(items, "license", None)
        self.no_classes = getattr(items, "no_classes", "")

    def __iter__(self) -> Iterator:
        """Without opening more files than are asked for."""
        return (_image(item, frame) for item in self.items for frame in self._frames(item))

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, k: int):
        file, frame = self.index[k]
        return _image(self.items[file], frame)

    @cached_property
    def index(self) -> list[tuple[int, int | None]]:
        """The file and the frame of each image."""
        return [(k, frame) for k, item in enumerate(self.items) for frame in self._frames(item)]

    def _frames(self, item) -> Sequence[int | None]:
        try:
            number = count_images(item.source, self.slices, self.frames)
        except ValueError as error:
            raise ValueError(f"{item} {error}") from error
        return range(number) if number > 1 else (None,)


def _image(item, frame: int | None):
    return item if frame is None else item._replace(frame=frame, group=item.group or item.name)

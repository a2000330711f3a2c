"""The user's pictures as pixel values on disk, which an image model learns from as a language model does from text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fastff.convert.capture import check_disk
from fastff.errors import CheckpointError, FileError
from fastff.io import reading, remove_stale, replacing
from fastff.report.progress import Progress, silent
from fastff.text.examples import Examples

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")
STORED = "pictures.npy"
A_CALL = 64  # pictures between two words of progress


class Pictures(Examples):
    """pixel_values (pictures, channels, height, width), and how many patches, those that stand for the whole picture
    included, the model makes of each: all equally many, so that nothing is padded."""

    def __init__(self, pixel_values: np.ndarray[Any, Any], patches: int) -> None:
        super().__init__(patches * np.arange(len(pixel_values) + 1, dtype=np.int64))
        self.pixel_values, self.patches = pixel_values, patches
        self.picture = pixel_values.shape[1:]

    def slice(self, first: int, last: int) -> Self:
        return type(self)(self.pixel_values[first:last], self.patches)

    def batch(self, which: np.ndarray[Any, Any], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """pixel_values (pictures, channels, height, width), float32."""
        values = torch.from_numpy(np.asarray(self.pixel_values[which], dtype=np.float32))
        return {"pixel_values": values.to(device, non_blocking=True)}


def picture_paths(folder: Path) -> list[Path]:
    """The pictures in a folder and those below it, sorted. Raises CheckpointError if there are none."""
    if not folder.is_dir():
        raise CheckpointError(f"images {folder} is not a folder")
    every = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and not path.name.startswith("."))
    found = sorted(path for path in every if path.is_file())
    if not found:
        raise CheckpointError(f"images {folder} holds no picture, expected files {', '.join(SUFFIXES)}")
    return found


def store_pictures(
    processor: Any, paths: Sequence[Path], folder: Path, *, patches: int, progress: Progress = silent
) -> Pictures:
    """Write the pixel values of pictures into `folder`/pictures.npy, float16, in an order drawn at random but always
    the same, or open the file that is there: of sorted paths the last ones are often all of one sort.

    processor: the model's own image processor. Raises CheckpointError, naming it, for a file that is no picture, and
    for too little disk; FileError for a damaged pictures.npy."""
    path = folder / STORED
    if not path.exists():
        remove_stale(folder)
        _write(processor, [paths[k] for k in np.random.default_rng(0).permutation(len(paths))], path, progress)
    remedy = f"remove {folder} and run the same command again"
    with reading(path, remedy):
        pixel_values = np.load(path, mmap_mode="r", allow_pickle=False)
    if pixel_values.ndim != 4 or pixel_values.dtype != np.float16 or len(pixel_values) != len(paths):
        found = f"{pixel_values.dtype} {pixel_values.shape}"
        raise FileError(f"{path} holds {found}, expected float16 of {len(paths)} pictures: {remedy}")
    return Pictures(pixel_values, patches)


def _write(processor: Any, paths: Sequence[Path], path: Path, progress: Progress) -> None:
    picture = picture_size(processor)
    shape = (len(paths), *picture)
    check_disk(path.parent, int(np.prod(shape)) * np.dtype(np.float16).itemsize, "storing the pictures")
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float16)), "fortran_order": False, "shape": shape}
    with replacing(path) as file:
        np.lib.format.write_array_header_2_0(file, header)
        for start in range(0, len(paths), A_CALL):
            for one in paths[start : start + A_CALL]:  # one at a time: large ones fill the memory
                values = pixel_values_of(processor, [_read(one)])
                if values.shape[1:] != picture:
                    raise CheckpointError(
                        f"the image processor makes {_size(values.shape[1:])} values of {one}, "
                        f"expected {_size(picture)} as of a square one: all must become equally large"
                    )
                file.write(values.astype(np.float16).tobytes())
            progress("pictures", min(start + A_CALL, len(paths)), len(paths))


def _read(path: Path) -> Image.Image:
    """A picture in RGB, turned as its EXIF data say. Raises CheckpointError, naming the file, for none."""
    try:
        with Image.open(path) as picture:
            turned = ImageOps.exif_transpose(picture)
            if turned.mode.startswith("I") or turned.mode == "F":
                raise ValueError(
                    f"mode {turned.mode}, expected 8 bits a channel"
                )  # converted it would be cut, not scaled
            return turned.convert("RGB")
    except Exception as error:  # decoders raise what they like about a damaged file
        raise CheckpointError(f"{path} is not a picture that can be read: {error}") from error


def pixel_values_of(processor: Any, pictures: Sequence[Image.Image]) -> np.ndarray[Any, Any]:
    """What a model's image processor makes of pictures: (pictures, channels, height, width), float32.

    Raises CheckpointError where it makes no such array, as of pictures whose sizes it leaves different."""
    try:
        values = np.asarray(processor(images=list(pictures), return_tensors="np")["pixel_values"], dtype=np.float32)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the image processor gives no pixel values of one size: {error}") from error
    if values.ndim != 4:
        raise CheckpointError(f"the image processor gives pixel values {values.shape}, expected four dimensions")
    return values


def picture_size(processor: Any) -> tuple[int, ...]:
    """Channels, height and width that an image processor makes of a square picture."""
    picture: tuple[int, ...] = pixel_values_of(processor, [Image.new("RGB", (512, 512))]).shape[1:]
    return picture


@torch.no_grad()
def patches_of(model: Any, processor: Any) -> int:
    """Positions that a model makes of a picture, those that stand for the whole of it included.

    Raises CheckpointError for an image processor whose pictures the model does not take."""
    picture = picture_size(processor)
    try:
        return int(model(pixel_values=torch.zeros(1, *picture, device=model.device)).last_hidden_state.shape[1])
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"the image processor makes pictures of {_size(picture)}: {error}") from error


def _size(picture: Sequence[int]) -> str:
    return "x".join(map(str, picture))

"""Images and videos: read in any common format, resized and cropped, written for viewing."""

import contextlib
import re
import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor

from core.config import reason
from core.files import atomic

Size = tuple[int, int]  # height, width in pixels
MOST_PICTURE, MOST_VIDEO = 1 << 26, 1 << 30  # pixels of one picture; of all frames of a video that is held in memory
VIDEO_SUFFIXES = {".mp4", ".mov", ".avi", ".mkv", ".webm", ".gif"}
# What imageio and Pillow raise on broken files, and on small files that decompress to gigantic pictures.
BROKEN = (
    OSError, ValueError, RuntimeError, SyntaxError, EOFError, LookupError, struct.error, Image.DecompressionBombError
)  # fmt: skip
Image.MAX_IMAGE_PIXELS = MOST_PICTURE // 2  # Pillow warns above this, and refuses twice as much
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def cover(source: Size, target: Size) -> tuple[Size, int, int]:
    """Resize until the target is covered, then crop the centre: resized (height, width), the crop's top and left."""
    scale = max(target[0] / source[0], target[1] / source[1])
    resized = tuple(max(round(n * scale), least) for n, least in zip(source, target, strict=True))
    return resized, (resized[0] - target[0]) // 2, (resized[1] - target[1]) // 2


def fit_nearest(image: np.ndarray, size: Size) -> np.ndarray:
    """Nearest-neighbour resize and centre crop, as in `cover`: [height, width, ...] -> [*size, ...]."""
    resized, *corner = cover(image.shape[:2], size)
    rows, columns = (  # each pixel takes the value under its centre
        (2 * np.arange(start, start + length) + 1) * old // (2 * new)
        for old, new, start, length in zip(image.shape[:2], resized, corner, size, strict=True)
    )
    return image[rows[:, None], columns]


def fit_frames(frames: np.ndarray, size: Size) -> Tensor:
    """Smooth resize and centre crop, as in `cover`: uint8 [T, height, width, 3] -> float32 [3, T, *size], 0 to 255."""
    (height, width), top, left = cover(frames.shape[1:3], size)
    box = (left, top, left + size[1], top + size[0])
    pictures = (Image.fromarray(f).resize((width, height), Image.Resampling.LANCZOS).crop(box) for f in frames)
    return torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(3, 0, 1, 2).float()


def read_picture(path: Path | str) -> np.ndarray:
    """uint8 [height, width, 3], upright as its EXIF says; an animation's first frame. Raises one of BROKEN."""
    with Image.open(path) as image:
        image.load()
        with contextlib.suppress(Exception):  # a garbled EXIF block can raise anything; the picture is fine
            ImageOps.exif_transpose(image, in_place=True)
        return np.asarray(image.convert("RGB"))


def read_video(path: Path) -> Iterator[np.ndarray]:
    """Frames [height, width, 3] uint8 of a video file. Raises one of BROKEN."""
    with iio.imopen(path, "r", plugin="FFMPEG") as file:
        width, height = file.metadata()["size"]
        if width * height > MOST_PICTURE:
            raise ValueError(f"a frame of {width}x{height} is larger than {MOST_PICTURE} pixels")
        yield from file.iter()


def read_frames(path: Path, check: Callable[[bool, str, str], None]) -> Iterator[np.ndarray]:
    """Frames [height, width, 3] uint8 of a video, or of a folder of PNG files: 2.png before 10.png."""
    try:
        if path.is_dir():
            files = [file for file in path.iterdir() if file.suffix.lower() == ".png"]
            files.sort(key=lambda file: [int(s) if s.isdigit() else s for s in re.split("([0-9]+)", file.name)])
            yield from map(read_picture, files)
        else:
            yield from read_video(path)
    except BROKEN as error:
        check(False, "", f"can't be decoded ({reason(error)}); save the maps as an H.264 mp4 or as PNG files")


def to_uint8(video: Tensor, scale: int = 1) -> np.ndarray:
    """[3, T, H, W] in [-1, 1] -> [T, scale H, scale W, 3] uint8, enlarged by repeating pixels."""
    frames = ((video.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).cpu().numpy()
    return frames.repeat(scale, axis=1).repeat(scale, axis=2)


def contact_sheet(rows: Sequence[np.ndarray], gap: int = 2) -> np.ndarray:
    """One row per video [T, H, W, 3], its frames from left to right."""
    border = ((0, 0), (0, gap), (0, gap), (0, 0))
    padded = [np.pad(video, border, constant_values=255) for video in rows]
    return np.concatenate([rearrange(video, "t h w c -> h (t w) c") for video in padded])


def write_video(path: Path | str, frames: np.ndarray, fps: int) -> None:
    """[T, H, W, 3] uint8 -> an H.264 mp4 that plays anywhere."""
    with atomic(path) as temporary:
        iio.imwrite(temporary, frames, fps=fps, codec="libx264", macro_block_size=2, quality=9)


def write_animation(path: Path | str, frames: np.ndarray, fps: int) -> None:
    """[T, H, W, 3] uint8 -> a gif that loops forever."""
    with atomic(path) as temporary:
        iio.imwrite(temporary, frames, plugin="pillow", duration=1000 / fps, loop=0)


def write_image(path: Path | str, image: np.ndarray) -> None:
    with atomic(path) as temporary:
        iio.imwrite(temporary, image)

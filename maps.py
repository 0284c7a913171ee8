"""Map videos as found on disk: reading their frames, and finding the objects in them by colour.

A finished map is black with one constant colour per object (MagicMotion's convention), but codecs move colours and
blend edges. Nothing here knows of trajectories; trajectory.py turns what is found into one.
"""

import contextlib
import re
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common import reason

Turn = Image.Transpose

Size = tuple[int, int]  # height, width in pixels
MOST_PICTURE, MOST_VIDEO = 1 << 26, 1 << 30  # pixels of one picture, of all frames of a video that is to be held
VIDEO_SUFFIXES = {".mp4", ".mov", ".avi", ".mkv", ".webm", ".gif"}
MOST_OBJECTS = 64
NEAR = 28  # in RGB: how far a codec may move a colour
DARK = 24  # a pixel whose brightest channel is no brighter is background, whatever a codec did to it
# What imageio and Pillow raise on broken files, and on small ones that hold gigantic pictures.
BROKEN = (
    OSError, ValueError, RuntimeError, SyntaxError, EOFError, LookupError, struct.error, Image.DecompressionBombError
)  # fmt: skip
ORIENTATION = 0x0112  # EXIF's tag
TURNS = {
    2: Turn.FLIP_LEFT_RIGHT, 3: Turn.ROTATE_180, 4: Turn.FLIP_TOP_BOTTOM, 5: Turn.TRANSPOSE, 6: Turn.ROTATE_270,
    7: Turn.TRANSVERSE, 8: Turn.ROTATE_90,
}  # fmt: skip
Image.MAX_IMAGE_PIXELS = MOST_PICTURE // 2  # Pillow warns of more, and refuses what is twice as large
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def nearest(image: np.ndarray, size: Size) -> np.ndarray:
    """[height, width, ...] resized: each pixel takes the value under its centre."""
    rows, columns = ((2 * np.arange(n) + 1) * old // (2 * n) for n, old in zip(size, image.shape[:2], strict=True))
    return image[rows[:, None], columns]


def cover(source: Size, target: Size) -> tuple[Size, int, int]:
    """Resize until the target is covered, then cut its middle: resized (height, width), and the cut's top and left."""
    scale = max(target[0] / source[0], target[1] / source[1])
    resized = tuple(max(round(n * scale), least) for n, least in zip(source, target, strict=True))
    return resized, (resized[0] - target[0]) // 2, (resized[1] - target[1]) // 2


def fit_nearest(image: np.ndarray, size: Size) -> np.ndarray:
    """Nearest-neighbour resize and centre cut, as `cover` says. [height, width, ...] -> [*size, ...]."""
    resized, top, left = cover(image.shape[:2], size)
    return nearest(image, resized)[top : top + size[0], left : left + size[1]]


def fit_frames(frames: np.ndarray, size: Size) -> Tensor:
    """Smooth resize and centre cut, as `cover` says. uint8 [T, height, width, 3] -> float32 [3, T, *size], 0 to 255."""
    (height, width), top, left = cover(frames.shape[1:3], size)
    box = (left, top, left + size[1], top + size[0])
    fitted = [
        np.asarray(Image.fromarray(f).resize((width, height), Image.Resampling.LANCZOS).crop(box)) for f in frames
    ]
    return torch.from_numpy(np.stack(fitted)).permute(3, 0, 1, 2).float()


def read_picture(path: Path | str) -> np.ndarray:
    """uint8 [height, width, 3], turned as its EXIF says; of an animation, the first. One of BROKEN if there is none."""
    with Image.open(path) as image:
        turn = None
        with contextlib.suppress(*BROKEN, TypeError):  # garbled EXIF tells nothing
            turn = TURNS.get(image.getexif().get(ORIENTATION))
        upright = image.convert("RGB")
        return np.asarray(upright if turn is None else upright.transpose(turn))


def read_video(path: Path) -> Iterator[np.ndarray]:
    """Frames [height, width, 3] uint8 of a video file. One of BROKEN if there is none."""
    with iio.imopen(path, "r", plugin="FFMPEG") as file:
        width, height = file.metadata()["size"]
        if width * height > MOST_PICTURE:
            raise ValueError(f"a frame of {width}x{height} is larger than {MOST_PICTURE} pixels")
        yield from file.iter()


def read_frames(path: Path, check: Callable[[bool, str, str], None]) -> Iterator[np.ndarray]:
    """Frames [height, width, 3] uint8 of a video, or of a folder's PNG files: 2.png before 10.png."""
    try:
        if path.is_dir():
            files = [file for file in path.iterdir() if file.suffix.lower() == ".png"]
            files.sort(key=lambda file: [int(s) if s.isdigit() else s for s in re.split("([0-9]+)", file.name)])
            yield from map(read_picture, files)
        else:
            yield from read_video(path)
    except BROKEN as error:
        check(False, "", f"can't be decoded ({reason(error)}); save the maps as an H.264 mp4 or as PNG files")


def flat_colors(frame: np.ndarray) -> np.ndarray:
    """Colours of the objects in frame 0, [height, width, 3] -> float [K, 3], largest object first.

    Only pixels like all their neighbours count: at an edge two colours blend into others that no object has. In
    MagicMotion's own videos the codec moves flat colours by up to 19 in RGB, and its objects are 27 apart or more.
    """
    windows = np.lib.stride_tricks.sliding_window_view(frame, (3, 3), axis=(0, 1))  # (H - 2, W - 2, 3, 3, 3)
    flat = (windows.max((-1, -2)) - windows.min((-1, -2))).max(-1) <= 16
    inner = frame[1:-1, 1:-1]
    pixels = inner[flat & (inner.max(-1) > DARK)].astype(float)  # (n, 3)
    colors = []
    while len(pixels) and len(colors) <= MOST_OBJECTS:
        code = pixels.astype(int) // 8 @ np.array([1024, 32, 1])
        color = pixels[code == np.bincount(code).argmax()].mean(0)  # of the fullest cell; then of all around it
        near = np.linalg.norm(pixels - color, axis=1) < 14
        if near.sum() < 3 + frame.size // 30000:  # specks
            break
        colors.append(pixels[near].mean(0))
        pixels = pixels[np.linalg.norm(pixels - colors[-1], axis=1) > 24]
    return np.array(colors).reshape(-1, 3)


def label_pixels(frame: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Which object's colour each pixel shows: [height, width, 3] -> int8 [height, width], -1 for none.

    4:2:0 video halves the chroma of lines a pixel or two thick, so in small frames a colour's way to half its chroma
    counts as the colour. In large frames lines are thicker, and what is narrower than two pixels is a blend of two
    colours that looks like a third: it is dropped.
    """
    thick = min(frame.shape[:2]) >= 300
    label, bright = np.full(frame.shape[:2], -1, dtype=np.int8), frame.max(-1) > DARK
    distance = np.empty((len(colors), np.count_nonzero(bright)))
    for k, color in enumerate(colors):
        offset = frame[bright] - color  # (n, 3)
        if not thick:
            pale = (color @ [0.299, 0.587, 0.114] - color) / 2
            offset -= (offset @ pale / (pale @ pale + 1e-9)).clip(0, 1)[:, None] * pale
        distance[k] = np.linalg.norm(offset, axis=1)
    label[bright] = np.where(distance.min(0) < NEAR, distance.argmin(0), -1)
    if thick:
        across = label[:, 1:] == label[:, :-1]
        square = np.pad(across[1:] & across[:-1] & (label[1:, 1:] == label[:-1, 1:]), 1)  # 2x2 pixels alike
        label[~(square[1:, 1:] | square[1:, :-1] | square[:-1, 1:] | square[:-1, :-1])] = -1
    return label


def extents(label: np.ndarray, count: int) -> np.ndarray:
    """The box around each label's pixels, [count, 4]; NaN where there are none."""
    boxes = np.full((count, 4), np.nan)
    for k in range(count):
        y, x = np.nonzero(label == k)
        if len(x):
            boxes[k] = x.min(), y.min(), x.max() + 1, y.max() + 1
    return boxes

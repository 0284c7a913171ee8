"""Images and videos: read them in any common format, resize and crop them, write them for viewing."""

import contextlib
import errno
import io
import json
import os
import re
import signal
import struct
import subprocess
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
from einops import rearrange
from PIL import ExifTags, Image, ImageCms, ImageOps, PngImagePlugin
from torch import Tensor

from core.config import MachineError, UserError, reason, require, warn
from core.files import NOT_OURS, atomic, no_pointer

Size = tuple[int, int]  # height, width in pixels
MOST_VIDEO_SIDE = 16384  # x264 takes no more
MOST_PICTURE, MOST_VIDEO = 1 << 26, 1 << 30  # pixels of one picture; of all frames of a video that is held in memory
DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")  # Pillow's modes of one channel of more than 8 bits
HD = 720  # lines: players take an untagged video of this height or more for BT.709, a smaller one for BT.601
VIDEO_SUFFIXES = (".avi", ".gif", ".mkv", ".mov", ".mp4", ".webm")
NEEDED = "install version 5.1 or newer, or correct IMAGEIO_FFMPEG_EXE; if it is there, run the same command again"
AGAIN = "once that is mended, run the same command again"
FATAL = (signal.SIGABRT, signal.SIGBUS, signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM)
NO_FILES_FAULT = "|".join([  # what ffmpeg says where the machine, or ffmpeg itself, lacks something
    *(os.strerror(n) for n in (errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE)),
    "Unrecognized option.*", "Option .*not found", "No such filter.*", ".*shared librar.*", ".*received signal.*",
])  # fmt: skip
# What readers raise on broken files, and on small files that decompress to gigantic pictures.
BROKEN = (OSError, ValueError, RuntimeError, SyntaxError, EOFError, LookupError, struct.error,
          Image.DecompressionBombError)  # fmt: skip
Image.MAX_IMAGE_PIXELS = MOST_PICTURE // 2  # Pillow warns above this, and refuses twice as much
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def alike(one: Size, other: Size) -> bool:
    """Whether two pictures have one shape, but for sides that were rounded."""
    return abs(one[0] * other[1] / (one[1] * other[0]) - 1) < 0.02


def cover(source: Size, target: Size) -> tuple[Size, int, int]:
    """Resize until the target is covered, then crop the centre: resized (height, width), the crop's top and left."""
    scale = max(target[0] / source[0], target[1] / source[1])
    resized = tuple(max(round(n * scale), least) for n, least in zip(source, target, strict=True))
    return resized, (resized[0] - target[0]) // 2, (resized[1] - target[1]) // 2


def crop_box(source: Size, target: Size) -> tuple[float, float, float, float]:
    """The part of the source that `cover` keeps, in its own pixels: left, top, right, bottom."""
    (height, width), top, left = cover(source, target)
    y, x = source[0] / height, source[1] / width
    return left * x, top * y, (left + target[1]) * x, (top + target[0]) * y


def cover_nearest(image: np.ndarray, size: Size) -> np.ndarray:
    """Nearest-neighbour resize and centre crop, as in `cover`: [height, width, ...] -> [*size, ...]."""
    resized, *corner = cover(image.shape[:2], size)
    rows, columns = (  # each pixel takes the value under its centre
        (2 * np.arange(start, start + length) + 1) * old // (2 * new)
        for old, new, start, length in zip(image.shape[:2], resized, corner, size, strict=True)
    )
    return image[rows[:, None], columns]


def cover_frames(frames: np.ndarray, size: Size) -> Tensor:
    """Smooth resize and centre crop, as in `cover`: uint8 [T, height, width, 3] -> float32 [3, T, *size], 0 to 255."""
    (height, width), top, left = cover(frames.shape[1:3], size)
    box = (left, top, left + size[1], top + size[0])
    pictures = (Image.fromarray(f).resize((width, height), Image.Resampling.LANCZOS).crop(box) for f in frames)
    return torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(3, 0, 1, 2).float()


def read_picture(path: Path | str, ground: str = "white") -> np.ndarray:
    """uint8 [height, width, 3] in sRGB, upright as its EXIF says; an animation's first frame. Raises one of BROKEN.

    Grey of 16 bits or floats keeps its shades. What is transparent shows the ground: white, as in most viewers.
    """
    image = open_upright(path)
    if image.mode in DEEP:
        image = Image.fromarray((grey(image) * 255).round().astype(np.uint8))
    image = image.convert("RGBA") if image.has_transparency_data else image  # before RGB, at which Pillow warns
    alpha = image.getchannel("A") if image.mode == "RGBA" else None
    image = image if image.mode in ("L", "CMYK") else image.convert("RGB")  # the modes that profiles are for
    if profile := image.info.get("icc_profile"):
        source, target = ImageCms.ImageCmsProfile, ImageCms.createProfile("sRGB")
        with contextlib.suppress(ImageCms.PyCMSError, OSError, ValueError):  # garbled, or of another kind of picture
            image = ImageCms.profileToProfile(image, source(io.BytesIO(profile)), target, outputMode="RGB")
    image = image.convert("RGB")
    return np.asarray(Image.composite(image, Image.new("RGB", image.size, ground), alpha) if alpha else image)


def load_image(path: Path | str) -> np.ndarray:
    """`read_picture`, or UserError if it can't be used. A line on stderr says if the file holds more pictures."""
    require(no_pointer(path).is_file(), f"{path}: no such image; give a PNG or JPEG with --image")
    try:
        with Image.open(path) as image:  # a photo's embedded previews don't count
            count = getattr(image, "n_frames", 1) if image.format in ("GIF", "PNG", "WEBP", "TIFF") else 1
            with contextlib.suppress(Exception):  # as in open_upright
                if image.getexif().get(ExifTags.Base.Orientation, 1) > 1:
                    warn(f"{path}: is turned as its EXIF says; boxes and masks are of the turned picture")
        if count > 1:
            warn(f"{path}: holds {count} pictures; the first is taken")
        return read_picture(path)
    except BROKEN as error:
        mend = f"give a PNG or JPEG of at most {MOST_PICTURE // 10**6} million pixels"
        raise UserError(f"{path}: not a readable image ({reason(error)}); {mend}") from None


def read_mask(path: Path | str) -> np.ndarray:
    """Bool [height, width]: what is at least half as bright as the brightest, or as opaque. Raises one of BROKEN."""
    image = open_upright(path)
    if image.mode in DEEP:
        strength = grey(image)
    else:
        rgba = np.asarray(image.convert("RGBA"))
        cut_out = image.has_transparency_data and rgba[..., 3].min() < 255  # else alpha says nothing
        strength = rgba[..., 3] if cut_out else rgba[..., :3].max(-1)
    return (strength > 0) & (strength >= strength.max() / 2)


def open_upright(path: Path | str) -> Image.Image:
    """A picture, turned as its EXIF says."""
    image = Image.open(no_pointer(path))
    image.load()
    with contextlib.suppress(Exception):  # a garbled EXIF block can raise anything; the picture is fine
        ImageOps.exif_transpose(image, in_place=True)
    return image


def grey(image: Image.Image) -> np.ndarray:
    """A picture in one of DEEP's modes as values from 0 to 1. Floats may be from 0 to 1, to 255 or to 65535."""
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("holds values that are no numbers")
    high = values.max(initial=0)
    full = 65535 if image.mode.startswith("I;16") else next((n for n in (1, 255, 65535) if high <= n), high)
    return (values / full).clip(0, 1)


@cache
def ffmpeg_version() -> str:
    """What ffmpeg says it is. MachineError if it can't be run, or is older than 5.1, which brought -fps_mode."""
    job = start_ffmpeg("-version")
    said = b"".join(job.communicate()).decode(errors="replace").partition("\n")[0] or f"status {job.returncode}"
    number = re.match(r"ffmpeg version n?(\d+)\.(\d+)", said)
    if "version" not in said or (number and (int(number[1]), int(number[2])) < (5, 1)):
        raise MachineError(f"{imageio_ffmpeg.get_ffmpeg_exe()}: is no ffmpeg that can be used ({said}); {NEEDED}")
    return said


def start_ffmpeg(*arguments: object, **more: int) -> subprocess.Popen:
    """ffmpeg with pipes for what it says and gives. MachineError if it can't be run."""
    try:
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", *map(str, arguments)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)
    except (OSError, RuntimeError) as error:
        imageio_ffmpeg._utils._get_ffmpeg_exe.cache_clear()  # its own trial of ffmpeg may have been killed
        raise MachineError(f"ffmpeg: can't be run ({reason(error)}); {NEEDED}") from None


def complaint(path: Path, status: int, said: bytes) -> str:
    """Why ffmpeg failed, in its own words, at most three lines as one. MachineError if that's no file's fault."""
    if status == -signal.SIGXFSZ:
        return os.strerror(errno.EFBIG)
    lines = [re.sub(r"^(\[[^]]* @ 0x[0-9a-f]+\] )+", "", line) for line in said.decode(errors="replace").splitlines()]
    killed = -status if status < 0 else status - 128 if status - 128 in FATAL else 0  # a shell's way to say it
    if killed or (found := re.search(NO_FILES_FAULT, "\n".join(lines))):
        problem = f"ended by signal {killed}" if killed else found[0]
        raise MachineError(f"{path}: ffmpeg failed ({problem}), which says nothing of the file; {AGAIN}")
    return "; ".join(lines[:3]) or f"ffmpeg ended with status {status}"


def visible(folder: Path) -> list[Path]:
    """What is in a folder, by name, but what systems hide in it, such as the ._ files of macOS."""
    return sorted(file for file in folder.iterdir() if not file.name.startswith("."))


def describe(path: Path) -> tuple[str, str, str]:
    """What ffmpeg says of a file's video stream, "" if it has none; all that it says; and what it complains of."""
    ffmpeg_version()
    probe = start_ffmpeg("-nostdin", "-i", f"file:{no_pointer(path)}")
    said = (told := probe.communicate()[1]).decode(errors="replace")
    problem = "" if probe.returncode == 1 and "Input #0" in said else complaint(path, probe.returncode, told)
    stream = re.search(r"Stream #\S+ .*?Video: (.*)", said)
    return f"{stream[1]}," if stream else "", said, problem


def frame_rate(about: str) -> int:
    """Of a video that `describe` tells about, in whole frames a second; 0 if it doesn't say."""
    return round(float((re.search(r" ([\d.]+) (?:fps|tbr)", about) or ["", 0])[1]))


def read_video(path: Path, maps: bool = False, told: tuple[str, str, str] | None = None) -> Iterator[np.ndarray]:
    """The pictures [height, width, 3] uint8 that a video file holds, turned and stretched as players show them.

    `maps`: what is transparent is black. `told`: what `describe` says, if known. Raises one of BROKEN, or MachineError.
    """
    about, said, problem = told or describe(path)
    if not (size := re.search(r"[ ,](\d+)x(\d+)[ ,\[]", about)):
        raise ValueError(problem or f"holds no {'picture that can be decoded' if about else 'video'}")
    pixel = re.search(r"SAR ([1-9]\d*):([1-9]\d*)", about)
    across, down = map(int, pixel.groups()) if pixel else (1, 1)
    width, height = int(size[1]) * across // down, int(size[2])
    if width * height > MOST_PICTURE:
        raise ValueError(f"a frame of {width}x{height} is larger than {MOST_PICTURE} pixels")
    if hdr := re.search("smpte2084|arib-std-b67", about):
        raise ValueError(f"is HDR ({hdr[0]}); convert it to SDR first")
    tagged = re.search(r"\((?:[^()]*, )?(bt709|smpte170m|bt470bg|bt2020|gbr|fcc|smpte240m)", about)
    filters = [] if tagged or height < HD or "rgb" in about or "gbr" in about else ["scale=in_color_matrix=bt709"]
    filters += ["scale=round(iw*sar):ih"] if across != down else []
    decoder = []
    if maps and (alpha := "alpha_mode" in said or re.search("yuva|rgba|bgra|argb|abgr|gbrap|ya8|ya16|pal8", about)):
        filters.append("format=gbrap,premultiply=inplace=1")
        decoder = ["-c:v", "libvpx-vp9" if "vp9" in about else "libvpx"] if alpha is True else []
    pixels = None
    command = ["-nostdin", "-v", "error", *decoder, "-i", f"file:{path}", "-map", "0:v:0", "-fps_mode", "passthrough",
               "-vf", ",".join([*filters, "null"]), "-f", "image2pipe", "-c:v", "ppm",
               "-pix_fmt", "rgb24", "-"]  # fmt: skip
    with start_ffmpeg(*command) as job, ThreadPoolExecutor(1) as pool:
        errors = pool.submit(job.stderr.read)  # meanwhile: a full pipe would stop ffmpeg
        try:
            while len(head := b"".join(job.stdout.readline() for _ in range(3)).split()) == 4:  # P6, the sides, 255
                width, height = map(int, head[1:3])
                if len(pixels := job.stdout.read(3 * width * height)) < 3 * width * height:
                    break
                yield np.frombuffer(pixels, np.uint8).reshape(height, width, 3)
            if (status := job.wait()) or head:
                raise RuntimeError(complaint(path, status, errors.result()) if status else "ends amid a picture")
            if pixels is None:
                raise ValueError("holds no picture that can be decoded")
        finally:
            job.kill()  # the caller may have read enough


def read_frames(path: Path, check: Callable[[bool, str, str], None], maps: bool = True) -> Iterator[np.ndarray]:
    """Frames [height, width, 3] uint8 of a video, or of a folder of PNG files: 2.png before 10.png."""
    try:
        if path.is_dir():
            files = [file for file in visible(path) if file.suffix.lower() == ".png"]
            check(len(files) > 0, "", "a folder without PNG files; put one PNG map per frame in it")
            files.sort(key=lambda file: [int(s) if s.isdigit() else s for s in re.split("([0-9]+)", file.name)])
            numbers = [int(found[-1]) for file in files if (found := re.findall("[0-9]+", file.stem))]
            if len(numbers) == len(files) and len(set(np.diff(numbers))) > 1:
                gap = min(set(range(numbers[0], numbers[-1])) - set(numbers), default=numbers[0])
                check(False, "", f"a file is missing: number {gap}; frames are numbered without gaps")
            frames = (read_picture(file, "black") for file in files)
        else:
            frames = read_video(path, maps)
        for number, frame in enumerate(frames):
            white = maps and number == 0 and frame[[0, 0, -1, -1], [0, -1, 0, -1]].min() > 200  # in all four corners
            check(not white, "frame 0", "its ground is white; paint the ground of maps black")
            yield frame
    except BROKEN as error:
        check(False, "", f"can't be decoded ({reason(error)}); save it as an H.264 mp4 or as PNG files")


def to_uint8(video: Tensor, scale: int = 1) -> np.ndarray:
    """[3, T, H, W] in [-1, 1] -> [T, scale H, scale W, 3] uint8, enlarged by repeating pixels."""
    frames = ((video.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).cpu().numpy()
    return frames.repeat(scale, axis=1).repeat(scale, axis=2)


def contact_sheet(rows: Sequence[np.ndarray], gap: int = 2) -> np.ndarray:
    """One row per video [T, H, W, 3], its frames from left to right."""
    padded = np.pad(rows, ((0, 0), (0, 0), (0, gap), (0, gap), (0, 0)), constant_values=255)
    return rearrange(padded, "n t h w c -> (n h) (t w) c")


def write_video(path: Path | str, frames: np.ndarray, fps: int, made_of: dict[str, str] | None = None) -> None:
    """[T, H, W, 3] uint8 -> an H.264 mp4 that plays anywhere, tagged as BT.709. Odd sides gain a black pixel."""
    count, height, width = frames.shape[:3]
    with atomic(path) as temporary:
        encoder = start_ffmpeg(
            "-y", "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", fps, "-i", "-",
            "-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2,scale=out_color_matrix=bt709:out_range=tv,format=yuv420p,"
            "setparams=range=tv:color_primaries=bt709:color_trc=bt709:colorspace=bt709",
            "-c:v", "libx264", "-preset", "veryfast", "-crf", 5, "-movflags", "+faststart",
            "-metadata", f"comment=made of {json.dumps(made_of or {})}", f"file:{temporary}",
            stdin=subprocess.PIPE,
        )  # fmt: skip
        said = encoder.communicate(np.ascontiguousarray(frames).data)[1]
        if encoder.returncode:
            raise OSError(complaint(path, encoder.returncode, said))
        lister = start_ffmpeg("-nostdin", "-v", "error", "-i", f"file:{temporary}", "-c", "copy", "-f", "framecrc", "-")
        whole = sum(not line.startswith(b"#") for line in lister.communicate()[0].splitlines())  # a line a picture
        if whole != count:
            raise OSError(f"{whole} of {count} pictures arrived")


def read_record(path: Path | str) -> dict[str, str]:
    """What `write_video` was told that a video is made of, {} of a picture. UserError if it isn't of our making."""
    with open(path, "rb") as file:
        found = re.search(rb"made of (\{[^{}]*\})", file.read(1 << 20))  # before the pictures
    require(found, f"{path}: {NOT_OURS}")
    return json.loads(found[1])


def write_image(path: Path | str, image: np.ndarray) -> None:
    """uint8 [height, width, 3] or [height, width] -> a PNG that `read_record` knows."""
    made = PngImagePlugin.PngInfo()
    made.add_text("Comment", "made of {}")
    with atomic(path) as temporary:
        Image.fromarray(image).save(temporary, pnginfo=made)

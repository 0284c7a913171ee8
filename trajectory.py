"""Trajectories: what the user draws, checked and painted as the paper's trajectory condition, the maps networks read.

    trajectory = load_trajectory("boxes.json", image_size=(704, 1280), num_frames=121)
    maps = trajectory.maps("box")  # [3, 121, 704, 1280] in [-1, 1]

A map video is black, with one constant colour per object. Frame 0 always holds the filled segmentation masks; later
frames hold outlines of boxes, or masks, or nothing where the trajectory is sparse. Input is a boxes.json, a map video
or a folder of PNG maps, the last two as MagicMotion has them. A box is x0, y0, x1, y1 in pixels, x1 and y1 exclusive.
K objects, T frames. An adapter's config says which of the two ways to paint maps it reads.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from core.colors import MOST_OBJECTS, extents, flat_colors, label_pixels
from core.config import UserError
from core.media import BROKEN, VIDEO_SUFFIXES, Size, cover, fit_nearest, kept, read_frames, read_mask

# Half-intensity colours, as MagicMotion draws them; its first two are these. Any two are at least 45 apart in RGB.
PALETTE = [
    (128, 32, 32), (128, 80, 80), (32, 128, 32), (32, 64, 128), (128, 128, 32), (96, 32, 128), (32, 128, 128),
    (128, 80, 16), (80, 128, 80), (80, 96, 128), (128, 32, 96), (128, 112, 128), (16, 96, 80), (64, 16, 80),
    (80, 80, 16), (16, 16, 128), (16, 80, 16), (80, 16, 16), (16, 32, 80), (64, 80, 64),
]  # fmt: skip
Maps = Literal["outline", "pixels"]  # the two ways to paint: Trajectory.maps
TOP_FIELDS = ("num_frames", "width", "height", "objects")
OBJECT_FIELDS = ("name", "mask", "color", "interpolate", "boxes", "visible")
POINTS = (".npy", ".npz", ".txt", ".pt", ".pth")  # endings of point tracks, which tools/convert.py reads
MOST_BYTES, MOST_SIDE = 16 << 20, 65536
MOST_COUNTED = 1000  # maps beyond those asked for, to say how many there are


@dataclass(frozen=True)
class Trajectory:
    """K objects over T frames, in pixels of the generated video. Later objects pass in front of earlier ones."""

    boxes: np.ndarray  # [K, T, 4] float64; NaN in frames where no box is drawn
    masks: np.ndarray  # bool, [K, height, width] in frame 0 or [K, T, height, width] in all frames
    colors: np.ndarray  # [K, 3] uint8, RGB
    names: list[str]
    maps_given: Tensor | None = None  # [3, T, height, width] in [-1, 1], where the user gave finished maps

    @property
    def num_frames(self) -> int:
        return self.boxes.shape[1]

    @property
    def size(self) -> Size:
        return self.masks.shape[-2:]

    def maps(self, kind: str = "box", picture: Tensor | None = None) -> Tensor:
        """The condition video, float32 [3, T, height, width] in [-1, 1], black is -1.

        Outlines, unless a picture is given: frame 0 holds the filled masks in the objects' colours; later frames, for
        "box", outlines of the boxes `min(height, width) // 100` pixels thick (at least 1), and for "mask" the masks. A
        trajectory that was given as maps returns those, whatever the kind.

        With the first frame as `picture` [3, height, width] in [-1, 1], its own pixels: frame 0 holds what the masks
        show of it, later frames the same moved and scaled from frame 0's box to their own, later objects in front. What
        the first frame doesn't show of an object is plain grey (0): a part that another covers or that lies beyond the
        edge, or all of it. Nothing is darker than -0.9, for black is where nothing is said.
        Raises ValueError for another kind, or for "mask" where only first-frame masks exist.
        """
        if kind not in ("box", "mask"):
            raise ValueError(f"kind of map is {kind!r}; use 'box' or 'mask'")
        if picture is not None:
            return self._pixel_maps(picture)
        if self.maps_given is not None:
            return self.maps_given
        if kind == "mask" and self.masks.ndim != 4:
            raise ValueError("mask maps need the masks of every frame, and this trajectory has those of frame 0 only")
        canvas = np.full((3, self.num_frames, *self.size), -1, dtype=np.float32)
        thickness = max(1, min(self.size) // 100)
        values = self.colors.astype(np.float32) / 127.5 - 1
        corners = _pixels(self.boxes, self.size)
        for k, value in enumerate(values):
            value = value[:, None, None]
            if kind == "mask":
                np.copyto(canvas, value[..., None], where=self.masks[k])
                continue
            np.copyto(canvas[:, 0], value, where=self.masks[k] if self.masks.ndim == 3 else self.masks[k, 0])
            for t in range(1, self.num_frames):
                _outline(canvas[:, t], corners[k][t], thickness, value)
        return torch.from_numpy(canvas)

    def _pixel_maps(self, picture: Tensor) -> Tensor:
        masks = torch.from_numpy(self.masks if self.masks.ndim == 3 else self.masks[:, 0])  # (K, H, W)
        whole, (height, width) = torch.ones(self.size), self.size
        canvas = torch.full((3, self.num_frames, *self.size), -1.0)
        for k, boxes in enumerate(self.boxes):
            known = masks[k] & ~masks[k + 1 :].any(0)
            layers = torch.cat([picture.float(), torch.stack([masks[k].float(), known.float(), whole])])
            source = extents(np.where(masks[k], 0, -1), 1)[0] if np.isnan(boxes[0]).any() else boxes[0]
            for t in np.flatnonzero(~np.isnan(boxes[:, 0])):
                # Pixels whose centres lie in the box.
                x0, y0, x1, y1 = np.ceil(boxes[t] - 0.5).clip(0, [width, height] * 2).astype(int)
                if x0 >= x1 or y0 >= y1:
                    continue
                area = canvas[:, t, y0:y1, x0:x1]
                if not masks[k].any():
                    area[:] = 0
                    continue
                moved = move(layers, source, boxes[t], (y0, y1, x0, x1))
                mask, known_there, inside = moved[3:] > 0.5
                area[:, mask | ~inside] = 0
                area.copy_(torch.where(known_there, moved[:3].clamp(min=-0.9), area))
        return canvas

    def sparse(self, keep: Sequence[int]) -> "Trajectory":
        """The same trajectory told only in frames `keep` and in frame 0; the other frames' maps are black."""
        dropped = np.ones(self.num_frames, dtype=bool)
        dropped[[0, *keep]] = False
        boxes, masks, maps = self.boxes.copy(), self.masks.copy(), self.maps_given
        boxes[:, dropped] = np.nan
        if masks.ndim == 4:
            masks[:, dropped] = False
        if maps is not None:
            maps = maps.masked_fill(torch.from_numpy(dropped)[:, None, None], -1)
        return replace(self, boxes=boxes, masks=masks, maps_given=maps)


def enlarge(trajectory: Trajectory, path: str | Path, size: Size) -> Trajectory:
    """The trajectory that was read from this path in pixels of the same video at another size, height and width.

    Painted masks are read once more, for their detail; those of a map video are enlarged smoothly.
    """

    def fit(mask: np.ndarray, box: tuple[float, ...] | None = None) -> np.ndarray:
        picture = Image.fromarray(mask.astype(np.uint8) * 255)
        return np.asarray(picture.resize(size[::-1], Image.Resampling.BICUBIC, box)) > 127

    boxes = trajectory.boxes * (np.array(size[::-1] * 2) / (trajectory.size[::-1] * 2))
    masks = np.stack([fit(mask) for mask in trajectory.masks])
    for k, item in enumerate(read_boxes_json(Path(path))["objects"] if trajectory.maps_given is None else []):
        if not trajectory.masks[k].any():
            continue  # it enters later
        if "mask" in item:
            painted = read_mask(Path(path).parent / item["mask"], lambda got: None)
            masks[k] = fit(painted, kept(painted.shape, trajectory.size))
        else:
            x0, y0, x1, y1 = _pixels(boxes[k : k + 1, :1], size)[0][0]
            masks[k] = False
            masks[k, y0:y1, x0:x1] = True
    return replace(trajectory, boxes=boxes, masks=masks, maps_given=None)


def move(picture: Tensor, source: np.ndarray, target: np.ndarray, area: tuple[int, int, int, int]) -> Tensor:
    """What lies in the box `source` of a picture, moved and scaled until it fills the box `target`, in a part of it.

    picture [C, height, width]; boxes [4] in pixels; area: the part's first and last row and column, y0, y1, x0, x1, the
    last ones exclusive -> [C, y1 - y0, x1 - x0]; 0 where nothing of the picture comes.
    """
    y0, y1, x0, x1 = area
    height, width = picture.shape[-2:]
    scale = (source[2:] - source[:2]) / (target[2:] - target[:2])
    x = (np.arange(x0, x1) + 0.5 - target[0]) * scale[0] + source[0]
    y = (np.arange(y0, y1) + 0.5 - target[1]) * scale[1] + source[1]
    x, y = torch.from_numpy(2 * x / width - 1).float(), torch.from_numpy(2 * y / height - 1).float()
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)
    return F.grid_sample(picture[None], grid[None], align_corners=False)[0]


def dark_frames(u: np.ndarray, share: float) -> np.ndarray:
    """Which of T frames of a sparse trajectory are black, [T] bool: in a `share` of draws a random subset, else none.

    u [1 + T] is uniform in [0, 1). Frame 0 never is.
    """
    if u[0] >= share:
        return np.zeros(len(u) - 1, dtype=bool)
    dark = u[1:] <= u[0] / share  # u[0] / share is uniform again: how many frames go dark
    dark[0] = False
    return dark


def draw_overlay(frames: np.ndarray, trajectory: Trajectory) -> np.ndarray:
    """The trajectory drawn on a video, to look at: boxes, and a dot at every box centre of the whole path.

    frames uint8 [T, H, W, 3], of the trajectory's size or a multiple -> the same shape. Colours are the objects' own at
    full brightness. Raises ValueError if the trajectory is of another shape or length.
    """
    scale = frames.shape[1] // trajectory.size[0]
    size = tuple(scale * n for n in trajectory.size)
    if (trajectory.num_frames, *size) != frames.shape[:3] or not scale:
        raise ValueError(f"a trajectory of {trajectory.num_frames} x {trajectory.size} on a video {frames.shape}")
    canvas = rearrange(frames.copy(), "t h w c -> c t h w")
    thickness = max(1, min(size) // 100)
    bright = trajectory.colors.astype(float) / trajectory.colors.max(axis=1, keepdims=True).clip(1) * 255
    centers = (trajectory.boxes[..., :2] + trajectory.boxes[..., 2:]) / 2
    dots = _pixels(np.concatenate([centers, centers], axis=-1) * scale + np.array([-1, -1, 1, 1]) * thickness / 2, size)
    corners = _pixels(trajectory.boxes * scale, size)
    for k, color in enumerate(bright.round().astype(np.uint8)[..., None, None]):  # (3, 1, 1)
        for x0, y0, x1, y1 in dots[k]:
            canvas[..., y0:y1, x0:x1] = color[..., None]
        for t in range(trajectory.num_frames):
            _outline(canvas[:, t], corners[k][t], thickness, color)
    return rearrange(canvas, "c t h w -> t h w c")


def _pixels(boxes: np.ndarray, size: Size) -> list[list[list[int]]]:
    """Boxes [K, T, 4] to whole pixels inside the image: one or more, of however little a box shows there.

    NaN and what lies outside become empty boxes.
    """
    edges = size[1], size[0]
    shows = ((boxes[..., :2] < edges) & (boxes[..., 2:] > 0)).all(-1, keepdims=True)  # false for NaN
    return np.where(shows, _rounded(boxes.clip(0, edges * 2)), 0).astype(int).tolist()


def _rounded(boxes: np.ndarray) -> np.ndarray:
    """Boxes [..., 4] to whole pixels, one at least each way, which may lie outside the image. NaN stays."""
    middle = np.floor((boxes[..., :2] + boxes[..., 2:]) / 2)
    low, high = np.floor(boxes[..., :2] + 0.5), np.floor(boxes[..., 2:] + 0.5)
    thin = high <= low  # in x, in y
    low, high = np.where(thin, middle, low), np.where(thin, middle + 1, high)
    return np.concatenate([low, high], axis=-1)


def _outline(image: np.ndarray, box: list[int], thickness: int, value: np.ndarray) -> None:
    """Draw a box into image [3, H, W]. The line grows inward, so the outer edge is the box's own."""
    x0, y0, x1, y1 = box
    image[:, y0 : min(y0 + thickness, y1), x0:x1] = value
    image[:, max(y1 - thickness, y0) : y1, x0:x1] = value
    image[:, y0:y1, x0 : min(x0 + thickness, x1)] = value
    image[:, y0:y1, max(x1 - thickness, x0) : x1] = value


def load_trajectory(
    path: str | Path, image_size: Size, num_frames: int, source_size: Size | None = None, cut: bool = False
) -> Trajectory:
    """Read a boxes.json, a map video or a folder of PNG maps, and check all of it.

    image_size is the (height, width) of the generated video. source_size is that of the user's image, in whose pixels
    the boxes are unless the JSON states a width and height (default: image_size). A frame of another shape than the
    video is treated as the image is: resized until it covers the video, and cut to its middle.
    `cut`: a boxes.json may be for a longer video, of which these are the first frames.
    Raises UserError for anything that can't be used.
    """
    path = Path(path)
    check = partial(check_input, path)
    check(os.path.exists(path), "", "no such file; correct the path")
    if path.is_dir() or path.suffix.lower() in VIDEO_SUFFIXES:
        return _load_maps(path, image_size, num_frames, check)

    top = read_boxes_json(path)
    asked, length = top.get("num_frames", num_frames), num_frames
    num_frames = max(asked, length) if cut else length
    mend = f"change it or pass --frames {asked}"
    check(asked == num_frames, "", f"num_frames is {asked} but the video has {num_frames} frames; {mend}")
    size = (top["height"], top["width"]) if "width" in top else tuple(source_size or image_size)
    objects = top.get("objects")
    fine = isinstance(objects, list) and 1 <= len(objects) <= MOST_OBJECTS
    mend = "delete some" if isinstance(objects, list) and objects else "draw at least one"
    check(fine, "objects", f"must be a list of 1 to {MOST_OBJECTS} objects; {mend}")

    boxes, masks, colors, names, notes = [], [], [], [], []
    for k, item in enumerate(objects):
        where = f"objects[{k}]"
        _check_fields(check, where, item, OBJECT_FIELDS)
        names.append(item.get("name", f"object {k}"))
        check(isinstance(names[-1], str), f"{where}.name", f"{_show(names[-1])} is not text; put it in quotes")
        colors.append(_read_color(check, f"{where}.color", item.get("color"), k, colors))
        kind = item.get("interpolate", "smooth")
        known = kind in ("smooth", "linear", "none")
        check(known, f"{where}.interpolate", f"{_show(kind)} is unknown; use smooth, linear or none")
        frames, keys = _read_keyframes(check, f"{where}.boxes", item.get("boxes"), num_frames, size)
        placed = place(size, image_size, keys)
        kept = (placed[:, :2] < image_size[::-1]).all(1) & (placed[:, 2:] > 0).all(1)
        lost = f"the box of {names[-1]} lies outside what --size {image_size[0]}x{image_size[1]} keeps of the picture"
        mend = "move it, or give a size of the picture's shape"
        check(kept.all(), f'{where}.boxes["{frames[kept.argmin()]}"]', f"{lost}; {mend}")
        track = _interpolate(frames, placed, num_frames, kind)
        # Opposite sides are separate curves, which can cross on a fast path with uneven turns. Straight lines can't.
        crossed = (track[:, 2:] <= track[:, :2]).any(axis=1)
        mend = 'add a keyframe there or use "interpolate": "linear"'
        check(not crossed.any(), f"{where}.boxes", f"the box turns inside out in frame {crossed.argmax()}; {mend}")

        shown = _read_visible(check, f"{where}.visible", item.get("visible", [[0, num_frames - 1]]), num_frames)
        crossing = (placed < 0).any(1) | (placed[:, 2:] > image_size[::-1]).any(1)
        if cut := [str(t) for t in frames[crossing & shown[frames]]]:
            notes.append(f"{names[-1]} in frame {', '.join(cut[:4])}{' and more' if len(cut) > 4 else ''}")
        if not shown[0]:  # it enters later: frame 0 shows what is there
            masks.append(np.zeros(image_size, dtype=bool))
        elif "mask" in item:
            sizes = {size, tuple(source_size or size)}  # the boxes' frame, or the user's image where that is another
            masks.append(_read_mask(check, f"{where}.mask", path.parent, item["mask"], sizes, image_size))
        else:
            mend = 'add a box "0" or a mask'
            check(np.isfinite(track[0]).all(), f"{where}.boxes", f"frame 0 has neither box nor mask; {mend}")
            x0, y0, x1, y1 = _pixels(track[None, :1], image_size)[0][0]
            masks.append(np.zeros(image_size, dtype=bool))
            masks[-1][y0:y1, x0:x1] = True
        boxes.append(np.where(shown[:, None], track, np.nan))
    if notes:
        print(f"{path}: boxes cross the video's edge and are cut there: {'; '.join(notes)}", file=sys.stderr)
    return Trajectory(np.stack(boxes)[:, :length], np.stack(masks), np.array(colors, dtype=np.uint8), names)


Check = Callable[[bool, str, str], None]  # (fine, field, problem and mend), raises for the file at hand


def read_boxes_json(path: Path) -> dict:
    """What a boxes.json holds, checked but for its objects. UserError if it can't be used."""
    check = partial(check_input, path)
    check(path.stat().st_size <= MOST_BYTES, "", f"larger than {MOST_BYTES >> 20} MiB; is this a boxes.json?")
    tracks = f"point tracks are {', '.join(POINTS[:-1])} or {POINTS[-1]}, for python -m tools.convert"
    try:
        top = json.loads(path.read_bytes(), object_pairs_hook=partial(_once, check))
    except json.JSONDecodeError as error:
        check(path.suffix.lower() not in (".txt", ".csv"), "", f"is no boxes.json; {tracks}")
        check(False, f"line {error.lineno}", f"not valid JSON ({error.msg}); correct this line")
    except (ValueError, RecursionError, OSError):  # not text, numbers or nesting beyond reason, unreadable
        mend = "give a boxes.json, a map video or a folder of PNG maps"
        check(False, "", f"can't be read as JSON; {mend}; {tracks}")
    says = "holds a list, of spline points perhaps, which is not read; boxes.json is an object"
    check(not isinstance(top, list), "", f"{says}; {tracks}")
    _check_fields(check, "", top, TOP_FIELDS)
    for name in ("num_frames", "width", "height"):
        whole = _whole(top.get(name, 1), 1, MOST_SIDE)
        check(whole, name, f"{_show(top.get(name))} is not a whole number from 1 to {MOST_SIDE}; correct it")
    lone = "width" if "width" in top else "height"
    check(("width" in top) == ("height" in top), lone, "given alone; give both width and height, or neither")
    return top


def _once(check: Check, pairs: list[tuple[str, object]]) -> dict:
    """A JSON object, none of whose names may stand in it twice: which of the two counts would be a guess."""
    record = {}
    for name, value in pairs:
        check(name not in record, "", f"{_show(name)} stands twice in one object; keep one")
        record[name] = value
    return record


def check_input(path: Path, fine: bool, field: str, problem: str) -> None:
    if not fine:  # names and values are the user's: whatever breaks a line in them becomes a space
        raise UserError(" ".join(": ".join(filter(None, [str(path), field, problem])).splitlines())) from None


def _show(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _whole(value: object, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high  # not isinstance: true and false are no numbers here


def _check_fields(check: Check, where: str, record: object, known: tuple[str, ...]) -> None:
    check(isinstance(record, dict), where or "top level", f"must be an object {{...}} with fields {', '.join(known)}")
    for name in record:
        check(name in known, f"{where}.{name}".lstrip("."), f"unknown field; the known ones are {', '.join(known)}")


def _read_color(check: Check, field: str, color: object, k: int, taken: list[tuple]) -> tuple[int, ...]:
    check(color is not None or k < len(PALETTE), field, f"missing; only objects 0 to {len(PALETTE) - 1} have a default")
    color = list(PALETTE[k]) if color is None else color
    fine = isinstance(color, list) and len(color) == 3 and all(_whole(c, 0, 255) for c in color)
    check(fine, field, f"{_show(color)} is not a colour; give [red, green, blue], whole numbers from 0 to 255")
    check(any(color), field, "black is the background; give another colour")
    color = tuple(color)
    twin = taken.index(color) if color in taken else None
    check(twin is None, field, f"{_show(color)} is also the colour of objects[{twin}]; give one of them another")
    return color


def _read_keyframes(
    check: Check, field: str, boxes: object, num_frames: int, size: Size
) -> tuple[np.ndarray, np.ndarray]:
    """The `boxes` field -> frames [n], in order of time, and boxes [n, 4] in the source's pixels."""
    form = '{"0": [x0, y0, x1, y1], ...}'
    check(isinstance(boxes, dict | list) and len(boxes) > 0, field, f"missing, empty or no boxes; give {form}")
    if isinstance(boxes, list):
        mend = f"give one per frame, or keyframes {form}"
        check(len(boxes) == num_frames, field, f"a list of {len(boxes)} boxes for {num_frames} frames; {mend}")
    keys = {}
    for key, box in enumerate(boxes) if isinstance(boxes, list) else boxes.items():
        where, mend = f"{field}[{_show(key)}]", f"use 0 to {num_frames - 1}"
        check(bool(re.fullmatch("-?(0|[1-9][0-9]{0,8})", str(key))), where, f"a key is a frame number; {mend}")
        t = int(key)
        check(t >= 0, where, f"frame {t} is negative; {mend}")
        check(t < num_frames, where, f"frame {t} is beyond num_frames {num_frames}; {mend}")
        fine = isinstance(box, list) and len(box) == 4 and all(type(v) in (int, float) for v in box)
        fine = fine and all(abs(v) < float("inf") for v in box)  # false for NaN too
        check(fine, where, f"{_show(box)} is not a box; give [x0, y0, x1, y1], four finite numbers")
        fine = box[0] < box[2] and box[1] < box[3]
        check(fine, where, f"{_show(box)} has no area; x1 must be greater than x0, and y1 than y0")
        fine = max(map(abs, box)) <= MOST_SIDE and box[0] < size[1] and box[1] < size[0] and min(box[2:]) > 0
        mend = f"use 0 to {size[1]} for x and 0 to {size[0]} for y"
        check(fine, where, f"{_show(box)} lies outside the image; {mend}")
        keys[t] = box
    sides = [v for box in keys.values() for v in box]
    part = all(abs(v) <= 1 for v in sides) and any(v % 1 for v in sides) and max(size) > 1
    check(not part, field, "all boxes lie within 1 pixel; if they are parts of the picture, multiply by its size")
    frames = sorted(keys)
    return np.array(frames), np.array([keys[t] for t in frames], dtype=float)


def _read_visible(check: Check, field: str, ranges: object, num_frames: int) -> np.ndarray:
    """The `visible` field -> bool [T]."""
    shown = np.zeros(num_frames, dtype=bool)
    form = f"give [[first, last], ...], frames from 0 to {num_frames - 1}"
    check(isinstance(ranges, list) and len(ranges) > 0, field, f"{_show(ranges)} is not a list of ranges; {form}")
    for i, pair in enumerate(ranges):
        fine = isinstance(pair, list) and len(pair) == 2 and all(_whole(t, 0, num_frames - 1) for t in pair)
        check(fine and pair[0] <= pair[1], f"{field}[{i}]", f"{_show(pair)} is not a range; {form}")
        shown[pair[0] : pair[1] + 1] = True
    return shown


def place(source: Size, target: Size, xy: np.ndarray) -> np.ndarray:
    """Points [..., 2] or boxes [..., 4] of a source frame, in pixels of the target that covers it."""
    resized, top, left = cover(source, target)
    corners = xy.shape[-1] // 2
    return xy * ([resized[1] / source[1], resized[0] / source[0]] * corners) - [left, top] * corners


def _read_mask(check: Check, field: str, folder: Path, name: object, sizes: set[Size], image_size: Size) -> np.ndarray:
    """The `mask` image, of one of these sizes -> bool [height, width] of the generated size."""
    check(isinstance(name, str) and bool(name), field, f"{_show(name)} is not a file name; give an image's path")
    file = folder / name
    wanted = " or ".join(f"{w}x{h}" for h, w in sorted(sizes))

    def fits(got: Size) -> None:
        check(got in sizes, field, f"{file} is {got[1]}x{got[0]} but the image is {wanted}; resize it")

    try:
        check(file.exists(), field, f"{file} does not exist; correct the path, relative to the JSON file")
        mask = read_mask(file, fits)
    except BROKEN:
        check(False, field, f"{file} is not an image; save the mask as PNG")
    check(mask.any(), field, f"{file} is empty; paint the object in any colour but black")
    mask = fit_nearest(mask, image_size)
    check(mask.any(), field, f"{file} vanishes at {image_size[1]}x{image_size[0]}; paint a larger object")
    return mask


def _interpolate(frames: np.ndarray, keys: np.ndarray, num_frames: int, kind: str) -> np.ndarray:
    """Keyframes [n] and their boxes [n, 4] -> boxes [T, 4], held before the first and after the last keyframe.

    "smooth" is a monotone cubic per coordinate: Hermite pieces whose slope at an inner keyframe is the weighted
    harmonic mean of the two secants, 0 where their signs differ (Fritsch & Butland 1984), and at both ends the secant.
    A side thus stays between its two keyframes, and two keyframes alone make a straight line.
    """
    track = np.full((num_frames, 4), np.nan)
    if kind != "none":
        at = np.arange(num_frames)
        track = np.stack([np.interp(at, frames, side) for side in keys.T], axis=1)
    if kind == "smooth" and len(frames) > 2:
        h = np.diff(frames)[:, None].astype(float)  # (n - 1, 1)
        secant = np.diff(keys, axis=0) / h  # (n - 1, 4)
        slope = np.concatenate([secant[:1], np.zeros_like(secant[1:]), secant[-1:]])  # (n, 4)
        before, after = 2 * h[1:] + h[:-1], h[1:] + 2 * h[:-1]  # weights of the secants
        with np.errstate(divide="ignore", invalid="ignore"):
            mean = (before + after) / (before / secant[:-1] + after / secant[1:])
        slope[1:-1] = np.where(secant[:-1] * secant[1:] > 0, mean, 0)
        inner = np.arange(frames[0], frames[-1])
        i = np.searchsorted(frames, inner, side="right") - 1  # the piece that a frame lies in
        s = (inner - frames[i])[:, None] / h[i]
        # The Hermite cubic is the chord and a correction that vanishes at both keyframes.
        track[inner] += h[i] * s * (1 - s) * ((1 - s) * (slope[i] - secant[i]) - s * (slope[i + 1] - secant[i]))
    track[frames] = keys  # to the last bit
    return track


def _load_maps(path: Path, image_size: Size, num_frames: int, check: Check) -> Trajectory:
    """A map video or folder of PNG maps. Objects are the flat colours of frame 0; boxes, the extent of each colour."""
    maps, boxes, count = np.empty((num_frames, *image_size, 3), dtype=np.uint8), [], 0
    for count, frame in enumerate(read_frames(path, check), start=1):
        if count == 1:
            size, colors = frame.shape[:2], flat_colors(frame)
            mend = "a map is black, with one filled mask of one colour per object"
            check(0 < len(colors) <= MOST_OBJECTS, "frame 0", f"shows no object, or over {MOST_OBJECTS}; {mend}")
        check(frame.shape[:2] == size, f"frame {count - 1}", "is of another size than frame 0; give all maps one size")
        if count > num_frames:
            few = count <= num_frames + MOST_COUNTED
            check(few, "", f"more than {count - 1} maps but the video has {num_frames} frames; cut it")
            continue  # only to count them
        label = label_pixels(frame, colors)
        if count == 1:
            masks = fit_nearest(label, image_size) == np.arange(len(colors))[:, None, None]
            mend = f"is cut away at {image_size[1]}x{image_size[0]}; change the size"
            check(masks.any((1, 2)).all(), "frame 0", f"an object {mend}")
        maps[count - 1] = fit_nearest(frame, image_size)
        boxes.append(extents(label, len(colors)))
    check(count == num_frames, "", f"{count} maps but the video has {num_frames} frames; pass --frames {count}")
    given = rearrange(torch.from_numpy(maps), "t h w c -> c t h w").float() / 127.5 - 1
    names = [f"object {k}" for k in range(len(colors))]
    placed = place(size, image_size, np.stack(boxes, axis=1))
    return Trajectory(placed, masks, colors.round().astype(np.uint8), names, given)

"""Trajectories: what the user draws, checked, and painted as the maps that networks read.

    trajectory = load_trajectory("boxes.json", image_size=(704, 1280), num_frames=121)
    maps = trajectory.maps("box")  # [3, 121, 704, 1280] in [-1, 1]

Input is a boxes.json, or maps as MagicMotion has them: a video or a folder of PNG files, black, with one colour per
object. A box is x0, y0, x1, y1 in pixels, x1 and y1 exclusive. K objects, T frames.
"""

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from core import boxes as drawing
from core.config import UserError, warn
from core.files import no_pointer
from core.media import BROKEN, VIDEO_SUFFIXES, Size, alike, cover_nearest, read_frames, read_mask

# Half-intensity colours, as MagicMotion draws them; its first two are these. Any two are at least 45 apart in RGB.
PALETTE = [
    (128, 32, 32), (128, 80, 80), (32, 128, 32), (32, 64, 128), (128, 128, 32), (96, 32, 128), (32, 128, 128),
    (128, 80, 16), (80, 128, 80), (80, 96, 128), (128, 32, 96), (128, 112, 128), (16, 96, 80), (64, 16, 80),
    (80, 80, 16), (16, 16, 128), (16, 80, 16), (80, 16, 16), (16, 32, 80), (64, 80, 64),
]  # fmt: skip
Maps = Literal["outline", "pixels"]  # the two ways to paint, of which an adapter's config names one: Trajectory.maps
Fill = Callable[[np.ndarray, Size], np.ndarray]  # a box [4] and a size -> a mask, as `fill_box`
Check = Callable[[object, str, str], None]  # (fine, field, problem and mend), raises for the file at hand
POINTS = (".npy", ".npz", ".txt", ".pt", ".pth")  # suffixes of point tracks, which tools/convert.py reads
RIM = 2  # pixels around an object that its hole takes away too: masks seldom hold all of it
MOST_BYTES, MOST_SIDE, MOST_OBJECTS = 16 << 20, 65536, 64
MOST_COUNTED = 1000  # maps beyond the video's length that are counted for the error message


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

    @property
    def first_masks(self) -> np.ndarray:
        """Of frame 0, bool [K, height, width]."""
        return self.masks if self.masks.ndim == 3 else self.masks[:, 0]

    @property
    def unmasked(self) -> list[str]:
        """Names of the objects that frame 0 shows as their filled boxes."""
        first = zip(self.names, self.first_masks, self.boxes[:, 0], strict=True)
        return [name for name, mask, box in first if mask.any() and (mask == drawing.fill_box(box, self.size)).all()]

    def maps(self, kind: str = "box", picture: Tensor | None = None) -> Tensor:
        """The condition video, float32 [3, T, height, width] in [-1, 1], black is -1.

        Without a picture the paper's: frame 0 holds the filled masks in the objects' colours, later frames outlines of
        the boxes ("box") or the masks ("mask"). A trajectory that was given as maps returns those.

        With the first frame as `picture` [3, height, width] in [-1, 1], its own pixels. Frame 0 holds what the masks
        show of it. Later frames hold all of it, with the objects moved and scaled from frame 0's boxes to their own.
        Behind an object, which the first frame doesn't show, are smooth colours between those around; beyond the edge,
        the picture's mirror image. An object that comes later is plain grey (0).
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
        for k, color in enumerate(self.colors.astype(np.float32)[..., None, None] / 127.5 - 1):  # (3, 1, 1)
            if kind == "mask":
                np.copyto(canvas, color[..., None], where=self.masks[k])
                continue
            np.copyto(canvas[:, 0], color, where=self.first_masks[k])
            drawing.draw_outlines(canvas[:, 1:], self.boxes[k, 1:], color)
        return torch.from_numpy(canvas)

    def _pixel_maps(self, picture: Tensor) -> Tensor:
        def widen(mask: Tensor) -> Tensor:
            return F.max_pool2d(mask[None].float(), 2 * RIM + 1, stride=1, padding=RIM)[0] > 0

        masks, (height, width), picture = torch.from_numpy(self.first_masks), self.size, picture.float()
        covered = masks.any(0)
        later = drawing.fill_hole(picture, widen(covered))[:, None].expand(-1, self.num_frames - 1, -1, -1)
        canvas = torch.cat([picture.masked_fill(~covered, -1)[:, None], later], dim=1)
        for k, boxes in enumerate(self.boxes):
            in_picture, is_camera = bool(masks[k].any()), bool(masks[k].all())
            others = ~masks[k] | widen(masks[k + 1 :].any(0))  # pixels that do not show this object
            layers = torch.cat([drawing.fill_hole(picture, others), masks[k, None].float()])
            source = drawing.extents(np.where(masks[k], 0, -1), 1)[0] if np.isnan(boxes[0]).any() else boxes[0]
            for t in np.flatnonzero(~np.isnan(boxes[1:, 0])) + 1:
                # Pixels whose centres lie in the box, and one more each way, in which the object's edge fades.
                edges = np.ceil(boxes[t] - 0.5) + np.array([-1, -1, 1, 1]) * in_picture
                # The camera shows more than was in the picture.
                x0, y0, x1, y1 = (0, 0, width, height) if is_camera else edges.clip(0, [width, height] * 2).astype(int)
                area = canvas[:, t, y0:y1, x0:x1]  # empty where nothing of the box lies in the picture
                if in_picture:
                    moved = drawing.move(layers, source, boxes[t], (y0, y1, x0, x1), "reflection")
                    area.lerp_(moved[:3], moved[3])
                else:
                    area.zero_()
        return canvas


def load_trajectory(
    path: str | Path, image_size: Size, num_frames: int, source_size: Size | None = None, cut: bool = False,
    fill: Fill = drawing.fill_box,
) -> Trajectory:  # fmt: skip
    """Read a boxes.json, a map video or a folder of PNG maps. UserError for anything in it that can't be used.

    image_size is the (height, width) of the generated video. source_size is that of the user's image, in whose pixels
    the boxes are unless the JSON states a width and height (default: image_size). The frame of boxes or maps must have
    the shape of the image or the video. It is treated as the image is: resized until it covers the video, and cut to
    its middle. `cut`: a boxes.json may be for a longer video, of which these are the first frames. `fill`: gives the
    masks of objects that have none, from their first boxes.
    """
    path = Path(path)
    check = partial(check_input, path)

    def check_shape(field: str, size: Size) -> None:
        own = source_size or size
        how = "the picture turned by 90 degrees" if alike(size, own[::-1]) else "another shape"
        problem = f"{size[1]}x{size[0]} is of {how}; the picture is {own[1]}x{own[0]}; give boxes or maps in its shape"
        check(alike(size, own) or alike(size, image_size), field, problem)

    check(os.path.exists(no_pointer(path)), "", "no such file; correct the path")
    if path.is_dir() or path.suffix.lower() in VIDEO_SUFFIXES:
        return _load_maps(path, image_size, num_frames, check, check_shape)

    top, length = read_boxes_json(path), num_frames
    num_frames = top.get("num_frames", length)
    problem = f"num_frames is {num_frames} but the video has {length} frames; change it or pass --frames {num_frames}"
    check(num_frames == length or (cut and num_frames > length), "", problem)
    size = (top["height"], top["width"]) if "width" in top else tuple(source_size or image_size)
    check_shape("width", size)
    objects = top.get("objects")
    fine = isinstance(objects, list) and 0 < len(objects) <= MOST_OBJECTS
    check(fine, "objects", f"must be a list of 1 to {MOST_OBJECTS} objects; draw at least one or delete some")

    boxes, masks, colors, names, crossing = [], [], [], [], []
    for k, item in enumerate(objects):
        where = f"objects[{k}]"
        _check_fields(check, where, item, OBJECT_FIELDS)
        names.append(item.get("name", f"object {k}"))
        color = tuple(item.get("color") or next(iter(PALETTE[k : k + 1]), ()))
        check(color, f"{where}.color", f"missing; only objects 0 to {len(PALETTE) - 1} have a default")
        check(any(color), f"{where}.color", "black is the background; give another colour")
        twins = [n for n, other in enumerate(colors) if other == color]
        check(not twins, f"{where}.color", f"{_show(color)} is also the colour of objects{twins}; change one of them")
        colors.append(color)

        frames, sides = _read_keyframes(check, f"{where}.boxes", item.get("boxes"), num_frames, size)
        keys = drawing.place(size, image_size, sides)
        inside = (keys[:, :2] < image_size[::-1]).all(1) & (keys[:, 2:] > 0).all(1)
        lost = f"the box of {names[k]} lies outside what --size {image_size[0]}x{image_size[1]} keeps of the picture"
        mend = "move it, or give a size of the picture's shape"
        check(inside.all(), f'{where}.boxes["{frames[inside.argmin()]}"]', f"{lost}; {mend}")
        track = drawing.interpolate(frames, keys, num_frames, item.get("interpolate", "smooth"))
        # Opposite sides are separate curves, which can cross on a fast path with uneven turns. Straight lines can't.
        crossed = (track[:, 2:] <= track[:, :2]).any(axis=1)
        mend = 'add a keyframe there or use "interpolate": "linear"'
        check(not crossed.any(), f"{where}.boxes", f"the box turns inside out in frame {crossed.argmax()}; {mend}")

        visible, last = np.zeros(num_frames, dtype=bool), num_frames - 1
        for i, pair in enumerate(item.get("visible", [[0, last]])):
            fine, mend = _whole_numbers(pair, 2, 0, last), f"give [[first, last], ...], frames from 0 to {last}"
            check(fine and pair[0] <= pair[1], f"{where}.visible[{i}]", f"{_show(pair)} is not a range; {mend}")
            visible[pair[0] : pair[1] + 1] = True
        edge = np.array(image_size[::-1])  # of which fitting the shape cuts off a little
        outside = (sides < 0).any(1) | (sides[:, 2:] > size[::-1]).any(1)
        outside |= (keys[:, :2] < -0.02 * edge).any(1) | (keys[:, 2:] > 1.02 * edge).any(1)
        if at := [str(t) for t in frames[outside & visible[frames]]]:
            crossing.append(f"{names[k]} in frame {', '.join(at[:4])}{' and more' if len(at) > 4 else ''}")
        boxes.append(np.where(visible[:, None], track, np.nan))
        if visible[0] and "mask" in item:
            sizes = {size, tuple(source_size or size)}  # the boxes' frame, or the user's image where that is another
            masks.append(_read_mask(check, f"{where}.mask", path.parent / item["mask"], sizes, image_size))
        else:  # if it enters later, frame 0 has no box, and its mask is empty
            fine = not (visible[0] and np.isnan(track[0]).any())
            check(fine, f"{where}.boxes", 'frame 0 has neither box nor mask; add a box "0" or a mask')
            masks.append(fill(boxes[k][0], image_size))
    if crossing:
        warn(f"{path}: boxes cross the video's edge and are cut there: {'; '.join(crossing)}")
    return Trajectory(np.stack(boxes)[:, :length], np.stack(masks), np.array(colors, dtype=np.uint8), names)


def _whole_numbers(values: object, count: int, low: int, high: int) -> bool:
    fine = isinstance(values, list) and len(values) == count
    return fine and all(type(v) is int and low <= v <= high for v in values)  # true and false are no numbers here


# Of each field: which values it takes, and what the error message says that other values are not.
COUNT = (lambda value: _whole_numbers([value], 1, 1, MOST_SIDE), f"a whole number from 1 to {MOST_SIDE}; correct it")
LATER = (lambda value: True, "")  # checked where it is read
COLOR = "a colour; give [red, green, blue], whole numbers from 0 to 255"
TOP_FIELDS = {"num_frames": COUNT, "width": COUNT, "height": COUNT, "objects": LATER}
OBJECT_FIELDS = {
    "name": (lambda value: isinstance(value, str), "text; put it in quotes"),
    "mask": (lambda value: isinstance(value, str) and value, "a file name; give an image's path"),
    "color": (lambda value: value is None or _whole_numbers(value, 3, 0, 255), COLOR),
    "interpolate": (lambda value: value in ("smooth", "linear", "none"), "smooth, linear or none; use one of these"),
    "boxes": LATER,
    "visible": (lambda value: isinstance(value, list) and value, "a list of ranges; give [[first, last], ...]"),
}


def _check_fields(check: Check, where: str, record: object, fields: dict[str, tuple]) -> None:
    check(isinstance(record, dict), where or "top level", f"must be an object {{...}} with fields {', '.join(fields)}")
    for name, value in record.items():
        field = f"{where}.{name}".lstrip(".")
        check(name in fields, field, f"unknown field; the known ones are {', '.join(fields)}")
        fine, form = fields[name]
        check(fine(value), field, f"{_show(value)} is not {form}")


def read_boxes_json(path: Path) -> dict:
    """What a boxes.json holds, checked but for its objects. UserError if it can't be used."""
    check = partial(check_input, path)
    check(path.stat().st_size <= MOST_BYTES, "", f"larger than {MOST_BYTES >> 20} MiB; is this a boxes.json?")
    tracks = f"point tracks are {', '.join(POINTS[:-1])} or {POINTS[-1]}, for python -m tools.convert"

    def record(pairs: list[tuple[str, object]]) -> dict:
        once = {}
        for name, value in pairs:
            check(name not in once, "", f"{_show(name)} stands twice in one object; keep one")
            once[name] = value
        return once

    try:
        top = json.loads(path.read_bytes(), object_pairs_hook=record)
    except json.JSONDecodeError as error:
        check(path.suffix.lower() not in (".txt", ".csv"), "", f"is no boxes.json; {tracks}")
        check(False, f"line {error.lineno}, column {error.colno}", f"not valid JSON ({error.msg}); correct it there")
    except (ValueError, RecursionError, OSError):  # not text, numbers or nesting beyond reason, unreadable
        check(False, "", f"can't be read as JSON in UTF-8; give a boxes.json, a map video or PNG maps; {tracks}")
    check(not isinstance(top, list), "", f"holds a list, perhaps of spline points; boxes.json is an object; {tracks}")
    _check_fields(check, "", top, TOP_FIELDS)
    lone = "width" if "width" in top else "height"
    check(("width" in top) == ("height" in top), lone, "given alone; give both width and height, or neither")
    return top


def check_input(path: Path | str, fine: object, field: str, problem: str) -> None:
    if not fine:  # names and values are the user's: whatever breaks a line in them becomes a space
        raise UserError(" ".join(": ".join(filter(None, [str(path), field, problem])).splitlines())) from None


def _show(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _read_keyframes(check: Check, field: str, boxes: object, num_frames: int, size: Size) -> tuple[np.ndarray, ...]:
    """The `boxes` field -> frames [n], in order of time, and boxes [n, 4] in the source's pixels."""
    form = '{"0": [x0, y0, x1, y1], ...}'
    check(isinstance(boxes, dict | list) and boxes, field, f"missing, empty or no boxes; give {form}")
    if isinstance(boxes, list):
        mend = f"give one per frame, or keyframes {form}"
        check(len(boxes) == num_frames, field, f"a list of {len(boxes)} boxes for {num_frames} frames; {mend}")
        boxes = dict(enumerate(boxes))
    keys = {}
    for key, box in boxes.items():
        where, mend = f"{field}[{_show(key)}]", f"use 0 to {num_frames - 1}"
        check(re.fullmatch("-?(0|[1-9][0-9]{0,8})", str(key)), where, f"a key is a frame number; {mend}")
        beyond = "negative" if int(key) < 0 else f"beyond num_frames {num_frames}"
        check(0 <= int(key) < num_frames, where, f"frame {key} is {beyond}; {mend}")
        # The last comparison is false for NaN too.
        fine = isinstance(box, list) and [type(v) in (int, float) and abs(v) < np.inf for v in box] == [True] * 4
        check(fine, where, f"{_show(box)} is not a box; give [x0, y0, x1, y1], four finite numbers")
        fine = box[0] < box[2] and box[1] < box[3]
        check(fine, where, f"{_show(box)} has no area; x1 must be greater than x0, and y1 than y0")
        fine = max(map(abs, box)) <= MOST_SIDE and box[0] < size[1] and box[1] < size[0] and min(box[2:]) > 0
        check(fine, where, f"{_show(box)} lies outside the image; use 0 to {size[1]} for x and 0 to {size[0]} for y")
        keys[int(key)] = box
    frames = sorted(keys)
    sides = np.array([keys[t] for t in frames], dtype=float)
    part = (abs(sides) <= 1).all() and (sides % 1).any() and max(size) > 1
    check(not part, field, "all boxes lie within 1 pixel; if they are parts of the picture, multiply by its size")
    return np.array(frames), sides


def _read_mask(check: Check, field: str, file: Path, sizes: set[Size], image_size: Size) -> np.ndarray:
    """The `mask` image, of one of these sizes -> bool [height, width] of the generated size."""
    wanted = " or ".join(f"{w}x{h}" for h, w in sorted(sizes))
    try:
        check(file.exists(), field, f"{file} does not exist; correct the path, relative to the JSON file")
        mask = read_mask(file)
    except BROKEN:
        check(False, field, f"{file} is not an image; save the mask as PNG")
    check(mask.shape in sizes, field, f"{file} is {mask.shape[1]}x{mask.shape[0]} but the image is {wanted}; resize it")
    check(mask.any(), field, f"{file} is empty; paint the object in any colour but black")
    mask = cover_nearest(mask, image_size)
    check(mask.any(), field, f"{file} vanishes at {image_size[1]}x{image_size[0]}; paint a larger object")
    return mask


def _load_maps(path: Path, image_size: Size, num_frames: int, check: Check, check_shape: Callable) -> Trajectory:
    """A map video or folder of PNG maps. Objects are the flat colours of frame 0; boxes, the extent of each colour."""
    maps, boxes, count, late = np.empty((num_frames, *image_size, 3), dtype=np.uint8), [], 0, []
    for count, frame in enumerate(read_frames(path, check), start=1):
        if count == 1:
            size, colors = frame.shape[:2], drawing.flat_colors(frame, MOST_OBJECTS)
            check_shape("frame 0", size)
            mend = "a map is black, with one filled mask of one colour per object"
            check(0 < len(colors) <= MOST_OBJECTS, "frame 0", f"shows no object, or over {MOST_OBJECTS}; {mend}")
        check(frame.shape[:2] == size, f"frame {count - 1}", "is of another size than frame 0; give all maps one size")
        if count > num_frames:
            few = count <= num_frames + MOST_COUNTED
            check(few, "", f"more than {count - 1} maps but the video has {num_frames} frames; cut it")
            continue  # only to count them
        label = drawing.label_pixels(frame, colors)
        other = (label < 0) & (frame.max(-1) > max(drawing.DARK, colors.max(1).min() / 2))  # not a thin line's halo
        late += [count - 1] * bool(other.sum() > max(16, (label >= 0).sum() / 4))
        if count == 1:
            masks = cover_nearest(label, image_size) == np.arange(len(colors))[:, None, None]
            mend = f"is cut away at {image_size[1]}x{image_size[0]}; change the size"
            check(masks.any((1, 2)).all(), "frame 0", f"an object {mend}")
        maps[count - 1] = cover_nearest(frame, image_size)
        boxes.append((drawing.edges_of_outlines if count > 1 else drawing.extents)(label, len(colors)))
    check(count == num_frames, "", f"{count} maps but the video has {num_frames} frames; pass --frames {count}")
    if late:
        warn(f"{path}: frame {late[0]}: shows colours that frame 0 doesn't; no boxes are found for them")
    given = torch.from_numpy(maps).permute(3, 0, 1, 2).float() / 127.5 - 1
    placed = drawing.place(size, image_size, np.stack(boxes, axis=1))
    names = [f"object {k}" for k in range(len(colors))]
    return Trajectory(placed, masks, colors.round().astype(np.uint8), names, given)

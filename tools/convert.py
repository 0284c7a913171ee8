"""Convert trajectories: boxes.json, map videos, folders of PNG maps and point tracks, into any of the first three.

    python -m tools.convert maps.mp4 --to boxes.json --frames 121
    python -m tools.convert boxes.json --to maps --image x.png  # PNG maps, and maps.preview.mp4: boxes over the image
    python -m tools.convert tracks.npy --to boxes.json --size 704x1280 --box 80x60 --pick 0,4,7  # a box around a point

Point tracks are .npy, .npz, .pt, .pth or .txt, x and y in pixels for every frame: docs/FORMATS.md has names and axes.
"""

import glob
import io
import json
import pickle
import re
import tokenize
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from core import media
from core.boxes import draw_overlay, fill_box, place
from core.config import UserError, reason, require, run_script, shipped
from core.files import no_pointer, output_path, write_text
from core.weights import unpickle
from trajectory import PALETTE, POINTS, Check, Trajectory, check_input, load_trajectory, read_boxes_json

# Arrays of point tracks by the names that CoTracker, TAPIR, TAP-Vid, SpatialTracker and others give them, and whether
# the name says that they are point by point.
TRACKS = {"tracks": None, "pred_tracks": False, "target_points": True, "trajs": None, "trajectories": None}
VISIBLE = ("visibility", "visibilities", "pred_visibility", "visible", "visibles", "vis")
HIDDEN = ("occluded", "occlusion", "occlusions", "pred_occluded")
IGNORED = ("video", "frames", "fps", "query_points", "queries")


@dataclass(frozen=True)
class Config:
    source: str = shipped("examples/balloons.json")  # what to read
    to: str = "out/maps.mp4"  # what to write: a .json, an .mp4 of maps, or a folder of PNG maps
    image: str = ""  # a picture: a video of it with the boxes drawn over it is written too, <to>.preview.mp4
    size: str = ""  # height x width of the video, in whose pixels everything is written; the source's own if empty
    frames: int = 9  # length of the video
    source_size: str = ""  # height x width in whose pixels the points are, and boxes that don't say; size if empty
    box: str = "16x16"  # height x width of a point's box, in pixels of the video
    pick: str = ""  # numbers of the points to take, separated by commas; all if empty


def read_size(name: str, text: str) -> media.Size:
    """ "704x1280" -> (704, 1280)."""
    sides = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    require(sides, f"--{name} {text}: takes height x width in pixels, as 704x1280")
    return int(sides[1]), int(sides[2])


def read_points(path: Path, frames: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Point tracks: positions [T, K, 2], and which are visible [T, K]. `frames` is T, to tell [K, T, 2]."""
    check, form = partial(check_input, path), "give [T, K, 2], or [T, K, 3] with visibility last"
    check(no_pointer(path).is_file(), "", "no such file; correct the path")
    try:
        points, shown, by_point = find_arrays(read_tracks(path), check)
    except pickle.UnpicklingError:
        check(False, "", f"holds more than tensors, code perhaps, or is garbled, so it is not opened; {form}")
    except (*media.BROKEN, TypeError, MemoryError, zipfile.BadZipFile, tokenize.TokenError) as error:
        check(False, "", f"can't be read as point tracks ({reason(error)}); {form}")
    points = points[0] if points.ndim == 4 and len(points) == 1 else points
    check(points.ndim == 3 and points.shape[2] in (2, 3) and points.size > 0, "", f"is {list(points.shape)}; {form}")
    if points.shape[2] == 3:
        points, shown = points[..., :2], points[..., 2]
        fine = np.isin(shown[np.isfinite(shown)], (0, 1)).all()
        check(fine, "", "the third number of a point is visibility, 0 or 1; leave it out if it is depth or a share")
    check(np.isfinite(points).any(), "", "no point has a place in any frame; give other tracks")
    middle = np.nanmedian(np.abs(points), axis=(0, 1)).max()  # some points may lie beyond the picture
    check(middle > 1, "", "most coordinates lie within 1 pixel; if they are parts of the picture, multiply by its size")
    shape = points.shape[:2]
    alike = [n for n in shown.shape if n > 1] == [n for n in shape if n > 1]
    check(alike, "visibility", f"is {list(shown.shape)}; give {list(shape)}")
    shown = (shown.reshape(shape) > 0.5) & np.isfinite(points).all(-1)
    square, names = shape[0] == shape[1], "pred_tracks if it is frame by frame, target_points if it is point by point"
    mend = f"save the array in an .npz as {names}"
    check(by_point is not None or not square or shape[0] == 1, "", f"has as many points as frames, {shape[0]}; {mend}")
    if by_point if square or frames not in shape else shape[1] == frames:  # as TAPIR and TAP-Vid have them
        points, shown = points.swapaxes(0, 1), shown.T
    return points, shown


def read_tracks(path: Path) -> object:
    """What a file of point tracks holds: arrays by name, or what is none of these. Raises what readers raise."""
    if path.suffix.lower() == ".txt":
        lines = path.read_text(encoding="utf-8-sig").replace(",", " ").splitlines()
        rows = [[np.nan if word == "-" else float(word) for word in line.split()] for line in lines if line.strip()]
        return {"pred_tracks": np.array(rows).reshape(len(rows), -1, 2)}
    beside = path.with_name(re.sub(r"tracks?(?=\.npy$)", "visibility", path.name))  # as Wan-Move writes them
    if beside != path and no_pointer(beside).is_file():
        return {"pred_tracks": np.load(path, allow_pickle=False), "visibility": np.load(beside, allow_pickle=False)}
    held = unpickle(path) if path.suffix.lower() in (".pt", ".pth") else np.load(path, allow_pickle=False)
    if isinstance(held, bytes):  # as ATI writes them: a packed array [K, T, 1, 3], in eighths of a pixel
        packed = np.load(io.BytesIO(held), allow_pickle=False)["array"]
        return {"target_points": np.asarray(packed, dtype=float)[:, :, 0] / [8, 8, 1]}
    if isinstance(held, tuple | list) and len(held) == 2:  # as CoTracker and TAPIR return them
        return dict(zip(("tracks", "visibility"), held, strict=True))
    return {"tracks": held} if isinstance(held, np.ndarray | torch.Tensor) else held


def find_arrays(held: object, check: Check) -> tuple[np.ndarray, np.ndarray, bool | None]:
    """The tracks among what a file holds, which points are visible, and whether it is point by point, if it says so."""
    problem = f"holds a {type(held).__name__}, neither an array nor a dict of them; give [T, K, 2]"
    check(isinstance(held, Mapping), "", problem)
    names = [str(name) for name in held if not isinstance(held, dict) or held[name] is not None]
    tracks, flags = ([name for name in known if name in names] for known in (TRACKS, (*VISIBLE, *HIDDEN)))
    check(len(tracks) == 1, "", f"holds {', '.join(names)}; name the tracks {' or '.join(TRACKS)}")
    unknown = [name for name in names if name not in (*tracks, *flags, *IGNORED)]
    seen = f"which points are seen is told by {', '.join((*VISIBLE, *HIDDEN))}"
    check(not unknown, "", f"{', '.join(unknown)}: not understood; {seen}")
    check(len(flags) < 2, "", f"holds {' and '.join(flags)}; leave one out")
    arrays = (held[name] for name in (*tracks, *flags))
    arrays = [np.asarray(a.detach().double() if isinstance(a, torch.Tensor) else a, dtype=float) for a in arrays]
    points, shown = arrays if flags else (*arrays, np.ones(arrays[0].shape[:-1]))
    problem = "holds more than 0 to 1, logits perhaps; give visibility, 0 to 1, after the sigmoid"
    check(((shown >= 0) & (shown <= 1)).all(), "".join(flags), problem)
    return points, 1 - shown if flags and flags[0] in HIDDEN else shown, TRACKS[tracks[0]]


def own_size(path: Path) -> media.Size:
    """Height and width of the frame that the source was made for. UserError if it doesn't say."""
    require(no_pointer(path).exists(), f"{path}: no such file; correct the path")
    if path.is_dir() or path.suffix.lower() in media.VIDEO_SUFFIXES:
        return next(media.read_frames(path, partial(check_input, path))).shape[:2]
    if path.suffix.lower() not in POINTS and "width" in (top := read_boxes_json(path)):
        return top["height"], top["width"]
    raise UserError(f"{path}: doesn't say how large its frame is; give --size, height x width as in 704x1280")


def from_points(cfg: Config, size: media.Size, source_size: media.Size) -> Trajectory:
    """A trajectory with a box of one size around every point, cut at the video's edge."""
    check = partial(check_input, Path(cfg.source))
    points, shown = read_points(Path(cfg.source), cfg.frames)
    check(len(points) == cfg.frames, "", f"{len(points)} frames but the video has {cfg.frames}; pass --frames")
    if cfg.pick:
        try:
            points, shown = (x[:, [int(n) for n in cfg.pick.split(",")]] for x in (points, shown))
        except (ValueError, IndexError):
            raise UserError(f"--pick {cfg.pick}: takes numbers from 0 to {points.shape[1] - 1}") from None
    count = points.shape[1]
    check(count <= len(PALETTE), "", f"{count} points, {len(PALETTE)} at most; choose some with --pick 0,5,9")
    centers = place(source_size, size, points)
    half = np.array(read_size("box", cfg.box)[::-1]) / 2
    boxes = np.concatenate([centers - half, centers + half], axis=-1).clip(0, (*size[::-1], *size[::-1]))
    inside = shown & (boxes[..., 0] < boxes[..., 2]) & (boxes[..., 1] < boxes[..., 3])
    mend = "leave it out with --pick, or correct --size or --source_size"
    check(inside[0].all(), "", f"point {inside[0].argmin()} is not to be seen in frame 0; {mend}")
    boxes[~inside] = np.nan
    masks, colors = np.stack([fill_box(box, size) for box in boxes[0]]), np.array(PALETTE[:count], dtype=np.uint8)
    return Trajectory(boxes.transpose(1, 0, 2), masks, colors, [f"point {k}" for k in range(count)])


def write_boxes(path: Path, trajectory: Trajectory) -> None:
    """A boxes.json, and beside it the mask of each object. Boxes are cut at the video's edge."""
    height, width = trajectory.size
    cut = trajectory.boxes.clip(0, (width, height) * 2).round(3)  # NaN stays
    drawn = (cut[..., 2:] > cut[..., :2]).all(-1)  # (K, T)
    lost = trajectory.names[drawn.any(1).argmin()]
    require(drawn.any(1).all(), f"--to {path}: {lost} has no box inside the video in any frame; change --size")
    objects = []
    for k, (name, mask) in enumerate(zip(trajectory.names, trajectory.first_masks, strict=True)):
        at, kind = np.flatnonzero(drawn[k]).tolist(), "linear" if drawn[k].all() else "none"
        boxes, color = {t: cut[k, t].tolist() for t in at}, trajectory.colors[k].tolist()
        objects.append({"name": name, "color": color, "interpolate": kind, "boxes": boxes})
        if mask.any():
            objects[k]["mask"] = f"{path.stem}_mask_{k}.png"
            media.write_image(path.with_name(objects[k]["mask"]), mask.astype(np.uint8) * 255)
        elif at[0]:  # it enters later
            objects[k]["visible"] = [[at[0], at[-1]]]
    top = {"num_frames": trajectory.num_frames, "width": width, "height": height, "objects": objects}
    write_text(path, json.dumps(top, indent=1))


def main(cfg: Config) -> None:
    out = Path(cfg.to)
    require(out.name and out.suffix in (".json", ".mp4", ""), f"--to {out}: give a .json, an .mp4, or a folder")
    source_size = read_size("source_size", cfg.source_size) if cfg.source_size else None
    size = read_size("size", cfg.size) if cfg.size else source_size or own_size(Path(cfg.source))
    preview = out.with_suffix(".preview.mp4")
    if not out.suffix and out.exists() and (out.is_file() or any(out.iterdir())):
        raise UserError(f"--to {out}: exists and is no empty folder; give another")
    written = [out, preview] if cfg.image else [out]
    for path in written:
        output_path(str(path), path.suffix, "to", source=cfg.source, image=cfg.image)
    written += sorted(out.parent.glob(f"{glob.escape(out.stem)}_mask_*.png")) if out.suffix == ".json" else []
    for path in written if out.suffix else written[1:]:
        require(not path.exists(), f"--to {out}: {path} exists, and would be lost; move it, or give another name")
    if (out.suffix == ".mp4" or cfg.image) and (size[0] % 2 or size[1] % 2):
        raise UserError(f"--size {size[0]}x{size[1]}: an mp4 takes an even height and width")
    most = media.MOST_VIDEO // (size[0] * size[1])
    require(0 < cfg.frames <= most, f"--frames {cfg.frames}: at least 1, and at most {most} of {size[0]}x{size[1]}")
    if Path(cfg.source).suffix.lower() in POINTS:
        trajectory = from_points(cfg, size, source_size or size)
    else:
        trajectory = load_trajectory(cfg.source, size, cfg.frames, source_size)
    image = media.cover_nearest(media.load_image(cfg.image), size) if cfg.image else None
    if out.suffix == ".json":
        write_boxes(out, trajectory)
    elif out.suffix == ".mp4":
        media.write_video(out, media.to_uint8(trajectory.maps()), fps=8)
    else:
        for t, frame in enumerate(media.to_uint8(trajectory.maps())):
            media.write_image(out / f"{t:05d}.png", frame)
    if image is not None:
        still = np.broadcast_to(image, (cfg.frames, *image.shape))
        media.write_video(preview, draw_overlay(still, trajectory.boxes, trajectory.colors), fps=8)
    print(f"{len(trajectory.names)} objects, {cfg.frames} frames: {out}")


if __name__ == "__main__":
    run_script(main, Config, positional="source")

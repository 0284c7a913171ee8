"""Measure generated videos of the real world against true ones.

    python -m tools.evaluate_folder --generated DIR --true DIR --networks DIR

Videos are paired by name: `name.mp4` in both folders. Each of these files and folders adds its measure:

    networks/inception-2015-12-05.pt    TorchScript, uint8 images [n, 3, h, w] to features [n, D] under
                                        return_features=True: FID over all frames
    networks/i3d_torchscript.pt         TorchScript, videos [n, 3, T, 224, 224] in [-1, 1] to features [n, D] under
                                        rescale=False, resize=False, return_features=True: FVD, of at least 10 frames
    networks/lpips.pt                   TorchScript, two batches of images in [-1, 1] to distances [n]
    true/masks/                         true masks, `name/` with one PNG per frame or `name.mp4`: black, one colour per
                                        object; mask IoU, and box IoU between their extents
    generated/masks/                    the same of the generated videos, from a segmentation network that was given the
                                        objects of frame 0: there they are matched with the true ones, in any colours
    true/boxes/                         `name.json`, boxes as sample.py takes them: for box IoU, instead of true masks

IoU is averaged over the frames in which the truth shows the object, then over objects; a frame in which nothing is
found counts as 0. As in FlashBench, rows are for all videos and by number of objects.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from core.boxes import DARK, NEAR, extents, flat_colors, label_pixels
from core.config import UserError, require, run_script, warn
from core.files import no_pointer
from core.frechet import frechet_distance
from core.media import VIDEO_SUFFIXES, Size, alike, read_frames, visible
from core.tables import markdown, table_path, write_rows
from core.weights import file_errors
from trajectory import MOST_OBJECTS, check_input, load_trajectory

NETWORKS = {"fid": "inception-2015-12-05.pt", "fvd": "i3d_torchscript.pt", "lpips": "lpips.pt"}
SCRIPT = "a TorchScript file that works as --help says"


@dataclass(frozen=True)
class Config:
    generated: str = "generated"  # folder of generated videos
    true: str = "true"  # folder of true videos with the same names
    networks: str = ""  # folder of TorchScript files, for FID, FVD and LPIPS
    out: str = "out/benchmark.json"  # rows; a Markdown table goes beside it


def read_whole(path: Path) -> Tensor:
    """uint8 [T, 3, h, w]."""
    frames = read_frames(path, partial(check_input, path), maps=False)
    return torch.from_numpy(np.stack(list(frames))).permute(0, 3, 1, 2)


def score(measure: str, network: Callable, *videos: Tensor) -> list[Tensor] | Tensor:
    """Two uint8 videos [T, 3, h, w] -> for FID features [T, D] of each, for FVD [1, D] of each, or LPIPS's mean."""
    if measure == "fid":
        return [torch.cat([network(part, return_features=True) for part in video.split(32)]) for video in videos]
    if measure == "lpips":
        return network(*(video / 127.5 - 1 for video in videos)).mean()
    clips = (F.interpolate(v.float(), (224, 224), mode="bilinear", align_corners=False) / 127.5 - 1 for v in videos)
    return [network(clip.transpose(0, 1)[None], rescale=False, resize=False, return_features=True) for clip in clips]


def videos(folder: str) -> dict[str, Path]:
    """Names and paths of a folder's mp4 files, but those that sample.py writes with boxes."""
    found = visible(Path(folder)) if Path(folder).is_dir() else ()
    return {p.stem: p for p in found if p.suffix.lower() == ".mp4" and not p.stem.endswith(".boxes")}


def find_masks(folder: str, name: str) -> Path:
    """`folder/masks/name/`, or `folder/masks/name` with a video's suffix."""
    for place in (Path(folder) / "masks" / f"{name}{suffix}" for suffix in ("", *VIDEO_SUFFIXES)):
        if no_pointer(place).exists():
            return place
    raise UserError(f"{Path(folder) / 'masks' / name}: no such folder or video; every generated video needs one")


def read_labels(path: Path, known: Sequence[np.ndarray] = ()) -> tuple[list[np.ndarray], np.ndarray]:
    """Which object each pixel of frames [h, w] shows, -1 for none; and colours [K, 3], of frame 0 and those `known`."""
    check, labels, lit = partial(check_input, path), [], False
    for frame in read_frames(path, check):
        if not labels:
            own = flat_colors(frame, MOST_OBJECTS)
            colors = np.array([*own, *(c for c in known if (np.linalg.norm(own - c, axis=1) >= NEAR).all())])
            check(len(colors) > 0, "frame 0", "shows no object; paint each in a colour of its own")
        labels.append(label_pixels(frame, colors))
        lit |= frame.max() > (0 if path.is_dir() else DARK)
    seen = max(label.max() for label in labels) >= 0
    check(seen or not lit, "", "shows objects, but in none of the true masks' colours, nor in bright ones in frame 0")
    return labels, colors


def match(true: np.ndarray, found: np.ndarray, near: np.ndarray) -> np.ndarray:
    """Which found object each of K true ones overlaps most in labels [h, w], or is `near` [K, M] in colour; else -1."""
    sides = zip((true, found), near.shape, strict=True)
    one, other = ((labels.ravel() == np.arange(n)[:, None]) * 1.0 for labels, n in sides)  # (K, h w), (M, h w)
    both = one @ other.T  # (K, M)
    shared = both / (one.sum(1)[:, None] + other.sum(1) - both).clip(1) + near * 1e-9
    which = shared.argmax(1)
    return np.where(shared[:, which].max(0) == shared.max(1), which, -1)


def box_overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of boxes [..., 4]; 0 where one is NaN."""
    both = (np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])).clip(0).prod(-1)
    areas = [(box[..., 2:] - box[..., :2]).prod(-1) for box in (a, b)]
    return np.nan_to_num(both / (areas[0] + areas[1] - both))


def overlaps(cfg: Config, name: str, size: Size) -> dict[str, float]:
    """A video's mask IoU and box IoU, where there are any, and number of objects K. `size`: the video's."""
    true_path, path = (find_masks(folder, name) for folder in (cfg.true, cfg.generated))
    true, colors = read_labels(true_path)
    found, found_colors = read_labels(path, colors)
    if [label.shape for label in found] != [label.shape for label in true]:
        raise UserError(f"{path}: has not as many frames as the true masks, of their size; give one of each frame")
    if not alike(true[0].shape, size):
        raise UserError(f"{true_path}: masks [h, w] {[*true[0].shape]} of a video {[*size]}; give them in its shape")
    true, found, count = np.stack(true), np.stack(found), len(colors)
    which = match(true[0], found[0], np.linalg.norm(colors[:, None] - found_colors, axis=-1) < NEAR)
    shown = set(np.unique(found)) - {-1}
    problem = "an object lies where none of the true ones does, and has a colour of its own"
    require(set(which) <= shown or shown <= set(which), f"{path}: frame 0: {problem}; use the true masks' colours")
    names = np.full(len(found_colors) + 1, -1)  # the last is for pixels of no object
    names[which[which >= 0]] = np.flatnonzero(which >= 0)
    found = names[found]
    boxes, found_boxes = (np.stack([extents(label, count) for label in both], axis=1) for both in (true, found))
    if (file := Path(cfg.true) / "boxes" / f"{name}.json").parent.is_dir():
        given = load_trajectory(file, true[0].shape, len(true), true[0].shape).boxes
        # Boxes come in an order of their own; the masks of frame 0 tell which is whose.
        order = [int(box_overlap(given[:, 0], box).argmax()) for box in boxes[:, 0]]
        fine = sorted(order) == list(range(len(given)))
        check_input(file, fine, "objects", f"are not the {count} that frame 0 of {true_path} shows")
        boxes = given[order]
    ious = {"mask_iou": [], "box_iou": []}  # of each object, in the frames that show it
    for k in range(count):
        want, got = (labels[(true == k).any((1, 2))] == k for labels in (true, found))
        ious["mask_iou"].append((want & got).sum((1, 2)) / (want | got).sum((1, 2)))
        shown = np.isfinite(boxes[k]).all(-1)
        ious["box_iou"].append(box_overlap(found_boxes[k, shown], boxes[k, shown]))
    means = {measure: [values.mean() for values in of_each if len(values)] for measure, of_each in ious.items()}
    return {measure: float(np.mean(m)) for measure, m in means.items() if m} | {"objects": count}


@torch.no_grad()
def main(cfg: Config) -> None:
    out, masked = table_path(cfg.out), (Path(cfg.true) / "masks").is_dir()
    for folder in (Path(cfg.generated) / "masks", Path(cfg.true) / "boxes"):
        require(masked or not folder.is_dir(), f"{folder}: is compared with {cfg.true}/masks, which is missing")
    made_of, true_of = videos(cfg.generated), videos(cfg.true)
    require(made_of, f"--generated {cfg.generated}: holds no .mp4 files")
    if alone := sorted(made_of.keys() - true_of.keys()):
        raise UserError(f"--true {cfg.true}: holds no {alone[0]}.mp4, which is generated; {len(alone)} are missing")
    if alone := sorted(true_of.keys() - made_of.keys()):
        warn(f"--generated {cfg.generated}: {alone[0]}.mp4 is missing, {len(alone)} in all; they are left out")
    networks = {}
    for measure, name in NETWORKS.items():
        if cfg.networks and no_pointer(file := Path(cfg.networks) / name).exists():
            with file_errors(file, SCRIPT):
                networks[measure] = file, torch.jit.load(file).eval()
    require(networks or not cfg.networks, f"--networks {cfg.networks}: holds no {', '.join(NETWORKS.values())}")
    scores = []  # of each video; its features until the distance between the sets is taken
    for name in sorted(made_of):
        made, true = read_whole(made_of[name]), read_whole(true_of[name])
        if made.shape != true.shape:
            raise UserError(f"{name}.mp4: {[*made.shape]} generated, {[*true.shape]} true; cut or resize one")
        require(len(made) >= 10 or "fvd" not in networks, f"{name}.mp4: {len(made)} frames; FVD needs 10 at least")
        scores.append(overlaps(cfg, name, made.shape[2:]) if masked else {})
        for measure, (file, network) in networks.items():
            with file_errors(file, SCRIPT):
                scores[-1][measure] = score(measure, network, made, true)
    rows = []
    for group in ("all", *sorted({score["objects"] for score in scores if masked})):
        members = [score for score in scores if group in ("all", score.get("objects"))]
        rows.append({"name": Path(cfg.generated).name, "videos": len(members), "objects": group})
        for measure in ("fid", "fvd", "mask_iou", "box_iou", "lpips"):
            values = [member[measure] for member in members if measure in member]
            if measure in ("fid", "fvd"):
                sets = [torch.cat(side) for side in zip(*values, strict=True)]
                values = [frechet_distance(*sets)] if sets and len(sets[0]) > 1 else []
            finite = [float(value) for value in values if math.isfinite(value)]
            rows[-1][measure] = round(float(np.mean(finite)), 4) if finite else None
    print(markdown(rows))
    write_rows(out, rows)


if __name__ == "__main__":
    run_script(main, Config)

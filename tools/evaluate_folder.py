"""Measure generated videos of the real world against true ones.

    python -m tools.evaluate_folder --generated DIR --true DIR

Videos are paired by name: `DIR/name.mp4` in both folders. Each of these options adds its measure:

    --inception FILE    TorchScript, uint8 images [n, 3, h, w] to features [n, D] under return_features=True, as
                        inception-2015-12-05.pt: FID over all frames
    --i3d FILE          TorchScript, videos [n, 3, T, 224, 224] in [-1, 1] to features [n, D] under rescale=False,
                        resize=False, return_features=True, as i3d_torchscript.pt: FVD, of at least 10 frames
    --lpips FILE        TorchScript, two batches of images in [-1, 1] to distances [n]
    --masks DIR         true masks, `name/` with one PNG per frame or `name.mp4`: black, one colour per object
    --found DIR         masks of the generated videos, in the same colours, from a segmentation network that was given
                        the objects of frame 0: mask IoU, and box IoU between their extents
    --boxes DIR         `name.json`, boxes as sample.py takes them: true boxes for the box IoU instead of the masks'

IoU is averaged over the frames in which the truth shows the object, then over objects; a frame in which nothing is
found counts as 0. As in FlashBench, rows are for all videos and by number of objects.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from core.boxes import extents, flat_colors, label_pixels
from core.config import UserError, reason, run_script
from core.files import output_path
from core.frechet import frechet_distance
from core.media import BROKEN, MOST_VIDEO, VIDEO_SUFFIXES, read_frames, read_video
from core.tables import table, write_rows
from trajectory import MOST_OBJECTS, check_input, load_trajectory


@dataclass(frozen=True)
class Config:
    generated: str = "generated"  # folder of generated videos
    true: str = "true"  # folder of true videos with the same names
    masks: str = ""  # folder of true masks
    found: str = ""  # folder of the masks found in generated videos
    boxes: str = ""  # folder of boxes.json files
    inception: str = ""  # TorchScript file, for FID
    i3d: str = ""  # TorchScript file, for FVD
    lpips: str = ""  # TorchScript file
    out: str = "out/benchmark.json"  # rows; a Markdown table goes beside it


def read_whole(path: Path) -> Tensor:
    """uint8 [T, 3, h, w]."""
    try:
        video = read_video(path)
        frames = [next(video)]
        most = MOST_VIDEO // frames[0][..., 0].size
        frames += islice(video, most)
    except (*BROKEN, StopIteration):
        raise UserError(f"{path}: can't be decoded; save it as an H.264 mp4") from None
    if len(frames) > most:
        raise UserError(f"{path}: more than {MOST_VIDEO} pixels in all its frames; cut it")
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def open_network(path: str, use: Callable[..., Tensor]) -> Callable[..., Tensor] | None:
    """`use(network, ...)` with the network of a TorchScript file; None if no file is given."""
    if not path:
        return None
    try:
        network = torch.jit.load(path).eval()
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"{path}: no TorchScript file ({reason(error)})") from None

    def call(*inputs: Tensor) -> Tensor:
        try:
            return use(network, *inputs)
        except torch.OutOfMemoryError:  # a RuntimeError too, but not the file's fault
            raise
        except RuntimeError as error:
            raise UserError(f"{path}: can't be called as --help says ({reason(error)})") from None

    return call


def image_features(network: Callable, *videos: Tensor) -> list[Tensor]:
    """uint8 videos [T, 3, h, w] -> [T, D] each."""
    return [torch.cat([network(part, return_features=True) for part in video.split(32)]) for video in videos]


def clip_features(network: Callable, *videos: Tensor) -> list[Tensor]:
    """uint8 videos [T, 3, h, w] -> [1, D] each."""
    clips = (F.interpolate(v.float(), (224, 224), mode="bilinear", align_corners=False) / 127.5 - 1 for v in videos)
    return [network(clip.transpose(0, 1)[None], rescale=False, resize=False, return_features=True) for clip in clips]


def videos(folder: str) -> dict[str, Path]:
    """Names and paths of a folder's mp4 files, but those that sample.py writes with boxes."""
    found = Path(folder).iterdir() if Path(folder).is_dir() else ()
    return {p.stem: p for p in found if p.suffix.lower() == ".mp4" and not p.stem.endswith(".boxes")}


def find_masks(folder: str, name: str) -> Path:
    """`folder/name/`, or `folder/name` with a video's suffix."""
    places = [Path(folder) / name, *(Path(folder) / f"{name}{suffix}" for suffix in sorted(VIDEO_SUFFIXES))]
    for place in places:
        if place.exists():
            return place
    raise UserError(f"{places[0]}: no such folder or video; every generated video needs one")


def read_labels(path: Path, colors: np.ndarray | None = None) -> tuple[list[np.ndarray], np.ndarray]:
    """Which object each pixel shows, a list of frames [h, w] with -1 for none; and the objects' colours [K, 3]."""
    check, labels = partial(check_input, path), []
    for frame in read_frames(path, check):
        colors = flat_colors(frame, MOST_OBJECTS) if colors is None else colors
        check(len(colors) > 0, "frame 0", "shows no object; paint each in a colour of its own")
        labels.append(label_pixels(frame, colors))
    return labels, colors


def box_overlap(a: np.ndarray, b: np.ndarray) -> float:
    """IoU of two boxes [4]; 0 if the first is NaN."""
    both = (np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])).clip(0).prod()
    areas = [(box[2:] - box[:2]).prod() for box in (a, b)]
    return float(both / (areas[0] + areas[1] - both)) if both > 0 else 0.0


def overlaps(cfg: Config, name: str) -> dict[str, float]:
    """A video's mask IoU, box IoU and number of objects."""
    (true, colors), path = read_labels(find_masks(cfg.masks, name)), find_masks(cfg.found, name)
    found, count, boxes = read_labels(path, colors)[0], len(colors), None
    if len(found) != len(true):
        raise UserError(f"{path}: has not as many frames as the true masks; give one of each frame")
    if cfg.boxes:
        file = Path(cfg.boxes) / f"{name}.json"
        boxes = load_trajectory(file, true[0].shape, len(true)).boxes
        # Boxes come in an order of their own; the masks of frame 0 tell which is whose.
        order = [int(np.argmax([box_overlap(track[0], box) for track in boxes])) for box in extents(true[0], count)]
        fits = sorted(order) == list(range(len(boxes)))
        check_input(file, fits, "objects", f"are not the {count} that frame 0 of {cfg.masks}/{name} shows")
        boxes = boxes[order]
    mask_ious, box_ious = ([[] for _ in colors] for _ in range(2))
    for t, (want, got) in enumerate(zip(true, found, strict=True)):
        if want.shape != got.shape:
            raise UserError(f"{path}: frame {t} is {got.shape}, the true mask {want.shape}; give one size")
        true_boxes = extents(want, count) if boxes is None else boxes[:, t]
        for k, (true_box, box) in enumerate(zip(true_boxes, extents(got, count), strict=True)):
            a, b = want == k, got == k
            if a.any():
                mask_ious[k].append((a & b).sum() / (a | b).sum())
            if np.isfinite(true_box).all():
                box_ious[k].append(box_overlap(box, true_box))
    means = [[np.mean(values) for values in per_object if values] for per_object in (mask_ious, box_ious)]
    mask_iou, box_iou = (float(np.mean(values)) if values else math.nan for values in means)
    return {"mask_iou": mask_iou, "box_iou": box_iou, "objects": count}


@torch.no_grad()
def main(cfg: Config) -> None:
    out = output_path(cfg.out, ".json")
    if bool(cfg.masks) != bool(cfg.found):
        raise UserError("--masks, --found: mask IoU compares both; give both or neither")
    if cfg.boxes and not cfg.masks:
        raise UserError(f"--boxes {cfg.boxes}: are compared with masks; give --masks and --found too")
    for flag in ("generated", "true"):
        if not Path(getattr(cfg, flag)).is_dir():
            raise UserError(f"--{flag} {getattr(cfg, flag)}: no such folder; correct the path")
    made_of, true_of = videos(cfg.generated), videos(cfg.true)
    if not made_of:
        raise UserError(f"--generated {cfg.generated}: holds no .mp4 files")
    if alone := sorted(made_of.keys() - true_of.keys()):
        raise UserError(f"--true {cfg.true}: holds no {alone[0]}.mp4, which is generated; {len(alone)} are missing")
    if alone := sorted(true_of.keys() - made_of.keys()):
        said = f"--generated {cfg.generated}: {alone[0]}.mp4 is missing, {len(alone)} in all; they are left out"
        print(said, file=sys.stderr)
    networks = {
        "fid": open_network(cfg.inception, image_features),
        "fvd": open_network(cfg.i3d, clip_features),
        "lpips": open_network(cfg.lpips, lambda network, *videos: network(*(v / 127.5 - 1 for v in videos)).mean()),
    }
    scores = []  # of each video; its features until the distance between the sets is taken
    for name in sorted(made_of):
        made, true = read_whole(made_of[name]), read_whole(true_of[name])
        if made.shape != true.shape:
            shapes = f"{list(made.shape)} generated, {list(true.shape)} true"
            raise UserError(f"{name}.mp4: {shapes}; cut or resize one")
        if cfg.i3d and len(made) < 10:
            raise UserError(f"{name}.mp4: {len(made)} frames; FVD needs 10 at least")
        score = {measure: network(made, true) for measure, network in networks.items() if network}
        scores.append(score | (overlaps(cfg, name) if cfg.masks else {}))
    rows = []
    for group in ("all", *sorted({score["objects"] for score in scores if "objects" in score})):
        members = [score for score in scores if group in ("all", score.get("objects"))]
        row = {"name": Path(cfg.generated).name, "videos": len(members), "objects": group}
        for measure in ("fid", "fvd"):
            sets = [torch.cat(side) for side in zip(*(m[measure] for m in members if measure in m), strict=True)]
            row[measure] = round(frechet_distance(*sets), 4) if sets and len(sets[0]) > 1 else None
        for measure in ("mask_iou", "box_iou", "lpips"):
            values = [float(m[measure]) for m in members if measure in m and math.isfinite(m[measure])]
            row[measure] = round(float(np.mean(values)), 4) if values else None
        rows.append(row)
    print(table(rows))
    write_rows(out, rows)


if __name__ == "__main__":
    run_script(main, Config)

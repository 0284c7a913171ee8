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
    generated/masks/                    the same of the generated videos, in the same colours, from a segmentation
                                        network that was given the objects of frame 0
    true/boxes/                         `name.json`, boxes as sample.py takes them: for box IoU, instead of true masks

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
from core.media import MOST_VIDEO, VIDEO_SUFFIXES, read_frames
from core.tables import markdown, write_rows
from trajectory import MOST_OBJECTS, check_input, load_trajectory


@dataclass(frozen=True)
class Config:
    generated: str = "generated"  # folder of generated videos
    true: str = "true"  # folder of true videos with the same names
    networks: str = ""  # folder of TorchScript files, for FID, FVD and LPIPS
    out: str = "out/benchmark.json"  # rows; a Markdown table goes beside it


def read_whole(path: Path) -> Tensor:
    """uint8 [T, 3, h, w]."""
    check = partial(check_input, path)
    frames = read_frames(path, check)
    first = next(frames)
    most = MOST_VIDEO // first[..., 0].size
    video = [first, *islice(frames, most)]
    check(len(video) <= most, "", f"more than {MOST_VIDEO} pixels in all its frames; cut it")
    return torch.from_numpy(np.stack(video)).permute(0, 3, 1, 2)


def open_network(path: Path, use: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`use(network, ...)` with the network of a TorchScript file."""
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


def image_distance(network: Callable, *videos: Tensor) -> Tensor:
    """Two uint8 videos [T, 3, h, w] -> the mean over their frames."""
    return network(*(video / 127.5 - 1 for video in videos)).mean()


NETWORKS = {  # measure -> its network's file, and how that is called
    "fid": ("inception-2015-12-05.pt", image_features),
    "fvd": ("i3d_torchscript.pt", clip_features),
    "lpips": ("lpips.pt", image_distance),
}


def videos(folder: str) -> dict[str, Path]:
    """Names and paths of a folder's mp4 files, but those that sample.py writes with boxes."""
    found = Path(folder).iterdir() if Path(folder).is_dir() else ()
    return {p.stem: p for p in found if p.suffix.lower() == ".mp4" and not p.stem.endswith(".boxes")}


def find_masks(folder: str, name: str) -> Path:
    """`folder/masks/name/`, or `folder/masks/name` with a video's suffix."""
    places = [Path(folder) / "masks" / f"{name}{suffix}" for suffix in ("", *sorted(VIDEO_SUFFIXES))]
    if found := [place for place in places if place.exists()]:
        return found[0]
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
    true_path, path = (find_masks(folder, name) for folder in (cfg.true, cfg.generated))
    true, colors = read_labels(true_path)
    found, count, boxes = read_labels(path, colors)[0], len(colors), None
    if len(found) != len(true):
        raise UserError(f"{path}: has not as many frames as the true masks; give one of each frame")
    if (file := Path(cfg.true) / "boxes" / f"{name}.json").parent.is_dir():
        boxes = load_trajectory(file, true[0].shape, len(true)).boxes
        # Boxes come in an order of their own; the masks of frame 0 tell which is whose.
        order = [int(np.argmax([box_overlap(track[0], box) for track in boxes])) for box in extents(true[0], count)]
        fine = sorted(order) == list(range(len(boxes)))
        check_input(file, fine, "objects", f"are not the {count} that frame 0 of {true_path} shows")
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
    masked = (Path(cfg.true) / "masks").is_dir()
    for folder in (Path(cfg.generated) / "masks", Path(cfg.true) / "boxes"):
        if folder.is_dir() and not masked:
            raise UserError(f"{folder}: is compared with {cfg.true}/masks, which is missing")
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
    files = {measure: Path(cfg.networks) / name for measure, (name, _) in NETWORKS.items() if cfg.networks}
    networks = {measure: open_network(file, NETWORKS[measure][1]) for measure, file in files.items() if file.exists()}
    if files and not networks:
        raise UserError(f"--networks {cfg.networks}: holds no {', '.join(file for file, _ in NETWORKS.values())}")
    scores = []  # of each video; its features until the distance between the sets is taken
    for name in sorted(made_of):
        made, true = read_whole(made_of[name]), read_whole(true_of[name])
        if made.shape != true.shape:
            shapes = f"{list(made.shape)} generated, {list(true.shape)} true"
            raise UserError(f"{name}.mp4: {shapes}; cut or resize one")
        if "fvd" in networks and len(made) < 10:
            raise UserError(f"{name}.mp4: {len(made)} frames; FVD needs 10 at least")
        score = {measure: network(made, true) for measure, network in networks.items()}
        scores.append(score | (overlaps(cfg, name) if masked else {}))
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
    print(markdown(rows))
    write_rows(out, rows)


if __name__ == "__main__":
    run_script(main, Config)

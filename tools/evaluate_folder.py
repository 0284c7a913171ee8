"""Measure generated videos of the real world against true ones: `python -m tools.evaluate_folder --generated DIR --true DIR`.

Videos are paired by name: `DIR/name.mp4` in both. What else you bring decides what is measured; the rest stays empty.

    --inception FILE    TorchScript, uint8 images [n, 3, h, w] to features [n, D] under return_features=True, as
                        inception-2015-12-05.pt: FID over all frames
    --i3d FILE          TorchScript, videos [n, 3, T, 224, 224] in [-1, 1] to features [n, D] under rescale=False,
                        resize=False, return_features=True, as i3d_torchscript.pt: FVD, of at least 10 frames
    --lpips FILE        TorchScript, two batches of images in [-1, 1] to distances [n]
    --masks DIR         true masks, `name/` of a PNG a frame or `name.mp4`: black, one colour an object
    --found DIR         masks of the generated videos, in the same colours, from a segmentation network that was given
                        the objects of frame 0: mask IoU, and box IoU between the extents
    --boxes DIR         `name.json`, boxes as sample.py takes them: the true boxes of box IoU, instead of the masks'

IoU is the mean over objects of the mean over frames in which the truth shows the object; a frame in which nothing is
found counts 0. As FlashBench does, rows stand for all videos and by the number of objects.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice, zip_longest
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from core.colors import extents, flat_colors, label_pixels
from core.config import UserError, reason, run_script
from core.files import output_path
from core.frechet import frechet_distance
from core.media import BROKEN, MOST_VIDEO, VIDEO_SUFFIXES, read_frames, read_video
from core.tables import table, write_rows
from trajectory import check_input, load_trajectory


@dataclass(frozen=True)
class Config:
    """Options of the evaluation of folders."""

    generated: str = "generated"  # folder of generated videos
    true: str = "true"  # folder of the true ones, of the same names
    masks: str = ""  # folder of true masks
    found: str = ""  # folder of the masks found in generated videos
    boxes: str = ""  # folder of boxes.json files
    inception: str = ""  # TorchScript file, for FID
    i3d: str = ""  # TorchScript file, for FVD
    lpips: str = ""  # TorchScript file
    out: str = "out/benchmark.json"  # rows; a table in Markdown goes beside it


def read_whole(path: Path) -> Tensor:
    """uint8 [T, 3, h, w]."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; videos are paired by name")
    try:
        frames = read_video(path)
        first = next(frames)
        rest = list(islice(frames, MOST_VIDEO // first[..., 0].size))
    except (*BROKEN, StopIteration):
        raise UserError(f"{path}: can't be decoded; save it as an H.264 mp4") from None
    if (1 + len(rest)) * first[..., 0].size > MOST_VIDEO:
        raise UserError(f"{path}: more than {MOST_VIDEO} pixels in all its frames; cut it")
    return torch.from_numpy(np.stack([first, *rest])).permute(0, 3, 1, 2)


def read_network(path: str) -> torch.jit.ScriptModule | None:
    """A TorchScript file, or None where none is given."""
    if not path:
        return None
    try:
        return torch.jit.load(path).eval()
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"{path}: no TorchScript file ({reason(error)})") from None


def find(folder: str, name: str) -> Path:
    """`folder/name/`, or `folder/name` with the ending of a video."""
    places = [Path(folder) / name, *(Path(folder) / f"{name}{suffix}" for suffix in sorted(VIDEO_SUFFIXES))]
    for place in places:
        if place.exists():
            return place
    raise UserError(f"{places[0]}: no such folder or video; every generated video needs one")


def read_labels(path: Path, colors: np.ndarray | None) -> tuple[Iterator[np.ndarray], np.ndarray]:
    """Which object each pixel shows, frame by frame, [h, w] with -1 for none; and the objects' colours."""
    check: Callable = partial(check_input, path)
    frames = read_frames(path, check)
    first = next(frames, None)
    check(first is not None, "", "holds no frames; give a PNG or video frame each")
    colors = flat_colors(first) if colors is None else colors
    check(len(colors) > 0, "frame 0", "shows no object; paint each in a colour of its own")
    return (label_pixels(frame, colors) for frame in (first, *frames)), colors


def box_overlap(a: np.ndarray, b: np.ndarray) -> float:
    """IoU of two boxes [4]; 0 where the first is NaN."""
    width, height = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    both = max(width, 0) * max(height, 0) if np.isfinite(a).all() else 0.0
    areas = [np.prod(box[2:] - box[:2]) for box in (a, b)]
    return float(both / (areas[0] + areas[1] - both)) if both else 0.0


def overlaps(cfg: Config, name: str) -> tuple[float, float, int]:
    """A video's mask IoU and box IoU, and its number of objects."""
    (true, colors), where = read_labels(find(cfg.masks, name), None), find(cfg.found, name)
    found, _ = read_labels(where, colors)
    boxes = None
    pairs = list(zip_longest(true, found))
    if any(label is None for pair in pairs for label in pair):
        raise UserError(f"{where}: has not as many frames as the true masks; give one of each frame")
    if cfg.boxes:
        file = Path(cfg.boxes) / f"{name}.json"
        boxes = load_trajectory(file, pairs[0][0].shape, len(pairs)).boxes
        first = extents(pairs[0][0], len(colors))  # boxes have an order of their own: which is which, frame 0 tells
        order = [int(np.argmax([box_overlap(track[0], extent) for track in boxes])) for extent in first]
        fits = sorted(order) == list(range(len(boxes)))
        check_input(file, fits, "objects", f"are not the {len(colors)} that frame 0 of {cfg.masks}/{name} shows")
        boxes = boxes[order]
    masks_iou, boxes_iou = [[] for _ in colors], [[] for _ in colors]
    for t, (want, got) in enumerate(pairs):
        if want.shape != got.shape:
            raise UserError(f"{where}: frame {t} is {got.shape}, the true mask {want.shape}; give one size")
        extent = [extents(label, len(colors)) for label in (got, want)]
        for k in range(len(colors)):
            if (want == k).any():
                either = ((want == k) | (got == k)).sum()
                masks_iou[k].append(((want == k) & (got == k)).sum() / either)
            box = extent[1][k] if boxes is None else boxes[k, t]
            if np.isfinite(box).all():
                boxes_iou[k].append(box_overlap(extent[0][k], box))
    both = [[np.mean(values) for values in per_object if values] for per_object in (masks_iou, boxes_iou)]
    return *(float(np.mean(values)) if values else math.nan for values in both), len(colors)


def apply(path: str, function: Callable, *inputs: object) -> Tensor:
    """What a network of a TorchScript file makes of this. UserError if it can't be called so."""
    try:
        return function(*inputs)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise UserError(f"{path}: can't be called as --help says ({reason(error)})") from None


def image_features(network: Callable, video: Tensor) -> Tensor:
    """[T, 3, h, w] uint8 -> [T, D]."""
    return torch.cat([network(part, return_features=True) for part in video.split(32)])


def clip_features(network: Callable, video: Tensor) -> Tensor:
    """[T, 3, h, w] uint8 -> [1, D]: resized to 224 each way, bilinearly, values in [-1, 1]."""
    frames = F.interpolate(video.float(), (224, 224), mode="bilinear", align_corners=False) / 127.5 - 1
    return network(frames.transpose(0, 1)[None], rescale=False, resize=False, return_features=True)


@torch.no_grad()
def main(cfg: Config) -> None:
    out = output_path(cfg.out, ".json")
    if bool(cfg.masks) != bool(cfg.found):
        raise UserError("--masks, --found: mask IoU compares both; give both or neither")
    if cfg.boxes and not cfg.masks:
        raise UserError(f"--boxes {cfg.boxes}: are compared with masks; give --masks and --found too")
    overlay = ".boxes.mp4"  # sample.py writes one beside each video
    names = sorted(path.stem for path in Path(cfg.generated).glob("*.mp4") if not path.name.endswith(overlay))
    if not names:
        raise UserError(f"--generated {cfg.generated}: holds no .mp4 files")
    networks = {n: read_network(getattr(cfg, n)) for n in ("inception", "i3d", "lpips")}
    features: dict[str, list[list[Tensor]]] = {"inception": [], "i3d": []}
    scores = []
    for name in names:
        made, true = (read_whole(Path(folder) / f"{name}.mp4") for folder in (cfg.generated, cfg.true))
        if made.shape != true.shape:
            mend = "cut or resize one"
            raise UserError(f"{name}.mp4: {list(made.shape)} generated, {list(true.shape)} true; {mend}")
        if networks["i3d"] and len(made) < 10:
            raise UserError(f"{name}.mp4: {len(made)} frames; FVD needs 10 at least")
        for kind, describe in (("inception", image_features), ("i3d", clip_features)):
            if networks[kind]:
                features[kind].append([apply(getattr(cfg, kind), describe, networks[kind], v) for v in (made, true)])
        distance = math.nan
        if networks["lpips"]:
            both = (video.float() / 127.5 - 1 for video in (made, true))
            distance = float(apply(cfg.lpips, networks["lpips"], *both).mean())
        mask_iou, box_iou, count = overlaps(cfg, name) if cfg.masks else (math.nan, math.nan, 0)
        scores.append({"mask_iou": mask_iou, "box_iou": box_iou, "lpips": distance, "objects": count})
    rows = []
    for group in ("all", *sorted({s["objects"] for s in scores} - {0})):
        members = [i for i, s in enumerate(scores) if group in ("all", s["objects"])]
        row = {"name": Path(cfg.generated).name, "videos": len(members), "objects": group}
        for measure, kind in (("fid", "inception"), ("fvd", "i3d")):
            chosen = [features[kind][i] for i in members] if networks[kind] else []
            sets = [torch.cat(side) for side in zip(*chosen, strict=True)]
            row[measure] = frechet_distance(*sets) if sets and len(sets[0]) > 1 else math.nan
        for measure in ("mask_iou", "box_iou", "lpips"):
            values = [v for v in (scores[i][measure] for i in members) if math.isfinite(v)]
            row[measure] = float(np.mean(values)) if values else math.nan
        rows.append({k: round(v, 4) if isinstance(v, float) and math.isfinite(v) else v for k, v in row.items()})
    rows = [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()} for row in rows]
    print(table(rows))
    write_rows(out, rows)


if __name__ == "__main__":
    run_script(main, Config)

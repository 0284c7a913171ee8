"""Real videos: encode clips on disk, once, into the shards of latents that training reads.

    python -m tools.prepare_clips --source MagicData/MagicData.csv --out shards --preset wan5b --weights Wan2.2-TI2V-5B
    torchrun --nproc_per_node=8 -m tools.prepare_clips --source clips --out shards ...

`--source` is MagicData's CSV (columns path, num_frames, text), with mask maps in masks/<id>/ and box maps in boxs/<id>/
beside videos/<id>.mp4, one PNG per frame. Or the CSV of MagicMotion's authors, which names the maps and the frames that
have them: trajectory_maps_path, box_path, mask_start_index, mask_end_index. Or a folder of videos, each with
<name>.txt, its caption, and <name>.json, its boxes (trajectory.py).

A clip that can't be used is left out, and rejected.csv says why. If the command is killed, run it again: it continues.
"""

import csv
import json
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from core import media, parallel
from core.boxes import extents, fill_box, flat_colors, label_pixels
from core.codec import Codec
from core.config import UserError, run_script
from core.files import atomic, no_pointer, write_text
from core.media import BROKEN, VIDEO_SUFFIXES, Size, cover_frames, cover_nearest, read_frames, read_video, to_uint8
from core.runs import check_options
from core.weights import read_config, read_safetensors, write_safetensors
from data import open_codec
from tools.batch import read_table
from trajectory import MOST_OBJECTS, Maps, load_trajectory, random_blackout


@dataclass(frozen=True)
class Config:
    source: str = ""  # a CSV in MagicData's format, or a folder of videos with captions and boxes
    out: str = "shards"  # folder for the shards and rejected.csv
    preset: Literal["small", "wan5b"] = "small"  # whose codec
    weights: str = "Wan2.2-TI2V-5B"  # preset wan5b: its folder as published
    size: str = "64x64"  # height x width of wide clips, turned for tall ones; or auto: each of its own shape
    smallest: int = 32  # pixels that a clip has both ways at least; what is smaller than `size` is enlarged
    frames: int = 9  # their length; longer ones are cut
    maps: Maps = "pixels"  # how boxes are painted: as outlines, or as the clip's own first pixels, moved along
    sparse: float = 0.15  # share of clips whose box maps are blacked out in a random subset of frames
    boxed: float = 0.0  # share of clips whose box maps show filled boxes in frame 0, too, not masks; outlines only


WAN5B = replace(
    Config(),
    preset="wan5b",
    size="704x1280",  # (Turbo, FastVideo; that tall clips have it turned is a guess)
    smallest=480,  # (guess)
    frames=121,  # (Wan)
    maps="outline",  # (paper)
    boxed=0.1,  # (guess: the paper's frame 0 is always a mask; users may have none)
)
SHARD = 16  # clips per file


@dataclass(frozen=True)
class Clip:
    """A video and what goes with it."""

    video: Path
    caption: str
    boxes: Path  # a boxes.json, or a folder or video of maps
    masks: Path | None = None  # a folder or video of maps, unless there is a boxes.json
    start: int = 0  # first frame that has maps
    end: int | None = None  # the frame after the last


def require(fine: object, problem: str) -> None:
    if not fine:
        raise UserError(problem)


def find_clips(source: Path) -> list[Clip]:
    """The clips of a CSV in its order, or of a folder by name. UserError if there are none."""
    if not source.is_dir():
        return [read_row(source, line, row) for line, row in enumerate(read_table(source), start=2)]
    files = sorted(file for file in source.iterdir() if file.is_file() and not file.name.startswith("."))
    videos = {file.stem for file in files if file.suffix.lower() in VIDEO_SUFFIXES}
    require(videos, f"{source}: holds no clips; give a CSV with rows or a folder with videos")
    files = [file for file in files if file.suffix not in (".txt", ".json") or file.stem not in videos]
    return [Clip(f, read_caption(f.with_suffix(".txt")), f.with_suffix(".json")) for f in files]  # no video: rejected


def read_caption(file: Path) -> str:
    """A text file's content; empty if there is no such file, or no text in it."""
    no_pointer(file)
    try:
        return file.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def read_row(source: Path, line: int, row: dict[str, str]) -> Clip:
    """One row of a CSV, whose paths are relative to its folder."""
    absent = [name for name in ("path", "num_frames", "text") if name not in row]
    require(not absent, f"{source}: has no column {', '.join(absent)}; its first line must name the columns")
    try:
        start, end = int(row.get("mask_start_index") or 0), int(row.get("mask_end_index") or row["num_frames"])
    except ValueError:
        raise UserError(f"{source}: line {line}: a frame number is not a whole number; correct it") from None
    require(start >= 0, f"{source}: line {line}: mask_start_index is negative; correct it")
    folder, video = source.parent, source.parent / row["path"]
    masks = row.get("trajectory_maps_path") or f"masks/{video.stem}"
    boxes = row.get("box_path") or f"boxs/{video.stem}"
    return Clip(video, row["text"].strip(), folder / boxes, folder / masks, start, end)


def read_clip(clip: Clip, cfg: Config, codec: Codec) -> tuple[dict[str, Tensor], float]:
    """Video and maps, [3, T, height, width] in [-1, 1] each: "video", "box", and "mask" if every frame has masks.

    And how many times as large as in the file they are. UserError with the reason if a clip can't be used.
    """
    require(clip.video.suffix.lower() in VIDEO_SUFFIXES, f"no video; read are {', '.join(sorted(VIDEO_SUFFIXES))}")
    require(clip.caption, "no caption, or none in UTF-8")
    require(clip.video.exists(), "no such video")
    try:
        stack = list(islice(read_video(clip.video), clip.start, clip.start + cfg.frames))
    except BROKEN:
        raise UserError("the video can't be decoded") from None
    length = len(stack) if clip.end is None else min(len(stack), clip.end - clip.start)
    require(length == cfg.frames, f"{length} frames of {cfg.frames}")
    own = stack[0].shape[:2]
    require(min(own) >= cfg.smallest, f"{own[1]}x{own[0]} is smaller than --smallest {cfg.smallest}")
    size = tuple(sorted(codec.video_size(cfg.size, cfg.frames, own), reverse=own[0] > own[1]))  # turned as the clip is
    scale = max(size[0] / own[0], size[1] / own[1])
    video = cover_frames(np.stack(stack), size) / 127.5 - 1
    if clip.boxes.suffix == ".json":
        trajectory = load_trajectory(clip.boxes, size, cfg.frames, own, cut=True)
        return {"video": video, "box": trajectory.maps("box", video[:, 0] if cfg.maps == "pixels" else None)}, scale
    require(cfg.maps == "outline", "painted maps, which hold no pixels of the clip; give a boxes.json")
    mask, box = (read_maps(*each, own, size, cfg.frames) for each in (("mask", clip.masks), ("box", clip.boxes)))
    box[:, 0] = mask[:, 0]  # frame 0 of every condition is the segmentation mask
    return {"video": video, "mask": mask, "box": box}, scale


def read_maps(kind: str, path: Path, own: Size, size: Size, frames: int) -> Tensor:
    """The first maps of a folder or video, for a video of size `own`: [3, T, *size] in [-1, 1]. Raises UserError."""

    def check(fine: object, _field: str, problem: str) -> None:
        require(fine, f"{kind} maps: {problem}")

    check(path.exists(), "", f"{path} does not exist")
    maps = list(islice(read_frames(path, check), frames))
    check(len(maps) == frames, "", f"{len(maps)} frames of {frames}")
    for height, width, _ in (frame.shape for frame in maps):
        alike = abs(height * own[1] / (width * own[0]) - 1) < 0.02  # the sides of small maps are rounded
        check(alike, "", f"{width}x{height}, of another shape than the video's {own[1]}x{own[0]}")
    fitted = torch.from_numpy(np.stack([cover_nearest(m, size) for m in maps])).permute(3, 0, 1, 2).float() / 127.5 - 1
    check((fitted[:, 0] > -0.8).any(), "", "frame 0 shows no object")
    return fitted


def darken(maps: Tensor, share: float, number: int) -> Tensor:
    """Box maps [3, T, H, W], in a `share` of the clips blacked out in a random subset of frames, but never frame 0."""
    dark = random_blackout(np.random.default_rng([0, number]).random(1 + maps.shape[1]), share)
    return maps.masked_fill(torch.from_numpy(dark)[:, None, None], -1)


def fill_boxes(frame: Tensor) -> None:
    """Fill the boxes around the masks in a map [3, height, width], each in its mask's colour."""
    image = to_uint8(frame[:, None])[0]
    colors = flat_colors(image, MOST_OBJECTS)
    for color, box in zip(colors, extents(label_pixels(image, colors), len(colors)), strict=True):
        frame[:, fill_box(box, image.shape[:2])] = torch.from_numpy(color / 127.5 - 1).float()[:, None]


def main(cfg: Config) -> None:
    """Encode captions, then videos and maps, shard by shard; the processes share the shards among them."""
    require(cfg.source, "--source: missing; give a CSV in MagicData's format or a folder of videos")
    check_options(cfg)
    procs = parallel.init_processes()
    codec = open_codec(cfg.preset, cfg.weights, procs.device)
    codec.video_size(cfg.size, cfg.frames)
    out, clips = Path(cfg.out), find_clips(Path(cfg.source))
    if procs.rank == 0:
        check_shards(out / "config.json", cfg, clips)
    procs.barrier()

    def missing(kind: str, title: str) -> Iterator[tuple[int, list[Clip], Path]]:
        """This process's shards that are still to be made: the number of the first clip, the clips and the file."""
        starts = range(0, len(clips), SHARD)[procs.rank :: procs.world]
        files = [(n, clips[n : n + SHARD], out / f"{kind}-{n // SHARD:05}.safetensors") for n in starts]
        return tqdm([shard for shard in files if not shard[2].exists()], title, disable=procs.rank > 0)

    encode = None
    for start, shard, file in missing("text", "captions"):
        encode = encode or codec.text_encoder()
        names = [*map(str, range(start, start + len(shard))), "empty", "negative"]
        rows = zip(names, encode([*(clip.caption for clip in shard), "", codec.negative]), strict=True)
        write_safetensors(file, {name: row[: int(row.any(-1).sum())] for name, row in rows}, {})
    del encode  # it is large
    for start, shard, file in missing("latents", "clips"):
        tensors, rejected, scales, rates = {}, [], [], []
        for number, clip in enumerate(shard, start):
            try:
                parts, scale = read_clip(clip, cfg, codec)
            except UserError as reason:
                rejected.append((str(clip.video), str(reason)))
                continue
            scales.append(scale)
            rates.append(media.frame_rate(clip.video))
            parts["box"] = darken(parts["box"], cfg.sparse, number)
            if cfg.maps == "outline" and np.random.default_rng([0, number, 1]).random() < cfg.boxed:
                fill_boxes(parts["box"][:, 0])
            tensors |= {f"{number}.{kind}": codec.encode_video(video[None])[0] for kind, video in parts.items()}
        lists = json.dumps([rejected, scales, rates])
        write_safetensors(file, tensors, {"report": lists})  # one key: several have no order
    procs.barrier()
    if procs.rank == 0:
        report(out)


def check_shards(file: Path, cfg: Config, clips: list[Clip]) -> None:
    """Write to a file what the shards beside it are made from. UserError if it says that they hold something else."""
    sizes = [clip.video.stat().st_size if clip.video.exists() else 0 for clip in clips]
    contents = zlib.crc32(repr([clips, sizes]).encode(errors="surrogateescape"))
    options = asdict(cfg) | {"shard": SHARD, "clips": len(clips), "contents": contents}
    del options["out"], options["weights"]
    if not file.exists():
        return write_text(file, json.dumps(options, indent=1))
    before = read_config(file)
    if other := [name for name, now in options.items() if before.get(name) != now]:
        were = ", ".join("other captions or videos" if n == "contents" else f"{n} {before.get(n)}" for n in other)
        raise UserError(f"{file}: shards of other clips lie here ({were}); give another --out")


def report(out: Path) -> None:
    """Write rejected.csv, and print how many clips were kept and enlarged, and their frame rates if they differ."""
    shards = sorted(out.glob("latents-*.safetensors"))
    reports = [json.loads(read_safetensors(file)[0]["report"]) for file in shards]
    rejected, scales, rates = ([*chain(*lists)] for lists in zip(*reports, strict=True))
    with atomic(out / "rejected.csv") as temporary, temporary.open("w", newline="") as table:
        csv.writer(table).writerows([("path", "reason"), *rejected])
    if len(rates := Counter(rates)) > 1:
        listed = ", ".join(f"{rate} a second in {n} clips" for rate, n in sorted(rates.items()))
        mend = "they are taken picture by picture, as if of one rate; convert them to one if speeds matter"
        print(f"{out}: frame rates are mixed: {listed}; {mend}", file=sys.stderr)
    print(f"{out}: {len(scales)} clips in {len(shards)} shards; {len(rejected)} rejected, listed in {out}/rejected.csv")
    if larger := [scale for scale in scales if scale > 1]:
        print(f"{len(larger)} clips were enlarged, by {max(larger):.2f} at most; --smallest leaves out the smallest")


if __name__ == "__main__":
    run_script(main, Config, {"wan5b": WAN5B})

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
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from core import parallel
from core.config import UserError, run_script
from core.files import atomic, write_text
from core.media import BROKEN, VIDEO_SUFFIXES, Size, cover_frames, cover_nearest, read_frames, read_video
from core.runs import check_options
from core.weights import read_config, read_safetensors, write_safetensors
from data import open_codec
from tools.batch import read_table
from trajectory import Maps, load_trajectory, random_blackout


@dataclass(frozen=True)
class Config:
    source: str = ""  # a CSV in MagicData's format, or a folder of videos with captions and boxes
    out: str = "shards"  # folder for the shards and rejected.csv
    preset: Literal["small", "wan5b"] = "small"  # whose codec
    weights: str = "Wan2.2-TI2V-5B"  # preset wan5b: its folder as published
    size: str = "64x64"  # height x width of the clips, or auto: each of its own shape
    frames: int = 9  # their length; longer ones are cut
    maps: Maps = "pixels"  # how boxes are painted: as outlines, or as the clip's own first pixels, moved along
    sparse: float = 0.15  # share of clips whose box maps are blacked out in a random subset of frames


WAN5B = replace(
    Config(),
    preset="wan5b",
    size="auto",  # (Wan)
    frames=121,  # (Wan)
    maps="outline",  # (paper)
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


def find_clips(source: Path) -> list[Clip]:
    """The clips of a CSV in its order, or of a folder by name. UserError if there are none."""
    if source.is_dir():
        files = sorted(file for file in source.iterdir() if file.is_file() and not file.name.startswith("."))
        videos = {file.stem for file in files if file.suffix.lower() in VIDEO_SUFFIXES}
        files = [file for file in files if file.suffix not in (".txt", ".json") or file.stem not in videos]
        clips = [Clip(f, read_caption(f.with_suffix(".txt")), f.with_suffix(".json")) for f in files]  # others: listed
    else:
        rows = read_table(source)
        if absent := [name for name in ("path", "num_frames", "text") if name not in rows[0]]:
            raise UserError(f"{source}: has no column {', '.join(absent)}; its first line must name the columns")
        clips = [read_row(source, line, row) for line, row in enumerate(rows, start=2)]
    if not clips or (source.is_dir() and not videos):
        raise UserError(f"{source}: holds no clips; give a CSV with rows or a folder with videos")
    return clips


def read_caption(file: Path) -> str:
    """A text file's content; empty if there is no such file, or no text in it."""
    try:
        return file.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def read_row(source: Path, line: int, row: dict[str, str]) -> Clip:
    """One row of a CSV, whose paths are relative to its folder."""
    folder, video = source.parent, source.parent / row["path"]
    try:
        start, end = int(row.get("mask_start_index") or 0), int(row.get("mask_end_index") or row["num_frames"])
    except ValueError:
        raise UserError(f"{source}: line {line}: a frame number is not a whole number; correct it") from None
    if start < 0:
        raise UserError(f"{source}: line {line}: mask_start_index is negative; correct it")
    masks = row.get("trajectory_maps_path") or f"masks/{video.stem}"
    boxes = row.get("box_path") or f"boxs/{video.stem}"
    return Clip(video, row["text"].strip(), folder / boxes, folder / masks, start, end)


def require(fine: bool, reason: str) -> None:
    if not fine:
        raise UserError(reason)


def read_clip(clip: Clip, fit: Callable[[Size], Size], frames: int, maps: Maps = "outline") -> dict[str, Tensor]:
    """Video and maps, [3, T, height, width] in [-1, 1] each: "video", "box", and "mask" if every frame has masks.

    `fit` gives the clip's (height, width) for the file's. UserError with the reason if a clip can't be used.
    """
    require(clip.video.suffix.lower() in VIDEO_SUFFIXES, f"no video; read are {', '.join(sorted(VIDEO_SUFFIXES))}")
    require(bool(clip.caption), "no caption, or none in UTF-8")
    require(clip.video.exists(), "no such video")
    try:
        stack = list(islice(read_video(clip.video), clip.start, clip.start + frames))
    except BROKEN:
        raise UserError("the video can't be decoded") from None
    length = len(stack) if clip.end is None else min(len(stack), clip.end - clip.start)
    require(length == frames, f"{length} frames of {frames}")
    height, width = stack[0].shape[:2]
    size = fit((height, width))
    require(height >= size[0] and width >= size[1], f"{width}x{height} is smaller than {size[1]}x{size[0]}")
    video = cover_frames(np.stack(stack), size) / 127.5 - 1
    if clip.boxes.suffix == ".json":
        trajectory = load_trajectory(clip.boxes, size, frames, (height, width), cut=True)
        return {"video": video, "box": trajectory.maps("box", video[:, 0] if maps == "pixels" else None)}
    require(maps == "outline", "painted maps, which hold no pixels of the clip; give a boxes.json")
    paths = {"mask": clip.masks, "box": clip.boxes}
    mask, box = (read_maps(f"{kind} maps", path, (height, width), size, frames) for kind, path in paths.items())
    box[:, 0] = mask[:, 0]  # frame 0 of every condition is the segmentation mask
    return {"video": video, "mask": mask, "box": box}


def read_maps(what: str, path: Path, source: Size, size: Size, frames: int) -> Tensor:
    """The first maps of a folder or video, for a video of size `source`: [3, T, *size] in [-1, 1]. Raises UserError."""
    require(path.exists(), f"{what}: {path} does not exist")
    maps = list(islice(read_frames(path, lambda fine, _, why: require(fine, f"{what}: {why}")), frames))
    require(len(maps) == frames, f"{what}: {len(maps)} frames of {frames}")
    height, width = maps[0].shape[:2]
    require(all(m.shape == maps[0].shape for m in maps), f"{what}: not all of one size")
    alike = abs(height * source[1] / (width * source[0]) - 1) < 0.02  # the sides of small maps are rounded
    sizes = f"{width}x{height}, of another shape than the video's {source[1]}x{source[0]}"
    require(alike, f"{what}: {sizes}")
    fitted = torch.from_numpy(np.stack([cover_nearest(m, size) for m in maps])).permute(3, 0, 1, 2).float() / 127.5 - 1
    require(bool((fitted[:, 0] > -0.8).any()), f"{what}: frame 0 shows no object")
    return fitted


def darken(maps: Tensor, share: float, number: int) -> Tensor:
    """Box maps [3, T, H, W], in a `share` of the clips blacked out in a random subset of frames, but never frame 0."""
    dark = random_blackout(np.random.default_rng([0, number]).random(1 + maps.shape[1]), share)
    return maps.masked_fill(torch.from_numpy(dark)[:, None, None], -1)


def main(cfg: Config) -> None:
    """Encode captions, then videos and maps, shard by shard; the processes share the shards among them."""
    if not cfg.source:
        raise UserError("--source: missing; give a CSV in MagicData's format or a folder of videos")
    check_options(cfg)
    procs = parallel.init_processes()
    codec = open_codec(cfg.preset, cfg.weights, procs.device)
    codec.video_size(cfg.size, cfg.frames)
    out = Path(cfg.out)
    clips = find_clips(Path(cfg.source))
    starts = range(0, len(clips), SHARD)
    if procs.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        check_shards(out, cfg, clips)
        for unfinished in out.glob(".tmp*"):  # of a killed run
            unfinished.unlink()
    procs.barrier()

    def missing(kind: str) -> list[tuple[int, Path]]:
        """This process's shards that are still to be made: the first clip and the file of each."""
        own = [(n, out / f"{kind}-{n // SHARD:05}.safetensors") for n in starts[procs.rank :: procs.world]]
        return [(start, file) for start, file in own if not file.exists()]

    if todo := missing("text"):
        encode = codec.text_encoder()  # large, and not needed below
        for start, file in tqdm(todo, "captions", disable=procs.rank > 0):
            captions = [clip.caption for clip in clips[start : start + SHARD]]
            names = [*map(str, range(start, start + len(captions))), "empty", "negative"]
            rows = zip(names, encode([*captions, "", codec.negative]), strict=True)
            write_safetensors(file, {name: row[: int(row.any(-1).sum())] for name, row in rows}, {})
        del encode
    for start, file in tqdm(missing("latents"), "clips", disable=procs.rank > 0):
        tensors, rejected = {}, []
        for number, clip in enumerate(clips[start : start + SHARD], start):
            try:
                parts = read_clip(clip, partial(codec.video_size, cfg.size, cfg.frames), cfg.frames, cfg.maps)
            except UserError as reason:
                rejected.append((str(clip.video), str(reason)))
                continue
            parts["box"] = darken(parts["box"], cfg.sparse, number)
            for kind, video in parts.items():
                tensors[f"{number}.{kind}"] = codec.encode_video(video[None])[0]
        write_safetensors(file, tensors, {"rejected": json.dumps(rejected)})
    procs.barrier()
    if procs.rank == 0:
        report(out)


def check_shards(out: Path, cfg: Config, clips: list[Clip]) -> None:
    """Write down what the shards are made from. UserError if there are shards made from something else."""
    sizes = [clip.video.stat().st_size if clip.video.exists() else 0 for clip in clips]
    contents = zlib.crc32(repr([clips, sizes]).encode(errors="surrogateescape"))
    file = out / "config.json"
    options = asdict(cfg) | {"shard": SHARD, "clips": len(clips), "contents": contents}
    del options["out"], options["weights"]
    if not file.exists():
        return write_text(file, json.dumps(options, indent=1))
    before = {"maps": "outline"} | read_config(file)  # older shards hold outlines, and don't say so
    if other := [name for name, now in options.items() if before.get(name, now) != now]:
        were = ", ".join("other captions or videos" if n == "contents" else f"{n} {before[n]}" for n in other)
        raise UserError(f"{file}: shards of other clips lie here ({were}); give another --out")


def report(out: Path) -> None:
    """Write rejected.csv, and print how many clips were kept."""
    kept, rejected, shards = 0, [], sorted(out.glob("latents-*.safetensors"))
    for file in shards:
        header, tensors = read_safetensors(file)
        kept += sum(name.endswith(".video") for name in tensors)
        rejected += json.loads(header["rejected"])
    with atomic(out / "rejected.csv") as temporary, temporary.open("w", newline="") as table:
        csv.writer(table).writerows([("path", "reason"), *rejected])
    print(f"{out}: {kept} clips in {len(shards)} shards; {len(rejected)} rejected, listed in {out}/rejected.csv")


if __name__ == "__main__":
    run_script(main, Config, {"wan5b": WAN5B})

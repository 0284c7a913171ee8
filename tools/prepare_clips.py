"""Real videos: encode clips on disk, once, into the shards of latents that training reads.

    python -m tools.prepare_clips --source MagicData/MagicData.csv --out shards --preset wan5b --weights Wan2.2-TI2V-5B
    torchrun --nproc_per_node=8 -m tools.prepare_clips --source clips --out shards ...

`--source` is MagicData's CSV, that of MagicMotion's authors, or a folder of videos, each with its caption in <name>.txt
and its boxes in <name>.json: docs/FORMATS.md has the columns and folders. A clip that can't be used is left out, and
rejected.csv says why. If the command is killed, run it again: it continues.
"""

import csv
import json
import os
import re
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
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
from core.config import ROOT, MachineError, UserError, reason, require, run_script, warn
from core.files import atomic, no_pointer, write_text
from core.noise import random_blackout
from core.record import checksum, lock
from core.weights import read_config, read_safetensors, write_safetensors
from data import open_codec
from tools.batch import read_table
from trajectory import MOST_OBJECTS, Maps, check_input, load_trajectory


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
    video: Path
    caption: str
    boxes: Path  # a boxes.json, or a folder or video of maps
    masks: Path | None = None  # a folder or video of maps, unless there is a boxes.json
    start: int = 0  # first frame that has maps
    end: int | None = None  # the frame after the last


def find_clips(source: Path, out: Path | None = None) -> list[Clip]:
    """The clips of a CSV in order, or of a folder by name, without `out`. UserError if none, or if two share files."""
    if source.is_dir():
        names = (file for file in sorted(source.rglob("*")) if not file.is_dir() or file.is_symlink())
        files = [f for f in names if not re.search(r"/\.", f"/{f.relative_to(source)}")]
        files = [f for f in files if not out or not f.parent.resolve().is_relative_to(out.resolve())]
        videos = [file for file in files if file.suffix.lower() in media.VIDEO_SUFFIXES]
        require(videos, f"{source}: holds no clips; give a CSV with rows or a folder with videos")
    else:
        rows = read_table(source)
        videos = {Path(row.get("path", "")) for row in rows}
    whole, last = (Counter(names) for names in ([v.parent / v.stem for v in videos], [v.stem for v in videos]))
    for name in (name for name, count in whole.items() if count > 1):
        raise UserError(f"{source}: two videos are called {name}, and would share what goes with them; rename one")
    if not source.is_dir():
        return [read_row(source, line, row, last) for line, row in enumerate(rows, start=2)]
    files = [f for f in files if f.suffix not in (".txt", ".json") or f.with_name(f.stem) not in whole]
    return [Clip(f, read_caption(f.with_suffix(".txt")), f.with_suffix(".json")) for f in files]  # no video: rejected


def read_caption(file: Path) -> str:
    """A text file's content; empty if there is no such file, or no text in it."""
    try:
        return no_pointer(file).read_text(encoding="utf-8-sig").strip()
    except (FileNotFoundError, UnicodeDecodeError):
        return ""


def read_row(source: Path, line: int, row: dict[str, str], names: Counter[str]) -> Clip:
    """One row of a CSV, whose paths are relative to its folder. `names`: how many videos of the CSV have which name."""
    absent = [name for name in ("path", "num_frames", "text") if name not in row]
    require(not absent, f"{source}: has no column {', '.join(absent)}; its first line must name the columns")
    require(row["path"].strip(), f"{source}: line {line}: has no path; name the video's file")
    try:
        start, end = int(row.get("mask_start_index") or 0), int(row.get("mask_end_index") or row["num_frames"])
    except ValueError:
        raise UserError(f"{source}: line {line}: a frame number is not a whole number; correct it") from None
    require(start >= 0, f"{source}: line {line}: mask_start_index is negative; correct it")
    folder, video = source.parent, source.parent / row["path"]
    parts, maps = Path(row["path"]).parts[:-1], []
    for column, kind in (("box_path", "boxs"), ("trajectory_maps_path", "masks")):
        # What the column says; else for videos/cats/1.mp4 `kind`/cats/1, or `kind`/1 if no other has this name.
        places = [folder / kind / Path(*parts[i:], video.stem) for i in range(len(parts) + (names[video.stem] == 1))]
        maps.append(folder / row[column] if row.get(column) else next(filter(Path.exists, places), places[-1]))
    return Clip(video, row["text"].strip(), *maps, start, end)


def read_clip(clip: Clip, cfg: Config, codec: Codec) -> tuple[dict[str, Tensor], float, int]:
    """Video and maps, [3, T, height, width] in [-1, 1] each: "video", "box", and "mask" if every frame has masks.

    And how many times as large they are as in the file, and its frames a second. UserError if a clip can't be used.
    """
    require(clip.video.suffix.lower() in media.VIDEO_SUFFIXES, f"no video; read are {', '.join(media.VIDEO_SUFFIXES)}")
    require(clip.caption, "no caption, or none in UTF-8")
    require(os.path.exists(no_pointer(clip.video)), "no such video")
    try:
        told = media.describe(clip.video)
        stack = list(islice(media.read_video(clip.video, told=told), clip.start, clip.start + cfg.frames))
    except media.BROKEN as error:
        raise UserError(f"the video can't be decoded: {reason(error)}") from None
    length = len(stack) if clip.end is None else min(len(stack), clip.end - clip.start)
    require(length == cfg.frames, f"{length} frames of {cfg.frames}")
    own = height, width = stack[0].shape[:2]
    require(min(own) >= cfg.smallest, f"{width}x{height} is smaller than --smallest {cfg.smallest}")
    size = tuple(sorted(codec.video_size(cfg.size, cfg.frames, own), reverse=height > width))  # turned as the clip is
    scale, rate = max(size[0] / height, size[1] / width), media.frame_rate(told[0])
    video = media.cover_frames(np.stack(stack), size) / 127.5 - 1
    if clip.boxes.suffix == ".json":
        trajectory = load_trajectory(clip.boxes, size, cfg.frames, own, cut=True)
        box = trajectory.maps("box", video[:, 0] if cfg.maps == "pixels" else None)
        return {"video": video, "box": box}, scale, rate
    require(cfg.maps == "outline", "painted maps, which hold no pixels of the clip; give a boxes.json")
    mask, box = (read_maps(*each, own, size, cfg.frames) for each in (("mask", clip.masks), ("box", clip.boxes)))
    box[:, 0] = mask[:, 0]  # frame 0 of every condition is the segmentation mask
    return {"video": video, "mask": mask, "box": box}, scale, rate


def read_maps(kind: str, path: Path, own: media.Size, size: media.Size, frames: int) -> Tensor:
    """The first maps of a folder or video, for a video of size `own`: [3, T, *size] in [-1, 1]. Raises UserError."""
    check = partial(check_input, f"{kind} maps")
    check(os.path.exists(no_pointer(path)), "", f"{path} does not exist")
    maps = list(islice(media.read_frames(path, check), frames))
    check(len(maps) == frames, "", f"{len(maps)} frames of {frames}")
    for height, width, _ in (frame.shape for frame in maps):
        fine = media.alike((height, width), own)
        check(fine, "", f"{width}x{height}, of another shape than the video's {own[1]}x{own[0]}")
    fitted = torch.from_numpy(np.stack([media.cover_nearest(frame, size) for frame in maps]))
    check((fitted[0] > 25).any(), "", "frame 0 shows no object")
    return fitted.permute(3, 0, 1, 2).float() / 127.5 - 1


def darken(maps: Tensor, share: float, number: int) -> Tensor:
    """Box maps [3, T, H, W], in a `share` of the clips blacked out in a random subset of frames, but never frame 0."""
    dark = random_blackout(np.random.default_rng([0, number]).random(1 + maps.shape[1]), share)
    return maps.masked_fill(torch.from_numpy(dark)[:, None, None], -1)


def fill_boxes(frame: Tensor) -> None:
    """Fill the boxes around the masks in a map [3, height, width], each in its mask's colour."""
    image = media.to_uint8(frame[:, None])[0]
    colors = flat_colors(image, MOST_OBJECTS)
    for color, box in zip(colors, extents(label_pixels(image, colors), len(colors)), strict=True):
        frame[:, fill_box(box, image.shape[:2])] = torch.from_numpy(color / 127.5 - 1).float()[:, None]


def main(cfg: Config) -> None:
    require(cfg.source, "--source: missing; give a CSV in MagicData's format or a folder of videos")
    procs = parallel.init_processes()
    codec = open_codec(cfg.preset, cfg.weights, procs.device)
    codec.video_size(cfg.size, cfg.frames)
    out, clips, program = Path(cfg.out), find_clips(Path(cfg.source), Path(cfg.out)), this_program()
    if procs.rank == 0:
        lock(out)
        options = begin(out, cfg, len(clips), codec)
    starts = range(0, len(clips), SHARD)[procs.rank :: procs.world]
    shards = [(n, clips[n : n + SHARD], out / f"latents-{n // SHARD:05}.safetensors") for n in starts]
    shards = [(*shard, still_good(*shard, program)) for shard in shards]
    procs.barrier()  # all are checked before one is made

    encoder = cache(codec.text_encoder)  # read when the first captions need it
    for start, shard, latents, _ in tqdm(shards, "captions", disable=procs.rank > 0):
        file = latents.with_name(latents.name.replace("latents", "text"))
        header = {"made_of": checksum(*(clip.caption for clip in shard))}
        if file.exists() and read_safetensors(file)[0].get("made_of") == header["made_of"]:
            continue
        names = [*map(str, range(start, start + len(shard))), "empty", "negative"]
        rows = zip(names, encoder()([*(clip.caption for clip in shard), "", codec.negative]), strict=True)
        write_safetensors(file, {name: row[: int(row.any(-1).sum())] for name, row in rows}, header, sums=True)
    del encoder  # it is large
    for start, shard, file, kept in tqdm(shards, "clips", disable=procs.rank > 0):
        if len(kept) == len(shard):
            continue
        stored = read_safetensors(file)[1] if kept else {}
        made_of, tensors = {}, {name: tensor.read() for name, tensor in stored.items()}
        for number, clip in enumerate(shard, start):
            made_of[number] = record = kept.get(str(number)) or {"path": str(clip.video), "sum": sources(clip)}
            if str(number) in kept:
                continue
            try:
                parts, record["scale"], record["rate"] = read_clip(clip, cfg, codec)
            except MachineError:
                raise
            except UserError as error:
                record |= {"rejected": str(error), "by": program}
                continue
            parts["box"] = darken(parts["box"], cfg.sparse, number)
            if cfg.maps == "outline" and np.random.default_rng([0, number, 1]).random() < cfg.boxed:
                fill_boxes(parts["box"][:, 0])
            tensors |= {f"{number}.{kind}": codec.encode_video(video[None])[0] for kind, video in parts.items()}
        write_safetensors(file, tensors, {"made_of": json.dumps(made_of)}, sums=True)
    procs.barrier()
    if procs.rank == 0:
        report(out, options)


def this_program() -> str:
    """What decides, besides a clip's files, whether the clip can be used: this project's code and ffmpeg."""
    code = (file for folder in (".", "core", "tools") for file in sorted((ROOT / folder).glob("*.py")))
    return checksum(*code, media.ffmpeg_version())


def sources(clip: Clip) -> str:
    """The checksum of everything that a clip is made of. OSError if the machine can't read it."""
    return checksum(clip.caption, clip.start, clip.end, clip.video, clip.boxes, clip.masks)


def begin(out: Path, cfg: Config, count: int, codec: Codec) -> dict:
    """Write what the shards will be made of to config.json, not yet their list. UserError if others lie there."""
    file = out / "config.json"
    options = asdict(cfg) | {"shard": SHARD, "clips": count, "codec": {f.name: checksum(f) for f in codec.files()}}
    del options["out"], options["weights"], options["source"]
    strange = next(chain.from_iterable(map(out.glob, ("latents-*", "text-*", "rejected.csv"))), None)
    before = read_config(file) if file.exists() else options
    fine = file.exists() or not strange
    require(fine, f"{strange}: lies here without a config.json that says of what; give another --out")
    if other := [name for name, now in options.items() if before.get(name) != now]:
        were = ", ".join(f"{name} {before.get(name)}" for name in other)
        raise UserError(f"{file}: shards of other clips lie here ({were}); give another --out")
    for shard in (out / name for name in before.get("shards", ())):
        same = not shard.exists() or checksum(shard) == before["shards"][shard.name]
        require(same, f"{shard}: isn't what was written here; delete it, and it is made anew, or give another --out")
    write_text(file, json.dumps(options, indent=1))
    return options


def still_good(start: int, shard: list[Clip], file: Path, program: str) -> dict[str, dict]:
    """Of a shard's clips those that need not be read again, and what they are made of. UserError if that has changed.

    What was left out is read again once its files or this program have changed.
    """
    if not file.exists():
        return {}
    before, kept = json.loads(read_safetensors(file)[0].get("made_of", "{}")), {}
    for number, clip in enumerate(shard, start):
        record = before.get(str(number), {})
        if record.get("sum") == sources(clip) and record.get("by", program) == program:
            kept[str(number)] = record
        elif "rejected" not in record:
            changed = f"{clip.video}, its caption, boxes or maps are not those that {file} was made of"
            raise UserError(f"{changed}; delete that file, and it is made anew, or give another --out")
    return kept


def report(out: Path, options: dict) -> None:
    """Write rejected.csv and the list of shards; print how many clips were kept and enlarged, and at what rates."""
    numbers = range(-(-options["clips"] // SHARD))
    shards = [out / f"{kind}-{n:05}.safetensors" for kind in ("latents", "text") for n in numbers]
    clips = [c for file in shards[: len(numbers)] for c in json.loads(read_safetensors(file)[0]["made_of"]).values()]
    rejected = [(clip["path"], clip["rejected"]) for clip in clips if "rejected" in clip]
    text = {"newline": "", "encoding": "utf-8", "errors": "backslashreplace"}  # names may be in another encoding
    with atomic(out / "rejected.csv") as temporary, temporary.open("w", **text) as table:
        csv.writer(table).writerows([("path", "reason"), *rejected])
    write_text(out / "config.json", json.dumps(options | {"shards": {f.name: checksum(f) for f in shards}}, indent=1))
    kept = [clip for clip in clips if "rejected" not in clip]
    if len(rates := Counter(clip["rate"] for clip in kept)) > 1:
        listed = ", ".join(f"{rate} a second in {n} clips" for rate, n in sorted(rates.items()))
        mend = "they are taken picture by picture, as if of one rate; convert them to one if speeds matter"
        warn(f"{out}: frame rates are mixed: {listed}; {mend}")
    print(f"{out}: {len(kept)} clips in {len(numbers)} shards; {len(rejected)} rejected, listed in {out}/rejected.csv")
    if larger := [clip["scale"] for clip in kept if clip["scale"] > 1]:
        print(f"{len(larger)} clips were enlarged, by {max(larger):.2f} at most; --smallest leaves out the smallest")


if __name__ == "__main__":
    run_script(main, Config, {"wan5b": WAN5B})

"""Real videos: what is read of a clip, why one is rejected, and shards that a kill can't spoil; training on them."""

import csv
import json
import subprocess
import time
import zlib
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import make_trajectory, refused

import train_slow_adapter
from core.media import to_uint8, write_image, write_video
from data import ClipLatents
from tools import prepare_clips
from tools.prepare_clips import Config
from toy.codec import ToyCodec
from toy.world import World, WorldBatch
from trajectory import load_trajectory
from wan.codec import WanCodec

FRAMES, LIKE_MAGIC = 9, {"size": "48x48", "maps": "outline"}  # of the clips


def read(clip, maps="outline"):
    return prepare_clips.read_clip(clip, Config(size="48x48", maps=maps), ToyCodec())[0]


def write_maps(folder, maps):
    for t, frame in enumerate(to_uint8(maps)):
        write_image(folder / f"annotated_frame_{t:05}.png", frame)


@pytest.fixture(scope="module")
def world() -> WorldBatch:
    """24 videos in whose frame 0 a thing is seen."""
    batch = World("train", (48, 48)).batch(range(40))
    seen = batch.masks[:, 1:, 0].any((-1, -2)).sum(1) == batch.used[:, 1:].sum(1)
    return batch.subset(seen.nonzero()[:, 0].tolist()[:24])


@pytest.fixture(scope="module")
def magic(tmp_path_factory, world):
    """MagicData in small: 20 good clips and one each of what can be wrong."""
    root, rows = tmp_path_factory.mktemp("magic"), [("path", "num_frames", "text")]
    for i, video in enumerate(world.video):
        name, trajectory = f"clip{i:02}", world.trajectory(i, "mask")
        write_video(root / f"videos/{name}.mp4", to_uint8(video), fps=8)
        write_maps(root / f"masks/{name}", trajectory.maps("mask"))
        write_maps(root / f"boxs/{name}", trajectory.maps("box"))
        rows.append((f"videos/{name}.mp4", FRAMES, world.captions[i]))
    (root / "videos/clip03.mp4").write_bytes(b"no video at all")
    write_video(root / "videos/clip07.mp4", to_uint8(world.video[7])[:5], fps=8)
    write_video(root / "videos/clip11.mp4", to_uint8(world.video[11])[:, :24], fps=8)
    (root / "masks/clip15/annotated_frame_00008.png").unlink()
    with (root / "MagicData.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return root


REJECTED = {
    "clip03": "the video can't be decoded: ",  # and ffmpeg's own words
    "clip07": "5 frames of 9",
    "clip11": "48x24 is smaller than --smallest 32",
    "clip15": "mask maps: 8 frames of 9",
}
KEPT = [number for number in range(16) if f"clip{number:02}" not in REJECTED]  # of the first shard


def first_shard(folder, kind="latents") -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / f"{kind}-00000.safetensors")


def shards(folder):
    """What its files hold, but for the order of a header's entries, which safetensors draws."""

    def parse(data: bytes):
        size = 8 + int.from_bytes(data[:8], "little")
        return json.loads(data[8:size]), data[size:]

    files = {file.name: file.read_bytes() for file in folder.iterdir() if file.name != ".lock"}
    return {name: parse(data) if name.endswith(".safetensors") else data for name, data in files.items()}


@pytest.fixture(scope="module")
def prepared(magic):
    prepare_clips.main(Config(source=str(magic / "MagicData.csv"), out=str(magic / "shards"), **LIKE_MAGIC))
    return magic / "shards"


def test_shards_hold_the_clips_and_a_report_of_those_rejected(magic, prepared, world):
    with (prepared / "rejected.csv").open(newline="") as file:
        rejected = {row["path"].split("/")[-1][:6]: row["reason"] for row in csv.DictReader(file)}
    assert rejected.keys() == REJECTED.keys() and "moov atom not found" in rejected["clip03"]
    assert all(reason.startswith(REJECTED[name]) for name, reason in rejected.items())
    assert len(list(prepared.glob("latents-*.safetensors"))) == 2
    codec, batch = ToyCodec(), world.subset([4, 5])
    latents, texts = first_shard(prepared), first_shard(prepared, "text")
    assert set(latents) == {f"{n}.{kind}" for n in KEPT for kind in ("box", "mask", "video")}
    for i, number in enumerate((4, 5)):
        box, mask, video = (latents[f"{number}.{kind}"].float() for kind in ("box", "mask", "video"))
        latent, other = codec.encode_video(batch.video[[i, 1 - i]])
        assert (video - latent).abs().mean() < 0.2 < (video - other).abs().mean()  # an mp4 lies between
        assert (mask - codec.encode_video(batch.trajectory(i, "mask").maps("mask")[None])[0]).abs().max() < 0.1
        assert torch.equal(box[:, 0], mask[:, 0]) and not torch.equal(box[:, 1:], mask[:, 1:])  # frame 0 is the mask
    text = codec.encode_text(batch.captions)[0]
    assert torch.equal(texts["4"], text[text.any(-1)].bfloat16()) and texts["empty"].shape == (0, 64)


def test_killed_or_shared_out_it_makes_the_same_shards(magic, prepared, run, tmp_path):
    flags = ("--source", magic / "MagicData.csv", "--size", "48x48", "--maps", "outline", "--out")
    job = run("tools.prepare_clips", *flags, tmp_path / "killed", wait=False)
    while not (tmp_path / "killed/latents-00000.safetensors").exists():
        assert job.poll() is None
        time.sleep(0.01)
    job.kill()
    assert not (tmp_path / "killed/rejected.csv").exists()
    with subprocess.Popen(["true"]) as ended:
        pass
    left = f".tmp{ended.pid}-{zlib.crc32(b'latents-00001.safetensors'):08x}.safetensors"  # as a kill leaves it
    (tmp_path / "killed" / left).write_text("half-written")
    for folder, processes in (("killed", 1), ("shared", 2)):
        job = run("tools.prepare_clips", *flags, tmp_path / folder, processes=processes)
        assert job.returncode == 0, job.stderr
        assert "20 clips in 2 shards; 4 rejected" in job.stdout and shards(tmp_path / folder) == shards(prepared)


def test_stage_1_trains_on_them(prepared, here):
    options = {"steps": 2, "mask_steps": 1, "batch": 2, "compile": False, "maps": "outline", "sample_every": 0}
    train_slow_adapter.main(train_slow_adapter.Config(data=str(prepared), **options))


def test_a_sample_is_the_same_in_any_batch(prepared):
    data = ClipLatents(prepared, 32, seed=3)
    many, one = (data.batch(samples, "box", drop_text=0.5) for samples in ([0, 1, 16], [1]))
    assert all(torch.equal(a[0], b[1]) for a, b in zip(one, many, strict=True))


def test_the_authors_own_columns_name_maps_and_their_frames(tmp_path, world):
    trajectory, frames = world.trajectory(0, "mask"), to_uint8(world.video[0])
    write_video(tmp_path / "v.mp4", np.concatenate([np.zeros_like(frames[:3]), frames]), fps=8)
    write_maps(tmp_path / "m", trajectory.maps("mask"))
    write_maps(tmp_path / "b", trajectory.maps("box"))
    names = "text,path,num_frames,width,height,trajectory_maps_path,videoid,mask_start_index,mask_end_index,box_path"
    (tmp_path / "x.csv").write_text(f"{names}\na disc,v.mp4,12,48,48,m,v,3,12,b\na disc,v.mp4,12,48,48,m,v,4,12,b\n")
    good, short = prepare_clips.find_clips(tmp_path / "x.csv")
    parts = read(good)
    assert (parts["video"] - world.video[0]).abs().mean() < 0.1  # three black frames are passed over
    assert torch.equal(parts["mask"], trajectory.maps("mask"))
    refused("painted maps, which hold no pixels of the clip", read, good, "pixels")
    refused("8 frames of 9", read, short)


def write_plain(folder, name, boxes, video=None, caption="a square", **top):
    """A clip of a plain folder: by default nine grey frames."""
    write_video(folder / f"{name}.mp4", np.full((9, 48, 48, 3), 90, np.uint8) if video is None else video, fps=8)
    (folder / f"{name}.txt").write_text(caption)
    (folder / f"{name}.json").write_text(json.dumps({**top, "objects": [{"boxes": boxes, "interpolate": "linear"}]}))


def test_a_plain_folder_of_videos_captions_and_boxes(tmp_path, world):
    for i, name in enumerate("abc"):
        boxes = {str(t): [4 + 2 * t, 8, 16 + 2 * t, 20] for t in range(9)}
        write_plain(tmp_path, name, boxes, to_uint8(world.video[i]), world.captions[i] + "\n")
    (tmp_path / "b.json").write_text("{}")
    (tmp_path / "c.txt").unlink()
    first, second, third = prepare_clips.find_clips(tmp_path)
    parts = read(first)
    assert set(parts) == {"video", "box"} and first.caption == world.captions[0]
    x0, y0, x1, y1 = 12, 8, 24, 20
    lit = (parts["box"][0, 4] > -1).nonzero()
    assert lit.amin(0).tolist() == [y0, x0] and lit.amax(0).tolist() == [y1, x1]
    painted, video = (read(first, "pixels")[kind] for kind in ("box", "video"))
    assert torch.equal(painted, load_trajectory(first.boxes, (48, 48), 9).maps("box", video[:, 0]))
    assert torch.allclose(painted[:, 4, 8:20, 12:24], video[:, 0, 8:20, 4:16].clamp(min=-0.9), atol=1e-4)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    for clip, reason in ((second, "b.json: objects"), (third, "no caption"),
                         (prepare_clips.find_clips(tmp_path)[0], "no caption, or none in UTF-8")):  # fmt: skip
        refused(reason, read, clip)


def test_boxes_for_a_whole_video_are_cut_as_it_is(tmp_path):
    video = np.full((12, 48, 48, 3), 90, np.uint8)
    write_plain(tmp_path, "a", {"0": [4, 4, 16, 16], "11": [26, 4, 38, 16]}, video, num_frames=12)
    (clip,) = prepare_clips.find_clips(tmp_path)
    box = read(clip)["box"]
    assert box.shape[1] == 9 and (box[:, 8] > -1).any(0).any(0).nonzero()[0].item() == 4 + 2 * 8
    write_plain(tmp_path, "a", {"0": [4, 4, 16, 16]}, video, num_frames=5)
    refused("num_frames is 5 but the video has 9 frames", read, clip)


def test_a_share_of_the_clips_loses_boxes_in_some_frames():
    maps = torch.ones(3, 9, 4, 4)
    dark = [(prepare_clips.darken(maps, 0.5, n)[0, :, 0, 0] < 0).tolist() for n in range(200)]
    assert not any(row[0] for row in dark) and 60 < sum(any(row) for row in dark) < 110
    assert torch.equal(prepare_clips.darken(maps, 0.0, 1), maps)


def test_a_share_of_the_clips_shows_boxes_instead_of_masks_in_frame_0(magic, prepared, world, tmp_path):
    options = {"source": str(magic / "MagicData.csv"), "out": str(tmp_path / "out"), "sparse": 0.0, "boxed": 0.5}
    prepare_clips.main(Config(**options | LIKE_MAGIC))
    made, plain, boxed = first_shard(tmp_path / "out"), first_shard(prepared), []
    for number in KEPT:
        drawn = world.trajectory(number, "mask")
        new, mask = made[f"{number}.box"].float()[:, 0], plain[f"{number}.mask"].float()[:, 0]
        boxed.append(not torch.equal(new, mask))
        if boxed[-1] and len(drawn.colors) == 1:
            y, x = drawn.first_masks[0].nonzero()
            filled = make_trajectory([[[x.min(), y.min(), x.max() + 1, y.max() + 1]]], (48, 48)).maps()
            latent = ToyCodec().encode_video(filled[None])[0, :, 0]
            assert (new - latent).abs().max() < 0.1 < (new - mask).abs().max()
        assert torch.equal(made[f"{number}.mask"], plain[f"{number}.mask"])
    assert 3 < sum(boxed) < 13


WIDE, TALL = (48, 2, 44, 80), (48, 2, 80, 44)  # latents of 5 frames of 704x1280, and of 1280x704


class Shrinking(WanCodec):
    """Has Wan's sizes and none of its networks: latents are shrunken frames."""

    def encode_video(self, video):
        small = torch.nn.functional.avg_pool2d(video[0, :, ::4].transpose(0, 1), 16)
        return small.transpose(0, 1).repeat(16, 1, 1, 1)[None]

    def text_encoder(self):
        return lambda captions: torch.ones(len(captions), 2, 4)


def test_wan5b_has_two_sizes_and_enlarges_small_clips(tmp_path, monkeypatch, capsys):
    """Wide clips and tall ones, each covered and cut; what --smallest leaves out; --size auto, as before."""
    monkeypatch.setattr(prepare_clips, "open_codec", lambda *_: Shrinking(tmp_path, torch.device("cpu")))
    sizes = [(720, 1280), (1080, 1920), (540, 960), (480, 720), (1920, 1080), (478, 720)]
    for number, size in enumerate(sizes):
        write_plain(tmp_path / "clips", number, {"0": [200, 200, 400, 300]}, np.full((5, *size, 3), 90, np.uint8))
    cfg = replace(prepare_clips.WAN5B, source=str(tmp_path / "clips"), frames=5, out=str(tmp_path / "out"))
    prepare_clips.main(cfg)
    said = "2 clips were enlarged, by 1.78 at most; --smallest leaves out the smallest"
    assert capsys.readouterr().out.splitlines()[-1] == said
    assert "720x478 is smaller than --smallest 480" in (tmp_path / "out/rejected.csv").read_text()
    stored = first_shard(tmp_path / "out")
    assert [stored[f"{n}.video"].shape for n in range(5)] == [WIDE, WIDE, WIDE, WIDE, TALL]
    assert [stored[f"{n}.box"].shape for n in range(5)] == [WIDE, WIDE, WIDE, WIDE, TALL]
    lit = (stored["3.box"][0, 0] > -0.99).nonzero()  # 720 columns become 1280, of 853 rows 704 stay
    assert lit.amin(0).tolist() == [(200 * 16 // 9 - 74) // 16, 200 * 16 // 9 // 16]
    first, auto = prepare_clips.find_clips(tmp_path / "clips")[0], replace(cfg, size="auto")
    codec = WanCodec(tmp_path, torch.device("cpu"))
    assert prepare_clips.read_clip(first, auto, codec)[0]["video"].shape == (3, 5, 704, 1248)


def test_bad_input_is_one_line(tmp_path):
    def wrong(message, **options):
        refused(message, prepare_clips.main, Config(out=str(tmp_path / "out"), **options))
        assert not (tmp_path / "out").exists()

    wrong("--source: missing")
    wrong(r"/no\.csv: no such file; correct the path", source=str(tmp_path / "no.csv"))
    wrong("holds no clips", source=str(tmp_path))
    for text, message in (
        ("path,text\na.mp4,b\n", "has no column num_frames"),
        ("num_frames,text\n9,b\n", "has no column path"),
        ("path,num_frames,text\na.mp4,9,b\n ,9,c\n", "line 3: has no path"),
        ("path,num_frames,text\na.mp4,many,b\n", "line 2: a frame number is not a whole number"),
        ("path,num_frames,text,mask_start_index\na.mp4,9,b,-1\n", r"x\.csv: line 2: mask_start_index is negative"),
        ('path,num_frames,text\na.mp4,9,"red, blue"\nb.mp4,9,a, b\n', "row 2 has more cells than columns"),
    ):
        (tmp_path / "x.csv").write_text(text)
        wrong(message, source=str(tmp_path / "x.csv"))
    wrong("--size 48x50", source=str(tmp_path / "x.csv"), size="48x50")

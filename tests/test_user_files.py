"""What users' files and machines do: full disks, odd videos, pictures and masks of every depth, names."""

import json
import os
import resource
import stat
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import refused
from PIL import Image, ImageCms, ImageFilter
from test_trajectory import load as load_boxes

from core import media
from core.config import UserError
from core.files import atomic, output_path, write_text
from core.media import load_image, read_mask, read_picture, read_video, write_image, write_video
from core.weights import file_errors, load, read_checkpoint, read_config, read_safetensors, write_safetensors
from tools import convert, prepare_clips
from tools.batch import read_table
from toy.codec import ToyCodec
from trajectory import load_trajectory
from wan.lora import merge
from wan.published import find_generator

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
GREY = np.tile(np.linspace(0, 255, 64).round().astype(np.uint8), (64, 1))


def encode(path: Path, *arguments: str) -> Path:
    subprocess.run([FFMPEG, "-y", "-v", "error", *arguments, path], check=True)
    return path


def pictures_in(path: Path) -> int:
    """By an independent count: packets of the stream as ffmpeg decodes them."""
    command = [FFMPEG, "-v", "error", "-i", path, "-map", "0:v:0", "-fps_mode", "passthrough", "-f", "framecrc", "-"]
    lines = subprocess.run(command, capture_output=True, check=True).stdout.splitlines()
    return sum(not line.startswith(b"#") for line in lines)


NOISE = np.random.default_rng(0).integers(0, 256, (9, 96, 96, 3), dtype=np.uint8)
BIG = {"x": torch.randn(40_000)}
WRITERS = {
    "mp4": lambda path: write_video(path, NOISE, 8),
    "png": lambda path: write_image(path, NOISE[0]),
    "json": lambda path: write_text(path, "x" * 60_000),
    "safetensors": lambda path: write_safetensors(path, BIG, {}, torch.float32),
}


@pytest.mark.parametrize("before", [None, b"before"])
@pytest.mark.parametrize("kind", WRITERS)
def test_a_write_that_fails_is_one_line_and_leaves_what_stood_before(kind, before, tmp_path, monkeypatch):
    """No file may pass 20 KiB: what a full disk does, without root. One that succeeds has the user's permissions."""
    path = tmp_path / f"out.{kind}"
    if before:
        path.write_bytes(before)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # Python would keep a half-written module
    resource.setrlimit(resource.RLIMIT_FSIZE, (20 << 10, limit[1]))
    try:
        refused(rf"out\.{kind}: can't be written .*; make room", WRITERS[kind], path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == ({path.name: before} if before else {})
    for umask in (0o022, 0o077, 0o002):
        monkeypatch.setattr("core.files.UMASK", umask)
        WRITERS[kind](path)
        assert path.stat().st_size > 20 << 10 and stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_an_encoder_that_lies_is_caught(monkeypatch, tmp_path):
    """Exit status 0 and a file of too few pictures: read back before the rename."""
    short = encode(tmp_path / "short.mp4", "-f", "lavfi", "-i", "testsrc=s=96x96:r=8:d=0.5")
    liar = tmp_path / "ffmpeg"
    liar.write_text(f'#!/bin/sh\nfor last; do :; done\ncase "$*" in *rawvideo*) cat > /dev/null; '
                    f'cp {short} "${{last#file:}}";; *) exec {FFMPEG} "$@";; esac\n')  # fmt: skip
    liar.chmod(0o755)
    monkeypatch.setattr(media.imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(liar))
    refused(r"a\.mp4: can't be written \(4 of 9 pictures arrived\)", write_video, tmp_path / "a.mp4", NOISE, 8)
    assert not (tmp_path / "a.mp4").exists()


def test_long_names_are_written_where_a_disk_takes_them_and_refused_before_any_work_where_not(tmp_path):
    for name in ("a" * 251 + ".mp4", "é" * 125 + ".mp4", "b" * 240 + ".mp4"):
        write_text(tmp_path / name, "x")
        assert (tmp_path / name).read_text() == "x\n"
    for name in ("a" * 252 + ".mp4", "é" * 126 + ".mp4", "a\0b.mp4"):
        refused(r"--out .*: can't be the name of a file", output_path, str(tmp_path / name), ".mp4")


def test_what_a_killed_run_left_is_removed_when_the_file_is_made_again(tmp_path):
    job = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    with atomic(tmp_path / "a.mp4") as own:
        own.write_bytes(b"new")
        mark = own.name.partition("-")[2]
        gone, other = tmp_path / f".tmp{job.stdout.strip()}-{mark}", tmp_path / f".tmp{os.getppid()}-{mark}"
        stranger = tmp_path / ".tmp1-00000000.mp4"
        for file in (gone, other, stranger):
            file.write_bytes(b"half")
    with atomic(tmp_path / "a.mp4") as own:
        own.write_bytes(b"newer")
    assert not gone.exists() and other.exists() and stranger.exists()  # a living process keeps its own
    assert (tmp_path / "a.mp4").read_bytes() == b"newer"


PLAIN = ("-f", "lavfi", "-i", "testsrc=s=96x64:r=30:d=3")
STAMPED = ("-fps_mode", "passthrough", "-enc_time_base", "1/90000", "-video_track_timescale", "90000")
ODD_VIDEOS = {
    "variable rate": (*PLAIN, "-vf", "settb=1/90000,setpts='if(lt(N,9),N*1500,9*1500+(N-9)*6000)'", *STAMPED),
    "a gap amid it": (*PLAIN, "-vf", "settb=1/90000,setpts='N*3000+gte(N,20)*90000'", *STAMPED),
    "sound that begins early": ("-itsoffset", "0.02", *PLAIN, "-f", "lavfi", "-i", "sine=d=3", "-c:a", "aac"),
    "turned": ("-display_rotation", "90", *PLAIN),
    "constant rate": PLAIN,
}


@pytest.mark.parametrize("kind", ODD_VIDEOS)
def test_frame_k_is_the_kth_picture(kind, tmp_path, capfd):
    path = encode(tmp_path / "x.mp4", *ODD_VIDEOS[kind])
    frames = list(read_video(path))
    assert len(frames) == pictures_in(path) == 90
    assert capfd.readouterr() == ("", "")  # no library talks
    assert frames[0].shape == ((96, 64, 3) if kind == "turned" else (64, 96, 3))
    assert not np.array_equal(frames[0], frames[31])


def test_a_clip_cut_by_stream_copy_has_the_pictures_it_shows(tmp_path):
    whole = encode(tmp_path / "whole.mp4", *PLAIN, "-g", "30", "-bf", "2")
    for start in ("0.3", "0.7", "1.1"):
        cut = encode(tmp_path / "cut.mp4", "-ss", start, "-i", str(whole), "-c", "copy")
        assert len(list(read_video(cut))) == pictures_in(cut)


@pytest.mark.parametrize("aspect, turn, shape", [("2", (), (96, 144)), ("16/15", (), (96, 77)), ("1/2", (), (96, 36)),
                                                 ("2", ("-display_rotation", "90"), (72, 48))])  # fmt: skip
def test_pixels_that_are_not_square_are_stretched_as_players_do(aspect, turn, shape, tmp_path):
    half = "color=white:s=36x96:d=0.2,pad=72:96:0:0,setsar=" + aspect  # its left half is white
    path = encode(tmp_path / "x.mp4", "-f", "lavfi", "-i", half, "-crf", "1")
    path = encode(tmp_path / "y.mp4", *turn, "-i", path, "-c", "copy")
    frame = next(read_video(path))
    assert frame.shape == (*shape, 3)
    assert abs((frame[..., 0] > 128).mean() - 0.5) < 0.02


@pytest.mark.parametrize("transfer", ["smpte2084", "arib-std-b67"])
def test_hdr_is_refused_by_name(transfer, tmp_path):
    path = encode(tmp_path / "hdr.mp4", "-f", "lavfi", "-i", "color=red:s=64x64:d=0.2", "-vf",
                  f"format=yuv420p10le,setparams=color_trc={transfer}:color_primaries=bt2020:colorspace=bt2020nc",
                  "-c:v", "libx265", "-x265-params", "log-level=none")  # fmt: skip
    with pytest.raises(ValueError, match=rf"is HDR \({transfer}\); convert it to SDR first"):
        list(read_video(path))


@pytest.mark.parametrize("size", [(64, 96), (720, 1280), (576, 720)])
def test_colours_written_are_tagged_and_read_back(size, tmp_path):
    for color in ((255, 0, 0), (40, 160, 60), (20, 60, 200)):
        write_video(tmp_path / "x.mp4", np.full((2, *size, 3), color, np.uint8), 8)
        said = subprocess.run([FFMPEG, "-hide_banner", "-i", tmp_path / "x.mp4"], capture_output=True, text=True).stderr
        assert "yuv420p(tv, bt709" in said
        assert np.abs(next(read_video(tmp_path / "x.mp4")).astype(int) - color).max() <= 4


@pytest.mark.parametrize("height, taken", [(64, "smpte170m"), (720, "bt709")])
def test_colours_are_read_by_their_tag_or_as_players_take_them(height, taken, tmp_path):
    """Of a video of (40, 160, 60)."""
    for matrix, tag in (*((tag, tag) for tag in ("bt709", "smpte170m", "bt470bg")), (taken, "unknown")):
        source = f"color=0x28a03c:s=96x{height}:d=0.2,format=gbrp"
        made = f"format=gbrp,scale=out_color_matrix={matrix},format=yuv420p,setparams=colorspace={tag}"
        path = encode(tmp_path / "x.mp4", "-f", "lavfi", "-i", source, "-vf", made, "-crf", "1")
        assert np.abs(next(read_video(path)).astype(int) - (40, 160, 60)).max() <= 4


@pytest.mark.parametrize("suffix, values", [
    ("png", GREY.astype(np.uint16) * 257), ("tiff", GREY.astype(np.uint16) * 257),
    ("tiff", (GREY / 255).astype(np.float32)), ("tiff", GREY.astype(np.float32)),
    ("tiff", GREY.astype(np.int32) * 257), ("tiff", np.full((8, 8), np.nan, np.float32)),
], ids=["png of 16 bits", "tiff of 16 bits", "floats to 1", "floats to 255", "tiff of 32 bits", "NaN"])  # fmt: skip
def test_deep_grey_keeps_its_shades_and_no_numbers_are_refused(suffix, values, tmp_path):
    Image.fromarray(values).save(tmp_path / f"x.{suffix}")
    if np.isfinite(values).all():
        assert np.abs(read_picture(tmp_path / f"x.{suffix}").astype(int) - GREY[..., None]).max() <= 1
    else:
        with pytest.raises(media.BROKEN, match="no numbers"):
            read_picture(tmp_path / f"x.{suffix}")


@pytest.mark.parametrize("mode, suffix", [("RGBA", "png"), ("LA", "png"), ("P", "png"), ("RGBA", "webp")])
def test_what_is_transparent_shows_white(mode, suffix, tmp_path):
    rgba, path = np.full((8, 8, 4), (10, 200, 30, 255), np.uint8), tmp_path / f"x.{suffix}"
    rgba[:, :4, 3] = 0
    picture = Image.fromarray(rgba)
    (picture.quantize() if mode == "P" else picture.convert(mode)).save(path, lossless=True)
    got = read_picture(path)
    assert (got[:, :4] == 255).all() and np.ptp(got[:, 4:].reshape(-1, 3), axis=0).max() == 0 and got[0, 7].max() < 255


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
EXCHANGED = SRGB.replace(b"rXYZ", b"?XYZ").replace(b"bXYZ", b"rXYZ").replace(b"?XYZ", b"bXYZ")  # what is red is blue
PINK = (200, 40, 90)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
@pytest.mark.parametrize("color, profile, wanted", [
    (PINK, EXCHANGED, PINK[::-1]), ((*PINK, 255), EXCHANGED, PINK[::-1]), (PINK, SRGB, PINK), (PINK, b"garbled", PINK),
    (120, b"garbled", (120, 120, 120)), (120, SRGB, (120, 120, 120)),
])  # fmt: skip
def test_colours_are_as_the_profile_says_unless_it_is_garbled(color, profile, wanted, suffix, tmp_path):
    mode = "L" if color == 120 else "RGBA"[: len(color)]
    Image.new(mode, (8, 8), color).save(tmp_path / f"x.{suffix}", icc_profile=profile)
    assert np.abs(read_picture(tmp_path / f"x.{suffix}")[0, 0].astype(int) - wanted).max() <= 2


DISC = (np.hypot(*(np.mgrid[:96, :96] - 47.5)) < 30).astype(np.uint8)
PAINTED = Image.fromarray(DISC * 255)
MASKS = {
    "black is 3": Image.fromarray(np.where(DISC, 255, 3).astype(np.uint8)),
    "grey on black": Image.fromarray(DISC * 90),
    "soft edges": PAINTED.filter(ImageFilter.GaussianBlur(3)),
    "colour on nearly black": Image.fromarray(np.where(DISC[..., None], (20, 90, 250), 2).astype(np.uint8)),
    "a label": Image.fromarray(DISC),
    "16 bits": Image.fromarray(DISC.astype(np.uint16) * 40_000),
    "16 bits, a label": Image.fromarray(DISC.astype(np.uint16)),
    "one bit": PAINTED.convert("1"),
    "alpha": Image.merge("RGBA", [Image.new("L", (96, 96), 0)] * 3 + [PAINTED]),
    "opaque alpha": PAINTED.convert("RGBA"),
    "palette": Image.fromarray(np.where(DISC[..., None], (128, 0, 0), 0).astype(np.uint8)).quantize(2),
}


@pytest.mark.parametrize("kind", [*MASKS, 30, 60, 90])
def test_masks_as_programs_write_them(kind, tmp_path):
    """Of every mode, and in lossy files of these qualities."""
    lossy = kind not in MASKS
    for suffix in ("webp", "jpg") if lossy else ("png", "tiff"):
        MASKS.get(kind, PAINTED).save(tmp_path / f"m.{suffix}", **{"quality": kind} if lossy else {})
        got, disc = read_mask(tmp_path / f"m.{suffix}"), DISC.astype(bool)
        assert (got & disc).sum() / (got | disc).sum() > 0.95


def test_weights_that_are_no_numbers_are_refused(tmp_path):
    for value in (float("nan"), float("inf"), -float("inf")):
        weights = {"weight": torch.tensor([[1.0, value]]), "bias": torch.zeros(1)}
        safetensors.torch.save_file(weights, tmp_path / "w.safetensors")
        torch.save(weights, tmp_path / "w.pt")
        for path, tensors in ((tmp_path / "w.safetensors", read_safetensors(tmp_path / "w.safetensors")[1]),
                              (tmp_path / "w.pt", read_checkpoint(tmp_path / "w.pt"))):  # fmt: skip
            with pytest.raises(UserError, match=rf"{path.name}: weight holds values that are no finite numbers"):
                load(lambda: torch.nn.Linear(2, 1), tensors, path)


def test_a_byte_order_mark_is_no_letter(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa disc")
    (tmp_path / "t.csv").write_bytes("path,num_frames,text\na.mp4,9,a disc\n".encode("utf-8-sig"))
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbf1 2\n3 4\n")
    (tmp_path / "b.json").write_bytes(b'\xef\xbb\xbf{"objects": [{"boxes": {"0": [1, 1, 9, 9]}}]}')
    assert prepare_clips.find_clips(tmp_path)[0].caption == "a disc"
    assert prepare_clips.find_clips(tmp_path / "t.csv")[0].caption == "a disc"
    assert convert.read_points(tmp_path / "p.txt")[0].tolist() == [[[1, 2]], [[3, 4]]]
    assert load_trajectory(tmp_path / "b.json", (16, 16), 2).boxes[0, 0].tolist() == [1, 1, 9, 9]


def test_every_file_of_a_folder_is_read_or_listed(tmp_path):
    clip = encode(tmp_path / "a.mp4", "-f", "lavfi", "-i", "testsrc=s=48x48:r=8:d=2").read_bytes()
    for name in ("a.mp4", "IMG_0001.MP4", "b.MOV", "c.mkv", "d.avi", "e.WebM"):
        path = tmp_path / name
        path.write_bytes(clip)
        path.with_suffix(".txt").write_text("a disc")
        path.with_suffix(".json").write_text('{"objects": [{"boxes": {"0": [4, 4, 20, 20]}}]}')
    for name in ("notes.md", "lonely.txt", "x.jpg"):
        (tmp_path / name).write_text("x")
    clips, listed = prepare_clips.find_clips(tmp_path), []
    for one in clips:
        try:
            prepare_clips.read_clip(one, prepare_clips.Config(size="48x48"), ToyCodec())
        except UserError as error:
            listed.append((one.video.name, str(error)))
    assert len(clips) == 9 and {name for name, _ in listed} == {"notes.md", "lonely.txt", "x.jpg"}
    assert all(why.startswith("no video; read are .avi") for _, why in listed)


READERS = {  # of files that a clone without their content holds as pointers
    "g.safetensors": read_safetensors, "g.pt": read_checkpoint, "c.json": read_config, "x.png": load_image,
    "m.webp": read_mask, "v.mp4": lambda path: next(read_video(path)), "t.npy": convert.read_points,
    "t.txt": convert.read_points, "b.json": lambda path: load_trajectory(path, (8, 8), 1),
    "maps/0.png": lambda path: load_trajectory(path.parent, (8, 8), 1), "s.csv": read_table,
    "a.txt": prepare_clips.read_caption, "clip.mov": lambda path: prepare_clips.read_clip(
        prepare_clips.Clip(path, "a cat", path), prepare_clips.Config(), ToyCodec()),
    "fast_generator.safetensors": lambda path: find_generator(path.parent, "fast"),
    "lora.safetensors": lambda path: merge({}, f"{path}:0.5"),
    "i.pt": lambda path: file_errors(path, "").__enter__(),
}  # fmt: skip

KEY = f"annex/objects/SHA256E-s9--{7:064d}.bin"
POINTERS = {  # what stands in the file, or what the link names; and how to get the file
    "git-lfs": (f"version https://git-lfs.github.com/spec/v1\noid sha256:{7:064d}\nsize 9\n", "", "git lfs pull"),
    "git-annex": (f"/{KEY}\n", "", "git annex get"),
    "git-annex, no links": (f"../.git/{KEY}", "", "git annex get"),
    "git-annex, a link": ("", f"../.git/annex/objects/Zx/9q/k/{KEY}", "git annex get"),
    "git-annex, a link in a submodule": ("", f"../../.git/modules/a/{KEY}", "git annex get"),
}


@pytest.mark.parametrize("name", READERS)
def test_a_pointer_in_place_of_a_file_is_known_as_one(name, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    for kind, (text, link, get) in POINTERS.items():
        path.unlink(missing_ok=True)
        path.symlink_to(link) if link else path.write_text(text)
        tool = kind.partition(",")[0]
        refused(rf"{name}: is a pointer of {tool}, not the file itself; run {get} in its", READERS[name], path)


def test_a_file_that_git_annex_holds_is_read_and_other_links_are_not_taken_for_its(tmp_path):
    (tmp_path / ".git/annex/objects").mkdir(parents=True)
    (tmp_path / ".git/annex/objects/k.json").write_text("{}")
    (tmp_path / "c.json").symlink_to(".git/annex/objects/k.json")
    assert read_config(tmp_path / "c.json") == {}
    (tmp_path / "d.json").symlink_to("annex/k.json")
    refused("no such file", read_config, tmp_path / "d.json")


def test_the_rate_of_a_video_is_in_whole_frames_a_second_and_mixed_ones_are_told(tmp_path, capsys):
    for rate, whole in (("30000/1001", 30), ("24000/1001", 24), ("8", 8), ("60", 60)):
        clip = encode(tmp_path / "x.mp4", "-f", "lavfi", "-i", f"testsrc=s=48x48:r={rate}:d=1")
        assert media.frame_rate(media.describe(clip)[0]) == whole
    for shard, rates in enumerate(([24, 24, 60], [24])):
        header = {"made_of": json.dumps({n: {"path": "", "scale": 1.0, "rate": rate} for n, rate in enumerate(rates)})}
        for kind in ("latents", "text"):
            write_safetensors(tmp_path / f"{kind}-{shard:05}.safetensors", {"0.video": torch.zeros(1)}, header)
    prepare_clips.report(tmp_path, {"clips": 17})
    assert "frame rates are mixed: 24 a second in 3 clips, 60 a second in 1 clips" in capsys.readouterr().err
    write_safetensors(tmp_path / "latents-00000.safetensors", {"0.video": torch.zeros(1)}, header)
    prepare_clips.report(tmp_path, {"clips": 17})
    assert capsys.readouterr().err == ""


def test_a_box_at_the_picture_s_edge_crosses_nothing_though_fitting_the_shape_cuts_a_little(tmp_path, capsys):
    for box, said in (([0, 0, 240, 192], ""), ([0, 0, 240.5, 192], "crosses"), ([-1, 20, 40, 60], "crosses")):
        load_boxes(tmp_path, {"0": box}, size=(152, 184), source=(192, 240))
        assert bool(capsys.readouterr().err) == bool(said), box
    load_boxes(tmp_path, {"0": [0, 0, 99, 199]}, size=(704, 1280), source=(480, 640))
    assert "boxes cross the video's edge and are cut there" in capsys.readouterr().err  # a wide video cuts much


@pytest.mark.parametrize("box", [[-10, 4, 10, 20], [40, 30, 60, 70], [4, -3.5, 20, 12]])
def test_a_box_that_crosses_the_edge_is_cut_there_with_a_note(box, tmp_path, capsys):
    maps = load_boxes(tmp_path, {"0": [4, 4, 20, 20], "8": box}, name="cat").maps("box")
    note = capsys.readouterr().err
    assert note.count("\n") == 1 and "boxes cross the video's edge and are cut there: cat in frame 8" in note
    ys, xs = np.nonzero((maps[:, 8] > -1).any(0).numpy())
    corners = np.floor(np.add(box, 0.5)).astype(int)
    inside = np.clip(np.add(corners, [0, 0, 1, 1]), 0, 48).tolist()  # an outline ends on its second corner
    assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == tuple(inside)


@pytest.mark.parametrize("size, problem", [
    ((48, 64), "48x64 is of the picture turned by 90 degrees; the picture is 64x48"),
    ((97, 128), "97x128 is of the picture turned by 90 degrees"),
    ((64, 64), "64x64 is of another shape; the picture is 64x48; give boxes or maps in its shape"), ((96, 128), None),
    ((90, 90), "90x90 is of another shape"), ((200, 100), None), ((47, 63), None),  # the video has the first's
])  # fmt: skip
@pytest.mark.parametrize("kind", ["boxes", "maps"])
def test_a_frame_of_the_unturned_picture_is_refused(kind, size, problem, tmp_path):
    """The picture is 48 high and 64 wide, the video 60 and 30. A size is (height, width); messages say width first."""
    height, width = size if problem is None else size[::-1]
    path, (x0, y0, x1, y1) = tmp_path / kind, np.array([0.4, 0.4, 0.6, 0.6]) * [width, height, width, height]
    if kind == "boxes":
        path.write_text(json.dumps({"width": width, "height": height, "objects": [{"boxes": {"0": [x0, y0, x1, y1]}}]}))
    else:
        picture = np.zeros((height, width, 3), np.uint8)
        picture[int(y0) : int(y1), int(x0) : int(x1)] = 128, 32, 32
        write_image(path / "0.png", picture)
    with pytest.raises(UserError, match=problem) if problem else nullcontext():
        assert load_trajectory(path, (60, 30), 1, (48, 64)).masks.any()


def test_a_picture_that_is_turned_and_an_animation_say_so(tmp_path, capsys):
    """By 180 degrees, or if it is square, no shape tells that boxes are of the stored one."""
    exif = Image.Exif()
    for orientation in (1, 3, 5, 6):
        exif[0x0112] = orientation
        Image.new("RGB", (16, 16)).save(tmp_path / "x.jpg", exif=exif)
        load_image(tmp_path / "x.jpg")
        said = f"{tmp_path}/x.jpg: is turned as its EXIF says; boxes and masks are of the turned picture\n"
        assert capsys.readouterr().err == ("" if orientation == 1 else said)
    first, *rest = (Image.fromarray(np.full((16, 16, 3), value, np.uint8)) for value in (0, 120, 250))
    for suffix in ("gif", "png", "webp", "tiff", "jpg"):
        path, moves = tmp_path / f"y.{suffix}", suffix != "jpg"
        first.save(path, **({"save_all": True, "append_images": rest} if moves else {}))
        assert load_image(str(path)).max() < 9  # the first
        assert capsys.readouterr().err == (f"{path}: holds 3 pictures; the first is taken\n" if moves else "")


@pytest.mark.parametrize("names, gap", [
    ("000 001 003", 2), ("annotated_frame_00000 annotated_frame_00002 annotated_frame_00003", 1), ("f9 f10 f12", 11),
    ("0 5 10", None), ("7 8 9", None), ("a b c", None),  # every fifth is fine
])  # fmt: skip
def test_a_folder_of_maps_with_a_gap_is_refused(names, gap, tmp_path):
    drawn = np.zeros((16, 16, 3), np.uint8)
    drawn[4:12, 4:12] = 128, 0, 0
    for name in names.split():
        write_image(tmp_path / f"{name}.png", drawn)
    problem = f"a file is missing: number {gap}; frames are numbered without gaps"
    with pytest.raises(UserError, match=problem) if gap else nullcontext():
        load_trajectory(tmp_path, (16, 16), 3)

"""Folders know what they were made of by content, and whose they are; the machine's failures are not the files'."""

import csv
import errno
import json
import os
import shutil
import time
from pathlib import Path
from unittest.mock import Mock

import imageio_ffmpeg
import numpy as np
import pytest
import safetensors.torch
import torch
import warm
from conftest import refused
from test_prepare_clips import write_plain
from test_runs import new, save

from core import media
from core.config import MachineError
from core.media import read_video, write_video
from core.record import READ, checksum, lock
from core.weights import read_safetensors, write_safetensors
from data import ClipLatents, training_data
from tools import prepare_clips
from tools.prepare_clips import Config
from toy.codec import ToyCodec


def test_a_checksum_sees_what_name_size_and_date_do_not(tmp_path, monkeypatch):
    """A large file's last byte, a mask that a boxes.json names, a file in a folder, two that are swapped."""
    big, mask, boxes = tmp_path / "big.bin", tmp_path / "m/é.png", tmp_path / "boxes.json"
    mask.parent.mkdir()
    boxes.write_text(json.dumps({"objects": [{"mask": "m/é.png"}]}))  # with \u00e9
    big.write_bytes(bytes(40 << 20))
    mask.write_bytes(b"a")
    for seen, file, byte in ((big, big, b"x"), (boxes, mask, b"y"), (tmp_path, mask, b"z")):
        before, dates = checksum(seen), file.stat()
        with file.open("r+b") as opened:
            opened.seek(-1, os.SEEK_END)
            opened.write(byte)
        os.utime(file, ns=(dates.st_atime_ns, dates.st_mtime_ns))
        assert file.stat().st_size == dates.st_size and checksum(seen) != before
    assert checksum(big, mask) != checksum(mask, big) and checksum(tmp_path / "none") != checksum(mask)
    for number in (errno.EIO, errno.EACCES, errno.ESTALE):  # one that the machine can't read is no missing file
        monkeypatch.setattr(Path, "open", Mock(side_effect=OSError(number, "no")))
        with pytest.raises(OSError):
            checksum(boxes)


def test_ffmpeg_is_looked_for_anew_once_a_trial_of_it_was_killed(monkeypatch):
    found = imageio_ffmpeg._utils._get_ffmpeg_exe
    monkeypatch.delenv("IMAGEIO_FFMPEG_EXE", raising=False)
    with monkeypatch.context() as killed:
        killed.setattr("imageio_ffmpeg._utils._is_valid_exe", lambda _: False)
        found.cache_clear()
        with pytest.raises(MachineError, match="ffmpeg: can't be run"):
            media.start_ffmpeg("-version")
    assert b"ffmpeg version" in media.start_ffmpeg("-version").communicate()[0]


def hold(folder: Path, seconds: float) -> warm.Job:
    work = f"lock({str(folder)!r}); print('held', flush=True); time.sleep({seconds})"
    return warm.Job(exec, [f"import time; from core.record import lock; {work}"], folder.parent, 1, 1)


def test_a_folder_is_one_process_s_until_it_is_gone(tmp_path):
    holder = hold(tmp_path / "a", 60)
    while "held" not in holder.read("out"):
        assert holder.poll() is None
        time.sleep(0.02)
    said = rf"a: process {holder.forks[0].pid} on {os.uname().nodename} is at work here; wait"
    refused(said, lock, tmp_path / "a")
    lock(tmp_path / "b")  # another folder is free
    holder.kill()
    lock(tmp_path / "a")
    lock(tmp_path / "a")  # as often as one likes
    assert (tmp_path / "a/.lock").read_text().startswith(f"process {os.getpid()} on ")
    assert f"process {os.getpid()} on" in hold(tmp_path / "a", 0).wait().stderr


def test_a_folder_that_can_not_be_locked_is_used_all_the_same_and_a_full_disk_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/.lock").symlink_to("/dev/full")
    refused(r"/\.lock: can't be written \(.+\); mend that, and run", lock, tmp_path / "full")
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    lock(tmp_path)
    assert "can't be locked (No locks available)" in capsys.readouterr().err


def begin(folder, **files):
    """A run that has opened these files, as they are now."""
    READ.clear()
    for name, value in files.items():
        if value is not None:
            write_safetensors(folder / f"{name}.safetensors", {"w": torch.full((4,), float(value))}, {})
        read_safetensors(folder / f"{name}.safetensors")
    return new(folder / "run")


def test_a_run_goes_on_with_the_files_that_it_began_with_alone(tmp_path):
    run = begin(tmp_path, generator=1, codec=2)
    run.resume()
    save(run, 2)
    assert begin(tmp_path, generator=None, codec=None).resume() == 2
    other = r"ckpt/step_00000002/config\.json: the run began with another .*safetensors"
    for files in ({"generator": 3, "codec": 2}, {"generator": 1, "codec": 3}, {"generator": 2, "codec": 1},
                  {"generator": 1}, {"generator": 1, "codec": 2, "init": 1}):  # fmt: skip
        refused(other, begin(tmp_path, **files).resume)
    codec = r"began with another .*/codec\.safetensors; bring that back, or give the run"
    refused(codec, begin(tmp_path, generator=1, codec=7).resume)
    assert begin(tmp_path, moved=1, codec=2).resume() == 2  # known by content
    (tmp_path / "run").rename(tmp_path / "other")  # a checkpoint of another run, whatever lies beside it
    begin(tmp_path, generator=2).resume()
    shutil.copytree(tmp_path / "other/ckpt", tmp_path / "run/ckpt")
    refused("began with another", begin(tmp_path, generator=2).resume)
    (tmp_path / "run/config.json").unlink()
    refused("began with another", begin(tmp_path, generator=2).resume)


SHARD = "out/latents-00000.safetensors"


@pytest.fixture(scope="module")
def set_of_five(tmp_path_factory):
    root = tmp_path_factory.mktemp("clips")
    for i in range(5):
        video = np.full((9, 48, 48, 3), 40 + 30 * i, np.uint8)
        write_plain(root, f"c{i}", {"0": [4, 4, 16 + i, 16]}, video, f"square {i}")
    prepare_clips.main(Config(source=str(root), out=str(root / "out"), size="48x48"))
    return root


@pytest.fixture
def five(set_of_five, tmp_path):
    shutil.copytree(set_of_five, tmp_path / "clips")
    return tmp_path / "clips"


def prepare(five, **more):
    prepare_clips.main(Config(**{"source": str(five), "out": str(five / "out"), "size": "48x48"} | more))


def rejected(five) -> dict[str, str]:
    with (five / "out/rejected.csv").open(newline="") as file:
        return {Path(row["path"]).name: row["reason"] for row in csv.DictReader(file)}


def test_training_refuses_shards_that_do_not_belong_together(five):
    """A vanished one, one twice, one of a set with the same captions; and a tensor changed under its header."""
    out = five / "out"
    training_data(str(out), ToyCodec(), 0, 2)
    latents = out / "latents-00000.safetensors"
    kept = latents.read_bytes()
    shutil.copy(latents, out / "latents-00001.safetensors")
    refused(r"latents-00001.safetensors: isn't the file that was prepared", ClipLatents, out, 32)
    (out / "latents-00001.safetensors").unlink()
    boxes = json.loads((five / "c2.json").read_text())
    boxes["objects"][0]["boxes"]["0"] = [20, 20, 40, 40]
    (five / "c2.json").write_text(json.dumps(boxes))
    prepare(five, out=str(five / "out2"))
    shutil.copy(five / "out2/latents-00000.safetensors", latents)
    refused(r"latents-00000.safetensors: isn't", ClipLatents, out, 32)
    latents.write_bytes(kept)
    data = ClipLatents(out, 32)
    latents.write_bytes(kept[:-2] + b"\x7f\x7f")
    refused("isn't what was written there", lambda: [data.latents[name].read() for name in data.latents])


def test_what_a_clip_is_made_of_is_compared_by_content(five, tmp_path):
    def redraw():  # as long as before, and as old
        dates = (five / "c1.json").stat()
        (five / "c1.json").write_text((five / "c1.json").read_text().replace("[4, 4,", "[9, 4,"))
        os.utime(five / "c1.json", ns=(dates.st_atime_ns, dates.st_mtime_ns))

    def film():
        write_video(five / "c1.mp4", np.full((9, 48, 48, 3), 41, np.uint8), 8)

    for change in (redraw, film, lambda: (five / "c1.txt").write_text("square 7")):
        change()
        refused(r"c1\.mp4, its caption, boxes or maps are not those that .*00000.* delete", prepare, five)
        refused("no finished shards", ClipLatents, five / "out", 32)
        (five / SHARD).unlink()
        prepare(five)
        assert len(ClipLatents(five / "out", 32).latents) == 10


def test_shards_of_another_codec_are_refused(five, tmp_path, monkeypatch):
    tensors, path = safetensors.torch.load_file(ToyCodec.weights), tmp_path / "codec.safetensors"
    header = read_safetensors(ToyCodec.weights)[0]
    safetensors.torch.save_file({name: t * 1.01 for name, t in tensors.items()}, path, header)
    again = r"was prepared with another codec\.safetensors; bring that back"
    refused(again, training_data, str(five / "out"), ToyCodec(path), 0, 2)
    monkeypatch.setattr(prepare_clips, "open_codec", lambda *_: ToyCodec(path))
    refused(r"shards of other clips lie here \(codec ", prepare, five)


def test_shards_go_on_with_the_same_clips_and_maps_alone(five):
    (five / "._c1.mp4").write_bytes(b"what macOS leaves on other disks")
    prepare(five)
    assert (five / "out/rejected.csv").read_text() == "path,reason\n"
    assert json.loads((five / "out/config.json").read_text())["maps"] == "pixels"
    refused(r"shards of other clips lie here \(maps pixels\); give another --out", prepare, five, maps="outline")
    for suffix in (".mp4", ".txt", ".json"):
        (five / f"c4{suffix}").rename(five / f"a{suffix}")
    refused(r"/a\.mp4, its caption, boxes or maps are not those .*; delete that file", prepare, five)
    (five / "out/config.json").write_text("{")
    refused(r"config\.json: not JSON", prepare, five)


def test_a_moved_set_is_the_same_set_and_two_of_one_name_are_refused(five, tmp_path):
    (tmp_path / "clips").rename(tmp_path / "elsewhere")
    five = tmp_path / "elsewhere"
    prepare(five)
    shutil.copy(five / "c1.mp4", five / "c1.mov")
    refused(r"two videos are called .*c1, and would share what goes with them", prepare, five)
    table = five / "x.csv"
    table.write_text("path,num_frames,text\nv/a.mp4,9,b\nv/a.webm,9,c\n")
    refused("two videos are called v/a", prepare, five, source=str(table))
    (five / "masks/cats/a").mkdir(parents=True)
    table.write_text("path,num_frames,text\nv/cats/a.mp4,9,b\nv/dogs/a.mp4,9,c\nv/b.mp4,9,d\n")
    names = [str(clip.masks.relative_to(five)) for clip in prepare_clips.find_clips(table)]
    assert names == ["masks/cats/a", "masks/dogs/a", "masks/b"]


def wrap(tmp_path, monkeypatch, text):
    """An ffmpeg that does something else first: `text`, in sh, with the true one's name in $true."""
    script = tmp_path / "ffmpeg"
    script.write_text(f"#!/bin/sh\ntrue={imageio_ffmpeg.get_ffmpeg_exe()}\n{text}\n")
    script.chmod(0o755)
    monkeypatch.setattr(media.imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(script))
    monkeypatch.setattr(media, "ffmpeg_version", media.ffmpeg_version.__wrapped__)  # asked anew each time


AS_EVER = ';; *) exec $true "$@";; esac'
DECODES = 'case "$*" in *image2pipe*) '
FAILS = {
    "killed at once": ("kill -9 $$", r"is no ffmpeg that can be used \(status -9\)"),
    "killed amid a picture": (DECODES + '$true "$@" | head -c 9000; kill -9 $$' + AS_EVER, "ended by signal 9"),
    "killed, as a shell tells": (DECODES + "exit 137" + AS_EVER, "ended by signal 9"),
    "no memory": (DECODES + "echo 'x: Cannot allocate memory' >&2; exit 244" + AS_EVER, "Cannot allocate memory"),
    "stopped": (DECODES + "echo 'Exiting normally, received signal 15.' >&2; exit 255" + AS_EVER, "received signal"),
    "lacks a library": ("echo 'error while loading shared libraries: libx.so' >&2; exit 127", r"libx\.so"),
    "too old": ("echo ffmpeg version 5.0.1", r"5\.0\.1"),
}


def test_a_machine_that_fails_rejects_no_clip(five, tmp_path, monkeypatch):
    true, shard = Path.open, five / SHARD

    def fail(path, *more, **options):
        if path.name in ("c3.mp4", "c3.txt"):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return true(path, *more, **options)

    shard.unlink()
    for says, why in FAILS.values():
        with monkeypatch.context() as patch:
            wrap(tmp_path, patch, says)
            assert "ffmpeg" in refused(why, prepare, five) and not shard.exists()
    with monkeypatch.context() as patch:  # a disk that fails
        patch.setattr(Path, "open", fail)
        with pytest.raises(OSError, match=r"Input/output error.*c3\.txt"):
            prepare(five)
    prepare(five)
    assert rejected(five) == {}


def test_a_rejected_clip_is_read_again_when_its_file_or_the_program_has_changed(five, monkeypatch):
    whole = (five / "c3.mp4").read_bytes()
    (five / "c3.mp4").write_bytes(whole[:-400])
    (five / "c4.txt").unlink()
    (five / SHARD).unlink()
    prepare(five)
    assert rejected(five)["c4.mp4"] == "no caption, or none in UTF-8"
    assert "decoded: " in rejected(five)["c3.mp4"] and len(rejected(five)["c3.mp4"]) > 40  # ffmpeg's own words
    reads, true = [], prepare_clips.read_clip
    monkeypatch.setattr(prepare_clips, "read_clip", lambda clip, *_: reads.append(clip.video.name) or true(clip, *_))
    prepare(five)
    assert reads == []
    monkeypatch.setattr(prepare_clips, "this_program", lambda: "newer")
    prepare(five)
    assert reads == ["c3.mp4", "c4.mp4"] and len(rejected(five)) == 2
    before = safetensors.torch.load_file(five / SHARD)
    (five / "c3.mp4").write_bytes(whole)
    (five / "c4.txt").write_text("mended")
    prepare(five)
    assert rejected(five) == {} and reads[2:] == ["c3.mp4", "c4.mp4"]
    after = safetensors.torch.load_file(five / SHARD)
    assert len(before) == 6 and len(after) == 10 and all(torch.equal(after[name], t) for name, t in before.items())
    text = ClipLatents(five / "out", 32).text("4")
    assert torch.equal(text, ToyCodec().encode_text(["mended"])[0].bfloat16().float())


def test_a_decoder_that_says_much_does_not_stand_still(tmp_path, monkeypatch):
    write_video(tmp_path / "v.mp4", np.full((9, 48, 48, 3), 90, np.uint8), 8)
    noise = f'{DECODES} head -c 300000 /dev/zero >&2;; esac; exec $true "$@"'
    wrap(tmp_path, monkeypatch, noise)
    began = time.monotonic()
    assert len(list(read_video(tmp_path / "v.mp4"))) == 9 and time.monotonic() - began < 30
    first = next(read_video(tmp_path / "v.mp4"))  # the rest is not wanted
    assert first.shape == (48, 48, 3)

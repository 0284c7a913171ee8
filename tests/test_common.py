"""The plumbing: flags, sharing of work, noise, schedule, averages, files."""

import dataclasses
from typing import Literal

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import distill_fast
import finetune_hybrid
import sample
import train_slow_adapter
from core.config import UserError, help_text, parse_config
from core.files import atomic, output_path
from core.media import contact_sheet, to_uint8, write_video
from core.noise import sample_noise, sample_uniform


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of a script that is none."""

    lr: float = 1e-3  # the rate
    steps: int = 10  # how many
    flag: bool = False  # on or off
    name: str = "x"  # a word
    kind: Literal["a", "b"] = "a"  # one of two


def test_flags():
    assert parse_config(Options, []) == Options()
    parsed = parse_config(Options, ["--lr", "1e-4", "--flag", "true", "--steps=3", "--kind", "b"])
    assert parsed == Options(lr=1e-4, flag=True, steps=3, kind="b")


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--foo", "1"], "unknown flag --foo; the flags are --lr, --steps, --flag, --name, --kind"),
        (["lr", "1"], "unknown flag lr"),
        (["--lr"], r"--lr needs a value \(float\)"),
        (["--lr", "fast"], "--lr fast: not a valid value; it takes float"),
        (["--lr", "nan"], "--lr nan: not a valid value"),
        (["--steps", "1.5"], "--steps 1.5: not a valid value; it takes int"),
        (["--flag", "yes"], r"--flag yes: not a valid value; it takes true\|false"),
        (["--kind", "c"], r"--kind c: not a valid value; it takes a\|b"),
    ],
)
def test_bad_flags(argv, message):
    with pytest.raises(UserError, match=message):
        parse_config(Options, argv)


@pytest.mark.parametrize("script", [sample, clips, train_slow_adapter, distill_fast, finetune_hybrid])
def test_a_preset_has_its_own_defaults_and_flags_go_before_them(script):
    presets = {"wan5b": script.WAN5B}
    assert parse_config(script.Config, [], presets) == script.Config()
    wan = parse_config(script.Config, ["--preset", "wan5b", "--seed", "7"], presets)
    assert wan == dataclasses.replace(script.Config(), preset="wan5b", seed=7, **script.WAN5B)
    name, value = next(iter(script.WAN5B.items()))
    lines = help_text(script.Config, presets).splitlines()
    assert f"  --{name} {value}" in lines[lines.index("defaults with --preset wan5b:") :]
    asked = parse_config(script.Config, [f"--{name}", str(value), "--preset=wan5b"], presets)
    assert getattr(asked, name) == value


def test_help_prints_every_field_with_default_and_comment(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_config(train_slow_adapter.Config, ["--help"])
    assert caught.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  --lr float (default 0.006): peak learning rate of the matrices" in lines
    assert "  --compile true|false (default true): torch.compile each block" in lines
    assert sum(line.startswith("  --") for line in lines) == len(dataclasses.fields(train_slow_adapter.Config))


def test_randomness_depends_on_its_key_alone():
    together = sample_noise((3, 2), [5, 9], 0, 7)
    assert torch.equal(together[1:], sample_noise((3, 2), [9], 0, 7))
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(together, sample_noise((3, 2), [5, 9], 0, 8))
    u = sample_uniform(list(range(32, 48)), 16, 0)
    assert torch.equal((u * 16).floor(), torch.arange(16.0))  # stratified
    assert torch.equal(u[4:6], sample_uniform([36, 37], 16, 0))


def test_atomic_leaves_nothing_behind_on_failure(tmp_path):
    with pytest.raises(RuntimeError), atomic(tmp_path / "a" / "x.txt") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert list((tmp_path / "a").iterdir()) == []
    with atomic(tmp_path / "x.txt") as temporary:
        temporary.write_text("whole")
    assert [p.name for p in tmp_path.glob("*.txt")] == ["x.txt"]


def test_pictures(tmp_path):
    video = torch.stack([torch.full((2, 4, 6), v) for v in (-1.0, 0.0, 1.0)])  # [3, T, H, W]
    frames = to_uint8(video, scale=2)
    assert frames.shape == (2, 8, 12, 3) and frames[0, 0, 0].tolist() == [0, 128, 255]
    sheet = contact_sheet([frames, frames], gap=2)
    assert sheet.shape == (20, 28, 3) and sheet[8].min() == 255
    big = np.zeros((5, 96, 96, 3), np.uint8)
    write_video(tmp_path / "v.mp4", big, fps=8)
    assert iio.imread(tmp_path / "v.mp4").shape == big.shape


def test_a_flag_may_be_empty_and_a_folder_is_no_file(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Options:
        text: str = "x"
        seed: int = 0

    assert parse_config(Options, ["--text=", "--seed", "3"]) == Options("", 3)
    assert parse_config(Options, ["--text", "", "--seed=3"]) == Options("", 3)
    with pytest.raises(UserError, match="--seed : not a valid value"):
        parse_config(Options, ["--seed="])
    (tmp_path / "d.mp4").mkdir()
    with pytest.raises(UserError, match=r"d\.mp4: is a folder; give another name"):
        output_path(str(tmp_path / "d.mp4"), ".mp4")

"""Flags: their types, presets and help, what is said of wrong ones, and where shipped files are found."""

import dataclasses
import importlib
import inspect
import re
import shlex
import sys
from pathlib import Path
from typing import Literal
from unittest.mock import Mock

import pytest
from conftest import refused

from core.config import RANGES, ROOT, check_options, flags, parse_config, run_script, shipped


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of a script that is none."""

    lr: float = 1e-3  # the rate, 100% of it
    steps: int = 10  # how many
    flag: bool = False  # on or off
    name: str = "x"  # a word
    kind: Literal["a", "b"] = "a"  # one of two
    long_name: str = ""  # a name of two words


@pytest.mark.parametrize("argv, changed", [
    ("", {}),
    ("--lr 1e-4 --flag true --steps=3 --kind b", {"lr": 1e-4, "flag": True, "steps": 3, "kind": "b"}),
    ("--flag", {"flag": True}),  # a switch alone is on
    ("--flag --steps 3", {"flag": True, "steps": 3}),  # and what follows is no part of it
    ("--flag false", {}),
    ("--long-name a-b_c", {"long_name": "a-b_c"}),  # dash and underscore are one, but in values
    ("--long_name a-b_c", {"long_name": "a-b_c"}),
    ("--long-name=a-b_c", {"long_name": "a-b_c"}),
    ("--lr -0.5 --steps -3", {"lr": -0.5, "steps": -3}),
    ("--lr=-1e-3 --name=-x", {"lr": -1e-3, "name": "-x"}),
    ("--name= --steps 3", {"name": "", "steps": 3}),
    ("--name '' --steps=3", {"name": "", "steps": 3}),
])  # fmt: skip
def test_flags(argv, changed):
    assert parse_config(Options, shlex.split(argv)) == Options(**changed)


@pytest.mark.parametrize("argv, message", [
    ("--foo 1", "^unknown flag --foo; --help lists them all$"),
    ("--stpes 1", r"^unknown flag --stpes; did you mean --steps\? --help lists them all$"),
    ("--long-nam=1", r"^unknown flag --long_nam; did you mean --long_name\? --help lists them all$"),
    ("--step 1", r"^unknown flag --step; did you mean --steps\?"),  # no abbreviation
    ("lr 1", "^unknown flag lr; "),
    ("--lr", "^argument --lr: expected one argument$"),
    ("--lr fast", "^argument --lr: invalid float value: 'fast'$"),
    ("--steps=", r"^argument --steps: .*''"),
    ("--steps 1.5", r"^argument --steps: invalid int value: '1\.5'$"),
    ("--flag yes", r"^argument --flag: invalid choice: 'yes' \(choose from '?true'?, '?false'?\)$"),
    ("--kind c", r"^argument --kind: invalid choice: 'c' \(choose from '?a'?, '?b'?\)$"),
])  # fmt: skip
def test_bad_flags(argv, message):
    refused(message, parse_config, Options, argv.split())


@dataclasses.dataclass(frozen=True)
class Many:
    """Options of a script that takes files."""

    files: tuple[str, ...] = ("one",)  # what to read
    out: str = "o"  # what to write


def test_a_field_may_be_given_without_its_flag_and_hold_many():
    assert parse_config(Many, [], positional="files") == Many()
    assert parse_config(Many, ["a", "b", "--out", "c"], positional="files") == Many(("a", "b"), "c")
    assert parse_config(Many, ["--out", "c", "a"], positional="files") == Many(("a",), "c")
    assert parse_config(Many, ["--files", "a", "b"]) == Many(("a", "b"))
    assert parse_config(Options, ["word", "--steps", "3"], positional="name") == Options(name="word", steps=3)
    assert parse_config(Options, ["--steps", "3"], positional="name") == Options(steps=3)
    assert flags({"files": ("a", "b")}) == "--files a b"


FILES = [f for place in (".", "toy", "tools") for f in (ROOT / place).glob("*.py") if "class Config" in f.read_text()]
CONFIGS = {file.stem: importlib.import_module(".".join(file.relative_to(ROOT).with_suffix("").parts)) for file in FILES}


@pytest.mark.parametrize("script", [script for script in CONFIGS.values() if hasattr(script, "WAN5B")])
def test_a_preset_has_its_own_defaults_and_flags_go_before_them(script):
    presets, usual = {"wan5b": script.WAN5B}, script.Config()
    assert parse_config(script.Config, [], presets) == usual
    wan = parse_config(script.Config, ["--preset", "wan5b", "--weights", "7"], presets)
    assert wan == dataclasses.replace(script.WAN5B, weights="7") and wan.preset == "wan5b"
    own = inspect.get_annotations(script.Config).keys() - {"preset"}
    name = next(name for name in sorted(own - {"weights"}) if getattr(usual, name) != getattr(wan, name))
    asked = parse_config(script.Config, [*flags({name: getattr(wan, name)}).split(), "--preset=wan5b"], presets)
    other = parse_config(script.Config, ["--preset=wan5b", *flags({name: getattr(usual, name)}).split()], presets)
    assert getattr(asked, name) == getattr(wan, name)
    assert getattr(other, name) == getattr(usual, name)  # though it is the default without a preset


# What has no source: where files lie, and what costs memory alone.
UNMARKED = {"preset", "generator", "adapter", "backbone", "weights", "accumulate", "recompute", "save_every", "detail"}
# Numbers that are a machine's, the ablation's, and tools.prepare_clips's.
ELSEWHERE = {"sequence", "seed", "compile", "save_every", "sample_every", "use_gan", "use_diffusion", "sparse"}


@pytest.mark.parametrize("script", CONFIGS.values(), ids=CONFIGS)
def test_help_shows_the_docstring_the_options_as_they_stand_in_the_script_and_the_sources_of_values(script, capsys):
    """Each value of wan5b says where it comes from, and every number that a training depends on has one."""
    argv, presets = (["--weights", "x"], {"wan5b": script.WAN5B}) if hasattr(script, "WAN5B") else ([], {})
    with pytest.raises(SystemExit) as caught:
        parse_config(script.Config, [*argv, "--help"], presets)
    page, source = capsys.readouterr().out, Path(script.__file__).read_text().splitlines()
    assert caught.value.code == 0 and page.startswith(script.__doc__.strip())
    for name in inspect.get_annotations(script.Config):
        assert re.search(rf"^    {name}: .*  # .", page, re.MULTILINE), name
    lines = page.partition("WAN5B = replace(\n    Config(),\n")[2].removesuffix("\n)\n").splitlines()
    values = {line.partition("=")[0].strip(): line.partition("# ")[2] for line in lines}
    if presets:
        new = [line for line in page.splitlines()[1:] if line not in source]
        assert new == ["Options: `--name value` sets a field of"] and "preset" in values
    for name, comment in values.items():
        assert name in UNMARKED or re.fullmatch(r"\(.*(paper|Turbo|Wan|guess).*\)", comment), name
    if script.__name__ in ("train_slow_adapter", "distill_fast", "finetune_hybrid"):
        numbers = {field.name for field in dataclasses.fields(script.Config) if isinstance(field.default, int | float)}
        assert numbers - ELSEWHERE <= values.keys()


def test_what_is_typed_is_what_is_shown_and_what_a_class_inherits_is_no_flag():
    changed = {"lr": 1e-4, "flag": True, "name": "y"}
    assert flags(changed) == "--lr 0.0001 --flag true --name y"
    assert parse_config(Options, flags(changed).split()) == Options(**changed)

    @dataclasses.dataclass(frozen=True)
    class Forked(Options):
        my_weight: float = 0.5

    assert parse_config(Forked, ["--my-weight", "0.7"]) == Forked(my_weight=0.7)
    refused("^unknown flag --lr; ", parse_config, Forked, ["--lr", "1"])


def test_a_command_that_is_interrupted_says_so_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x.py"])
    with pytest.raises(SystemExit) as caught:
        run_script(Mock(side_effect=KeyboardInterrupt), Options)
    assert caught.value.code == 130 and capsys.readouterr().err == "x.py: stopped\n"


def test_shipped_files_are_found_from_any_folder(tmp_path, monkeypatch):
    """By name where the user stands in the project, else by their whole path: no links are needed."""
    monkeypatch.chdir(ROOT)
    assert shipped("examples/balloons.json") == "examples/balloons.json"
    monkeypatch.chdir(tmp_path)
    assert shipped("examples/balloons.json") == str(ROOT / "examples/balloons.json")


def test_every_number_of_every_script_has_a_range_that_holds_its_values():
    assert len(CONFIGS) == 14
    for script, module in CONFIGS.items():
        for config in filter(None, (module.Config(), getattr(module, "WAN5B", None))):
            check_options(config)
            numbers = {n for n, v in vars(config).items() if isinstance(v, int | float) and not isinstance(v, bool)}
            assert not {n for n in numbers if n not in RANGES and f"{script}.{n}" not in RANGES}, script
            for name in numbers:
                refused(f"^--{name} -1: ", check_options, dataclasses.replace(config, **{name: -1}))


@pytest.mark.parametrize("script, name, value, within", [
    ("finetune_hybrid", "lr", 0.0, "more than 0"),
    *(("train_slow_adapter", "lr", float(text), "more than 0, and finite") for text in ("nan", "inf", "-inf")),
    ("distill_fast", "clip", 0.0, "more than 0"), ("train_slow_adapter", "shift", 0.0, "more than 0"),
    ("train_slow_adapter", "ema", 1.0, "at least 0, at most 0.999999999"), ("finetune_hybrid", "momentum", 1.0, "at"),
    ("distill_fast", "judge_sigma_max", 1.5, "more than 0, at most 1"), ("sample", "seed", 2**63, "at most"),
    *((script, "steps", 0, "at least 1") for script in ("train_codec", "train_baseline", "distill_fast", "evaluate")),
    *(("train_slow_generator", name, 3.0, "at least 0, at most 1") for name in ("small", "guided", "pure_noise")),
    *(("train_slow_adapter", name, 0, "at least 1") for name in ("batch", "save_every")),
    ("distill_fast", "ratio", 0, "at least 1"), ("bench", "repeats", 0, "at least 1"),
    ("evaluate", "videos", 1, "at least 2"), ("convert", "frames", 0, "at"),
])  # fmt: skip
def test_a_number_out_of_its_range_is_refused(script, name, value, within):
    config = dataclasses.replace(CONFIGS[script].Config(), **{name: value})
    refused(rf"^--{name} {re.escape(str(value))}: .*{within}", check_options, config)
    check_options(dataclasses.replace(CONFIGS["sample"].Config(), steps=0, shift=0.0))  # the sampler's own

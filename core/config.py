"""Options and errors. A script is a frozen dataclass of options and a `main(cfg)`; `run_script` joins them."""

import argparse
import ast
import contextlib
import difflib
import inspect
import os
import re
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from core.memory import shortage

ROOT = Path(__file__).resolve().parent.parent


class UserError(Exception):
    """Something is wrong with the user's input. The message is one line: which file, which field, how to fix it."""


class MachineError(UserError):
    """The trouble is not in a file but in the machine: whoever leaves out files that are broken must let this pass."""


def require(fine: object, problem: str) -> None:
    """UserError that says what the problem is, unless all is fine."""
    if not fine:
        raise UserError(problem)


def warn(text: object) -> None:
    """A line on stderr."""
    print(text, file=sys.stderr)


def reason(error: BaseException) -> str:
    """The first line of a library's error message, or the error's type if it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def shipped(name: str) -> str:
    """Path of a file that comes with this project, from whatever folder the user works in."""
    return name if Path.cwd() == ROOT else str(ROOT / name)


# What takes less memory, by the option that a script has for it.
LESS = {"size": "a smaller --size", "frames": "fewer --frames", "memory": "--memory low",
        "accumulate": "--accumulate 0", "recompute": "--recompute full", "sequence": "a larger --sequence"}  # fmt: skip
MORE, MOST = sys.float_info.min, sys.float_info.max  # than 0; of any finite number
# The least and the most of every number among the options and recipes of all scripts, by name; and by script and name
# where one has another meaning for 0: the sampler's own.
RANGES = (
    dict.fromkeys(("lr", "fake_lr", "classifier_lr", "clip", "shift", "gan_scale", "change"), (MORE, MOST))
    | dict.fromkeys(("steps", "batch", "save_every", "ratio", "frames", "fit", "repeats", "smallest"), (1, MOST))
    | dict.fromkeys(("warmup", "mask_steps", "diffusion_first", "adapter_start", "sample_every"), (0, MOST))
    | dict.fromkeys(("accumulate", "sequence", "guidance", "energy", "detail", "noise", "video", "r1"), (0, MOST))
    | dict.fromkeys(("sample.steps", "sample.shift"), (0, MOST))
    | dict.fromkeys(("sparse", "guided", "pure_noise", "small", "boxed"), (0, 1))
    | dict.fromkeys(("ema", "momentum"), (0, 1 - 1e-9))  # at 1 nothing is ever taken in
    | {"judge_sigma_max": (MORE, 1), "videos": (2, MOST), "seed": (0, 2**63 - 1)}
)


def check_options(config) -> None:
    """UserError if a number is out of its range."""
    script = Path(inspect.getfile(type(config))).stem
    for name, value in vars(config).items():
        least, most = RANGES.get(f"{script}.{name}") or RANGES.get(name, (-MOST, MOST))
        if isinstance(value, int | float) and not least <= value <= most:
            low = "more than 0" if least == MORE else f"at least {least}"
            high = f", at most {most:.9g}" if most < MOST else ", and finite" * isinstance(value, float)
            raise UserError(f"--{name} {value}: {low}{high}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(message)


def parse_config(config_class: type, argv: Sequence[str], presets: Mapping[str, object] = {}, positional: str = ""):
    """`--lr 1e-4 --compile false` -> an instance of the frozen dataclass. UserError for a wrong flag or value.

    The fields that the class itself declares are flags; those that it inherits are not. `presets`: the instances that
    `--preset` starts from, by name. `positional`: a field that is given without its flag.
    """
    if {"-h", "--help"} & set(argv):
        print(help_page(config_class, presets))
        sys.exit(0)
    parser = _Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    kinds = inspect.get_annotations(config_class)
    for name, kind in kinds.items():
        if kind is bool:
            takes = {"choices": ("true", "false"), "nargs": "?", "const": "true"}
        elif typing.get_origin(kind) is typing.Literal:
            takes = {"choices": typing.get_args(kind)}
        elif typing.get_origin(kind) is tuple:
            takes = {"nargs": "*"}
        else:
            takes = {"type": kind} | ({"nargs": "?"} if name == positional else {})
        parser.add_argument(name if name == positional else f"--{name}", **takes)
    argv = [re.sub(r"^--[^=]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), word) for word in argv]
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        word = unknown[0].partition("=")[0]
        near = difflib.get_close_matches(word, [f"--{name}" for name in kinds], n=1)
        raise UserError(f"unknown flag {word}; {f'did you mean {near[0]}? ' if near else ''}--help lists them all")
    values = vars(known)
    for name, value in values.items():
        if kinds[name] is bool:
            values[name] = value == "true"
        elif isinstance(value, list):
            values[name] = tuple(value)
    return replace(presets.get(values.get("preset"), config_class()), **values)


def help_page(config_class: type, presets: Mapping[str, object]) -> str:
    """The script's docstring, then its options and presets as they stand in the script, with their comments."""
    module = inspect.getmodule(config_class)
    code = inspect.getsource(module)
    assignments = [node for node in ast.parse(code).body if isinstance(node, ast.Assign)]
    parts = [inspect.getdoc(module), "Options: `--name value` sets a field of", inspect.getsource(config_class)]
    parts += [ast.get_source_segment(code, a) for a in assignments if ast.unparse(a.targets[0]).lower() in presets]
    return "\n\n".join(part.strip() for part in parts)


def flags(values: Mapping[str, object]) -> str:
    """Options as they are typed on the command line."""
    text = {name: str(v).lower() if isinstance(v, bool) else v for name, v in values.items()}
    return " ".join(f"--{name} {' '.join(v) if isinstance(v, tuple) else v}" for name, v in text.items())


class _Steady:
    """stdout or stderr: a reader who has left, a full log or another encoding end no work, as a failed print would."""

    def __init__(self, stream: typing.TextIO):
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        code = self.stream.encoding or "utf-8"
        try:
            self.stream.write(text.encode(code, "backslashreplace").decode(code))
            self.stream.flush()  # what fails is to fail here
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        return len(text)


def run_script(main: Callable, config_class: type, presets: Mapping[str, object] = {}, positional: str = "") -> None:
    """Parse the command line and call `main(cfg)`. A UserError becomes one line on stderr and exit status 2."""
    status, message = 0, ""
    out, errors = (stream and _Steady(stream) for stream in (sys.stdout, sys.stderr))  # None where there is none
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            config = parse_config(config_class, sys.argv[1:], presets, positional)
            check_options(config)
            main(config)
            if dist.is_initialized():
                dist.barrier()  # no process leaves while others still communicate
        except UserError as error:
            status, message = 2, str(error)
        except KeyboardInterrupt:
            status, message = 130, "stopped"
        except (OSError, MemoryError, RuntimeError) as error:
            if lacking := shortage(error):
                helps = [text for name, text in LESS.items() if name in inspect.get_annotations(config_class)]
                status, message = 2, f"{lacking}; try {', '.join(helps) or 'a machine with more'}"
            elif isinstance(error, OSError) and error.errno:  # what the system says of a file, wherever it was used
                status, message = 2, f"{error.filename or 'this machine'}: {error.strerror}"
            else:
                raise
        finally:
            if parallel := dist.is_initialized():
                dist.destroy_process_group()
        if message:
            print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
        if parallel:  # Gloo's threads outlive their group, and can abort an interpreter that shuts down: so skip that
            os._exit(status)
        if status:
            sys.exit(status)

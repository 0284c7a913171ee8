"""Options and errors. A script is a frozen dataclass of options and a `main(cfg)`; `run_script` joins them."""

import argparse
import dataclasses
import difflib
import inspect
import math
import os
import re
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent


class UserError(Exception):
    """Something is wrong with the user's input. The message is one line: which file, which field, how to fix it."""


def reason(error: BaseException) -> str:
    """The first line of a library's error message, or the error's type if it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def shipped(name: str) -> str:
    """Path of a file that comes with this project, from whatever folder the user works in."""
    return name if Path.cwd() == ROOT else str(ROOT / name)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(message)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return value


def _switch(text: str) -> bool:
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text} is neither true nor false")
    return text == "true"


def parse_config(config_class: type, argv: Sequence[str], presets: Mapping[str, dict] = {}, positional: str = ""):
    """`--lr 1e-4 --compile false` -> an instance of the frozen dataclass. UserError for a wrong flag or value.

    `presets`: the defaults that each `--preset` changes; a comment next to one, such as (paper), says where the value
    comes from. `positional`: a field that is given without its flag.
    """
    module = inspect.getmodule(config_class)
    source = inspect.getsource(config_class)  # the comment next to a field is its help text
    comments = dict(re.findall(r"^    (\w+): [^#\n]*#\s*(.*)$", source, flags=re.MULTILINE))
    code = inspect.getsource(module) + "\n"
    blocks = {name: re.findall(rf"^{name.upper()} = {{\n(.*?)^}}$", code, re.MULTILINE | re.DOTALL) for name in presets}
    origins = {
        name: dict(re.findall(r'^    "(\w+)": [^#\n]*# (\(.*)$', "".join(block), flags=re.MULTILINE))
        for name, block in blocks.items()
    }
    parser = _Parser(
        description=inspect.getdoc(module), formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        usage=f"%(prog)s {f'{positional} ' if positional else ''}[--flag value ...]",
    )  # fmt: skip
    types = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        kind, default, text = types[field.name], field.default, comments.get(field.name, "").replace("%", "%%")
        shown = flags({"": default}).strip("- ").replace("%", "%%")
        shown = f" (default: {shown})" if shown else ""
        for preset, values in presets.items():
            if field.name in values:
                value = flags({"": values[field.name]}).strip("- ") or "empty"
                shown += f"; with {preset}: {value} {origins[preset].get(field.name, '')}".rstrip().replace("%", "%%")
        options = {"default": default, "help": text + shown}
        if kind is bool:
            options |= {"type": _switch, "nargs": "?", "const": True, "metavar": "true|false"}
        elif typing.get_origin(kind) is typing.Literal:
            options |= {"choices": typing.get_args(kind)}
        elif typing.get_origin(kind) is tuple:
            options |= {"nargs": "*"}
        else:
            options |= {"type": _number if kind is float else kind, "metavar": kind.__name__}
            options |= {"nargs": "?"} if field.name == positional else {}
        parser.add_argument(field.name if field.name == positional else f"--{field.name}", **options)
    argv = [re.sub(r"^--[^=]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), word) for word in argv]
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        word = unknown[0].partition("=")[0]
        near = difflib.get_close_matches(word, [f"--{name}" for name in types], n=1)
        raise UserError(f"unknown flag {word}; {f'did you mean {near[0]}? ' if near else ''}--help lists them all")
    parser.set_defaults(**presets.get(getattr(known, "preset", ""), {}))
    values = vars(parser.parse_args(argv))
    return config_class(**{n: tuple(v) if isinstance(v, list) else v for n, v in values.items()})


def flags(values: Mapping[str, object]) -> str:
    """Options as they are typed on the command line."""
    text = {name: str(v).lower() if isinstance(v, bool) else v for name, v in values.items()}
    return " ".join(f"--{name} {' '.join(v) if isinstance(v, tuple) else v}" for name, v in text.items())


def run_script(main: Callable, config_class: type, presets: Mapping[str, dict] = {}, positional: str = "") -> None:
    """Parse the command line and call `main(cfg)`. A UserError becomes one line on stderr and exit status 2."""
    status = 0
    try:
        main(parse_config(config_class, sys.argv[1:], presets, positional))
        if dist.is_initialized():
            dist.barrier()  # no process leaves while others still communicate
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: stopped", file=sys.stderr)
        status = 130
    except OSError as error:  # what a disk or a file system says of a file, wherever it was touched
        if error.filename is None:
            raise
        print(f"{Path(sys.argv[0]).name}: {error.filename}: {error.strerror}", file=sys.stderr)
        status = 2
    finally:
        if parallel := dist.is_initialized():
            dist.destroy_process_group()
    if parallel:
        # Gloo's threads outlive their process group, and one that frees its last tensor while the interpreter shuts
        # down aborts the process. So skip the shutdown.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if status:
        sys.exit(status)

"""Options and errors. A script is a frozen dataclass of options and a `main(cfg)`; `run_script` joins them.

The comment beside a field of the dataclass is its help text.
"""

import argparse
import ast
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
    """The user's input is at fault. The message is one line that names the file, the field and the mend."""


def reason(error: BaseException) -> str:
    """The first line of what a library says went wrong, or the error's kind if it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def shipped(name: str) -> str:
    """The path of a file that comes with this project, whatever folder the user stands in."""
    return name if Path.cwd() == ROOT else str(ROOT / name)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(message)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return value


def _switch(text: str) -> bool:
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text} is neither true nor false")
    return text == "true"


def parse_config(config_class: type, argv: Sequence[str], presets: Mapping[str, dict] = {}, positional: str = ""):
    """`--lr 1e-4 --compile false` -> an instance of the frozen dataclass.

    `presets`: other defaults under another `--preset`. `positional`: a field that is given without its flag.

    Raises UserError for an unknown flag or a value of the wrong type. `--help` prints every field with its default.
    """
    source = inspect.getsource(config_class)
    comments = dict(re.findall(r"^    (\w+): [^#\n]*#\s*(.*)$", source, flags=re.MULTILINE))
    about = ast.get_docstring(ast.parse(Path(inspect.getfile(config_class)).read_text(encoding="utf-8")))
    lines = [f"defaults with --preset {preset}:\n  {flags(values)}" for preset, values in presets.items()]
    parser = _Parser(
        description=about, epilog="\n\n".join(lines), formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=f"%(prog)s {f'{positional} ' if positional else ''}[--flag value ...]", allow_abbrev=False,
    )  # fmt: skip
    types = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        kind, default, text = types[field.name], field.default, comments[field.name].replace("%", "%%")
        shown = flags({"": default}).strip("- ").replace("%", "%%")
        options = {"default": default, "help": f"{text} (default: {shown})" if shown else text}
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
    """Options as one types them."""
    words = {True: "true", False: "false"}
    text = {name: words[v] if isinstance(v, bool) else v for name, v in values.items()}
    return " ".join(f"--{name} {' '.join(v) if isinstance(v, tuple) else v}" for name, v in text.items())


def run_script(main: Callable, config_class: type, presets: Mapping[str, dict] = {}, positional: str = "") -> None:
    """Parse the command line and call `main(cfg)`. User errors end as one line on stderr and exit status 2."""
    status = 0
    try:
        main(parse_config(config_class, sys.argv[1:], presets, positional))
        if dist.is_initialized():
            dist.barrier()  # nobody leaves while another still talks
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        status = 2
    finally:
        if parallel := dist.is_initialized():
            dist.destroy_process_group()
    if parallel:
        # Gloo's threads outlive their process group, and one that drops its last tensor while the interpreter shuts
        # down aborts the process. So there is no shutdown.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if status:
        sys.exit(status)

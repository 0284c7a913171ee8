"""Writing files: paths are checked before any work is done, and a file appears whole or not at all."""

import contextlib
import glob
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from core.config import UserError, reason

UMASK = os.umask(0)  # reading it means setting it
os.umask(UMASK)


def output_path(text: str, suffix: str, flag: str = "out") -> Path:
    """A flag's value as a path. UserError if it has another ending or its folder can't be written to."""
    if Path(text).suffix != suffix:
        raise UserError(f"--{flag} {text}: the name must end in {suffix}")
    try:
        if "\0" in text:
            raise ValueError("a character that no name can have")
        if suffix and Path(text).is_dir():
            raise UserError(f"--{flag} {text}: is a folder; give another name")
        nearest = next(folder for folder in Path(text).absolute().parents if folder.exists())
    except (OSError, ValueError) as error:
        raise UserError(f"--{flag} {text}: can't be the name of a file ({reason(error)})") from None
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"--{flag} {text}: {nearest} is no folder that can be written to")
    return Path(text)


def keep_inputs(out: Path, flag: str, **inputs: Path | str) -> None:
    """UserError if writing `out`, which the flag names, would overwrite an input. `inputs`: their paths by flag."""
    for name, path in inputs.items():
        if path and Path(path).exists() and out.exists() and out.samefile(path):
            raise UserError(f"--{flag}: would overwrite {path}, which --{name} reads; give another name")


@contextlib.contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """Yields a temporary path next to `path`; renames it when all is on disk, removes it on any failure.

    UserError if the file can't be written: a full disk, or a folder without permission.
    """
    path = Path(path)
    mark = f"-{zlib.crc32(os.fsencode(path.name)):08x}{path.suffix}"  # short: the name itself may be as long as can be
    temporary = path.with_name(f".tmp{os.getpid()}{mark}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".tmp*{glob.escape(mark)}"):
            if not alive(left.name):  # of a run that was killed
                left.unlink(missing_ok=True)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # some file systems only now say that they are full
        temporary.chmod(0o666 & ~UMASK)  # some libraries write files for their owner alone
        os.replace(temporary, path)
    except OSError as error:
        fix = "make room, or give another place"
        raise UserError(f"{path}: can't be written ({error.strerror or reason(error)}); {fix}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def alive(name: str) -> bool:
    """Is the process at work that a temporary file is named after?"""
    number = re.match(r"\.tmp(\d+)-", name)
    if os.name != "posix":  # elsewhere the signal would end it
        return True
    try:
        os.kill(int(number[1]), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True  # somebody else's
    return True


def write_text(path: Path | str, text: str) -> None:
    """Write UTF-8 text and a final newline."""
    with atomic(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")

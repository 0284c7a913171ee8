"""Writing files: paths are checked before any work is done, and a file appears whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from core.config import UserError


def output_path(text: str, suffix: str, flag: str = "out") -> Path:
    """A flag's value as a path. UserError if it has another ending or its folder can't be written to."""
    if Path(text).suffix != suffix:
        raise UserError(f"--{flag} {text}: the name must end in {suffix}")
    if suffix and Path(text).is_dir():
        raise UserError(f"--{flag} {text}: is a folder; give another name")
    nearest = next(folder for folder in Path(text).absolute().parents if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"--{flag} {text}: {nearest} is no folder that can be written to")
    return Path(text)


@contextlib.contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """Yields a temporary path next to `path`; renames it on success, removes it on any failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.tmp{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
    """Write UTF-8 text and a final newline."""
    with atomic(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")

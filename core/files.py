"""Writing files: paths are checked before any work is done, and a file appears whole or not at all."""

import contextlib
import errno
import glob
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from core.config import UserError, reason, require

# What stands in place of a file, and what brings the file. git-annex leaves text, or links that lead nowhere.
POINTERS = (("git-lfs", rb"version https://git-lfs", "git lfs pull"),
            ("git-annex", rb"(.*\.git\b.*)?/annex/objects/", "git annex get"))  # fmt: skip
NOT_OURS = "exists, and was not made here; move it, or give another name"
UMASK = os.umask(0)  # reading it means setting it
os.umask(UMASK)


def output_path(text: str, suffix: str, flag: str = "out", **read: Path | str) -> Path:
    """A flag's value as a path. UserError for another ending, no permission, or one of the files that flags `read`."""
    path, said = Path(text), f"--{flag} {text}"
    require(path.suffix == suffix, f"{said}: the name must end in {suffix}")
    writable(path, said)
    require(not suffix or not path.is_dir(), f"{said}: is a folder; give another name")
    for name, other in read.items():
        if other and Path(other).exists() and path.exists() and path.samefile(other):
            raise UserError(f"--{flag}: would overwrite {other}, which --{name} reads; give another name")
    return path


def no_pointer(path: Path | str) -> Path:
    """The path. UserError if a clone without git-lfs or git-annex left only a pointer in place of a file."""
    try:
        with open(path, "rb") as file:
            start = file.read(256)
    except (OSError, ValueError):
        start = os.fsencode(os.readlink(path)) if os.path.islink(path) and not os.path.exists(path) else b""
    for tool, known, get in POINTERS:
        if re.match(known, start):
            raise UserError(f"{path}: is a pointer of {tool}, not the file itself; run {get} in its folder")
    return Path(path)


def writable(path: Path, said: str) -> None:
    """UserError, which begins with what was `said`, if no such file can be written."""
    try:
        if "\0" in str(path):
            raise ValueError("a character that no name can have")
        path.exists()
        nearest = next(folder for folder in path.absolute().parents if folder.exists() or folder.is_symlink())
    except (OSError, ValueError) as error:
        raise UserError(f"{said}: can't be the name of a file ({reason(error)})") from None
    require(nearest.exists(), f"{said}: {nearest} is a link that leads nowhere; is the disk mounted?")
    require(nearest.is_dir() and os.access(nearest, os.W_OK), f"{said}: {nearest} is no folder that can be written to")


@contextlib.contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path; rename it once all is on disk, else remove it. UserError if it can't be written."""
    path = Path(path)
    mark = f"-{zlib.crc32(os.fsencode(path.name)):08x}{path.suffix}"  # the name may be as long as names can be
    temporary = path.with_name(f".tmp{os.getpid()}{mark}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in path.parent.glob(f".tmp*{glob.escape(mark)}"):
            if not alive(old.name):  # left by a run that was killed
                old.unlink(missing_ok=True)
        yield temporary
        with temporary.open("rb") as file:
            try:
                os.fsync(file.fileno())  # only here do some file systems report that they are full
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # and some lack it
                    raise
        with contextlib.suppress(OSError):  # not every file system has modes
            temporary.chmod(0o666 & ~UMASK)  # some libraries write files that only their owner may read
        os.replace(temporary, path)
    except OSError as error:
        said = error.strerror or reason(error)
        room = any(os.strerror(n) in said for n in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
        raise UserError(f"{path}: can't be written ({said}){'; make room, or give another place' * room}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def alive(name: str) -> bool:
    """Is the process that wrote this temporary file still running?"""
    try:
        os.kill(int(re.match(r"\.tmp(\d+)-", name)[1]), 0)
    except (OSError, OverflowError) as error:
        return isinstance(error, PermissionError)  # another user's
    return True


def write_text(path: Path | str, text: str) -> None:
    """Write UTF-8 text and a final newline."""
    with atomic(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")

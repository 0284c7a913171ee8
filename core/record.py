"""What a folder was made of, known by content and not by name; and whose it is while somebody writes to it."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import socket
from functools import partial
from pathlib import Path

from core.config import UserError, warn
from core.files import writable

PIECE = 16 << 20  # bytes that are hashed at once
READ: dict[Path, None] = {}  # the files of weights that this command has opened, in their order
HELD = {}  # open locks by their paths, kept until the process ends


def checksum(*parts: object) -> str:
    """16 digits of SHA-256: of all bytes of what a Path names, and of how anything else is written in Python.

    A folder counts with the files in it and their names, a .json also with the files that it names (masks, shards), and
    what isn't there as empty. Shards, which may hold terabytes, count by the checksums of their tensors in their
    headers; the tensors are compared with these when they are read. OSError if a file can't be read.
    """
    return hashlib.sha256(repr([content(p) if isinstance(p, Path) else p for p in parts]).encode()).hexdigest()[:16]


def content(path: Path) -> str | list:
    """What `checksum` sees of a path."""
    if os.path.isdir(path):
        return [(file.name, content(file)) for file in sorted(path.iterdir()) if not file.name.startswith(".")]
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little") if path.suffix == ".safetensors" else 0
            if sums := re.search(rb'"sums":"(?:[^"\\]|\\.)*"', file.read(min(length, PIECE))):
                return hashlib.sha256(sums[0]).hexdigest()
            file.seek(0)
            pieces = [hashlib.sha256(piece).hexdigest() for piece in iter(partial(file.read, PIECE), b"")]
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
            return ""
        raise
    named = []
    if path.suffix == ".json":
        with contextlib.suppress(ValueError, RecursionError):
            json.loads(path.read_bytes(), object_pairs_hook=lambda pairs: named.extend(v for _, v in pairs))
    files = [path.parent / name for name in named if isinstance(name, str) and not name.endswith(".json")]
    return ["".join(pieces), *(content(file) for file in files if os.path.isfile(file))]


def lock(folder: Path | str) -> None:
    """Keep other processes out of a folder until this one ends, over NFS too. UserError that names one that is in."""
    path = Path(folder).absolute() / ".lock"
    if path in HELD:
        return
    writable(path, str(folder))
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        mend = "wait until it ends, or give another folder"
        raise UserError(f"{folder}: {path.read_text().strip() or 'another process'} is at work here; {mend}") from None
    except OSError as error:  # a file system without locks
        warn(f"{folder}: can't be locked ({error.strerror}); let no other command write to it")
    HELD[path] = file
    try:
        file.truncate(0)
        print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
    except OSError as error:  # of a full disk, which names no file
        raise UserError(f"{path}: can't be written ({error.strerror}); mend that, and run it again") from None

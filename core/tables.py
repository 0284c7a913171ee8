"""Rows of results as JSON, Markdown and text, with the command that made them."""

import json
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from core.config import flags, require
from core.files import NOT_OURS, output_path, write_text


def provenance(script: str, config, device: torch.device) -> dict[str, str]:
    """The command that reproduces a result, and the machine that made it."""
    changed = {name: value for name, value in vars(config).items() if value != getattr(type(config), name)}
    cpu = torch.cpu.get_capabilities().get("cpu_name") or platform.machine()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    machine = f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    return {"command": f"python {script} {flags(changed)}".strip(), "machine": machine}


def markdown(rows: Sequence[dict]) -> str:
    """Rows with equal keys as a Markdown table, without the command and the machine; None is an empty cell."""
    keys = [key for key in rows[0] if key not in ("command", "machine")]
    cells = (["" if row[key] is None else str(row[key]) for key in keys] for row in rows)
    lines = [[key.replace("_", " ") for key in keys], ["---"] * len(keys), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table_path(text: str) -> Path:
    """`--out` of rows and a table. UserError if there lies what does not begin as `write_rows` begins them."""
    out = output_path(text, ".json")
    for path, start in ((out, b'[\n {\n  "name": "'), (out.with_suffix(".md"), b"| name |")):
        require(not path.exists() or path.read_bytes().startswith(start), f"--out {out}: {path}: {NOT_OURS}")
    return out


def write_rows(out: Path, rows: Sequence[dict], table: Sequence[dict] = ()) -> None:
    """Write the rows as a JSON list and, next to it, as a Markdown table, or those of `table`."""
    write_text(out, json.dumps(rows, indent=1))
    write_text(out.with_suffix(".md"), markdown(table or rows))

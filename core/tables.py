"""Tables of results: rows as JSON, as Markdown and as text to read, and where they come from."""

import dataclasses
import json
import platform
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from core.config import flags
from core.files import write_text


def provenance(script: str, config, device: torch.device) -> dict[str, str]:
    """The command that makes a result again, and the machine that made it."""
    changed = {f.name: v for f in dataclasses.fields(config) if (v := getattr(config, f.name)) != f.default}
    info = Path("/proc/cpuinfo")  # Linux only
    models = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    if device.type == "cuda":
        models = [torch.cuda.get_device_name(device)]
    machine = f"{(models or [platform.machine()])[0]}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    return {"command": f"python {script} {flags(changed)}".strip(), "machine": machine}


def cells(rows: Sequence[dict], show: Callable[[object], str] = str) -> list[list[str]]:
    """Head and rows of a table; a range stands behind its measure."""
    keys = [key for key in rows[0] if key not in ("command", "machine") and not key.endswith("_range")]
    lines = [[key.replace("_", " ") for key in keys]]
    for row in rows:
        spans = {key: row.get(f"{key}_range") for key in keys}
        values = {key: "" if row[key] is None else show(row[key]) for key in keys}
        wide = {key for key in keys if spans[key] and spans[key][0] < spans[key][1]}
        lines.append([f"{v} ({spans[k][0]} to {spans[k][1]})" if k in wide else v for k, v in values.items()])
    return lines


def three_digits(value: object) -> str:
    """For measured times: 0.0912345 is 0.0912."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def table(rows: Sequence[dict]) -> str:
    """Rows of equal keys as aligned text."""
    lines = cells(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)


def markdown(rows: Sequence[dict], show: Callable[[object], str] = str) -> str:
    """The same as a Markdown table, for a page that quotes it."""
    lines = cells(rows, show)
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_rows(out: Path, rows: Sequence[dict], show: Callable[[object], str] = str) -> None:
    """A JSON list, and beside it the table in Markdown."""
    write_text(out, json.dumps(rows, indent=1))
    write_text(out.with_suffix(".md"), markdown(rows, show))

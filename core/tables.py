"""Rows of results as JSON, Markdown and text, with the command that made them."""

import json
import platform
from collections.abc import Callable, Sequence
from itertools import groupby
from operator import itemgetter
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


def over_seeds(rows: Sequence[dict], measures: Sequence[str]) -> list[dict]:
    """Rows of several seeds, neighbours of one name and number of steps, as one each: mean, range and how many."""
    merged = []
    for (name, steps), group in groupby(rows, key=itemgetter("name", "steps")):
        seeds = list(group)
        merged.append({"name": name, "steps": steps, "videos": seeds[0]["videos"], "seeds": len(seeds)})
        for key in measures:
            values = [row[key] for row in seeds if row[key] is not None]
            merged[-1] |= {key: round(sum(values) / len(values), 4) if values else None}
            merged[-1] |= {f"{key}_range": [min(values), max(values)] if values else None}
    return merged


def three_digits(value: object) -> str:
    """Numbers to three significant digits, for measured times: 0.0912345 becomes 0.0912."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def markdown(rows: Sequence[dict], show: Callable[[object], str] = str) -> str:
    """Rows with equal keys as a Markdown table. A measure's `_range`, unless of one value, goes into its cell."""
    keys = [key for key in rows[0] if key not in ("command", "machine") and not key.endswith("_range")]

    def cell(row: dict, key: str) -> str:
        text, span = "" if row[key] is None else show(row[key]), row.get(f"{key}_range")
        return f"{text} ({span[0]} to {span[1]})" if span and span[0] < span[1] else text

    lines = [[key.replace("_", " ") for key in keys], ["---"] * len(keys), *([cell(r, k) for k in keys] for r in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table_path(text: str) -> Path:
    """`--out` of rows and a table. UserError if there lies what does not begin as `write_rows` begins them."""
    out = output_path(text, ".json")
    for path, start in ((out, b'[\n {\n  "name": "'), (out.with_suffix(".md"), b"| name |")):
        require(not path.exists() or path.read_bytes().startswith(start), f"--out {out}: {path}: {NOT_OURS}")
    return out


def write_rows(out: Path, rows: Sequence[dict], show: Callable = str, table: Sequence[dict] = ()) -> None:
    """Write the rows as a JSON list and, next to it, as a Markdown table, or those of `table`."""
    write_text(out, json.dumps(rows, indent=1))
    write_text(out.with_suffix(".md"), markdown(table or rows, show))

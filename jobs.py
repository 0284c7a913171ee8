"""Tables of many videos to make, for `sample.py --batch`."""

import csv
import os
from itertools import islice
from pathlib import Path

from common import UserError

# Column -> option of sample.py: this project's own names, and those of MagicMotion's tables.
COLUMNS = {name: name for name in ("image", "traj", "prompt", "out", "seed")} | {
    "validation_images": "image", "validation_trajectory_maps": "traj", "validation_prompt": "prompt",
    "output_path": "out", "controlnet_weights": "",
}  # fmt: skip
PATHS = ("image", "traj", "out")  # relative to the table
MOST = 100_000


def read_jobs(path: Path) -> list[dict]:
    """A CSV file's rows as options of sample.py. UserError if the table as a whole can't be used.

    `out` is by default the row's number; a column that sample.py has no use for, `controlnet_weights`, is passed over.
    What is wrong in a single row is for whoever takes it up: a seed that is no number stays text, a missing image "".
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file, strict=True)
            rows = list(islice(table, MOST + 1))
            names = table.fieldnames or []
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; correct --batch") from None
    except (OSError, UnicodeError, csv.Error) as error:
        raise UserError(f"{path}: not a readable CSV file ({error}); save it as UTF-8 text with commas") from None
    known = ", ".join(COLUMNS)
    if unknown := [name for name in names if name not in COLUMNS]:
        raise UserError(f"{path}: column {unknown[0]!r} is unknown; the known ones are {known}")
    lacking = {"image", "traj", "prompt"} - {COLUMNS[name] for name in names}
    if lacking:
        raise UserError(f"{path}: no column {sorted(lacking)[0]}; the first line names the columns, of {known}")
    if not 0 < len(rows) <= MOST:
        raise UserError(f"{path}: {'no' if not rows else 'too many'} rows; give 1 to {MOST}")
    jobs = []
    for number, row in enumerate(rows):
        if any(cell.strip() for cell in row.pop(None, ())):
            raise UserError(f"{path}: row {number + 1} has more cells than columns; put texts with commas in quotes")
        values = {}
        for name, text in row.items():
            if COLUMNS[name] and not values.get(COLUMNS[name]):
                values[COLUMNS[name]] = (text or "").strip()
        values["out"] = values.get("out") or f"{number:05d}.mp4"
        if not values.get("seed"):
            values.pop("seed", None)
        values |= {name: os.path.normpath(path.parent / values[name]) for name in PATHS if values[name]}
        if values.get("seed", "").isdecimal():
            values["seed"] = int(values["seed"])
        jobs.append(values)
    if len({job["out"] for job in jobs}) < len(jobs):
        raise UserError(f"{path}: two rows write the same file; give each another in the column out")
    return jobs

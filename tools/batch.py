"""Tables that users give: CSV files, and among them that of `sample.py --batch`, with a video in each row."""

import csv
import io
import os
import re
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import replace
from itertools import islice
from pathlib import Path

from core.codec import Codec
from core.config import UserError, reason, require, warn
from core.media import read_record
from core.memory import Clock, shortage
from core.parallel import Processes
from core.record import READ, checksum
from core.weights import file_errors

MOST_ROWS = 100_000
# Options that leave a video as it is, or whose files are the `weights`.
SHOWN_ALIKE = ("out", "batch", "serve", "compile", "dtype", "generator", "adapter", "decoder")
# Column -> option of sample.py: this project's own names, and those of MagicMotion's tables.
COLUMNS = {name: name for name in ("image", "traj", "prompt", "out", "seed")} | {
    "validation_images": "image", "validation_trajectory_maps": "traj", "validation_prompt": "prompt",
    "output_path": "out", "controlnet_weights": "",
}  # fmt: skip


def make_table(
    cfg, codec: Codec, networks: Callable, read_condition: Callable, embed: Callable, make_video: Callable,
    clock: Clock, procs: Processes,
) -> None:  # fmt: skip
    """Make the videos of `--batch` that aren't there yet, each by one process. UserError, at the end, if some can't be.

    `cfg`: sample.py's options. The functions are sample.py's, with all that is the same for every row filled in.
    """
    jobs = [replace(cfg, batch="", **row) for row in read_jobs(Path(cfg.batch))]
    # Rank 0 looks for all: another might look when the first new videos are there already.
    done = [job for job in jobs if procs.rank == 0 and os.path.exists(job.out)]
    outs = set(procs.gather([job.out for job in done]))
    left = [job for job in jobs if job.out not in outs][procs.rank :: procs.world]
    if done:
        print(f"{len(done)} of {len(jobs)} videos stand already, and are not made again; to make one anew, delete it")
    with clock("encode prompt"):
        text = embed([*(job.prompt for job in left), codec.negative])
    with clock("read networks"):
        networks()
    weights, said = checksum(*codec.files()[:1], *READ), set()
    failed = [problem for job in done if (problem := unlike(job, weights))]
    for number, job in enumerate(left, start=1):
        try:
            with redirect_stderr(io.StringIO()) as warnings:
                condition = read_condition(job)
            if new := set(warnings.getvalue().splitlines()) - said:
                warn(f"{job.out}: {'; '.join(sorted(new))}")  # each once in a table
                said |= new
            make_video(job, condition, text[job.prompt], text[codec.negative], clock, made_of=made_of(job, weights))
            print(f"{job.out} and {overlay_path(job.out)} ({number} of {len(left)})")
        except Exception as error:  # whatever it is: a video that can't be made does not stop the rest
            failed.append(f"{job.out}: {shortage(error) or reason(error)}")
    print(clock)
    if failed := procs.gather(failed):
        raise UserError(f"{cfg.batch}: {len(failed)} of {len(jobs)} videos could not be made: {'; '.join(failed)}")


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, "" for missing cells. UserError if it isn't a table of 1 to MOST_ROWS rows."""
    mend = "save it as UTF-8 text with commas"
    with file_errors(path, "a readable CSV file", mend), path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, restval="", strict=True)
        reader.fieldnames = columns = [name.strip() for name in reader.fieldnames or []]
        filled = (row for row in reader if any("".join(cell).strip() for cell in row.values()))
        rows = list(islice(filled, MOST_ROWS + 1))
    if len(columns) == 1 and (other := re.search("[;\t]", columns[0])):
        raise UserError(f"{path}: columns are separated by {other[0]!r}; {mend}")
    require(0 < len(rows) <= MOST_ROWS, f"{path}: {'no' if not rows else 'too many'} rows; give 1 to {MOST_ROWS}")
    if twice := next((name for name in columns if columns.count(name) > 1), None):
        raise UserError(f"{path}: two columns are called {twice!r}; rename or delete one")
    for number, row in enumerate(rows, start=1):
        if any(cell.strip() for cell in row.pop(None, ())):  # where DictReader puts cells without a column
            raise UserError(f"{path}: row {number} has more cells than columns; put texts with commas in quotes")
    return rows


def read_jobs(path: Path) -> list[dict]:
    """The rows of a table as options. UserError if the table as a whole can't be used.

    Mistakes in a single row are reported when its turn comes: a seed that is no number stays text, a missing image "".
    """
    rows, known = read_table(path), ", ".join(COLUMNS)
    if unknown := [name for name in rows[0] if name not in COLUMNS]:
        raise UserError(f"{path}: column {unknown[0]!r} is unknown; the known ones are {known}")
    if lacking := sorted({"image", "traj"} - {COLUMNS[name] for name in rows[0]}):
        raise UserError(f"{path}: no column {lacking[0]}; the first line names the columns, of {known}")
    jobs = []
    for number, row in enumerate(rows):
        job = {"image": "", "traj": "", "prompt": ""}
        for name, text in row.items():
            if (option := COLUMNS[name]) and (text := text.strip()):
                if job.get(option):
                    raise UserError(f"{path}: row {number + 1}: two columns say its {option}; empty one of them")
                job[option] = text
        job.setdefault("out", f"{path.stem}_{number:05d}.mp4")
        if whole := re.fullmatch(r"(\d+)(\.0*)?", job.get("seed", "")):  # 3.0 where the column has gaps
            job["seed"] = int(whole[1])
        for name in ("image", "traj", "out"):
            job[name] = job[name] and os.path.normpath(path.parent / job[name])
        jobs.append(job)
    written = [path for job in jobs for path in (job["out"], str(overlay_path(job["out"])))]
    if len(set(written)) < len(written):
        raise UserError(f"{path}: two rows write the same file; give each another in the column out")
    if lost := sorted({job[name] for job in jobs for name in ("image", "traj")} & set(written)):
        raise UserError(f"{path}: {lost[0]} is read by one row and written by another; change the column out")
    return jobs


def overlay_path(out: str) -> Path:
    """Where the video with its boxes goes."""
    return Path(out).with_suffix(".boxes.mp4")


def made_of(job, weights: str) -> dict[str, str]:
    """Checksums of all that decides how a row's video looks, by option. `weights`: that of the networks."""
    values = {name: value for name, value in vars(job).items() if name not in SHOWN_ALIKE} | {"weights": weights}
    return {name: checksum(Path(v) if v and name in ("image", "traj") else v) for name, v in values.items()}


def unlike(job, weights: str) -> str:
    """What is wrong with a row's video that stands already; empty if it is what the row asks for."""
    try:
        now, before = made_of(job, weights), read_record(job.out)
    except (UserError, OSError) as error:
        return reason(error)
    other = [name for name in now if before.get(name) != now[name]] if before else ["recipe"]
    says = f"{job.out}: stands already, made with another {', '.join(other)}; delete it, or change the column out"
    return says if other else ""

"""sample.py --batch: many videos, some of them impossible."""

import csv
import shutil

import imageio.v3 as iio
import numpy as np
import pytest
from conftest import ROOT, refused

from tools.batch import read_jobs

GOOD = {"image": "balloons.jpg", "traj": "balloons.json", "prompt": "a blob"}


def table(folder, rows):
    """A CSV file of these rows, beside the shipped example's image and boxes."""
    path = shutil.copytree(ROOT / "examples", folder / "jobs", dirs_exist_ok=True) / "jobs.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize("processes", [1, 2])
def test_a_bad_job_stops_no_other_and_what_is_done_stays(run, tmp_path, processes):
    """An empty cell is not the example's picture or boxes; an empty prompt is fine."""
    path = table(tmp_path, [
        {**GOOD, "out": "a.mp4", "seed": "0"},
        {**GOOD, "out": "b.mp4", "seed": "many"},
        {**GOOD, "out": "c.mp4", "seed": "1", "traj": "gone.json"},
        {**GOOD, "out": "d.mp4", "seed": ""},
        {**GOOD, "out": "e.txt", "seed": "2"},
        {**GOOD, "out": "f" * 300 + ".mp4"},
        {**GOOD, "out": "g.mp4", "image": "g" * 300 + ".png"},
        {**GOOD, "out": "h.mp4", "traj": "h" * 300 + ".json"},
        {**GOOD, "image": ""}, {**GOOD, "traj": ""}, {**GOOD, "prompt": ""},
    ])  # fmt: skip
    flags = ("--size", "48x64", "--batch", path, "--steps", 1)
    job = run("sample.py", *flags, processes=processes)
    made = sorted(file.name for file in path.parent.glob("*.mp4") if "boxes" not in file.name)
    assert job.returncode != 0 and made == ["a.mp4", "d.mp4", "jobs_00010.mp4"]
    (line, *_) = [line for line in job.stderr.splitlines() if line.startswith("sample.py: ")]
    assert "8 of 11 videos could not be made" in line
    for text in ("b.mp4: --seed many: a whole number", "gone.json: no such file", "e.txt: the name must end in .mp4",
                 "f.mp4: ", "g.mp4: ", "h.mp4: ", "name too long", "jobs_00008.mp4: --image: empty; name a file",
                 "jobs_00009.mp4: --traj: empty"):  # fmt: skip
        assert text in line
    if processes == 1:
        assert job.returncode == 2
    a, d = (iio.imread(path.parent / name) for name in ("a.mp4", "d.mp4"))
    assert np.array_equal(a, d) and a.shape == (9, 180, 240, 3)  # the same seed, the default
    before = (path.parent / "a.mp4").stat().st_mtime_ns
    (path.parent / "d.mp4").unlink()
    job = run("sample.py", *flags, processes=processes)
    assert (path.parent / "a.mp4").stat().st_mtime_ns == before and (path.parent / "d.mp4").exists()
    assert "2 of 11 videos stand already" in job.stdout


@pytest.mark.parametrize("text, jobs", [
    # As spreadsheets write them: a space after each comma, whole numbers as fractions, commas alone at the end.
    ("image, validation_images, traj, prompt, seed\na.png,,b,c,7.0,\n,d.png,b,c,,,\n,,,\n,,,,,\n",
     [{"image": "a.png", "traj": "b", "prompt": "c", "seed": 7}, {"image": "d.png", "traj": "b", "prompt": "c"}]),
    ("validation_prompt,validation_images,validation_trajectory_maps,output_path,controlnet_weights\n"  # MagicMotion's
     "a cat,x.png,maps.mp4,,1.0\n", [{"image": "x.png", "traj": "maps.mp4", "prompt": "a cat"}]),
    ("image,traj,prompt\n,b,\n", [{"image": "", "traj": "b", "prompt": ""}]),
])  # fmt: skip
def test_tables_of_many_kinds(tmp_path, text, jobs):
    path = tmp_path / "jobs.csv"
    path.write_text(text)
    for number, job in enumerate(jobs):
        job["out"] = f"jobs_{number:05d}.mp4"
        job |= {name: job[name] and str(tmp_path / job[name]) for name in ("image", "traj", "out")}
    assert read_jobs(path) == jobs


@pytest.mark.parametrize("text, message", [
    (None, "no such file; correct the path"),
    ("traj,prompt\nx,y\n", "no column image"),
    ("image,prompt\nx,y\n", "no column traj"),
    ("image,traj,prompt,speed\n1,2,3,4\n", "column 'speed' is unknown"),
    ("image,traj,prompt\n" + "a,b,c\n" * 100_001, "too many rows"),
    ("image,traj,prompt,out\na,b,c,x.mp4\na,b,d,x.mp4\n", "two rows write the same file"),
    ("image,traj,prompt,out\na,b,c,x.mp4\na,b,d,./x.mp4\n", "two rows write the same file"),
    ("image,traj,prompt,out\na,b,c,x.mp4\na,b,d,x.boxes.mp4\n", "two rows write the same file"),
    ("image,traj,prompt,prompt\na,b,c,d\n", "two columns are called 'prompt'"),
    ("image,traj,validation_images,prompt\na,b,,d\na,b,c,d\n", "row 2: two columns say its image; empty one"),
    ("image,traj,prompt,out\na,b.mp4,c,x.mp4\na,b,d,b.mp4\n", "b.mp4 is read by one row and written by another"),
    ("image,traj,prompt,out\na,x.boxes.mp4,c,x.mp4\n", "x.boxes.mp4 is read by one row and written by another"),
    ("image;traj;prompt\na;b;c\n", "columns are separated by ';'; save it as UTF-8 text with commas"),
    ("image\ttraj\tprompt\na\tb\tc\n", r"columns are separated by '\\t'"),
    ("image,traj,prompt\na,b,c\na,b,a disc, a square\n", "row 2 has more cells than columns; put texts"),
])  # fmt: skip
def test_tables_that_can_not_be_used(tmp_path, text, message):
    path = tmp_path / "jobs.csv"
    if text is not None:
        path.write_text(text)
    assert refused(message, read_jobs, path).startswith(str(path))


def test_a_video_of_another_recipe_is_not_taken_for_the_row_s(run, tmp_path):
    """Behind the same names: another seed, other boxes, a video that somebody else put there."""
    rows = [{**GOOD, "out": f"{name}.mp4", "seed": "1"} for name in "abc"]
    path = table(tmp_path, rows)
    flags = ("--size", "48x64", "--batch", path, "--steps", 1)
    (path.parent / "c.mp4").write_bytes(b"mine")
    job = run("sample.py", *flags)
    assert job.returncode == 2 and "c.mp4: exists, and was not made here; move it" in job.stderr
    assert "a.mp4" not in job.stderr and (path.parent / "c.mp4").read_bytes() == b"mine"
    table(tmp_path, [rows[0], {**rows[1], "seed": "2"}])
    job = run("sample.py", *flags)
    assert job.returncode == 2 and "b.mp4: stands already, made with another seed; delete it" in job.stderr
    boxes = path.parent / "balloons.json"
    boxes.write_text(boxes.read_text().replace("33, 33", "34, 33"))
    job = run("sample.py", *flags)
    assert "a.mp4: stands already, made with another traj; " in job.stderr and "b.mp4: stands" in job.stderr

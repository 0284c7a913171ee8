"""plot.py: a run's log as curves in one page."""

import json
import re

import pytest

from core.config import UserError
from tools import plot


def log(folder, rows):
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_every_measure_has_a_chart_and_every_run_a_line(tmp_path, run):
    a = log(tmp_path / "runs/a", [{"step": s, "loss": 4 - s, "rate": 1.0} for s in range(4)])
    b = log(tmp_path / "runs/<b>", [{"step": 2 * s, "loss": s} for s in range(4)])
    job = run("plot.py", a, b, "--out", "c.html")
    assert job.returncode == 0 and "2 charts of 2 runs: c.html" in job.stdout, job.stderr
    page = (tmp_path / "c.html").read_text()
    lines = re.findall(r'<polyline points="([^"]+)"', page)
    assert len(lines) == 3 and "&lt;b&gt;" in page and "http" not in page
    first, second, _ = ([tuple(map(float, p.split(","))) for p in line.split()] for line in lines)
    assert len(first) == len(second) == 4
    assert second[3][0] == 2 * first[3][0] - first[0][0]  # twice as many steps, on one axis
    assert first[0][1] < first[3][1] and second[0][1] > second[3][1]  # falls, and rises: y points down


def test_smoothing_is_the_mean_of_the_last():
    curve = [(0, 1.0), (1, 3.0), (2, 8.0)]
    assert plot.smoothed(curve, 2) == [(0, 1.0), (1, 2.0), (2, 5.5)] and plot.smoothed(curve, 1) == curve


def test_bad_input_is_one_line(tmp_path):
    good = log(tmp_path / "good", [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": 1.0}])
    assert plot.read_log(good) == {"loss": [(2, 1.0)]}
    bad = log(tmp_path / "bad", [{"loss": 1.0}])
    for runs, out, message in (
        (bad, "x.html", "line 1 is no logged step"),
        (tmp_path / "gone", "x.html", "log.jsonl: no such file; give folders of runs"),
        (good, "x.png", "the name must end in .html"),
    ):
        with pytest.raises(UserError, match=message):
            plot.main(plot.Config(runs=str(runs), out=str(tmp_path / out)))
    assert not list(tmp_path.glob("x.*"))

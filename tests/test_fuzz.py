"""Whatever a file holds, it is used or refused in one line: a boxes.json with parts replaced by anything, raw bytes."""

import copy
import json
from pathlib import Path

import pytest

from core.config import UserError
from core.weights import read_checkpoint
from tools.batch import read_jobs
from tools.convert import read_points
from trajectory import Trajectory, load_trajectory

hypothesis = pytest.importorskip("hypothesis", reason="needs requirements-dev.txt")
st = hypothesis.strategies

GOOD = {
    "num_frames": 9, "width": 48, "height": 48,
    "objects": [{"name": "a", "color": [200, 30, 30], "interpolate": "smooth", "visible": [[0, 8]],
                 "boxes": {"0": [4, 4, 20, 20], "4": [9, 9, 20, 30], "8": [20, 20, 40, 40]}},
                {"boxes": [[5, 5, 9, 9]] * 9, "mask": "none.png"}],
}  # fmt: skip
NUMBERS = st.integers(-(10**20), 10**20) | st.integers(-3, 60) | st.floats()
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=4) | st.just("0"), inner, max_size=4),
    max_leaves=8,
)
QUIET = hypothesis.settings(
    max_examples=200, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)


def places(value, path=()):
    """Every place in a JSON value, as a path of keys."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def used_or_refused(path: Path) -> None:
    try:
        assert isinstance(load_trajectory(path, (48, 48), 9), Trajectory)
    except UserError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error) and len(str(error)) < 1000


@QUIET
@hypothesis.given(st.data())
def test_any_part_of_a_boxes_json_may_be_anything(tmp_path, data):
    top = copy.deepcopy(GOOD)
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.sampled_from([p for p in places(top) if p]))
        part = top
        for key in where[:-1]:
            part = part[key]
        part[where[-1]] = data.draw(VALUES)
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps(top))
    used_or_refused(path)


@QUIET
@hypothesis.given(st.binary(max_size=200) | st.text(max_size=200).map(lambda s: s.encode("utf-8", "replace")))
def test_any_bytes(tmp_path, content):
    for name in ("boxes.json", "jobs.csv"):
        (tmp_path / name).write_bytes(content)
    used_or_refused(tmp_path / "boxes.json")
    try:
        read_jobs(tmp_path / "jobs.csv")
    except UserError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("name", ["x.pth", "x.npy", "x.npz", "x.txt"])
@QUIET
@hypothesis.given(st.binary(max_size=200), st.sampled_from([b"", b"\x80\x02", b"\x93NUMPY\x01\x00v\x00{", b"1 2 "]))
def test_any_bytes_for_points_and_weights(tmp_path, name, content, start):
    path = tmp_path / name
    path.write_bytes(start + content)
    for read in (read_points, read_checkpoint):
        try:
            read(path)
        except UserError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)

"""Whatever a file holds, it is used or refused in one line: a boxes.json with parts replaced by anything, raw bytes."""

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from core.config import UserError
from core.weights import read_checkpoint
from tools.batch import read_jobs
from tools.convert import read_points
from trajectory import load_trajectory

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
load_boxes = partial(load_trajectory, image_size=(48, 48), num_frames=9)
QUIET = hypothesis.settings(
    max_examples=200, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)


def places(value):
    """Every place in a JSON value: what holds it, and its key there."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from places(inner)


def used_or_refused(read: Callable, path: Path) -> None:
    try:
        read(path)
    except UserError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error) and len(str(error)) < 1000


@QUIET
@hypothesis.given(st.data())
def test_any_part_of_a_boxes_json_may_be_anything(tmp_path, data):
    top = copy.deepcopy(GOOD)
    for _ in range(data.draw(st.integers(1, 3))):
        holder, key = data.draw(st.sampled_from(list(places(top))))
        holder[key] = data.draw(VALUES)
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps(top))
    used_or_refused(load_boxes, path)


READERS = {"boxes.json": (load_boxes,), "jobs.csv": (read_jobs,)}
READERS |= dict.fromkeys(("x.pth", "x.npy", "x.npz", "x.txt"), (read_points, read_checkpoint))
STARTS = (b"", b"\x80\x02", b"\x93NUMPY\x01\x00v\x00{", b"1 2 ")


@pytest.mark.parametrize("name", READERS)
@QUIET
@hypothesis.given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode), st.sampled_from(STARTS))
def test_any_bytes(tmp_path, name, content, start):
    path = tmp_path / name
    path.write_bytes(start + content)
    for read in READERS[name]:
        used_or_refused(read, path)

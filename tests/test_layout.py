"""Who imports whom: every room from those below it alone, and nobody in a circle."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

ROOMS = ("core", "wan", "toy", "tools")
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for folder in (ROOT, *(ROOT / room for room in ROOMS))
    for path in sorted(folder.glob("*.py"))
}
SCRIPTS = {name for name in FILES if "." not in name}
# What a room may import, besides itself: rooms, and modules beside them.
ALLOWED = {"core": set(), "wan": {"core"}, "toy": {"core", *SCRIPTS} - {"data"}, "tools": {"core", "wan", *SCRIPTS}}


def imports(path: Path) -> set[str]:
    """The project's modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & FILES.keys()) or {node.module}
    return found & FILES.keys() | {name for name in found if name in ROOMS}


def test_the_rooms_hold_what_they_should():
    assert {
        "adapter", "data", "discriminator", "distill_fast", "finetune_hybrid", "flow", "model", "sample",
        "train_slow_adapter", "trajectory",
    } == SCRIPTS  # fmt: skip
    assert {name.partition(".")[0] for name in FILES if "." in name} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_what_lies_below_it_alone(room):
    for name, path in FILES.items():
        if name.startswith(f"{room}."):
            used = {other.partition(".")[0] for other in imports(path)}
            assert used <= {room, *ALLOWED[room]}, name


def test_nobody_imports_in_a_circle():
    order = list(TopologicalSorter({name: imports(path) for name, path in FILES.items()}).static_order())
    assert order.index("core.config") < order.index("model") < order.index("adapter") < order.index("sample")


def test_the_method_reads_nothing_of_the_tools_but_the_table_and_the_page_of_sample():
    for name in SCRIPTS:
        used = {other for other in imports(FILES[name]) if other.startswith("tools")}
        assert used == ({"tools.batch", "tools.serve"} if name == "sample" else set()), name


def test_stage_3_is_short_with_all_that_it_imports():
    code = "import sys, finetune_hybrid\nfor m in sys.modules.values(): print(getattr(m, '__file__', None))"
    listed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    own = set(map(Path, listed.splitlines())) & set(FILES.values())
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in own) <= 4600
    loaded = {name for name, path in FILES.items() if path in own and name.startswith("wan.")}
    assert loaded == {"wan.__init__", "wan.published"}

"""Who imports whom: every room from those below it alone, and nobody in a circle."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

from conftest import ROOT

ROOMS = ("core", "wan", "toy", "tools")
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for folder in (ROOT, *(ROOT / room for room in ROOMS))
    for path in sorted(folder.glob("*.py"))
}
SCRIPTS = {name for name in FILES if "." not in name}
# What a room may import, besides itself: rooms, and modules beside them.
ALLOWED = {"core": set(), "wan": {"core", "flow"}, "toy": {"core", *SCRIPTS} - {"data"}}
ALLOWED["tools"] = {"core", "wan", *SCRIPTS}


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


def test_everybody_imports_what_lies_below_alone_and_nobody_in_a_circle():
    """The method reads nothing of the tools but the table and the page of sample."""
    used = {name: imports(path) for name, path in FILES.items()}
    for name, others in used.items():
        room, inside, _ = name.partition(".")
        if inside:
            assert {other.partition(".")[0] for other in others} <= {room, *ALLOWED[room]}, name
        else:
            tools = {other for other in others if other.startswith("tools")}
            assert tools == ({"tools.batch", "tools.serve"} if name == "sample" else set()), name
    order = list(TopologicalSorter(used).static_order())
    assert order.index("core.config") < order.index("model") < order.index("adapter") < order.index("sample")


def test_stage_3_is_short_with_all_that_it_imports():
    code = "import sys, finetune_hybrid\nfor m in sys.modules.values(): print(getattr(m, '__file__', None))"
    listed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    own = set(map(Path, listed.splitlines())) & set(FILES.values())
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in own) <= 4350
    loaded = {name for name, path in FILES.items() if path in own and name.startswith("wan.")}
    assert loaded == {"wan.__init__", "wan.published"}

"""Every command and every figure of the pages is real."""

import ast
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, start_in

from adapter import AdapterConfig, ResNetAdapter
from core import tables
from core.config import parse_config
from core.weights import save_network
from model import DiTConfig, VideoDiT
from toy.evaluate import VARIANTS

PAGES = ("README.md", "docs/RESULTS.md", "docs/SPEED.md", "docs/WAN.md", "docs/SCALE.md", "docs/FORMATS.md",
         "checkpoints/small/README.md")  # fmt: skip
# Small networks are trained instead of the shipped ones, which sample.py and evaluate read; stage 3 keeps its backbone.
SMALL = "--generator small/slow_generator.safetensors --init small/slow_adapter.safetensors"
# What makes a command short, by how it begins. Later flags win.
SHORT = {
    "make test": "--dry-run",  # this is what runs it
    "python sample.py": "--steps 2",
    "torchrun --nproc_per_node=2 sample.py": "--steps 2",
    "python -m toy.evaluate": "--videos 2 --steps 2 --compile false --out runs/e/rows.json --weights small",
    "python -m toy.train_codec": "--steps 2 --batch 2 --sample_every 0",
    "python -m toy.train_slow_generator": "--steps 2 --batch 2 --compile false --init small --sample_every 0",
    "python train_slow_adapter.py": f"--steps 2 --mask_steps 1 --batch 2 --compile false {SMALL}",
    "torchrun --nproc_per_node=2 train_slow_adapter.py":
        f"--steps 2 --mask_steps 1 --batch 2 --compile false {SMALL} --sample_every 0 --name t",
    "python distill_fast.py": "--steps 2 --ratio 2 --batch 1 --compile false --sample_every 0"
        " --generator small/slow_generator.safetensors",
    "python finetune_hybrid.py": "--steps 2 --ratio 2 --diffusion_first 0 --adapter_start 0 --batch 1 --compile false"
        " --sample_every 0 --generator small/fast_generator.safetensors --adapter small/slow_adapter.safetensors",
}  # fmt: skip


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def prose(page: str) -> str:
    """A page in one line: where its lines break says nothing."""
    return " ".join(text(page).split())


def commands(page: str, language: str) -> list[str]:
    """Of the blocks in this language, in order: without comments, and those over several lines in one."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", text(page), flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    return [line for line in (re.sub(r"(^|\s+)#.*", "", line).strip() for line in lines) if line]


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def clone(tmp_path):
    """What a user gets, and the packages of these tests in its .venv, as `make` would have installed them."""
    folder = tmp_path / "clone"
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and not name.startswith("tests/") and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    (folder / ".venv").mkdir()
    for entry in Path(sys.prefix).iterdir():
        if entry.name not in ("ready", "ready-dev"):
            (folder / ".venv" / entry.name).symlink_to(entry)
    if not (folder / ".venv/bin/activate").exists():  # an interpreter without an environment of its own
        (folder / ".venv/bin").unlink()
        (folder / ".venv/bin").mkdir()
        for entry in Path(sys.prefix, "bin").iterdir():
            (folder / ".venv/bin" / entry.name).symlink_to(entry)
        (folder / ".venv/bin/activate").write_text(f'PATH="{folder}/.venv/bin:$PATH"\n')
    for stamp in ("ready", "ready-dev"):
        (folder / ".venv" / stamp).touch()
    generator = VideoDiT(DiTConfig(32, 64, 2, 2, text_dim=64, text_tokens=32, channels=24))
    adapter = ResNetAdapter(AdapterConfig(32, 2, hidden=16, channels=24))
    networks = {
        f"{speed}{kind}": net
        for speed in ("Slow", "Fast")
        for kind, net in (("Generator", generator), ("Adapter", adapter))
    }
    for name, net in networks.items():
        path = folder / "small" / f"{re.sub('(?<!^)(?=[A-Z])', '_', name).lower()}.safetensors"
        save_network(path, name, net.config, net.state_dict())
    return folder


def shortened(command: str) -> str:
    """The command, with what makes it short behind it."""
    short = max((begin for begin in SHORT if command.startswith(begin)), key=len, default=None)
    known = command in ("make demo", "source .venv/bin/activate") or command.startswith("python -m tools.convert")
    assert short or known or command.startswith("python -m toy.world"), f"{command}: not in the table"
    return command if short is None or "--help" in command else f"{command} {SHORT[short]}"


def test_commands_of_the_front_page_run_as_printed_in_a_fresh_shell(clone):
    """All of them, one after another in one shell."""
    listed, script = commands("README.md", "sh"), ["set -e"]
    for command in listed:
        script += [f"echo {shlex.quote(f'$ {command}')}", shortened(command)]
    environment = ["env", "-i", f"HOME={clone.parent}", "PATH=/usr/bin:/bin", "OMP_NUM_THREADS=1"]  # others work, too
    environment.append(
        f"XDG_CACHE_HOME={os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'}"
    )  # the world's pictures
    job = subprocess.run(
        [*environment, "bash", "-c", "\n".join(script)], cwd=clone, capture_output=True, text=True, timeout=900
    )
    reached = [line.removeprefix("$ ") for line in job.stdout.splitlines() if line.startswith("$ ")]
    assert job.returncode == 0, f"{reached[-1:]} failed: {job.stderr[-3000:]}"
    assert reached == listed
    assert {"sample.mp4", "seed1.mp4", "slow.mp4"} <= {path.name for path in (clone / "out").iterdir()}
    assert "pytest" in job.stdout and "pip" not in job.stdout  # make test would run the tests, and install nothing


@pytest.mark.parametrize("page", [page for page in PAGES[1:] if commands(page, "sh")])
def test_commands_of_the_other_pages_run_one_after_another(page, clone):
    """In processes that need not start anew, as Python and torchrun would start them."""
    start = start_in(clone)
    for command in commands(page, "sh"):
        words, processes = shlex.split(shortened(command)), 1
        if words[0] == "torchrun":
            processes = int(words.pop(1).removeprefix("--nproc_per_node="))
        script, *flags = words[2:] if words[1] == "-m" else words[1:]
        job = start(script, *flags, processes=processes)
        assert job.returncode == 0, f"{command} failed: {job.stderr[-3000:]}"


def quoted(page: str) -> list[str]:
    """Commands within sentences, but those with places to fill in."""
    found = [" ".join(code.split()) for code in re.findall(r"`((?:python|torchrun) [^`]+)`", text(page))]
    return [command for command in found if "..." not in command and "<" not in command]


def parsed(command: str) -> bool:
    """Hand a command's flags to its script, or say that it is no script of this project's."""
    words = shlex.split(command)
    words = words[words.index("torchrun") :] if "torchrun" in words else words
    if words[0] not in ("python", "torchrun"):
        return False
    if words[1] == "-c":  # a line of Python, which must be one
        return bool(ast.parse(words[2]))
    while words[1].startswith("--"):  # torchrun's own
        words.pop(1)
    name = words[2] if words[1] == "-m" else words[1].removesuffix(".py")
    flags = words[3:] if words[1] == "-m" else words[2:]
    if name.startswith("tests/"):
        return (ROOT / f"{name}.py").is_file()
    script = importlib.import_module(name)
    presets = {"wan5b": script.WAN5B} if hasattr(script, "WAN5B") else {}
    positional = re.findall(r'run_script\(.*positional="(\w+)"', Path(script.__file__).read_text(encoding="utf-8"))
    if "--help" not in flags:
        assert isinstance(parse_config(script.Config, flags, presets, "".join(positional)), script.Config)
    return True


@pytest.mark.parametrize("page", PAGES)
def test_commands_that_need_more_than_a_test_has_are_well_formed(page):
    """They need published weights or GPUs: each is one that its script takes."""
    foreign = [command for command in (*commands(page, "bash"), *quoted(page)) if not parsed(command)]
    assert all(command.startswith(("pip install ", "hf download ", "export ", "srun ")) for command in foreign), foreign


def test_make_ablation_makes_every_run_of_its_table():
    command = ["make", "--dry-run", "--always-make", "ablation"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    shown = re.sub(r"\\\n\s*", "", shown)
    steps = re.findall(r"^\S+(python .* --(?:name|ablation) .*)", shown, flags=re.MULTILINE)
    assert all(parsed(step) for step in steps)
    made = sorted(re.findall(r"--name (\S+)", " ".join(steps)))
    assert made == sorted(f"ablation/{variant}_{seed}" for variant in VARIANTS for seed in range(3))
    assert steps[-1].endswith("--out results/ablation.json")


def test_commands_in_slurm_files_are_well_formed():
    found = re.findall(r"srun bash -c '(.*?)'", re.sub(r"\\\n\s*", "", text("docs/SCALE.md")), flags=re.DOTALL)
    assert found and all(parsed(command) for command in found)


def test_code_on_the_pages_is_code():
    for page in PAGES:
        for block in re.findall(r"^```json\n(.*?)^```", text(page), flags=re.DOTALL | re.MULTILINE):
            assert json.loads(block)
        for block in re.findall(r"^```python\n(.*?)^```", text(page), flags=re.DOTALL | re.MULTILINE):
            assert ast.parse(block)


# --- figures ----------------------------------------------------------------------------------------------------------


def results(name: str) -> list[dict]:
    return json.loads((ROOT / "results" / f"{name}.json").read_text())


def test_pages_show_no_table_of_results_that_are_not_committed():
    """Tables of networks, with a row of the true video, are those of `results/`: today there are none."""
    made = [tables.markdown(results(file.stem)) for file in (ROOT / "results").glob("evaluate*.json")]
    for page in ("README.md", "docs/RESULTS.md"):
        whole = text(page)
        for table in made:
            whole = whole.replace(table, "")
        assert "| true video |" not in whole and "| SlowGenerator" not in whole, page


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 8192


def test_boxes_on_photographs_are_those_of_the_committed_picture():
    rows = results("photographs")
    assert len(rows) == 12 and len({row["photograph"] for row in rows}) == 9  # as the page says
    assert all(set(row["boxes"]) == {"0", "8"} for row in rows)
    assert all((ROOT / f"results/photographs.{kind}").exists() for kind in ("png", "gif"))


def test_speed_is_the_committed_one_and_ahead_everywhere():
    rows, page = results("bench-cpu"), prose("docs/SPEED.md")
    assert tables.markdown(rows, tables.three_digits) == (ROOT / "results/bench-cpu.md").read_text().strip()
    compared = ("DiT", "4 steps", "VAE", "attention")
    beside = [row for row in rows if row["name"].startswith(compared) and row["reference"]]
    assert len(beside) == 14 and tables.markdown(beside, tables.three_digits) in text("docs/SPEED.md")
    assert all(row["ratio"] < 1 for row in beside)
    ratio = {(row["name"], row["dtype"], row["compiled"]): row["ratio"] for row in rows}
    for fused in ("", ", reference fused"):
        assert ratio[f"DiT forward{fused}", "float32", False] <= 0.93
        assert ratio[f"DiT forward{fused}", "bfloat16", True] <= 0.85
    assert ratio["4 steps with adapter", "bfloat16", True] <= 0.8
    assert ratio["VAE decode", "bfloat16", False] <= 0.8
    assert ratio["VAE decode, peak memory", "bfloat16", False] <= 0.6
    flat = [row["ours"] for row in rows if "piece by piece" in row["name"]]
    assert len(flat) == 2 and max(flat) <= 1.01 * min(flat)
    growth = next(row["ratio"] for row in rows if row["name"].startswith("block: b / a"))
    assert 0.8 < growth < 1.25 and f"the ratio of both terms is {growth:.2f} of the predicted" in page
    error = next(row["ours"] for row in rows if row["name"] == "--memory low: error of a forward pass")
    assert f"`low` differs by a relative {error:.2f}" in prose("docs/WAN.md")


def test_one_gpu_is_the_committed_one():
    rows, page = results("bench-h200"), text("docs/SPEED.md")
    assert tables.markdown(rows, tables.three_digits) == (ROOT / "results/bench-h200.md").read_text().strip()
    assert tables.markdown(rows, tables.three_digits) in page
    row = {row["name"]: row for row in rows}
    learned = row["step of stage 1, resnet"]
    took = [row[name]["seconds"] for name in ("4 steps, resnet, compiled", "VAE encode", "VAE decode")]
    assert row["encode, 4 steps with resnet, decode"]["seconds"] == pytest.approx(sum(took))
    assert f"| four steps | 4.0 s | {took[0]:.2f} s |" in page and f"| decoding | 3.0 s | {took[2]:.2f} s |" in page
    assert f"| encoding, four steps, decoding | 8 s | {sum(took):.2f} s |" in page
    assert f"| stage 1 | 33% of the peak | {learned['share_of_peak']:.0%} |" in page
    assert f"took {learned['GB']:.1f} GB" in prose("docs/SCALE.md")
    held = [row[name]["GB"] for name in ("4 steps, resnet, compiled", "VAE encode", "VAE decode")]
    held += [gb for name, gb in ((r["name"], r["GB"]) for r in rows) if name.startswith("--memory low, resnet: decode")]
    said = "four steps took {:.1f} GB, encoding {:.1f} GB and decoding {:.1f} GB, or {:.1f} GB in squares"
    assert said.format(*held) in prose("docs/WAN.md") and max(held) < 18 and max(held[1], held[3]) < 11


def test_compiled_steps_are_the_committed_ones():
    rows = results("steps-cpu")
    assert tables.markdown(rows, tables.three_digits) in text("docs/SPEED.md")
    ratios = {row["name"][len("step of ") :][:7]: row["ratio"] for row in rows}
    assert ratios["stage 1"] < 0.95 and ratios["stage 3"] < 0.95 and 0.9 < ratios["stage 2"] < 1.1


def test_memory_of_the_real_model_is_the_committed_one():
    cost = json.loads((ROOT / "results/wan5b-cpu.json").read_text())
    page, peak, low = prose("docs/WAN.md"), max(cost["peak_gib"].values()), cost["low"]["peak_gib"]
    assert peak < 14 and f"a peak of {peak:.1f} GiB" in page
    prompt, low = low["encode prompt"], max(value for part, value in low.items() if part != "encode prompt")
    assert low < 9 and f"`--memory low` of {low:.1f} GiB" in page and f"({prompt:.1f} GiB while" in page


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of a page's headings."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", [*PAGES, "docs/LOG.md"])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", text(page)):
        file, _, anchor = target.partition("#")
        place = (ROOT / page).parent / file if file else ROOT / page
        assert target.startswith("https://") or place.exists(), target
        assert target.startswith("https://") or not anchor or anchor in anchors(place), target


def test_memory_at_scale_is_what_its_formula_gives():
    """2 bytes of a frozen parameter, 20 of a trained one (16 of the fake score), over W; the rest over S."""
    rows = {}
    for line in text("docs/SCALE.md").partition("## Rehearsed")[0].splitlines():
        if line.endswith(" GB |"):
            stage, _, _, kept, *cells = line.strip("| ").split(" | ")
            rows[stage] = (sum(map(int, kept.split(" + "))), [int(cell.removesuffix(" GB")) for cell in cells])
    generator, resnet, control, classifier = 5.000e9, 0.018e9, 5.283e9, 0.068e9
    held = {
        "1, ResNet": 2 * generator + 20 * resnet,
        "1, ControlNet": 2 * generator + 20 * control,
        "2": (2 + 20 + 16) * generator,
        "3, ResNet": 4 * generator + 20 * (resnet + classifier),
        "3, ControlNet": 4 * generator + 20 * (control + classifier),
    }
    assert rows.keys() == held.keys()
    for stage, (kept, cells) in rows.items():
        activations = kept * 2 * 27280 * 3072 * 30 + 5e9
        for (gpus, share), cell in zip(((1, 1), (4, 1), (4, 4), (8, 1), (8, 8)), cells, strict=True):
            assert cell == round((held[stage] / gpus + activations / share + 0.7e9) / 1e9)

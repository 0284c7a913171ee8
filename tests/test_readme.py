"""Every command and every figure of the pages is real."""

import ast
import importlib
import json
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
from toy.evaluate import VARIANTS, over_seeds

PAGES = ("README.md", "docs/RESULTS.md", "docs/SPEED.md", "docs/WAN.md", "docs/SCALE.md", "docs/FORMATS.md",
         "docs/PICTURES.md", "checkpoints/tiny/README.md", "checkpoints/pictures/README.md")  # fmt: skip
# Small networks are trained instead of the shipped ones, which sample.py and evaluate read; stage 3 keeps its backbone.
SMALL = "--generator small/slow_generator.safetensors --init small/slow_adapter.safetensors"
# What makes a command short, by how it begins. Later flags win.
SHORT = {
    "make test": "--dry-run",  # this is what runs it
    "python sample.py": "--steps 2",
    "torchrun --nproc_per_node=2 sample.py": "--steps 2",
    "python -m toy.evaluate": "--videos 2 --steps 2 --batch 2 --compile false --out runs/e/rows.json"
        " --slow_generator small/slow_generator.safetensors --slow_adapter small/slow_adapter.safetensors"
        " --fast_generator small/fast_generator.safetensors --fast_adapter small/fast_adapter.safetensors",
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
    generator = VideoDiT(DiTConfig(32, 64, 2, 2, text_dim=64, text_tokens=32, channels=16))
    adapter = ResNetAdapter(AdapterConfig(32, 2, hidden=16, channels=16))
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
    presets = {n: getattr(script, n.upper()) for n in ("pictures", "wan5b") if hasattr(script, n.upper())}
    positional = re.findall(r'run_script\(.*positional="(\w+)"', Path(script.__file__).read_text(encoding="utf-8"))
    if "--help" not in flags:
        assert isinstance(parse_config(script.Config, flags, presets, "".join(positional)), script.Config)
    return True


@pytest.mark.parametrize("page", PAGES)
def test_commands_that_need_more_than_a_test_has_are_well_formed(page):
    """They need published weights or GPUs: each is one that its script takes."""
    foreign = [command for command in (*commands(page, "bash"), *quoted(page)) if not parsed(command)]
    assert all(command.startswith(("pip install ", "hf download ", "export ", "srun ")) for command in foreign), foreign


@pytest.mark.parametrize("preset", ["pictures", "tiny"])
def test_make_ablation_makes_every_run_of_its_table(preset):
    command = ["make", "--dry-run", "--always-make", "ablation", f"PRESET={preset}"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    shown = re.sub(r"\\\n\s*", "", shown)
    steps = re.findall(r"^\S+(python .* --preset .*)", shown, flags=re.MULTILINE)
    assert all(parsed(step) for step in steps)
    made = sorted(re.findall(r"--name (\S+)", " ".join(steps)))
    assert made == sorted(f"ablation/{preset}/{variant}_{seed}" for variant in VARIANTS for seed in range(3))
    assert f"--out results/{preset}-ablation.json" in steps[-1]


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


@pytest.mark.parametrize("name", ["pictures", "pictures-photographs"])
def test_the_tables_of_pictures_are_the_results(name):
    assert tables.markdown(results(name)) in text("docs/PICTURES.md")
    rows = {row["name"]: row for row in results(name) if row["objects"] == "all"}
    still, fast = rows["the first frame, still"], rows["FastGenerator + FastAdapter"]
    pasted, slow = rows["cut out and pasted"], rows["SlowGenerator + SlowAdapter"]
    true = rows["true video"]
    assert fast["mask_iou"] > 0.8 * true["mask_iou"] and fast["box_iou"] > 0.77 * true["box_iou"]
    assert fast["thing_error"] < min(still["thing_error"] / 4, pasted["thing_error"])
    assert fast["mask_iou"] > slow["mask_iou"] and fast["fvd"] < slow["fvd"]
    assert fast["prompt_accuracy"] > 0.9 * true["prompt_accuracy"]
    assert fast["fvd"] < pasted["fvd"]  # "nearer to the true videos than pasting"
    if name == "pictures":  # "as sharp as they should be", and "in box IoU the full method reaches as far"
        assert fast["videos"] >= 256 and 0.9 <= fast["sharpness"] <= 1.1
        assert fast["box_iou"] > rows["true things, holes filled by blur"]["box_iou"] - 0.005
    else:  # within a fifth of the world of dead leaves
        world = next(row for row in results("pictures") if row["name"] == fast["name"])
        assert all(fast[key] > 0.8 * world[key] for key in ("mask_iou", "box_iou", "ground_psnr", "sharpness"))
    a_step = slow["seconds_per_video"] / slow["steps"]
    assert fast["seconds_per_video"] < 50 * a_step / 10


def test_four_steps_stand_beside_fifty():
    at = {row["name"]: row for row in results("pictures-slow") if row["objects"] == "all"}
    slow, fast = at["SlowGenerator + SlowAdapter"], at["FastGenerator + FastAdapter"]
    shown = [at[name] for name in ("true video", "cut out and pasted", slow["name"], fast["name"])]
    assert tables.markdown(shown) in text("docs/PICTURES.md")
    ratio = slow["seconds_per_video"] / fast["seconds_per_video"]
    assert (slow["steps"], fast["steps"]) == (50, 4) and 11.5 < ratio < 12.5
    assert fast["mask_iou"] > slow["mask_iou"] and fast["box_iou"] > slow["box_iou"] and fast["fvd"] < slow["fvd"]
    assert round(100 * fast["thing_error"] / slow["thing_error"]) == 104


def test_the_readme_is_short_and_its_table_is_the_committed_one():
    assert len((ROOT / "README.md").read_bytes()) <= 8192
    rows = {row["name"]: row for row in results("pictures") if row["objects"] == "all"}
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text("README.md").splitlines()]
    quotes = [line for line in lines if line[0] in rows]
    assert {"SlowGenerator + SlowAdapter", "FastGenerator + FastAdapter"} <= {line[0] for line in quotes}
    head = next(line for line in lines if line[0] == "name")
    other = {"distance": "fvd", "seconds": "seconds_per_video"}  # words of the page for a measure's name
    keys = [other.get(cell, cell.lower().replace(" ", "_")) for cell in head]
    assert len(quotes) <= 7 and {"steps", "mask_iou", "box_iou"} <= set(keys)
    for name, *cells in quotes:
        for key, cell in zip(keys[1:], cells, strict=True):
            value = rows[name][key]
            assert cell == ("" if value is None else str(value)), (name, key)


def test_results_table_is_the_committed_one():
    rows = results("tiny")
    assert tables.markdown(rows) in text("docs/RESULTS.md")
    by_name = {(row["name"], row["objects"]): row for row in rows}
    alone, slow, fast = (
        by_name[name, "all"] for name in ("SlowGenerator", "SlowGenerator + SlowAdapter", "FastGenerator + FastAdapter")
    )
    assert slow["mask_iou"] > alone["mask_iou"] and slow["box_iou"] > alone["box_iou"]  # the adapter does the work
    assert alone["mask_iou"] < 0.5
    assert slow["videos"] >= 256 and slow["mask_iou"] >= 0.88 and slow["box_iou"] >= 0.88
    assert 0.9 <= slow["sharpness"] <= 1.1 and slow["prompt_accuracy"] >= 0.9
    assert 0.1 < slow["clockwise_when_untold"] < 0.9  # where captions don't tell, both directions appear
    assert slow["steps"] == 50 and fast["steps"] == 4 and fast["fvd"] <= slow["fvd"]
    assert 0.9 <= fast["sharpness"] <= 1.1
    assert fast["mask_iou"] >= slow["mask_iou"] - 0.02 and fast["box_iou"] >= slow["box_iou"] - 0.02
    assert fast["seconds_per_video"] <= slow["seconds_per_video"] / 10
    assert {(way["name"], n) for way in (slow, fast) for n in (1, 2, 3)} <= by_name.keys()


def test_what_the_log_says_of_guidance_is_in_its_results():
    rows = results("guidance")
    assert tables.markdown(rows) == (ROOT / "results/guidance.md").read_text().strip()
    entry = text("docs/LOG.md").partition("The adapter in both branches of guidance\n\n")[2].partition("\n## ")[0]
    lines = [line.strip("|").split("|") for line in entry.splitlines() if line.startswith("| ")][1:]
    assert len(lines) == len(rows) == 6 and all(row["videos"] >= 64 for row in rows)
    for (_, *said), row in zip(lines, rows, strict=True):
        digits = (("mask_iou", 3), ("box_iou", 3), ("sharpness", 2), ("fvd", 2))
        assert [float(cell) for cell in said] == [pytest.approx(row[key], abs=0.51 * 10**-n) for key, n in digits]
    first_alone, both = rows[1], rows[2]
    assert both["sharpness"] < first_alone["sharpness"] - 0.5


def test_ablation_table_is_the_committed_one_and_says_what_the_page_says():
    rows, page = results("ablation"), text("docs/RESULTS.md")
    assert tables.markdown([row for row in rows if row["steps"] >= 4]) in page
    assert tables.markdown(rows) == (ROOT / "results/ablation.md").read_text().strip()
    assert all(row["videos"] >= 256 and row["seeds"] == 3 for row in rows if "hybrid" in row["name"])
    at = {n: {row["name"]: row for row in rows if row["steps"] == n} for n in (4, 2, 1)}
    full, no_gan = "FlashMotion: hybrid, decaying scale", "hybrid without GAN loss"
    as_is, no_video = "FastGenerator + SlowAdapter", "discriminator without video attention"
    for table in at.values():  # every bound outside the range of seeds
        assert table["hybrid without diffusion loss"]["mask_iou_range"][1] < table[full]["mask_iou_range"][0] - 0.03
        assert table[no_gan]["sharpness_range"][1] < table[full]["sharpness_range"][0] - 0.05
        assert table[no_gan]["fvd_range"][0] > 1.5 * table[full]["fvd_range"][1]
        assert table[as_is]["mask_iou"] < table[full]["mask_iou_range"][0]
        assert table[as_is]["box_iou"] < table[full]["box_iou_range"][0]
    assert at[4][no_gan]["fvd"] > 2 * at[4][full]["fvd"]
    assert at[1][as_is]["fvd"] > 1.5 * at[1][full]["fvd_range"][1]
    assert f"({at[1][as_is]['fvd']:.2f} against {at[1][full]['fvd']:.2f})" in prose("docs/RESULTS.md")
    assert all(at[n][as_is]["fvd"] < at[n][full]["fvd"] for n in (4, 2))  # other than in the paper: the page says so
    scales = {scale: at[4][f"hybrid, {scale} scale"] for scale in ("constant", "growing")} | {"decaying": at[4][full]}
    crisp = {scale: row["sharpness_range"] for scale, row in scales.items()}
    assert [scale for scale, (low, high) in crisp.items() if low >= 0.9 and high <= 1.1] == ["decaying"]
    assert crisp["constant"][1] == pytest.approx(1.3, abs=0.02)  # "up to 30% too crisp"
    for score in ("mask_iou", "box_iou"):
        assert max(scales, key=lambda scale: scales[scale][score]) == "decaying"
    assert scales["constant"]["fvd_range"][0] < scales["decaying"]["fvd"] < scales["constant"]["fvd_range"][1]
    assert scales["growing"]["fvd_range"][1] < scales["decaying"]["fvd_range"][0]
    for score in ("mask_iou", "sharpness", "fvd"):
        for part in ("semantic", "trajectory"):
            low, high = at[4][f"discriminator without {part} attention"][f"{score}_range"]
            assert low < at[4][full][f"{score}_range"][1] and high > at[4][full][f"{score}_range"][0], (part, score)
        ranges = [at[4][name][f"{score}_range"] for name in (no_video, no_gan)]
        assert max(low for low, _ in ranges) < min(high for _, high in ranges), score


def test_the_ablation_of_the_pictures_is_the_committed_one_and_says_what_the_page_says():
    runs = results("pictures-ablation")
    rows, page = over_seeds(runs), text("docs/PICTURES.md")
    assert tables.markdown([row for row in rows if row["steps"] >= 4]) in page
    assert tables.markdown(rows) == (ROOT / "results/pictures-ablation.md").read_text().strip()
    assert len({(row["command"], row["networks"]) for row in runs}) == 1 and all(row["videos"] >= 64 for row in rows)
    at = {n: {row["name"]: row for row in rows if row["steps"] == n} for n in (4, 2, 1)}
    full, no_gan = at[4]["FlashMotion: hybrid, decaying scale"], at[4]["hybrid without GAN loss"]
    no_diffusion, as_is = at[4]["hybrid without diffusion loss"], at[4]["FastGenerator + SlowAdapter"]
    variants = [row for name, row in at[4].items() if name.startswith(("FlashMotion", "hybrid", "discriminator"))]
    assert len(variants) == 8 and all(row["seeds"] == 3 for row in variants)
    assert [at[4][f"{kind} applied to the adapter"]["seeds"] for kind in ("LCM", "DMD")] == [3, 3]
    assert no_diffusion["mask_iou_range"][1] < full["mask_iou_range"][0] - 0.05  # all outside the range of seeds
    assert no_diffusion["box_iou_range"][1] < full["box_iou_range"][0] - 0.03
    assert no_gan["sharpness_range"][1] < full["sharpness_range"][0] / 2
    assert no_gan["fvd_range"][0] > 3 * full["fvd_range"][1]
    assert as_is["mask_iou"] < full["mask_iou_range"][0] - 0.03 and as_is["fvd"] > 4 * full["fvd_range"][1]
    without = {part: at[4][f"discriminator without {part} attention"] for part in ("semantic", "trajectory", "video")}
    for part, row in without.items():  # no better than the full discriminator
        assert row["mask_iou_range"][0] <= full["mask_iou_range"][1], part
        assert row["fvd_range"][1] >= full["fvd_range"][0], part
    for part in ("semantic", "trajectory"):
        for one, two in ((full[key], without[part][key]) for key in full if key.endswith("_range")):  # they overlap
            assert max(one[0], two[0]) <= min(one[1], two[1]), part
    no_video = without["video"]
    assert no_video["sharpness_range"][1] < full["sharpness_range"][0] / 2 and no_video["fvd"] > 2.9 * full["fvd"]
    assert no_video["fvd_range"][0] > 2 * full["fvd_range"][1]
    constant, growing = at[4]["hybrid, constant scale"], at[4]["hybrid, growing scale"]
    assert constant["sharpness_range"][1] < full["sharpness_range"][0]
    for kind in ("mask_iou", "box_iou"):
        assert growing[f"{kind}_range"][1] < full[f"{kind}_range"][0]
    for row, percent in ((constant, 14), (growing, 7)):
        assert full["fvd_range"][1] < row["fvd_range"][0] and round(100 * row["fvd"] / full["fvd"] - 100) == percent
    assert min(at[4].values(), key=lambda row: row["fvd"]) is full
    said = prose("docs/PICTURES.md")
    assert f"mask IoU falls from {full['mask_iou']:.2f} to {no_diffusion['mask_iou']:.2f}" in said
    assert f"sharpness falls from {full['sharpness']:.2f} to {no_gan['sharpness']:.2f}" in said
    assert f"the distance grows from {full['fvd']:.2f} to {no_gan['fvd']:.2f}" in said
    assert f"mask IoU {as_is['mask_iou']:.2f}, distance {as_is['fvd']:.2f}" in said
    few = [[at[n][name]["fvd"] for n in (2, 1)] for name in (as_is["name"], full["name"])]
    assert "({:.2f} and {:.2f}; the full method {:.2f} and {:.2f})".format(*few[0], *few[1]) in said
    assert all(at[n][as_is["name"]] == min(at[n].values(), key=lambda row: row["fvd"]) for n in (2, 1))


def test_the_baselines_are_the_committed_ones_and_the_page_says_what_they_show():
    rows, page = results("baselines"), text("docs/RESULTS.md")
    shown = [row for row in rows if row["steps"] == 4 and not row["name"].startswith("Slow")]
    assert tables.markdown(shown) in page and len(shown) == 4
    assert tables.markdown(rows) == (ROOT / "results/baselines.md").read_text().strip()
    names = [f"{kind} applied to the adapter" for kind in ("LCM", "DMD")]
    full, as_is = "FlashMotion: hybrid, decaying scale", "FastGenerator + SlowAdapter"
    for n in (4, 2, 1):
        at = {row["name"]: row for row in rows if row["steps"] == n}
        assert all(at[name]["seeds"] == 3 and at[name]["videos"] >= 256 for name in (full, *names))
        lcm, dmd = (at[name] for name in names)
        for other in (lcm, dmd):
            assert at[full]["fvd_range"][1] < other["fvd_range"][0] and at[as_is]["fvd"] < other["fvd"]
            assert at[full]["fvd"] < (0.4 if n > 1 else 0.5) * other["fvd"]
        if n > 1:
            assert lcm["mask_iou_range"][1] < at[as_is]["mask_iou"] < dmd["mask_iou"] < at[full]["mask_iou"]
            assert at[full]["mask_iou"] - dmd["mask_iou"] < 0.01 and dmd["sharpness"] < 0.95
    distances = [row["fvd"] for row in rows if row["name"] == names[0]]  # in 4, 2 and 1 steps
    assert len(distances) == 3 and distances == sorted(distances)


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
    error = {row["name"]: row["ours"] for row in rows}
    assert error["--memory medium: error of a forward pass"] == 0  # "the same result to the bit"
    error, page = error["--memory low: error of a forward pass"], prose("docs/WAN.md")
    assert "the same result to the bit" in page and f"differs by a relative {error:.2f}" in page


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
    for mode in ("low", "medium"):
        parts = ("encode image and boxes", "denoise", "decode")
        held = [next(r["GB"] for r in rows if r["name"].startswith(f"--memory {mode}, resnet: {p};")) for p in parts]
        assert "{:.1f}, {:.1f} and {:.1f} GB with `{}`".format(*held, mode) in prose("docs/WAN.md")
        assert max(held) < {"low": 11, "medium": 22}[mode] * 2**30 / 1e9


def test_compiled_steps_are_the_committed_ones():
    rows = results("steps-cpu")
    assert tables.markdown(rows, tables.three_digits) in text("docs/SPEED.md")
    ratios = {row["name"][len("step of ") :][:7]: row["ratio"] for row in rows}
    assert ratios["stage 1"] < 0.95 and ratios["stage 3"] < 0.95 and 0.9 < ratios["stage 2"] < 1.1


def test_training_times_are_the_committed_ones():
    rows = results("training")
    for row in rows:
        assert f"stage {row['stage']} took {row['seconds'] / 60:.0f} minutes" in prose("README.md")
    assert [row["stage"] for row in rows] == [1, 2, 3] and sum(row["seconds"] for row in rows) < 6 * 3600
    assert rows[0]["mask_iou"] >= 0.88
    assert f"comes to a mask IoU of {rows[0]['mask_iou']:.3f}" in prose("docs/RESULTS.md")


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


@pytest.mark.parametrize("page", PAGES)
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

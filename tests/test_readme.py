"""Every command and every figure on the pages is real."""

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

import nets
import pytest
from conftest import ROOT, start_in

from core import tables
from core.config import parse_config
from tools.bench import three_digits
from toy.evaluate import VARIANTS

DOCS = [f"docs/{name}.md" for name in ("RESULTS", "SPEED", "WAN", "SCALE", "FORMATS")]
PAGES = ["README.md", *DOCS, "checkpoints/small/README.md"]
TRAIN = "--steps 2 --batch 2 --sample_every 0"
SLOW, FAST = (f"{TRAIN} --compile false --generator small/{speed}_generator.safetensors" for speed in ("slow", "fast"))
# Flags that make a command short, by how it begins; later flags win. In small/ are tiny networks.
SHORT = {
    **dict.fromkeys(("make demo", "source .venv/bin/activate", "python -m tools.convert", "python -m toy.example"), ""),
    "make test": "--dry-run",  # this test is part of it
    **dict.fromkeys(("python sample.py", "torchrun --nproc_per_node=2 sample.py"), "--steps 2 --weights small"),
    "python -m toy.evaluate": "--videos 2 --steps 2 --compile false --out runs/e/rows.json --weights small",
    **dict.fromkeys(("python -m toy.train_codec", "python -m toy.train_segmenter"), "--steps 2"),
    "python -m toy.train_slow_generator": "--steps 2 --batch 2 --compile false --init small",
    "python train_slow_adapter.py": f"{SLOW} --init small/slow_adapter.safetensors --mask_steps 1",
    "torchrun --nproc_per_node=2 train_slow_adapter.py":
        f"{SLOW} --init small/slow_adapter.safetensors --mask_steps 1 --name t",
    "python distill_fast.py": SLOW,
    "python finetune_hybrid.py":  # with the shipped backbone
        f"{FAST} --adapter small/slow_adapter.safetensors --diffusion_first 0 --adapter_start 0",
}  # fmt: skip


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def prose(page: str) -> str:
    """A page without its line breaks."""
    return " ".join(text(page).split())


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text(page), flags=re.DOTALL | re.MULTILINE)


def commands(page: str, language: str) -> list[str]:
    """The commands in blocks of this language, in order, without comments and continued lines joined."""
    lines = [line for block in blocks(page, language) for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    return [line for line in (re.sub(r"(^|\s+)#.*", "", line).strip() for line in lines) if line]


@pytest.fixture
def clone(tmp_path):
    """A user's checkout, with this interpreter's packages in its .venv as if `make` had installed them."""
    folder = tmp_path / "clone"
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and not name.startswith("tests/") and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    environment = folder / ".venv"
    (environment / "bin").mkdir(parents=True)
    for own, content in (("bin/activate", f'PATH="{environment}/bin:$PATH"\n'), ("ready", ""), ("ready-dev", "")):
        (environment / own).write_text(content)
    for entry in (*Path(sys.prefix).iterdir(), *Path(sys.prefix, "bin").iterdir()):
        if not (link := environment / entry.relative_to(sys.prefix)).exists():
            link.symlink_to(entry)
    kinds = {"generator": nets.generator(layers=1), "adapter": nets.adapter(layers=1)}
    nets.save(folder / "small", **{f"{speed}_{kind}": net for kind, net in kinds.items() for speed in ("slow", "fast")})
    return folder


def shortened(command: str) -> str:
    known = [begin for begin in SHORT if command.startswith(begin)]
    assert known, f"{command}: not in the table"
    return f"{command} {SHORT[max(known, key=len)]}"


def in_shell() -> list[str]:
    """Of the front page's commands the first of each form: make, python, python -m, torchrun."""
    listed = commands("README.md", "sh")
    forms = [" ".join(word for word in command.split()[:2] if not word.endswith(".py")) for command in listed]
    return [command for n, command in enumerate(listed) if forms[n] not in forms[:n]]


def test_commands_of_the_front_page_run_as_printed_in_a_fresh_shell(clone):
    listed = in_shell()
    script = [line for command in listed for line in (f"echo {shlex.quote(f'$ {command}')}", shortened(command))]
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"  # has the world's pictures
    shell = ["env", "-i", f"HOME={clone.parent}", "PATH=/usr/bin:/bin", "OMP_NUM_THREADS=1", f"XDG_CACHE_HOME={cache}"]
    shell += ["bash", "-ec", "\n".join(script)]
    job = subprocess.run(shell, cwd=clone, capture_output=True, text=True, timeout=900)
    reached = [line.removeprefix("$ ") for line in job.stdout.splitlines() if line.startswith("$ ")]
    assert job.returncode == 0, f"{reached[-1:]} failed: {job.stderr[-3000:]}"
    assert reached == listed
    assert {"sample.mp4", "sample.boxes.mp4", "seed1.mp4"} <= {p.name for p in (clone / "out").iterdir()}
    assert "pytest" in job.stdout and "pip" not in job.stdout  # make test would run the tests, and install nothing


def test_all_other_commands_of_the_pages_run_one_after_another(clone):
    """In warm processes, which spare the start of Python and torchrun."""
    start, listed = start_in(clone), [command for page in PAGES for command in commands(page, "sh")]
    for command in sorted({*listed} - {*in_shell()}, key=listed.index):
        words, processes = shlex.split(shortened(command)), 1
        if words[0] == "torchrun":
            processes = int(words.pop(1).removeprefix("--nproc_per_node="))
        script, *flags = words[2:] if words[1] == "-m" else words[1:]
        job = start(script, *flags, processes=processes)
        assert job.returncode == 0, f"{command} failed: {job.stderr[-3000:]}"
    assert (clone / "out/slow.mp4").exists()


def parsed(command: str) -> bool:
    """Parse a command's flags as its script does. False if the command is none of this project's."""
    words = shlex.split(command)
    words = shlex.split(words[-1]) if words[0] == "srun" else words  # srun bash -c '...'
    if words[0] not in ("python", "torchrun"):
        return False
    if words[1] == "-c":
        return bool(ast.parse(words[2]))
    while words[1].startswith("--"):  # torchrun's own flags
        words.pop(1)
    name, *flags = words[2:] if words[1] == "-m" else words[1:]
    name = name.removesuffix(".py")
    if name.startswith("tests/"):
        return (ROOT / f"{name}.py").is_file()
    script = importlib.import_module(name)
    presets = {"wan5b": script.WAN5B} if hasattr(script, "WAN5B") else {}
    positional = re.findall(r'run_script\(.*positional="(\w+)"', Path(script.__file__).read_text(encoding="utf-8"))
    if "--help" not in flags:
        assert isinstance(parse_config(script.Config, flags, presets, "".join(positional)), script.Config)
    return True


@pytest.mark.parametrize("page", PAGES)
def test_commands_that_need_weights_or_gpus_are_well_formed(page):
    quoted = [" ".join(code.split()) for code in re.findall(r"`((?:python|torchrun) [^`]+)`", text(page))]
    quoted = [command for command in quoted if "..." not in command and "<" not in command]  # no places to fill in
    foreign = [command for command in (*commands(page, "bash"), *quoted) if not parsed(command)]
    assert all(command.startswith(("pip install ", "hf download ", "export ")) for command in foreign), foreign


def test_make_ablation_makes_every_run_of_its_table():
    command = ["make", "--dry-run", "--always-make", "ablation"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    steps = re.findall(r"^\S+(python .* --(?:name|ablation) .*)", re.sub(r"\\\n\s*", "", shown), flags=re.MULTILINE)
    assert all(parsed(step) for step in steps)
    made = sorted(re.findall(r"--name (\S+)", " ".join(steps)))
    assert made == sorted(f"ablation/{variant}_{seed}" for variant in VARIANTS for seed in range(3))
    assert steps[-1].endswith("--out results/ablation.json")


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", [*PAGES, "docs/LOG.md"])
def test_links_lead_somewhere_and_code_is_code(page):
    assert all(map(json.loads, blocks(page, "json"))) and all(map(ast.parse, blocks(page, "python")))
    for target in re.findall(r"\]\(([^)]+)\)", text(page)):
        file, _, anchor = target.partition("#")
        place = (ROOT / page).parent / file if file else ROOT / page
        if not target.startswith("https://"):
            assert place.exists() and (not anchor or anchor in anchors(place)), target


def results(name: str) -> list[dict]:
    return json.loads(text(f"results/{name}.json"))


def table(rows: list[dict]) -> str:
    return tables.markdown(three_digits(rows))


def test_the_readme_is_short_and_says_how_much_code_there_is():
    assert len((ROOT / "README.md").read_bytes()) <= 8192
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [ROOT / name for name in listed.splitlines() if not name.startswith("tests/")]
    lines = sum(len(file.read_bytes().splitlines()) for file in files if file.exists())
    stated = int(re.search(r"[Aa]bout ([\d,]+) lines of Python", prose("README.md"))[1].replace(",", ""))
    assert abs(stated - lines) <= 100, f"README.md says {stated} lines of Python outside tests, and there are {lines}"


def test_pages_show_no_results_that_are_not_committed():
    """Tables of networks, with a row of the true video, are those of `results/`.

    Boxes on photographs are those of the committed picture.
    """
    made = [tables.markdown(results(file.stem)) for file in (ROOT / "results").glob("small*.json")]
    assert all(known in text("docs/RESULTS.md") for known in made)
    for page in map(text, ("README.md", "docs/RESULTS.md")):
        for known in made:
            page = page.replace(known, "")
        assert "| true video |" not in page and "| SlowGenerator" not in page
    rows = results("photographs")
    assert len(rows) == 12 and len({row["photograph"] for row in rows}) == 9  # as the page says
    assert all(set(row["boxes"]) == {"0", "8"} for row in rows)
    assert all((ROOT / f"results/photographs.{kind}").exists() for kind in ("png", "gif"))


def test_speed_is_the_committed_one_and_ahead_everywhere():
    rows = results("bench-cpu")
    assert table(rows) == text("results/bench-cpu.md").strip()
    beside = [row for row in rows if row["name"].startswith(("DiT", "VAE")) and row["reference"]]
    assert len(beside) == 11 and table(beside) in text("docs/SPEED.md")
    amx = results("bench-amx")
    assert table(amx) == text("results/bench-amx.md").strip() and table(amx) in text("docs/SPEED.md")
    assert all(row["ratio"] < 1 for row in (*beside, *amx))
    ratio = {(row["name"], row["dtype"], row["compiled"]): row["ratio"] for row in rows}
    for fused in ("", ", reference fused"):
        assert ratio[f"DiT forward{fused}", "float32", False] <= 0.93
        assert ratio[f"DiT forward{fused}", "bfloat16", True] <= 0.85
    assert ratio["VAE decode", "bfloat16", False] <= 0.8
    assert ratio["VAE decode, peak memory", "bfloat16", False] <= 0.6
    flat = [row["ours"] for row in rows if "piece by piece" in row["name"]]
    assert len(flat) == 2 and max(flat) <= 1.01 * min(flat)
    rates = [1000 * row["ours"] for row in rows if row["name"] == "limit: matrix product"]
    assert "{:.0f} GFLOP/s in float32 and {:.0f} in bfloat16".format(*rates) in prose("docs/SPEED.md")
    error = next(row["ours"] for row in rows if row["name"] == "--memory low: error of a forward pass")
    assert f"differs from bfloat16's by a relative {error:.3f}" in prose("docs/SPEED.md")
    assert f"differs from bfloat16's by a relative {error:.2f}" in prose("docs/WAN.md")


def test_one_gpu_is_the_committed_one():
    rows = results("bench-h200")
    assert table(rows) == text("results/bench-h200.md").strip()
    assert table([row for row in rows if "--memory" not in row["name"]]) in text("docs/SPEED.md")
    row, scale, wan = {row["name"].partition(";")[0]: row for row in rows}, prose("docs/SCALE.md"), prose("docs/WAN.md")
    parts = [row[name] for name in ("4 steps, resnet, compiled", "VAE encode", "VAE decode")]
    together, step, small = (
        row[name] for name in ("encode, 4 steps with resnet, decode", "step of stage 1, resnet", "small decoder")
    )
    assert together["seconds"] == pytest.approx(sum(part["seconds"] for part in parts))
    assert f"took {step['GB']:.1f} GB" in scale and f"reached {step['share_of_peak']:.0%}" in scale
    held = [part["GB"] for part in (*parts, row["--memory low, resnet: decode"])]
    said = "four steps took {:.1f} GB, encoding {:.1f} GB and decoding {:.1f} GB, or {:.1f} GB in squares"
    assert said.format(*held) in wan and max(held) < 18 and max(held[1], held[3]) < 11
    said = f"in {small['seconds']:.2f} s instead of {parts[2]['seconds']:.1f} s and with {small['GB']:.1f} GB"
    assert said in wan


def test_compiled_steps_and_memory_of_the_real_model_are_the_committed_ones():
    rows = results("steps-cpu")
    assert table(rows) in text("docs/SPEED.md")
    ratios = {row["name"][len("step of ") :][:7]: row["ratio"] for row in rows}
    assert ratios["stage 1"] < 0.95 and ratios["stage 3"] < 0.95 and 0.9 < ratios["stage 2"] < 1.1
    cost, page = results("wan5b-cpu"), prose("docs/WAN.md")
    peak, low = max(cost["peak_gib"].values()), cost["low"]["peak_gib"]
    low = max(value for part, value in low.items() if part != "encode prompt")
    assert peak < 14 and f"a peak of {peak:.1f} GiB" in page
    assert low < 9 and f"with `--memory low`, {low:.1f} GiB once the prompt is encoded" in page


def test_memory_at_scale_is_what_its_formula_gives():
    """2 bytes of a frozen parameter, 20 of a trained one (16 of the fake score), over W; the rest over S.

    Of activations 4 bytes in each network, 2 in the residuals.
    """
    page, (generator, resnet, control, classifier) = text("docs/SCALE.md"), (5.000e9, 0.018e9, 5.283e9, 0.068e9)
    for row, held, kept in (
        ("| 1, ResNet | P | A | 1 + 1 |", 2 * generator + 20 * resnet, 6),
        ("| 1, ControlNet | P | A | 2 + 1 |", 2 * generator + 20 * control, 10),
        ("| 2 | P | 2 P | 1 + 0 |", (2 + 20 + 16) * generator, 4),
        ("| 3, ResNet | 2 P | A + C | 2 + 1 |", 4 * generator + 20 * (resnet + classifier), 10),
        ("| 3, ControlNet | 2 P | A + C | 3 + 1 |", 4 * generator + 20 * (control + classifier), 14),
    ):
        for gpus, share in ((1, 1), (4, 1), (4, 4), (8, 1), (8, 8)):
            activations = (kept * 27280 * 3072 * 30 + 5e9) / share
            row += f" {(held / gpus + activations + 0.7e9) / 1e9:.0f} GB |"
        assert f"\n{row}\n" in page

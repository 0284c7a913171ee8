"""The training scripts as a user runs them: exact resume after kill -9, and the same curve on two processes."""

import importlib
import json
import os
import signal
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import nets
import pytest
import safetensors.torch
import torch
from conftest import start_in

import adapter as adapters
import discriminator as discriminators
from core import runs
from core.config import run_script
from toy.codec import ToyCodec

SCRIPTS = {
    "toy.train_slow_generator": "slow_generator",
    "train_slow_adapter": "slow_adapter",
    "distill_fast": "fast_generator",
    "finetune_hybrid": "fast_adapter",
}
STEPS, SAVED = 5, 3  # cut in the middle of a cycle of stage 3
SHORT = ("--steps", STEPS, "--batch", 2, "--save_every", SAVED, "--compile", "false", "--dtype", "float32")
NEW = nets.adapter(fixed_norm=True, maps="pixels", copies=1.5).config  # of an adapter that starts as nothing


def stage(script: str, sample_every: str, *flags: str) -> None:
    """Run a stage by its flags, but for these values: a line for every step, small videos and networks, short cycles,
    and no samples.
    """
    runs.LOG_EVERY, ToyCodec.learned_on = 1, nets.VIDEOS
    adapters.PRESETS["small"], discriminators.PRESETS["small"] = NEW, nets.JUDGE
    sys.argv, module = [script, *flags], importlib.import_module(script)
    short = {"warmup": 2, "sparse": 0.5, "ratio": 2, "adapter_start": 1, "sample_every": int(sample_every)}
    short = {name: value for name, value in short.items() if hasattr(module.Config, name)}
    run_script(lambda cfg: module.main(replace(cfg, **short)), module.Config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def flags(folder):
    """Flags of a short run: all begin with random networks, and are cut in the middle of their cycle."""
    torch.manual_seed(0)
    given = nets.of_stage_3(folder / "given")
    slow = ("--generator", given["backbone"])
    hybrid = (*SHORT, *(f"--{name}={file}" for name, file in given.items()), "--diffusion_first", 0)
    control = adapters.ControlNetAdapter(adapters.ControlNetConfig(**vars(nets.SHAPE)))
    for p in control.project.parameters():
        torch.nn.init.normal_(p, std=0.05)
    nets.save(folder / "heavy", slow_adapter=control)
    return {
        "toy.train_slow_generator": (*SHORT, "--init", folder / "given", "--small", 1),
        "train_slow_adapter": (*SHORT, *slow, "--init", given["adapter"], "--mask_steps", 3),
        "distill_fast": (*SHORT, *slow),
        "finetune_hybrid": hybrid,
        "a new adapter": (*SHORT, *slow, "--steps", 4, "--mask_steps", 2, "--batch", 4),
        "a ControlNet": (*hybrid, "--adapter", folder / "heavy/slow_adapter.safetensors"),
    }


@pytest.fixture(scope="module")
def start(folder, flags):
    """start("distill_fast", ...) of a short run with these flags, or those of a `case`, and the values of `stage`."""

    def begin(script: str, *more, case: str = "", sample_every: int = 0, wait: bool = True, **how):
        job = start_in(folder)(stage, script, sample_every, *flags[case or script], *more, wait=wait, **how)
        assert not wait or job.returncode == 0, job.stderr[-20000:]
        return job

    return begin


@pytest.fixture(scope="module")
def whole(start, folder):
    """The log and weights of an uninterrupted run of a script on so many processes, of which some share a video.

    With samples at its end, unless two processes have a video each: samples are most of the time of such short runs.
    Those of stage 0, of full size, take the longest, and test_readme.py makes them.
    """

    @cache
    def train(script: str, processes: int, sequence: int = 1):
        name = f"whole{processes}_{sequence}_{SCRIPTS[script]}"
        more = ("--sequence", sequence) if sequence > 1 else ()
        every = 1000 if processes == sequence and script in STAGES else 0
        start(script, *more, "--name", name, processes=processes, sample_every=every)
        return outcome(folder, name, SCRIPTS[script])

    return train


def outcome(tmp_path, name: str, network: str) -> tuple[list[dict], dict[str, torch.Tensor]]:
    log = [json.loads(line) for line in (tmp_path / "runs" / name / "log.jsonl").read_text().splitlines()]
    return log, safetensors.torch.load_file(tmp_path / "runs" / name / f"{network}.safetensors")


def kill_at_checkpoint(job, folder) -> None:
    """kill -9 of every process as soon as the checkpoint stands."""
    deadline = time.time() + 200
    while not folder.exists():
        assert time.time() < deadline and job.poll() is None, job.read("err")[-2000:]
        time.sleep(0.01)
    job.kill()


STAGES = [script for script in SCRIPTS if not script.startswith("toy")]


@pytest.mark.parametrize("script, processes", [*((script, 1) for script in STAGES), ("finetune_hybrid", 2)])
def test_five_steps_equal_three_kill_and_two_more(start, folder, whole, script, processes):
    network, name = SCRIPTS[script], f"cut{processes}_{SCRIPTS[script]}"
    job = start(script, "--name", name, processes=processes, wait=False)
    kill_at_checkpoint(job, folder / "runs" / name / "ckpt" / "step_00000003")
    assert not (folder / "runs" / name / f"{network}.safetensors").exists()
    start(script, "--name", name, processes=processes)
    the_same(folder, whole(script, processes), name, network)


def the_same(folder: Path, complete: tuple[list[dict], dict], name: str, network: str) -> None:
    """This run ended as the uninterrupted one, to the last bit."""
    (log, weights), (cut_log, cut_weights) = complete, outcome(folder, name, network)
    assert [line["step"] for line in log] == list(range(1, STEPS + 1))
    assert log == cut_log  # losses, to the last digit
    assert weights.keys() == cut_weights.keys() and all(torch.equal(weights[n], cut_weights[n]) for n in weights)
    checkpoints = sorted(p.name for p in (folder / "runs" / name / "ckpt").iterdir())
    assert checkpoints == ["step_00000003", "step_00000005"]


@pytest.mark.parametrize("script, sequence", [*((script, 1) for script in SCRIPTS), *((s, 2) for s in STAGES)])
def test_two_processes_follow_the_curve_of_one(whole, script, sequence):
    """With a video each, and with every video split between both."""
    same_curve(whole(script, 1), whole(script, 2, sequence))


@pytest.mark.parametrize("script, case, nodes", [
    ("train_slow_adapter", "a new adapter", 2), ("finetune_hybrid", "a ControlNet", 1),
])  # fmt: skip
def test_two_processes_on_each_node_follow_the_curve_of_one(script, case, nodes, start, folder):
    """Parameters are sharded within a node and replicated over nodes (HSDP), those of a new adapter too.

    Before a backward pass of stage 3 a ControlNet runs up to four times, the last one with a gradient. What many
    processes recompute, one keeps.
    """
    names = [f"{nodes} {which}" for which in ("one", "more")]
    start(script, "--name", names[0], case=case)
    start(script, "--name", names[1], "--recompute", "full", case=case, processes=2, nodes=nodes)
    one, more = (outcome(folder, name, SCRIPTS[script]) for name in names)
    assert nodes == 1 or adapters.ResNetAdapter(NEW).state_dict().keys() == one[1].keys()
    same_curve(one, more)


def same_curve(one, other) -> None:
    """Two runs' logs and weights are the same up to rounding."""
    (one, one_weights), (two, two_weights) = one, other
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert value == pytest.approx(b[name], rel=1e-2 if "norm" in name else 1e-3)
    losses = {name: value for name, value in one[0].items() if name.endswith("loss")}
    assert losses and all(value == pytest.approx(two[0][name], rel=1e-5) for name, value in losses.items())
    distance = sum((one_weights[n].float() - two_weights[n].float()).square().sum() for n in one_weights).sqrt()
    size = sum(one_weights[n].float().square().sum() for n in one_weights).sqrt()
    assert distance / size < 5e-3  # exports are bf16


def killed(step: str, *given: str) -> None:
    """A stage that kills itself when it has written the data of this step's checkpoint, before that has its name."""
    rename = Path.rename

    def die(path, target):
        if step in str(target):
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(path, target)

    Path.rename = die
    stage(*given)


def test_kill_while_a_checkpoint_is_written_loses_only_that_one(start, folder, whole, flags):
    """The process dies after the data and before the rename, and again as if amid the data: what stood before stands.

    And from there stage 0 goes on as the others do.
    """
    script, kept = "toy.train_slow_generator", folder / "runs" / "k" / "ckpt"
    for step, left in (("00000003", []), ("00000005", ["step_00000003"])):
        job = start_in(folder)(killed, step, script, 0, *flags[script], "--name", "k")
        assert job.returncode == -signal.SIGKILL, job.stderr[-2000:]
        assert sorted(p.name for p in kept.glob("step_*")) == left
    data = max(kept.glob(".step_00000005*/*"), key=lambda p: p.stat().st_size)
    os.truncate(data, data.stat().st_size // 2)
    start(script, "--name", "k")
    the_same(folder, whole(script, 1), "k", "slow_generator")

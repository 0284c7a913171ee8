"""The training scripts as a user runs them: exact resume after kill -9, and the same curve on two processes."""

import json
import shutil
import signal
import time
from functools import cache
from pathlib import Path

import nets
import pytest
import safetensors.torch
import torch
from conftest import start_in

from adapter import ResNetAdapter

SCRIPTS = {
    "toy.train_slow_generator": "slow_generator",
    "train_slow_adapter": "slow_adapter",
    "distill_fast": "fast_generator",
    "finetune_hybrid": "fast_adapter",
}
STEPS, SAVED = 5, 3  # cut in the middle of a cycle of stage 3
SHORT = ("--steps", STEPS, "--batch", 2, "--save_every", SAVED, "--compile", "false", "--dtype", "float32")
NEW = nets.adapter(fixed_norm=True, maps="pixels", copies=1.5).config  # of an adapter that starts as nothing
# Runs a stage by its flags, but for these values: a line for every step, small videos and networks, short cycles, and
# no samples.
STAGE = f"""
import importlib, sys
from dataclasses import fields, replace
import adapter, discriminator
from adapter import AdapterConfig
from core import runs
from core.config import run_script
from toy.codec import ToyCodec

runs.LOG_EVERY, ToyCodec.learned_on, script = 1, {nets.VIDEOS}, importlib.import_module(sys.argv.pop(1))
adapter.PRESETS["small"], discriminator.PRESETS["small"] = {NEW}, discriminator.{nets.JUDGE}
short = dict(warmup=2, sparse=0.5, ratio=2, adapter_start=1, sample_every=int(sys.argv.pop(1)))
short = dict((field.name, short[field.name]) for field in fields(script.Config) if field.name in short)
if __name__ == "__main__":
    run_script(lambda cfg: script.main(replace(cfg, **short)), script.Config)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def flags(folder):
    """Flags of a short run: all begin with random networks, and are cut in the middle of their cycle."""
    torch.manual_seed(0)
    (folder / "stage.py").write_text(STAGE)
    given = nets.of_stage_3(folder / "given")
    slow = ("--generator", given["backbone"])
    return {
        "toy.train_slow_generator": (*SHORT, "--init", folder / "given", "--small", 1),
        "train_slow_adapter": (*SHORT, *slow, "--init", given["adapter"], "--mask_steps", 3),
        "distill_fast": (*SHORT, *slow),
        "finetune_hybrid": (*SHORT, *(f"--{name}={file}" for name, file in given.items()), "--diffusion_first", 0),
        "a new adapter": (*SHORT, *slow, "--steps", 4, "--mask_steps", 2, "--batch", 4),
    }


@pytest.fixture(scope="module")
def start(folder, flags):
    """start("distill_fast", ...) of a short run with these flags, which has the values of STAGE."""

    def begin(script: str, *more, sample_every: int = 0, **how):
        given = flags.get(script, ())
        return start_in(folder)(str(folder / "stage.py"), script, sample_every, *given, *more, **how)

    return begin


@pytest.fixture(scope="module")
def whole(start, folder):
    """The log and weights of an uninterrupted run of a script on so many processes, of which some share a video.

    With samples at its end, unless two processes have a video each: samples are most of the time of such short runs.
    """

    @cache
    def train(script: str, processes: int, sequence: int = 1):
        name = f"whole{processes}_{sequence}_{SCRIPTS[script]}"
        more = ("--sequence", sequence) if sequence > 1 else ()
        every = 1000 if processes == sequence else 0
        finish(start(script, *more, "--name", name, processes=processes, sample_every=every))
        return outcome(folder, name, SCRIPTS[script])

    return train


def outcome(tmp_path, name: str, network: str) -> tuple[list[dict], dict[str, torch.Tensor]]:
    log = [json.loads(line) for line in (tmp_path / "runs" / name / "log.jsonl").read_text().splitlines()]
    return log, safetensors.torch.load_file(tmp_path / "runs" / name / f"{network}.safetensors")


def finish(job) -> None:
    assert job.returncode == 0, job.stderr[-20000:]


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
    finish(start(script, "--name", name, processes=processes))
    the_same(folder, whole(script, processes), name, network)


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script != "finetune_hybrid"])
def test_two_processes_go_on_from_a_checkpoint(start, folder, whole, script):
    """As after a kill: what was written later is gone, but for the log."""
    network, name, complete = SCRIPTS[script], f"whole2_1_{SCRIPTS[script]}", whole(script, 2)
    shutil.rmtree(folder / "runs" / name / "ckpt" / "step_00000005")
    (folder / "runs" / name / f"{network}.safetensors").unlink()
    finish(start(script, "--name", name, processes=2))
    the_same(folder, complete, name, network)


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


def test_two_nodes_of_two_processes_follow_the_curve_of_one(start, folder, flags):
    """Parameters are sharded within a node and replicated over nodes (HSDP), those of a new adapter too."""
    short = ("train_slow_adapter", *flags["a new adapter"], "--init=", "--name")
    finish(start(*short, "one"))
    finish(start(*short, "nodes", processes=2, nodes=2))
    one, nodes = (outcome(folder, name, "slow_adapter") for name in ("one", "nodes"))
    assert ResNetAdapter(NEW).state_dict().keys() == one[1].keys()
    same_curve(one, nodes)


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


KILLER = """
import os, pathlib, signal, sys

def die(*a, **k): os.kill(os.getpid(), signal.SIGKILL)
moment, step = sys.argv.pop(1), sys.argv.pop(1)
if moment == "rename":
    rename = pathlib.Path.rename
    pathlib.Path.rename = lambda a, b: die() if step in str(b) else rename(a, b)
else:  # the second of its writes to that folder
    import torch.distributed.checkpoint as dcp
    save = dcp.async_save
    def cut(state, checkpoint_id, **k):
        saved = save(state, checkpoint_id=checkpoint_id, **k)
        if step in str(checkpoint_id):
            saved.result()
            data = max(pathlib.Path(checkpoint_id).iterdir(), key=lambda p: p.stat().st_size)
            os.truncate(data, data.stat().st_size // 2)
            die()
        return saved
    dcp.async_save = cut
sys.path.insert(0, os.path.dirname(__file__))
import stage
stage.run_script(lambda cfg: stage.script.main(stage.replace(cfg, **stage.short)), stage.script.Config)
"""


def test_kill_while_a_checkpoint_is_written_loses_only_that_one(start, folder, whole, flags):
    """The process dies after the data and before the rename, and again amid the data: what stood before stands.

    And from there stage 0 goes on as the others do.
    """
    script, (killer, kept) = "toy.train_slow_generator", (folder / "killer.py", folder / "runs" / "k" / "ckpt")
    killer.write_text(KILLER)
    for moment, step, left in (("rename", "00000003", []), ("write", "00000005", ["step_00000003"])):
        job = start_in(folder)(str(killer), moment, step, script, 0, *flags[script], "--name", "k")
        assert job.returncode == -signal.SIGKILL, job.stderr[-2000:]
        assert sorted(p.name for p in kept.glob("step_*")) == left
    finish(start(script, "--name", "k"))
    the_same(folder, whole(script, 1), "k", "slow_generator")

"""The training scripts as a user runs them: exact resume after kill -9, and the same curve on two processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from functools import cache

import common
import pytest
import safetensors.torch
import torch
from conftest import start_in
from weights import save_network

import adapter as adapters
from adapter import ResNetAdapter
from model import PRESETS, VideoDiT

SCRIPTS = {
    "train_slow_generator.py": "slow_generator",
    "train_slow_adapter.py": "slow_adapter",
    "distill_fast.py": "fast_generator",
    "finetune_hybrid.py": "fast_adapter",
}
SHORT = ("--steps", 10, "--batch", 2, "--save_every", 5, "--sample_every", 1000, "--log_every", 1, "--compile", "false",
         "--dtype", "float32", "--warmup", 2)  # fmt: skip
HYBRID = ("--ratio", 3, "--diffusion_first", 0, "--adapter_start", 1, "--sparse", 0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def flags(folder):
    """Flags of a short run: later stages train on random networks, and are cut in the middle of their cycle."""
    torch.manual_seed(0)
    generator, adapter = VideoDiT(PRESETS["tiny"]), ResNetAdapter(adapters.PRESETS["tiny"])
    torch.nn.init.normal_(generator.head.head.weight, std=0.02)
    slow, fast, helper = (folder / f"{name}.safetensors" for name in ("slow", "fast", "adapter"))
    save_network(slow, "SlowGenerator", generator.config, generator.state_dict())
    save_network(fast, "FastGenerator", generator.config, generator.state_dict())
    save_network(helper, "SlowAdapter", adapter.config, adapter.state_dict())
    networks = (f"--generator={fast}", f"--backbone={slow}", f"--adapter={helper}")
    return {
        "train_slow_generator.py": SHORT,
        "train_slow_adapter.py": (*SHORT, "--generator", slow, "--mask_steps", 4, "--sparse", 0.5),
        "distill_fast.py": (*SHORT, "--generator", slow, "--ratio", 3),
        "finetune_hybrid.py": (*SHORT, *networks, *HYBRID),
    }


@pytest.fixture(scope="module")
def start(folder):
    return start_in(folder)


@pytest.fixture(scope="module")
def whole(start, folder, flags):
    """The log and weights of an uninterrupted run of a script on so many processes, of which some share a video."""

    @cache
    def train(script: str, processes: int, sequence: int = 1):
        name = f"whole{processes}_{sequence}_{SCRIPTS[script]}"
        more = ("--sequence", sequence) if sequence > 1 else ()
        finish(start(script, *flags[script], *more, "--name", name, processes=processes))
        return outcome(folder, name, SCRIPTS[script])

    return train


def outcome(tmp_path, name: str, network: str) -> tuple[list[dict], dict[str, torch.Tensor]]:
    log = [json.loads(line) for line in (tmp_path / "runs" / name / "log.jsonl").read_text().splitlines()]
    return log, safetensors.torch.load_file(tmp_path / "runs" / name / f"{network}.safetensors")


def finish(job) -> None:
    assert job.returncode == 0, job.stderr[-20000:]


def family(pid: int) -> list[int]:
    """A process and all its descendants: torchrun's workers lead process groups of their own."""
    lines = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout.splitlines()
    pairs = [tuple(map(int, line.split())) for line in lines]
    found = [pid]
    for parent in found:
        found += [child for child, its_parent in pairs if its_parent == parent]
    return found


def kill_at_checkpoint(job, folder) -> None:
    """kill -9 of every process as soon as the checkpoint stands."""
    deadline = time.time() + 200
    while not folder.exists():
        assert time.time() < deadline and job.poll() is None, job.communicate()[1][-2000:]
        time.sleep(0.01)
    for pid in family(job.pid):
        os.kill(pid, signal.SIGKILL)
    job.communicate()


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("script", SCRIPTS)
def test_ten_steps_equal_five_kill_and_five_more(start, folder, flags, whole, script, processes):
    network, name = SCRIPTS[script], f"cut{processes}_{SCRIPTS[script]}"
    job = start(script, *flags[script], "--name", name, processes=processes, wait=False)
    kill_at_checkpoint(job, folder / "runs" / name / "ckpt" / "step_00000005")
    assert not (folder / "runs" / name / f"{network}.safetensors").exists()
    finish(start(script, *flags[script], "--name", name, processes=processes))

    (log, weights), (cut_log, cut_weights) = whole(script, processes), outcome(folder, name, network)
    assert [line["step"] for line in log] == list(range(1, 11)) and log == cut_log  # losses, to the last digit
    assert weights.keys() == cut_weights.keys() and all(torch.equal(weights[n], cut_weights[n]) for n in weights)
    checkpoints = sorted(p.name for p in (folder / "runs" / name / "ckpt").iterdir())
    assert checkpoints == ["step_00000005", "step_00000010"]


ALONE_AND_TOGETHER = [(script, 1) for script in SCRIPTS] + [(s, 2) for s in SCRIPTS if s != "train_slow_generator.py"]


@pytest.mark.parametrize("script, sequence", ALONE_AND_TOGETHER)
def test_two_processes_follow_the_curve_of_one(whole, script, sequence):
    """With a video each, and with every video split between both."""
    same_curve(whole(script, 1), whole(script, 2, sequence))


def test_two_nodes_of_two_processes_follow_the_curve_of_one(start, folder, flags):
    """Parameters are sharded within a node and replicated over nodes (HSDP)."""
    script = "train_slow_adapter.py"
    short = (*flags[script], "--steps", 4, "--mask_steps", 2, "--batch", 4, "--name")
    finish(start(script, *short, "one"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        meet = ("--nnodes=2", "--master_addr=127.0.0.1", f"--master_port={server.getsockname()[1]}")
    nodes = [
        start(script, *short, "nodes", processes=2, torchrun=(*meet, f"--node_rank={n}"), wait=False) for n in (0, 1)
    ]
    for node in nodes:
        _, errors = node.communicate(timeout=300)
        assert node.returncode == 0, errors[-20000:]
    same_curve(*(outcome(folder, name, "slow_adapter") for name in ("one", "nodes")))


def test_the_adapter_learns_from_diffusion_then_rests_then_from_both(start, folder, flags):
    script, more = "finetune_hybrid.py", ("--diffusion_first", 3, "--adapter_start", 3, "--name", "in_turn")
    finish(start(script, *flags[script], *more))
    log, _ = outcome(folder, "in_turn", "fast_adapter")
    assert [line["step"] for line in log if "discriminator_loss" in line] == list(range(4, 11))
    learned = {line["step"]: line for line in log if "diffusion_loss" in line}
    assert list(learned) == [3, 9] and all(line["diffusion_loss"] > 0 for line in learned.values())
    assert learned[3]["adversarial_loss"] == 0 < learned[9]["adversarial_loss"]


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


def test_kill_while_a_checkpoint_is_written_loses_only_that_one(run, whole, flags, tmp_path):
    """The process dies after the data and before the rename, and again amid the data: what stood before stands."""
    script, all_flags = "train_slow_generator.py", [str(f) for f in flags["train_slow_generator.py"]]
    folder = tmp_path / "runs" / "k" / "ckpt"
    killer = tmp_path / "killer.py"
    killer.write_text(f"""
import os, pathlib, signal, sys
sys.path.insert(0, {str(common.__file__).removesuffix("/common.py")!r})
import common, train_slow_generator
def die(*a, **k): os.kill(os.getpid(), signal.SIGKILL)
moment, step = sys.argv.pop(1), sys.argv.pop(1)
if moment == "rename":
    rename = os.rename
    os.rename = lambda a, b: die() if step in str(b) else rename(a, b)
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
common.run_script(train_slow_generator.main, train_slow_generator.Config)
""")
    for moment, step, left in (("rename", "00000005", []), ("write", "00000010", ["step_00000005"])):
        command = [sys.executable, str(killer), moment, step, *all_flags, "--name", "k"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        job = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert job.returncode == -signal.SIGKILL, job.stderr[-2000:]
        assert sorted(p.name for p in folder.glob("step_*")) == left
    finish(run(script, *all_flags, "--name", "k"))
    assert outcome(tmp_path, "k", "slow_generator")[0] == whole(script, 1)[0]
    assert sorted(p.name for p in folder.iterdir()) == ["step_00000005", "step_00000010"]

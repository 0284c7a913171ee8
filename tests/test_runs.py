"""A run's folder: its log, and checkpoints that are written while training goes on."""

import concurrent.futures
import dataclasses
import json
import re
import resource
import shutil
import sys
import weakref
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock, call

import imageio.v3 as iio
import pytest
import torch
from conftest import refused

from core import optim, parallel, runs
from core.codec import Batch
from core.config import UserError
from core.runs import Run, due, unreached
from toy.muon import muon_and_adamw

ALONE = parallel.Processes(0, 1, torch.device("cpu"), None)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Values of a script that are no options: a run resumes with these alone, too."""

    lr: float = 1e-3  # the rate


@dataclasses.dataclass(frozen=True)
class Options(Recipe):
    """Options of a script that is none."""

    steps: int = 9  # of it
    batch: int = 1  # videos
    save_every: int = 2  # steps
    sample_every: int = 100  # steps
    dtype: str = "float32"  # of it
    name: str = "a/b"  # of it
    wandb: str = ""  # a project


@pytest.fixture(autouse=True)
def every_step_is_logged(monkeypatch):
    monkeypatch.setattr(runs, "LOG_EVERY", 1)


def save(run, step):
    run.save(step)
    run.finish_saving()


def part(width):
    model = torch.nn.Sequential(torch.nn.Linear(4, width))
    model.blocks = model[:]
    return {"net": (model, muon_and_adamw(model, model.blocks, 0.0), optim.EMA(model, 0.9))}


def new(folder, width=4, **options):
    return Run(folder, Options(**options), ALONE, part(width))


def saved_steps(folder) -> list[int]:
    return sorted(int(p.name[-8:]) for p in (folder / "ckpt").glob("step_*"))


def test_log_rewinds_to_the_checkpoint_but_for_lines_that_somebody_else_wrote(tmp_path):
    run, log = new(tmp_path / "r"), tmp_path / "r/log.jsonl"
    assert run.resume() == 0
    save(run, 2)
    for step in (1, 2, 3):
        run.log(step, loss=step / 2)
    own = b'{bad}\n{"loss": 3}\n\xff\xfe\n[1]\nmy own note\n'
    log.write_bytes(log.read_bytes() + own + b'{"step": 4, "lo')  # cut by a kill
    assert run.resume() == 2
    assert log.read_bytes() == b'{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 1.0}\n' + own
    assert json.loads((tmp_path / "r" / "config.json").read_text()) == dataclasses.asdict(Options())


def test_a_checkpoint_holds_what_was_there_when_it_was_asked_for(tmp_path):
    """Though training goes on while it is written; and the next waits for it."""
    parts = part(512)
    model, (muon, adamw), ema = parts["net"]
    model[0](torch.randn(3, 4)).sum().backward()
    optim.clip_and_step(model, [muon, adamw], 1.0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    run = Run(tmp_path, Options(), ALONE, parts)
    run.save(1)
    for p in (*model.parameters(), *ema.average.values(), *(s["exp_avg"] for s in adamw.state.values())):
        p.data.fill_(7.0)
    save(run, 2)
    assert [p.name for p in run.checkpoints()] == ["step_00000001", "step_00000002"]
    assert run.resume() == 2 and all((p == 7).all() for p in model.parameters())
    run.checkpoints()[-1].rename(tmp_path / "aside")
    assert run.resume() == 1 and all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not any((average == 7).any() for average in ema.average.values())
    assert not any((state["exp_avg"] == 7).any() for state in adamw.state.values())


def test_a_write_that_fails_is_not_passed_over(tmp_path, monkeypatch):
    run = new(tmp_path)
    monkeypatch.setattr("pathlib.Path.rename", Mock(side_effect=OSError("disk full")))
    run.save(1)
    refused(r"can't be written \(disk full\)", run.save, 2)
    assert run.checkpoints() == []


def test_a_run_goes_on_only_with_a_whole_checkpoint_of_its_networks_and_under_its_options(tmp_path):
    run, config = new(tmp_path), tmp_path / "config.json"
    run.resume()
    save(run, 3)
    before = config.read_bytes()
    refused("of networks of other shapes; delete it, or give the run another", new(tmp_path, width=5).resume)
    for options in ({"lr": 9.0}, {"steps": 7}):
        refused(r"json: the run began with (lr 0.001; with 9.0|steps 9; with 7) give ", new(tmp_path, **options).resume)
        assert config.read_bytes() == before
    assert new(tmp_path, save_every=5).resume() == 3
    assert json.loads(config.read_text())["save_every"] == 5
    (run.checkpoints()[-1] / ".metadata").unlink()
    refused("step_00000003: damaged", run.resume)


def test_saving_before_the_first_step_changes_no_step(tmp_path):
    trained = []
    for saved in (False, True):
        torch.manual_seed(0)
        parts = part(4)
        model, optimizers, _ = parts["net"]
        if saved:
            save(Run(tmp_path, Options(), ALONE, parts), 1)
        optim.set_lr(optimizers, 0.01)
        for _ in range(3):
            model[0](torch.ones(3, 4)).square().sum().backward()
            optim.clip_and_step(model, optimizers, 1.0)
        trained.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*trained)


def test_samples_of_large_videos_stay_small_and_are_asked_for_one_by_one(tmp_path):
    """A large video is decoded when its turn comes, and is gone before the next."""
    run, alive = new(tmp_path), []

    def videos():
        for _ in range(3):
            assert not any(video() is not None for video in alive)
            video = torch.zeros(3, 5, 16, 32)
            alive.append(weakref.ref(video))
            yield video
            del video

    def pictures(step):
        return (iio.imread(tmp_path / "samples" / f"step_{step:08}.{kind}") for kind in ("png", "mp4"))

    run.samples(5, torch.zeros(2, 3, 33, 64, 1280))
    sheet, video = pictures(5)
    assert sheet.shape[1] < 9 * 270 and video.shape == (33, 12, 512, 3)
    run.samples(6, videos())
    _, video = pictures(6)
    assert len(alive) == 3 and video.shape == (5, 48, 288, 3)


def test_rank_0_alone_makes_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    for rank, videos in ((0, [torch.zeros(3, 5, 16, 32)]), (1, (pytest.fail("decoded") for _ in range(1)))):
        run = new(tmp_path)
        run.procs = parallel.Processes(rank, 2, torch.device("cpu"), mesh=object())
        run.samples(5, videos)


def test_what_is_due_and_when():
    """Every so many steps, and after the last one."""
    assert [step for step in range(1, 11) if due(step, 4, 10)] == [4, 8, 10]
    assert [step for step in range(1, 9) if due(step, 4, 8)] == [4, 8]
    assert not any(due(step, 0, 8) for step in range(1, 9))


def test_a_checkpoint_is_saved_before_samples_are_made(tmp_path):
    """Else a run that has no memory for them would never get past their step."""
    for saved in (3, 6, 9):
        with pytest.raises(MemoryError):
            train(tmp_path, {}, make=Mock(side_effect=MemoryError), save_every=3, sample_every=3)
        assert saved_steps(tmp_path)[-1] == saved


def test_a_name_outside_of_runs_is_refused(tmp_path):
    for name in ("../x", "", "/x", "a//b"):
        refused(rf"^--name {re.escape(name)}: is a folder under runs/", new, tmp_path, name=name)


def test_a_run_too_short_for_a_phase_says_so():
    short = {"steps": 3, "mask_steps": 480, "warmup": 50}
    assert [re.search("with (.*) this", line)[1] for line in unreached(short)] == ["mask_steps 480", "warmup 50"]
    stage_3 = {"steps": 104, "warmup": 20, "ratio": 5, "diffusion_first": 60, "adapter_start": 40}
    assert unreached(stage_3) == [f"--steps 104: with {what}" for what in (
        "warmup 20 this run never has its full learning rate", "ratio 5 this run ends before it has taught anything")
    ]  # fmt: skip
    assert not unreached(stage_3 | {"steps": 121}) and not unreached({"steps": 5, "ratio": 5, "warmup": 4})
    assert unreached({"steps": 4, "ratio": 5}) and not unreached({"steps": 1})


def steps_of(run, options, start, make=lambda batch, number: [batch.x0]):
    """The steps of a run, with checkpoints and samples after them, as in the training scripts' loops."""
    codec = SimpleNamespace(decode_video=lambda z: z, free=lambda: None)
    source = SimpleNamespace(batch=lambda *_: Batch(torch.zeros(1, 3, 2, 16, 16), None, None))
    for step in range(start, options.steps):
        yield step
        if due(step + 1, options.save_every, options.steps):
            run.save(step + 1)
        if due(step + 1, options.sample_every, options.steps):
            run.write_samples(step + 1, codec, source, make)


def train(folder, values, save_every=2, make=lambda batch, number: [batch.x0], **more) -> list[int]:
    """Steps taken of a run whose step n logs values[n], 0 if it is not there."""
    options = Options(save_every=save_every, **more)
    run, taken = Run(folder, options, ALONE, part(4)), []
    for step in steps_of(run, options, run.resume(), make):
        taken.append(step)
        run.log(step + 1, loss=torch.tensor(values.get(step + 1, 0.5)), grad_norm=1.0)
    return taken


def test_a_gpu_has_its_next_step_while_the_last_one_is_at_work(tmp_path, monkeypatch):
    """What a step gives is looked at a step later: until then the host makes batches and hands the GPU its work."""
    seen = []

    def read(loss):
        seen.append(int(loss))
        return torch.zeros(())

    class Loss(torch.Tensor):
        def isfinite(self):
            pytest.fail("the GPU's own number was read, not its copy")

    monkeypatch.setattr(runs, "fetch", lambda loss: partial(read, loss))
    procs = parallel.Processes(0, 1, torch.device("cuda"), None)
    options = Options(save_every=6, sample_every=0)
    monkeypatch.setattr(runs, "LOG_EVERY", 100)
    run, before = Run(tmp_path, options, procs, part(4)), []
    monkeypatch.setattr(runs.dcp, "async_save", Mock())  # written at once
    for step in steps_of(run, options, 0):
        before.append(list(seen))
        run.log(step + 1, loss=torch.tensor(float(step)).as_subclass(Loss))
    assert before == [[], [], [0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [*range(6)], [*range(6)], [*range(7)]]
    assert seen == list(range(9))  # at a checkpoint, the sixth, and at the end: all


@pytest.mark.parametrize("value, step, good", [
    (float("nan"), 1, "nothing"), (float("inf"), 5, "step_00000004"), (-float("inf"), 6, "step_00000004"),
    (float("nan"), 9, "step_00000008"),
])  # fmt: skip
def test_a_run_stops_at_the_first_value_that_is_no_finite_number(value, step, good, tmp_path):
    refused(rf"step {step}: loss is not a finite number; .*{good}", train, tmp_path, {step: value})
    lines = (tmp_path / "log.jsonl").read_text().splitlines() if step > 1 else []
    logged = [json.loads(line, parse_constant=pytest.fail)["step"] for line in lines]  # NaN is no JSON
    assert logged == list(range(1, step))
    saved = saved_steps(tmp_path)
    assert saved == [n for n in (2, 4, 6, 8) if n < step][-2:]
    assert train(tmp_path, {}) == list(range(saved[-1] if saved else 0, 9))  # begun again, it goes on from there


def test_a_finished_run_leaves_its_checkpoint_alone_and_what_a_user_keeps_beside_it(tmp_path):
    names = ("step_00000004.bak", "step_00000003_keep", "step_3", "step_000000050", "notes")
    mine = [tmp_path / "ckpt" / name for name in names]
    train(tmp_path, {})
    for folder in mine:
        folder.mkdir()
        (folder / "mine").write_text("x")
    files = sorted((tmp_path / "ckpt/step_00000009").iterdir())
    times = [file.stat().st_mtime_ns for file in files]
    assert train(tmp_path, {}) == [] and times == [file.stat().st_mtime_ns for file in files]
    for step in (8, 9):
        shutil.rmtree(tmp_path / f"ckpt/step_{step:08}")
    train(tmp_path, {})
    assert all((folder / "mine").read_text() == "x" for folder in mine)
    own = {p.name for p in (tmp_path / "ckpt").iterdir()} - {folder.name for folder in mine}
    assert "step_00000009" in own and len(own) <= 2


@pytest.mark.parametrize("limit", [1, 600, 2000])
def test_a_full_disk_is_reported_at_once_and_leaves_nothing_half_written(limit, tmp_path, monkeypatch):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(runs, "LOG_EVERY", 100)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # Python would keep a half-written module
    options = Options(save_every=4)
    run, taken = Run(tmp_path, options, ALONE, part(64)), []
    try:
        with pytest.raises(UserError, match=r"ckpt: a checkpoint can't be written \(.*File too large.*\); once"):
            for step in steps_of(run, options, 0):
                taken.append(step)
                if step == 3:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
                if step == 4:
                    concurrent.futures.wait([run.saving[0]])
                    resource.setrlimit(resource.RLIMIT_FSIZE, before)
                run.log(step + 1, loss=0.5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert taken == [0, 1, 2, 3, 4]  # told at the very next step, not at the next checkpoint
    assert not [p for p in (tmp_path / "ckpt").iterdir() if p.name.startswith(".")]


def test_weights_and_biases_gets_the_numbers_of_the_log_or_says_in_one_line_why_not(tmp_path, monkeypatch):
    """A stand-in for the package: what it is asked for, call by call."""
    package = Mock(Error=type("Error", (Exception,), {}))
    monkeypatch.setitem(sys.modules, "wandb", package)
    train(tmp_path / "without", {})
    assert package.mock_calls == []
    train(tmp_path / "with", {2: 0.75}, wandb="flash")
    begin, *logged, end = package.mock_calls
    config = dataclasses.asdict(Options(wandb="flash"))
    assert begin == call.init(project="flash", name="a/b", config=config, dir=tmp_path / "with")
    lines = map(json.loads, (tmp_path / "with/log.jsonl").read_text().splitlines())
    assert logged == [call.init().log(line, step=line.pop("step")) for line in lines] and len(logged) == 9
    assert end == call.init().finish()
    package.init = Mock(side_effect=package.Error("no API key\nlog in"))
    for why in (r"^--wandb flash: no API key$", r"^--wandb: the package is missing; pip install wandb$"):
        refused(why, train, tmp_path, {}, wandb="flash")
        monkeypatch.setitem(sys.modules, "wandb", None)

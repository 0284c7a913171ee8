"""A run's folder: its log, and checkpoints that are written while training goes on."""

import dataclasses
import json

import imageio.v3 as iio
import pytest
import torch

from core import optim, parallel
from core.config import UserError
from core.runs import COUNTS, Run, check_counts, due

ALONE = parallel.Processes(0, 1, torch.device("cpu"), None)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of a script that is none."""

    lr: float = 1e-3  # the rate
    log_every: int = 1  # steps
    steps: int = 9  # of it


def part(width):
    model = torch.nn.Sequential(torch.nn.Linear(4, width))
    model.blocks = model[:]
    return {"net": (model, optim.make_optimizers(model, model.blocks, 0.0), optim.EMA(model, 0.9))}


def test_log_rewinds_to_the_checkpoint_and_survives_a_cut_line(tmp_path):
    run = Run(tmp_path / "r", Options(), ALONE, part(4))
    assert run.resume() == 0
    run.save(2, wait=True)
    for step in (1, 2, 3):
        run.log(step, loss=step / 2)
    with (tmp_path / "r" / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert run.resume() == 2
    lines = (tmp_path / "r" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}]
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
    run.save(2, wait=True)
    assert [p.name for p in run.checkpoints()] == ["step_00000001", "step_00000002"]
    assert run.resume() == 2 and all((p == 7).all() for p in model.parameters())
    run.checkpoints()[-1].rename(tmp_path / "aside")
    assert run.resume() == 1 and all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not any((average == 7).any() for average in ema.average.values())
    assert not any((state["exp_avg"] == 7).any() for state in adamw.state.values())


def test_a_write_that_fails_is_not_passed_over(tmp_path, monkeypatch):
    run = Run(tmp_path, Options(), ALONE, part(4))

    def fail(folder):
        raise OSError("disk full")

    monkeypatch.setattr("core.runs.fsync_folder", fail)
    run.save(1)
    with pytest.raises(OSError, match="disk full"):
        run.save(2)
    assert run.checkpoints() == []


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    Run(tmp_path, Options(), ALONE, part(4)).save(3, wait=True)
    assert Run(tmp_path, Options(), ALONE, part(4)).resume() == 3
    with pytest.raises(UserError, match="of networks of other shapes; delete it, or give the run another"):
        Run(tmp_path, Options(), ALONE, part(5)).resume()


def test_a_damaged_checkpoint_is_named(tmp_path):
    run = Run(tmp_path, Options(), ALONE, part(4))
    run.resume()
    run.save(3, wait=True)
    (run.checkpoints()[-1] / ".metadata").unlink()
    with pytest.raises(UserError, match="step_00000003: damaged"):
        run.resume()


def test_a_run_goes_on_only_under_the_options_it_began_with(tmp_path):
    run = Run(tmp_path, Options(), ALONE, part(4))
    run.resume()
    run.save(3, wait=True)
    before = (tmp_path / "config.json").read_bytes()
    for options in (Options(lr=9.0), Options(steps=7)):
        with pytest.raises(UserError, match=r"config.json: the run began with --(lr 0.001|steps 9); with "):
            Run(tmp_path, options, ALONE, part(4)).resume()
        assert (tmp_path / "config.json").read_bytes() == before
    assert Run(tmp_path, Options(log_every=5), ALONE, part(4)).resume() == 3
    assert json.loads((tmp_path / "config.json").read_text())["log_every"] == 5


def test_a_finished_run_leaves_its_checkpoint_alone(tmp_path):
    run = Run(tmp_path, Options(), ALONE, part(4))
    run.resume()
    run.save(3, wait=True)
    times = [file.stat().st_mtime_ns for file in sorted(run.checkpoints()[-1].iterdir())]
    run.save(run.resume(), wait=True)
    assert times == [file.stat().st_mtime_ns for file in sorted(run.checkpoints()[-1].iterdir())]


def test_saving_before_the_first_step_changes_no_step(tmp_path):
    def trained(begin):
        torch.manual_seed(0)
        parts = part(4)
        model, optimizers, _ = parts["net"]
        begin(parts)
        optim.set_lr(optimizers, 0.01)
        for _ in range(3):
            model[0](torch.ones(3, 4)).square().sum().backward()
            optim.clip_and_step(model, optimizers, 1.0)
        return [p.detach().clone() for p in model.parameters()]

    plain = trained(lambda parts: None)
    saved = trained(lambda parts: Run(tmp_path, Options(), ALONE, parts).save(1, wait=True))
    assert all(torch.equal(a, b) for a, b in zip(plain, saved, strict=True))


def test_samples_of_large_videos_stay_small(tmp_path):
    run = Run(tmp_path, Options(), ALONE, part(4))
    run.samples(5, torch.zeros(2, 3, 33, 64, 1280))
    sheet, video = (iio.imread(tmp_path / "samples" / f"step_00000005.{kind}") for kind in ("png", "mp4"))
    assert sheet.shape[1] < 9 * 270 and video.shape == (33, 12, 512, 3)


@pytest.mark.parametrize("name", COUNTS)
def test_nothing_that_is_counted_may_be_none(name):
    options = dataclasses.make_dataclass("Counted", [(name, int, 0)], frozen=True)
    with pytest.raises(UserError, match=f"--{name} 0: at least 1"):
        check_counts(options())


def test_what_is_due_and_when():
    """Every so many steps and at the end; not where a run begins or goes on, which has it already."""
    assert [step for step in range(11) if due(step, 4, 0, last=step == 10)] == [4, 8, 10]
    assert [step for step in range(4, 11) if due(step, 4, 4, last=step == 10)] == [8, 10]
    assert [step for step in range(9) if due(step, 4, 0, last=step == 8)] == [4, 8]
    assert due(0, 4, 0, last=True)  # a run of no steps, or one that is begun again when it is done

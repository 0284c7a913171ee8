"""A run's folder: its log, and checkpoints that are written while training goes on."""

import dataclasses
import json

import pytest
import torch

import common
import optim
import parallel
from runs import Run

ALONE = parallel.Processes(0, 1, torch.device("cpu"), None)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of a script that is none."""

    lr: float = 1e-3  # the rate


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

    monkeypatch.setattr("runs.fsync_folder", fail)
    run.save(1)
    with pytest.raises(OSError, match="disk full"):
        run.save(2)
    assert run.checkpoints() == []


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    Run(tmp_path, Options(), ALONE, part(4)).save(3, wait=True)
    assert Run(tmp_path, Options(), ALONE, part(4)).resume() == 3
    with pytest.raises(common.UserError, match="of other shapes; give the run another --name"):
        Run(tmp_path, Options(), ALONE, part(5)).resume()

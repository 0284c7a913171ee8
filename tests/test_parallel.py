"""Many devices: shares of a batch, recomputed activations, sequences split among processes, nodes."""

import itertools
import timeit
from contextlib import nullcontext
from dataclasses import replace
from functools import partial, partialmethod
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import warm
from conftest import TORCHRUN, refused
from torch._dynamo.utils import counters
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import adapter as adapters
import flow
import sample
import train_slow_adapter
from core import optim, parallel
from discriminator import Classifier, ClassifierConfig
from model import DiTConfig, VideoDiT
from tools import bench
from wan.codec import WanCodec
from wan.vae import VAEConfig, WanVAE

ALONE = parallel.Processes(0, 1, torch.device("cpu"), None)


def test_a_global_batch_is_shared_whole():
    def shares(world, batch, accumulate, step, **more):
        return [replace(ALONE, rank=r, world=world, **more).share(batch, accumulate, step) for r in range(world)]

    everyone = shares(4, 16, 2, 3)
    assert sorted(s for parts in everyone for part in parts for s in part) == list(range(48, 64))
    assert all(len(part) == 2 for parts in everyone for part in parts)
    for world, videos in ((1, 16), (16, 1)):  # one in each micro-batch, whatever the number of processes
        assert [len(part) for part in shares(world, 16, 0, 0)[0]] == [1] * videos
    everyone = shares(8, 16, 1, 0, sequence=2)  # those that share a video get the same samples
    assert everyone[::2] == everyone[1::2]
    assert sorted(s for parts in everyone[::2] for part in parts for s in part) == list(range(16))
    for world, sequence, message in ((4, 1, "4 processes x 1"), (8, 2, "4 x 2 processes")):
        refused(f"--batch 6 does not divide into {message}", shares, world, 6, 1, 0, sequence=sequence)


def gradients(how: str, compile: bool = False) -> tuple[list[torch.Tensor], int]:
    """Of a small transformer's parameters, and what they cost in FLOP.

    Compiled, nothing is counted: where something is, torch compiles nothing.
    """
    torch.manual_seed(0)
    model = VideoDiT(DiTConfig(64, 256, 2, 2, text_dim=16, text_tokens=8, channels=16))
    torch.nn.init.normal_(model.head.head.weight)
    parallel.prepare(model, ALONE, compile, how)
    x, t, text = torch.randn(1, 16, 3, 16, 16), torch.tensor([[0.0, 500.0, 500.0]]), torch.randn(1, 8, 16)
    counter = FlopCounterMode(display=False)
    with nullcontext() if compile else counter:
        model(x, t, text).square().mean().backward()
    return [p.grad for p in model.parameters()], counter.get_total_flops()


def test_recomputing_gives_the_same_gradient_and_costs_what_it_says_and_so_do_compiled_blocks(monkeypatch):
    (none, work), (full, more) = map(gradients, ("none", "full"))
    for a, b in zip(none, full, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert 1.25 * work < more < 1.35 * work  # a forward pass again, of three
    # What the compiler is handed counts here. Code for it would take it a minute.
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    compiled, _ = gradients("full", compile=True)
    assert counters["frames"] == {"total": 1, "ok": 1} and counters["stats"]["unique_graphs"] == 1
    for a, b in zip(none, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_what_recomputing_keeps_of_an_activation():
    """A block's input of D numbers a token, as docs/SCALE.md reckons."""

    def activations(layers: int) -> int:
        """Bytes that autograd keeps of a forward pass, besides weights."""
        model = VideoDiT(DiTConfig(64, 256, 2, layers, text_dim=16, text_tokens=8, channels=16))
        parallel.prepare(model, ALONE, False, "full")
        kept, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

        def keep(y: torch.Tensor) -> torch.Tensor:
            storage = y.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return y

        with saved_tensors_hooks(keep, lambda y: y):
            model(torch.randn(1, 16, 5, 32, 32), torch.zeros(1, 5), torch.randn(1, 8, 16))
        return sum(kept.values())

    tokens = 5 * 16 * 16
    assert activations(8) - activations(4) == pytest.approx(4 * tokens * 64 * 4, rel=0.02)


SHAPE = DiTConfig(64, 128, 4, 2, text_dim=16, text_tokens=8, channels=16)
LIGHT, JUDGE = adapters.AdapterConfig(64, 2, 32, 16), ClassifierConfig(64, 16, (0, 1), channels=16)


def draw(network):
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return network


def agree(wanted, got, most, *what):
    for a, b in zip(wanted, got, strict=True):
        assert (a - b).norm() < most * a.norm(), (*what, a.shape, (a - b).norm() / a.norm())


def whole(main, *given) -> None:
    torch.set_num_threads(1)  # of two, which conftest would give each
    main(*given)
    dist.destroy_process_group()


def together(main, *given, processes: int = 2) -> None:
    """Call `main` in each of so many processes, which torchrun has started as it were."""
    job = warm.Job(whole, (main, *given), Path.cwd(), processes, 1).wait()
    assert job.returncode == 0, job.stderr[-3000:]


def ulysses(sizes, compiled_sizes):
    procs, shape = parallel.init_processes(sequence=0), replace(SHAPE, layers=2)
    torch.manual_seed(0)
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for size, kind in itertools.product(sizes, ("ResNet", "ControlNet")):
        model, light = VideoDiT(shape), kind == "ResNet"
        if light:
            torch._dynamo.reset()  # what is captured for one size serves both adapters
        adapter = adapters.ResNetAdapter(LIGHT) if light else adapters.ControlNetAdapter(shape)
        torch.nn.init.normal_(model.head.head.weight, std=0.1)
        draw(adapter)
        x, traj = torch.randn(2, 2, 16, 3, *size)
        t, text = torch.tensor([[0.0, 700.0, 700.0]]).expand(2, 3), torch.randn(2, 8, 16)
        networks = torch.nn.ModuleList([model, adapter])

        def outcome():
            networks.zero_grad()
            noisy = x.clone().requires_grad_(True)
            v, (feature,) = model(noisy, t, text, adapter(traj, noisy, t, text), feature_blocks=(1,))
            again = model(flow.add_noise(v, x, t / 1000), t, text)  # a gradient through one network into another
            (again.square().mean() + feature.square().mean()).backward()
            return [v.detach(), feature.detach(), again.detach()], [
                p.grad.clone() for p in networks.parameters() if p.grad is not None
            ] + [noisy.grad]

        outputs, grads = outcome()
        model.split = adapter.split = procs.split
        for compiled in (False, True) if size in compiled_sizes else (False,):
            if compiled:
                for block in (*model.blocks, *adapter.blocks):
                    block.compile(backend="eager")  # what is captured counts, not what the compiler makes of it
            shared, shared_grads = outcome()
            agree(outputs, shared, 1e-5, kind, compiled)
            for grad in shared_grads:
                dist.all_reduce(grad)
            agree(grads, [grad / procs.world for grad in shared_grads], 1e-4, kind, compiled)
        with torch.no_grad():
            lazy = model(x, t, text, adapter.residuals(traj, x, t, text))  # each when its block asks for it
        agree(outputs[:1], [lazy], 1e-5, kind)


@pytest.mark.parametrize("processes, sizes, compiled", [
    (2, [(8, 12), (6, 10), (2, 2)], [(8, 12), (2, 2)]), (4, [(2, 10)], []),
])  # fmt: skip
def test_processes_that_share_a_video_equal_one(processes, sizes, compiled):
    """Outputs, features and gradients, with either adapter, eager and compiled.

    A frame has 24, 15, 1 or 5 tokens: most don't divide, and of the last two one process gets none.
    """
    together(ulysses, sizes, compiled, processes=processes)


def relay():
    procs = parallel.init_processes()
    torch.manual_seed(0)
    codec, latents = WanCodec("", procs.device), torch.randn(1, 48, 6, 2, 3)
    codec.vae = WanVAE(VAEConfig(width=8, decoder_width=12, blocks=1))
    whole = list(codec.pieces(latents))
    for _ in range(2):  # nothing is left over for the next video
        own = list(codec.pieces(latents, procs))
        for a, b in zip(own, whole[procs.rank :: procs.world], strict=True):
            assert torch.equal(a, b)
    alone = sample.decode(codec, latents, parallel.Processes(0, 1, procs.device, None))
    assert alone.shape == (21, 32, 48, 3) and (sample.decode(codec, latents, procs) == alone).all()


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_that_take_turns_decode_what_one_does(processes):
    """To the bit, though each hands on what its layers remember while the next is at work already."""
    together(relay, processes=processes)


def test_auto_takes_the_type_in_which_this_machine_is_faster(monkeypatch):
    cpu = torch.device("cpu")
    taken = {}
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.ones(1024, 256, dtype=dtype)
        taken[dtype] = min(timeit.repeat(partial(F.linear, x, x), number=4, repeat=9))
    ratio = taken[torch.bfloat16] / taken[torch.float32]
    fast = parallel.fast_bfloat16(cpu)
    assert fast == (ratio < 1) or 0.7 < ratio < 1.4  # too near to tell
    for dtype, wanted in (("auto", fast), ("bfloat16", True), ("float32", False)):
        with parallel.autocast(cpu, dtype):
            x = torch.ones(2, 2)
            assert (x @ x).dtype == (torch.bfloat16 if wanted else torch.float32)
    assert parallel.fast_bfloat16(torch.device("cuda"))
    intel, amd = {"avx512_bf16": True, "cpu_name": "Intel Xeon"}, {"avx512_bf16": True, "cpu_name": "AMD EPYC 9R14"}
    for can, wanted in ((amd, True), (intel, False), (intel | {"amx_bf16": True}, True), ({"avx512_f": True}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda can=can: can)
        assert parallel.fast_bfloat16(cpu) == wanted


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    install = "compiler no-such-compiler; install it, or pass --compile false"
    refused(install, parallel.prepare, torch.nn.Linear(2, 2), ALONE, True)


def test_what_does_not_divide_is_refused(monkeypatch):
    stage, options = train_slow_adapter, {"steps": 1, "compile": False, "generator": "none"}  # before anything is read
    shared = "--batch 3 does not divide into 1 processes x 2 micro-batches"
    refused(shared, stage.main, stage.Config(batch=3, accumulate=2, **options))
    for world, message in ((2, "--sequence 3: must divide the number of processes, 2"),
                           (3, "4 attention heads do not divide among 3 processes; start fewer")):  # fmt: skip
        for name, value in (TORCHRUN | {"WORLD_SIZE": str(world)}).items():
            monkeypatch.setenv(name, value)
        refused(message, stage.main, stage.Config(sequence=3, **options))


def precision():
    procs, given = parallel.init_processes(), parallel.precision
    parallel.precision = lambda device, dtype: given(torch.device("cuda"), dtype)
    torch.manual_seed(0)
    for name in ("group_norm", "layer_norm"):  # on GPUs autocast computes these in float32
        norm = getattr(torch.nn.functional, name)

        def in_float32(x, n, *rest, norm=norm):
            return norm(x.float(), n, *(r.float() if torch.is_tensor(r) else r for r in rest))

        setattr(torch.nn.functional, name, in_float32)
    networks = VideoDiT(SHAPE), adapters.ResNetAdapter(LIGHT), adapters.ControlNetAdapter(SHAPE), Classifier(JUDGE)
    networks = [draw(network) for network in networks]
    x, traj = torch.randn(2, 2, 16, 3, 8, 12)
    t, text = torch.tensor([[0.0, 937.5, 833.3]]).expand(2, 3), torch.randn(2, 8, 16)
    features = list(torch.randn(2, 2, 72, 64))
    calls = [(x, t, text), (traj,), (traj, x, t, text), (features, text, traj)]

    def outcome(network, call, dtype="bfloat16"):
        with parallel.autocast(torch.device("cpu"), dtype):
            out = network(*call)
        out = torch.stack(out) if isinstance(out, list) else out
        out.float().square().mean().backward()
        return out.detach().float(), {n: p.grad for n, p in network.named_parameters() if p.grad is not None}

    for network, call in zip(networks, calls, strict=True):
        exact, _ = outcome(network, call, "float32")
        network.zero_grad()
        out, grads = outcome(network, call)
        network.zero_grad()
        again, sharded = outcome(parallel.prepare(network, procs, False), call)
        name = type(network).__name__
        errors = [((y - exact).norm() / exact.norm()).item() for y in (out, again)]
        most = 2.5 if isinstance(network, Classifier) else 1.2  # its logit is one number: roundings do not average
        assert errors[1] < most * errors[0], (name, errors)
        for n, grad in grads.items():
            own = parallel.full(sharded[n])
            assert own.dtype == torch.float32, (name, n)
            assert (grad - own).norm() < 0.05 * grad.norm() + 1e-9, (name, n, (grad - own).norm() / grad.norm())


def test_shards_gathered_as_on_gpus_change_no_more_than_autocast_does():
    """Timesteps and rotary tables reach the blocks unrounded; gradients come back in float32. float32 stays itself."""
    together(precision)
    assert parallel.precision(torch.device("cuda"), "float32").param_dtype is None
    assert parallel.precision(torch.device("cuda"), "auto").param_dtype == torch.bfloat16


def state():
    procs = parallel.init_processes()
    torch.manual_seed(0)
    model = truth = VideoDiT(SHAPE)
    before = {name: p.clone() for name, p in truth.state_dict().items()}
    if procs.rank:  # the shapes alone: the weights are rank 0's
        with torch.device("meta"):
            model = VideoDiT(SHAPE)
    model = parallel.prepare(model, procs, False)
    assert all(torch.equal(parallel.full(p), before[name]) for name, p in model.state_dict().items())
    optimizer, ema = optim.adamw(model), optim.EMA(model, 0.9)
    given = torch.randn(1, 16, 3, 8, 8), torch.zeros(1, 3), torch.randn(1, 8, 16)
    model(*given).sum().backward()
    optimizer.step()
    held = [*model.parameters(), *(p.grad for p in model.parameters()), *ema.average.values()]
    held += [v for state in optimizer.state.values() for v in state.values() if v.ndim]
    here = sum(t.to_local().nbytes for t in held)
    assert procs.world * here / sum(p.numel() for p in model.parameters()) == pytest.approx(20, rel=0.02)
    with torch.no_grad():  # FSDP keeps what it has gathered: after the averages it must gather the network's own again
        with ema.applied():
            averaged = model(*given)
        own = model(*given)
        model.reshard()
        assert torch.equal(model(*given), own) and not torch.equal(averaged, own)


def test_what_training_holds_of_a_parameter():
    """20 bytes over all processes, as docs/SCALE.md reckons: weight, gradient, two moments and average. And only rank 0
    need have held the weights before; and averages that are lent leave no trace.
    """
    together(state)


def test_floating_point_operations_are_those_counted():
    """bench.flop, which speeds and docs/SCALE.md rest on, against torch's own count."""
    config = DiTConfig(64, 256, 2, 3, text_dim=16, text_tokens=8, channels=16)
    plain = sdpa_kernel(SDPBackend.MATH)  # the only one that the counter knows on a CPU
    with FlopCounterMode(display=False) as counter, torch.no_grad(), plain:
        VideoDiT(config)(torch.randn(1, 16, 5, 16, 16), torch.zeros(1, 5), torch.randn(1, 8, 16))
    assert counter.get_total_flops() == pytest.approx(bench.flop(config, 5 * 8 * 8), rel=0.07)

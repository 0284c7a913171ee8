"""What one GPU does at the true shapes, with random weights: `python -m tools.bench --gpu`, about five minutes.

Seconds of four steps (eager by each attention backend, and compiled, with both adapters), of the VAE both ways (plain,
by Winograd's convolutions, compiled) and of the small decoder, of a video end to end, and of training steps of stages 1
and 3 with the share of the GPU's peak that they reach; and the real peak of memory of each. And the peaks of
`--memory` medium and low, beside the rehearsed ones (high is what the others hold). What matters most comes first, for
a run may be cut short. Nothing here compares with another project: `tools.bench` does.
"""

import contextlib
import gc
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

import discriminator as discriminators
import distill_fast
import finetune_hybrid
import flow
import train_slow_adapter
from adapter import AdapterConfig, ControlNetAdapter, ControlNetConfig, ResNetAdapter
from core import attention, memory, parallel
from core.codec import Batch
from core.config import ROOT
from model import PRESETS, DiTConfig, VideoDiT
from tools.rehearse import sampling, typed
from wan import vae
from wan.tiny_decoder import TinyDecoder

PEAK = 989e12  # FLOP/s of an H100 or H200 in bfloat16


def random(network: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A network built on the meta device, with random weights in the types in which it is read."""
    network = typed(network.to_empty(device=device), dtype)
    for p in network.parameters():
        nn.init.normal_(p, std=0.02)
    return network.requires_grad_(False)


def learning_losses(
    generator: VideoDiT, adapter: ResNetAdapter, discriminator: discriminators.DiffusionDiscriminator | None,
    batch: Batch, noise: Tensor, sigmas: Sequence[float],
) -> dict[str, Callable[[], Tensor]]:  # fmt: skip
    """What a step of stages 1 to 3 goes down on. Stage 2's fake score is the discriminator's backbone."""
    first, sigma = batch.x0[:, :, :1], torch.full((len(batch.x0),), 0.5, device=batch.x0.device)

    def stage_2() -> Tensor:
        draw = distill_fast.Draw(first, sigmas, 0, noise, noise[1], sigma)
        student, fake = (partial(network, text=batch.text) for network in (generator, discriminator.backbone))
        return distill_fast.student_loss(student, student, fake, draw)

    def stage_3() -> Tensor:
        velocity = partial(generator, text=batch.text, residuals=adapter(batch.traj))
        learned = finetune_hybrid.diffusion_loss(velocity, batch.x0, noise[1], sigma)
        fake = flow.backward_simulation(velocity, first, noise, sigmas, len(sigmas) - 2)
        level = flow.frame_sigma(sigma, fake.shape[2])
        x_t = flow.add_noise(fake, noise[1], level)
        logits = discriminator(x_t, flow.timestep(level), batch.text, batch.traj)
        return learned + discriminators.adversarial_loss(logits)

    return {
        "stage 1": lambda: train_slow_adapter.adapter_loss(generator, adapter, batch, noise[1], sigma),
        "stage 2": stage_2, "stage 3": stage_3,
    }  # fmt: skip


class Bench:
    """The parts of the table; each makes its own networks. Tests give small shapes. `grid`: of the latents."""

    def __init__(
        self, device: torch.device, config: DiTConfig = PRESETS["wan5b"], grid: tuple[int, int, int] = (31, 44, 80),
        vae_config: vae.VAEConfig | None = None, dtype: torch.dtype = torch.bfloat16,
        judge_config: discriminators.ClassifierConfig = discriminators.PRESETS["wan5b"],
    ):  # fmt: skip
        self.device, self.config, self.grid, self.dtype = device, config, grid, dtype
        self.vae_config, self.judge_config = vae_config or vae.VAEConfig(), judge_config
        self.attention = config.heads, config.dim, grid[0] * grid[1] * grid[2] // 4, device
        self.traj = torch.randn(1, config.channels, *grid, device=device)
        self.noise = torch.randn(4, *self.traj.shape, device=device)
        self.text = torch.randn(1, config.text_tokens, config.text_dim, device=device, dtype=dtype)
        self.cast = partial(parallel.autocast, device, "bfloat16" if dtype == torch.bfloat16 else "float32")
        self.seconds: dict[str, float] = {}  # of the rows so far
        parallel.start_compiler(device)

    def timed(self, name: str, call: Callable, warm: Callable | None = None, repeats: int = 1) -> dict:
        """A row: the best seconds of a call, and the most GB held. `warm`: a shorter call, which comes first."""
        (warm or call)()
        gc.collect()
        memory.reset_peak(self.device)
        self.seconds[name] = best = min(memory.seconds(call, self.device) for _ in range(repeats))
        most = memory.peak_memory(self.device) * 2**30 / 1e9
        return {"name": name, "seconds": best, "GB": most, "share_of_peak": None}

    def generator(self) -> VideoDiT:
        with torch.device("meta"):
            network = VideoDiT(self.config)
        return random(network, self.dtype, self.device)

    def adapter(self, kind: str) -> nn.Module:
        with torch.device("meta"):
            if kind == "controlnet":
                network = ControlNetAdapter(ControlNetConfig(**vars(self.config)))
            else:
                shape = AdapterConfig(self.config.dim, self.config.layers, channels=self.config.channels)
                network = ResNetAdapter(shape)
        return random(network, torch.float32 if kind == "resnet" else self.dtype, self.device)

    @torch.no_grad()
    def steps(self, generator: VideoDiT, adapter: nn.Module, number: int = 4) -> Tensor:
        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return generator(x, t, self.text, adapter.residuals(self.traj, x, t, self.text))

        with self.cast():
            return flow.sample_fewstep(velocity, self.traj[:, :, :1], self.noise, flow.sigma_schedule(number, 5.0))

    def compiled(self, kind: str) -> Iterator[dict]:
        networks = self.generator(), self.adapter(kind)
        for block in (*networks[0].blocks, *networks[1].blocks):
            block.compile()
        with attention.fastest(*self.attention):
            four, one = partial(self.steps, *networks), partial(self.steps, *networks, 1)
            yield self.timed(f"4 steps, {kind}, compiled", four, one, repeats=2)

    def eager(self, kind: str, most: int | None = None) -> Iterator[dict]:
        """By each attention backend, or by so many, the fastest first."""
        if self.device.type == "cuda":
            networks = self.generator(), self.adapter(kind)
            for backend in attention.ranking(*self.attention)[:most]:
                with sdpa_kernel(backend):
                    four, one = partial(self.steps, *networks), partial(self.steps, *networks, 1)
                    yield self.timed(f"4 steps, {kind}, eager, {backend.name}", four, one)

    def learn(self, stage: str, name: str, passes: int, repeats: int) -> Iterator[dict]:
        """A training step without the optimizer, of so many passes through a generator: stage 1's; or the adapter's of
        stage 3, which is judged by a second copy of the generator.
        """
        alone, discriminator = parallel.Processes(0, 1, self.device, None), None
        generator, adapter = self.generator(), self.adapter("resnet").requires_grad_(True)
        for network in (generator, adapter):
            parallel.prepare(network, alone, True, "full")
        if stage == "stage 3":
            with torch.device("meta"):
                judge = discriminators.Classifier(self.judge_config)
            backbone = parallel.prepare(self.generator(), alone, True, "full")
            discriminator = discriminators.DiffusionDiscriminator(backbone, random(judge, torch.float32, self.device))
        batch, sigmas = Batch(self.noise[0], self.text, self.traj), flow.sigma_schedule(4, 5.0)
        loss = learning_losses(generator, adapter, discriminator, batch, self.noise, sigmas)[stage]

        def step() -> None:
            with self.cast(), attention.fastest(*self.attention):
                loss().backward()

        row = self.timed(name, step, repeats=repeats)
        d, tokens = self.config.dim, self.attention[2]
        block = tokens * (12 * d * d + 4 * d * self.config.ffn_dim) + 4 * d * tokens * (tokens + len(self.text[0]))
        yield row | {"share_of_peak": passes * self.config.layers * block / row["seconds"] / PEAK}

    def pieces(self, name: str, network: vae.WanVAE | TinyDecoder) -> dict:
        """Decoding. What comes after the third latent frame is as that."""
        latents = torch.randn(1, self.vae_config.channels, *self.grid, device=self.device)
        decode = [partial(lambda z: [None for _ in network.frames(z)], z) for z in (latents, latents[:, :, :3])]
        return self.timed(name, *decode)

    def codec(self, how: str, compiled: bool = False) -> Iterator[dict]:
        """The VAE both ways."""
        with torch.device("meta"):
            codec = vae.WanVAE(self.vae_config)
        codec = random(codec, self.dtype, self.device)
        for module in codec.modules():
            if compiled and isinstance(module, vae.ResidualBlock):
                module.compile()
        yield self.pieces(f"VAE decode{how}", codec)
        frames, *size = self.grid
        video = torch.rand(1, 3, codec.temporal * (frames - 1) + 1, *(n * codec.spatial for n in size))
        yield self.timed(f"VAE encode{how}", *(partial(codec.encode, video[:, :, :n]) for n in (None, 9)))

    def plain(self) -> Iterator[dict]:
        yield from self.codec("")
        whole = [self.seconds.get(name) for name in ("VAE encode", "4 steps, resnet, compiled", "VAE decode")]
        if None not in whole:
            name = "encode, 4 steps with resnet, decode"
            yield {"name": name, "seconds": sum(whole), "GB": None, "share_of_peak": None}

    def winograd(self) -> Iterator[dict]:
        with mock.patch.object(vae.CausalConv3d, "paired_on", ("cpu", "cuda")):
            yield from self.codec(", Winograd")

    def small(self) -> Iterator[dict]:
        with torch.device("meta"):
            network = TinyDecoder(self.vae_config.channels)
        yield self.pieces("small decoder", random(network, self.dtype, self.device))

    def modes(self, kind: str) -> Iterator[dict]:
        """What the modes of --memory hold, beside what was rehearsed."""
        if self.device.type != "cuda" or self.config != PRESETS["wan5b"]:
            return
        table = json.loads((ROOT / "results/rehearsed.json").read_text(encoding="utf-8"))
        rehearsed = {(row["stage"], row["adapter"], row["peak_at"]): row["GB"] for row in table}
        for mode in ("low", "medium"):
            with contextlib.ExitStack() as stack, torch.no_grad():
                for part, call in sampling(stack, mode, kind, layers=4, offload=memory.offload).items():
                    gc.collect()
                    memory.reset_peak(self.device)
                    call()
                    most = memory.peak_memory(self.device) * 2**30 / 1e9
                    name = f"--memory {mode}, {kind}: {part}"
                    name += f"; rehearsed {rehearsed[f'sample, {mode}', kind, part]:.1f} GB"
                    yield {"name": name, "seconds": None, "GB": most, "share_of_peak": None}


PARTS: dict[str, Callable[[Bench], Iterator[dict]]] = {
    "compiled": partial(Bench.compiled, kind="resnet"),
    "vae": Bench.plain,
    "stage 1": partial(Bench.learn, stage="stage 1", name="step of stage 1, resnet", passes=3, repeats=2),
    "eager": partial(Bench.eager, kind="resnet"),
    "small decoder": Bench.small,
    "memory": partial(Bench.modes, kind="resnet"),
    # Three passes of the sampler that keep nothing; three each of its last, the true video's, the judge's.
    "stage 3": partial(
        Bench.learn, stage="stage 3", name="step of stage 3's adapter, resnet", passes=3 + 3 * 3, repeats=1
    ),
    "controlnet": partial(Bench.compiled, kind="controlnet"),
    "controlnet, eager": partial(Bench.eager, kind="controlnet", most=1),
    "controlnet, memory": partial(Bench.modes, kind="controlnet"),
    "winograd": Bench.winograd,
    "vae compiled": partial(Bench.codec, how=", compiled", compiled=True),  # last, for it is the one that may fail
}


def measure(device: torch.device, *shapes: object) -> Iterator[dict]:
    """Rows, each when it is measured. `shapes`: a Bench's."""
    bench = Bench(device, *shapes)
    for part in PARTS.values():
        gc.collect()  # compiled blocks refer to themselves
        yield from part(bench)

"""Generation: frames per second of H at 192x320 with guidance, by the rollout with a cache."""

from functools import lru_cache, partial

import torch
from torch import Tensor

from benchmarks.generation import AVERAGED, measure_rollout, random_model
from benchmarks.gpu_check.cases import Case, Part, Row, Setup
from gpdit_lightning import GPDiT, GPDiTConfig
from gpdit_lightning.codecs import WanCodec
from gpdit_lightning.diffusion import Guidance, RotationSampler
from gpdit_lightning.generation import GenerationConfig, rollout

WINDOW, SINKS = 11, 1  # latent frames that a frame attends to; 11 as in clips of 45 pixel frames
GUIDANCE = 1.2


@lru_cache(maxsize=1)
def model_with_context(setup: Setup) -> tuple[GPDiT, Tensor, torch.dtype | None]:
    """Return the model, its context, and the precision of products."""
    torch.manual_seed(0)
    if setup.smoke_test:
        config = GPDiTConfig.preset("tiny", layers=2, width=32, heads=2, mlp_width=32)
        return random_model(config, (4, 6), setup.device)
    return random_model(GPDiTConfig.preset("H"), (24, 40), setup.device)


def measure_generation(setup: Setup, steps: int, compiled: bool) -> Row:
    """Generate frames until the window is full, then measure some more."""
    model, context, precision = model_with_context(setup)
    sampler, guidance = RotationSampler(steps), Guidance(GUIDANCE)
    config = GenerationConfig(sampler, guidance, WINDOW, SINKS, True, compiled, precision)
    full = WINDOW + SINKS + 2
    # The warm-up, in which kernels are selected and compiled.
    latents = torch.stack(list(rollout(model, context, full, config)))
    (figure,) = measure_rollout(model, context, config, "window", [full + AVERAGED])
    return {
        "latent_ms": 1000 * figure.seconds,
        "frames_per_second": WanCodec.temporal_factor / figure.seconds,
        "gib": figure.mebibytes / 1024,
        "failure": "" if latents.isfinite().all() else "the generated latents are not finite",
    }


def cases(setup: Setup) -> list[Case]:
    """Return the cases: 25 and 8 sampler steps, not compiled and compiled."""
    grid = [(steps, compiled) for compiled in (False, True) for steps in (25, 8)]
    return [
        Case(
            {"steps": steps, "guidance": GUIDANCE, "compiled": "yes" if compiled else "no"},
            partial(measure_generation, setup, 1 if setup.smoke_test else steps, compiled),
        )
        for steps, compiled in (grid[:1] if setup.smoke_test else grid)
    ]


PART = Part(
    name="generation",
    title="Generation by GPDiT-H at 192x320, one video, bf16",
    share=70,
    columns={
        "steps": ("sampler steps", "d"),
        "guidance": ("guidance", ""),
        "compiled": ("compiled", ""),
        "latent_ms": ("ms per latent frame", ".1f"),
        "frames_per_second": ("frames/s", ".2f"),
        "gib": ("GiB in use", ".1f"),
    },
    cases=cases,
    note=f"Latents alone, without decoding; a latent frame is four frames. Each frame attends to the {WINDOW} latent "
    f"frames before it and the first one, by a cache; mean of {AVERAGED} latent frames.",
)

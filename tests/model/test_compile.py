"""Compiled blocks equal eager ones, and are compiled only once per shape."""

import functools
import shutil
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from gpdit_lightning import GPDiT
from gpdit_lightning.diffusion import Guidance, RotationSampler
from gpdit_lightning.generation import ClipInputs, GenerationConfig, rollout
from gpdit_lightning.model import block
from gpdit_lightning.model.attention import flex
from gpdit_lightning.model.attention.trial import SMALL_PLAN, Inputs, check_backend
from tests.model.toys import assert_near, toy_batch, toy_config, toy_model

IMAGES, VIDEOS = toy_batch(2, 0, frames=1), toy_batch(5, 2, frames=2)
PASSES = [(IMAGES, 1), (VIDEOS, 2), (IMAGES, 1), (VIDEOS, 2)]

INDUCTOR = pytest.param(
    "inductor",
    marks=[pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")],
)


@pytest.fixture
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Users get inductor; `aot_eager` traces forward and backward alike without its C++, `eager` the forward alone."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=request.param))
    block._compiled.cache_clear()
    counters.clear()
    yield
    block._compiled.cache_clear()
    torch._dynamo.reset()


def graphs() -> int:
    """Return the number of graphs, none of which has a graph break."""
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def gradients(model: GPDiT, batch: tuple[Tensor, ...], draws: int) -> list[Tensor]:
    output = model(*(x.float() for x in batch), draws=draws)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), list(model.parameters()))]


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("_backend", ["aot_eager", INDUCTOR], indirect=True)
def test_training_compiled_and_all_else_eager() -> None:
    """Images and videos alternate, with and without activation checkpointing: three graphs in total."""
    config = toy_config(layers=3)
    eager = toy_model(config).float()
    for checkpointing in (False, True):
        model = toy_model(config.replaced(compile=True, activation_checkpointing=checkpointing)).float()
        assert model.state_dict().keys() == eager.state_dict().keys()
        for batch, draws in PASSES:
            for compiled, expected in zip(gradients(model, batch, draws), gradients(eager, batch, draws), strict=True):
                assert_near(compiled, expected, tolerance=1e-5)
    assert graphs() == 3  # any block for images; the inner blocks and the last for videos

    noisy, theta, clean = (x.float() for x in toy_batch(2, frames=3))
    with torch.no_grad():
        expected = eager(noisy, theta, clean)
        assert torch.equal(model(noisy, theta, clean), expected)
    cache = model.new_cache(2, 3, 4, 6)
    for frame in range(3):
        assert_near(model.denoise(noisy[:, frame], theta[:, frame], cache), expected[:, frame], tolerance=1e-5)
        model.extend(cache, clean[:, frame : frame + 1])
    assert graphs() == 3


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("_backend", ["eager"], indirect=True)
def test_many_shapes_are_all_compiled() -> None:
    """Beyond torch's limit of eight graphs blocks would run eagerly."""
    model = toy_model(layers=1, compile=True).float()
    for width in range(2, 20, 2):
        model(*(x.float() for x in toy_batch(1, 0, frames=1, width=width)))
    assert graphs() == 9


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("_backend", ["eager"], indirect=True)
def test_flex_attention_is_compiled_for_many_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, beyond torch's limit of graphs, and as a part of a compiled block without a graph break."""
    compiled = flex.load_flex_attention.__wrapped__("cuda")
    monkeypatch.setattr(flex, "load_flex_attention", lambda _: compiled)
    limit = torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True)
    with torch.no_grad(), limit:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            inputs = Inputs.random(SMALL_PLAN, 2, 16, torch.device("cpu"), dtype, gradient=False)
            check_backend(flex.Flex(), SMALL_PLAN, inputs, gradient=False)
        assert graphs() == 3
        model = toy_model(layers=1, attention_backend="flex_attention").float()
        noisy, theta, _ = (x.float() for x in toy_batch(1, frames=1))
        assert_near(model.denoise(noisy[:, 0], theta[:, 0], compiled=True), model(noisy, theta)[:, 0], tolerance=1e-5)
        assert not counters["graph_break"]


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("_backend", ["aot_eager"], indirect=True)
def test_compiled_calls_do_not_change_torchs_settings() -> None:
    """The limit of graphs and DDP's optimizer concern everything else that a process compiles."""
    before = torch._dynamo.config.get_config_copy()
    model = toy_model(layers=1, compile=True).float()
    noisy, theta, clean = (x.float() for x in toy_batch(1, frames=2))
    model(noisy, theta, clean).sum().backward()
    model.denoise(noisy[:, 0], theta[:, 0], compiled=True)
    assert graphs() > 0
    assert torch._dynamo.config.get_config_copy() == before


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("_backend", ["aot_eager", INDUCTOR], indirect=True)
@pytest.mark.parametrize("variant", ["of2", "of"])
def test_a_rolling_window_is_compiled_once(variant: str) -> None:
    """A frame's first pass, which takes in the frame before, in inner blocks and the last; and any other pass."""
    model = toy_model(attention=variant, layers=3, classes=2).float().eval()
    context = toy_batch(2, 2, frames=4)[2].float()
    sampler, guidance = RotationSampler(steps=3), Guidance(context=2.0)
    made, counted = [], []
    for compiled in (False, True):
        config = GenerationConfig(sampler, guidance, window=2, sinks=1, compile=compiled)
        frames = rollout(model, context, 5, config, ClipInputs(condition=torch.tensor([0, 1])))
        made.append([next(frames), next(frames)])
        counted.append(graphs())
        made[-1] += frames
    assert_near(torch.stack(made[1]), torch.stack(made[0]), tolerance=1e-5)
    assert graphs() == counted[1] == 4  # without a prefix a pass that takes in nothing has no last block of its own

"""Public functions that take tensors, with arguments on several devices; run by tests/device/test_on_sim.py.

A function either moves its arguments, with the result that it has on the CPU, or refuses them in one sentence.
"""

from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from gpdit_lightning import GPDiT, GPDiTConfig
from gpdit_lightning.checkpoints.hub import HubGPDiT
from gpdit_lightning.codecs import Codec, fit_pca, load_codec
from gpdit_lightning.codecs.wan import WanCodec
from gpdit_lightning.diffusion import (
    SAMPLERS,
    DenoisingLoss,
    Guidance,
    NoiseSchedule,
    RotationSampler,
    denoising_loss,
    rotate_back,
    rotate_to,
)
from gpdit_lightning.errors import InputError
from gpdit_lightning.evaluation import metrics, networks, self_checks
from gpdit_lightning.evaluation.chunks import EvaluationSettings, MetricNetworks, measure, reconstruct
from gpdit_lightning.evaluation.i3d import I3D
from gpdit_lightning.evaluation.inception import LogitsClassifier, NvidiaInception, PlainInception
from gpdit_lightning.generation import (
    ClipInputs,
    GenerationConfig,
    cast_linear_weights,
    continue_video,
    rollout,
    stream_video,
    transform,
)
from gpdit_lightning.generation.context_loss import relative_loss
from gpdit_lightning.media import image_tasks
from gpdit_lightning.model.layout import BlockLayout, count_blocks
from gpdit_lightning.options.evaluate import NetworkOptions
from gpdit_lightning.probing.encoder import VideoEncoder
from tests.device.simulated import recording
from tests.evaluation.scripted import ScriptedClassifier, ScriptedInception

CONFIG = GPDiTConfig(size="tiny", layers=2, width=24, heads=2, mlp_width=24, latent_channels=16, classes=3)
SHAPE = (2, 4, 16, 4, 4)  # (B, F, C, h, w)
NUMBERS = torch.Generator().manual_seed(0)
LATENTS, OTHERS = torch.randn(2, *SHAPE, generator=NUMBERS)
THETA = torch.rand(SHAPE[:2], generator=NUMBERS)
LABELS = torch.tensor([2, 0])
PIXELS, OTHER_PIXELS = torch.randint(0, 256, (2, 2, 13, 3, 32, 32), dtype=torch.uint8, generator=NUMBERS)
FEATURES, OTHER_FEATURES = torch.randn(2, 30, 5, generator=NUMBERS)


# Architectures whose blocks are not frames, or whose time conditioning is not the rotation.
ADALN = {"time_conditioning": "adaln", "target": "epsilon"}
BLOCKS: dict[str, dict[str, Any]] = {
    "squares": {"block_shape": (1, 2, 2), "patch_size": 1, **ADALN},
    "squares-rotation": {"block_shape": (1, 1, 2), "attention": "of"},
    "chunks": {"block_shape": (2, 0, 0), "causal_in_block": True, "factorized": True, **ADALN},
    "first-block-modulation": {
        "block_shape": (3, 0, 0),
        "first_block_frames": 1,
        "time_conditioning": "rotation_modulation",
    },
    "first-block": {"block_shape": (3, 0, 0), "first_block_frames": 1, "time_site": "residual"},
    "clip": {"block_shape": (0, 0, 0), "first_block_frames": 1, **ADALN},
}
of_blocks = pytest.mark.parametrize("fields", BLOCKS.values(), ids=BLOCKS)


def model_of(device: str, **changes: Any) -> GPDiT:
    """Return a model with the same random weights on any device."""
    model = HubGPDiT(CONFIG.replaced(**changes)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return model.to(device)


def wan() -> Codec:
    """Return the WanVAE with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return WanCodec(diffusers.AutoencoderKLWan(base_dim=8, num_res_blocks=1))


def pca() -> Codec:
    return load_codec("pca")


def no_owner(device: str) -> None:
    """Return None, for functions that need no model, codec or network."""


def check_any_device(function: Callable[..., Any], *tensors: Tensor, of: Callable[[str], Any] = no_owner) -> None:
    """Check that a function gives the result of the CPU wherever its tensors are.

    Args:
        function: of what `of` returns, unless that is None, and of the tensors.
        tensors: arguments, on the CPU.
        of: returns a model, codec or network on a device; it is on `sim` for all but the expected result.
    """

    def results(device: str, *moved: Tensor) -> list[Tensor]:
        owner = of(device)
        result = function(*([] if owner is None else [owner]), *moved)
        parts = [result] if isinstance(result, Tensor | float) else list(result)
        return [torch.as_tensor(part).cpu() for part in parts]

    expected = results("cpu", *tensors)
    for devices in product(("cpu", "sim"), repeat=len(tensors)):
        actual = results("sim", *(tensor.to(device) for tensor, device in zip(tensors, devices, strict=True)))
        # Where a GPU computes in float32 what a CPU computes in float64, pixels may differ by one level.
        for here, there in zip(actual, expected, strict=True):
            tolerance = 1.01 if here.dtype == torch.uint8 else 1e-4
            torch.testing.assert_close(here.float(), there.float(), rtol=1e-4, atol=tolerance)


# --- the model


@pytest.mark.parametrize(
    ("variant", "site"), [("of2", "branch"), ("of2", "branch_inverse"), ("of", "residual"), ("of", "input")]
)
def test_angles_and_labels_may_be_on_any_device(variant: str, site: str) -> None:
    def velocity(model: GPDiT, theta: Tensor, labels: Tensor) -> Tensor:
        noisy, clean = (latents.to(model.device) for latents in (LATENTS, OTHERS))
        return model(noisy, theta, clean, labels)

    check_any_device(velocity, THETA, LABELS, of=lambda device: model_of(device, attention=variant, time_site=site))


@of_blocks
def test_models_of_blocks_take_angles_and_labels_on_any_device(fields: dict[str, Any]) -> None:
    """Their predictions with and without context, the gradient, and features."""
    count = count_blocks(CONFIG.replaced(**fields), range(SHAPE[1]), *SHAPE[-2:])
    angles = torch.rand(2, count, generator=torch.Generator().manual_seed(3))

    def results(model: GPDiT, theta: Tensor, labels: Tensor) -> list[Tensor]:
        noisy, clean = (latents.to(model.device) for latents in (LATENTS, OTHERS))
        prediction = model(noisy, theta, clean[:1], labels)
        prediction.square().sum().backward()
        gradient = model.patch_embedding.weight.grad
        return [prediction.detach(), gradient / gradient.norm(), model.features(clean, [2], labels)[2].detach()]

    check_any_device(results, angles, LABELS, of=lambda device: model_of(device, **fields))


def test_cached_generation_takes_angles_and_labels_on_any_device() -> None:
    def velocity(model: GPDiT, theta: Tensor, labels: Tensor) -> Tensor:
        latents = OTHERS.to(model.device)
        cache = model.new_cache(2, 3, *SHAPE[-2:], sinks=1)
        model.extend(cache, latents, labels)
        rows, levels = LATENTS[:, 0].to(model.device).repeat(2, 1, 1, 1), theta[:, 0].repeat(2)
        return model.denoise(rows, levels, cache, labels.repeat(2), latents[:, :1], draws=2)

    check_any_device(velocity, THETA, LABELS, of=model_of)


def test_text_embeddings_may_be_on_any_device() -> None:
    text = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(2))

    def last_frame(model: GPDiT, condition: Tensor, null: Tensor, context: Tensor) -> Tensor:
        config = GenerationConfig(RotationSampler(2), Guidance(label=2.0))
        return list(rollout(model, context, 1, config, ClipInputs(0, condition, null)))[-1]

    model = partial(model_of, classes=0, text_width=5)
    check_any_device(last_frame, text, text * 0, LATENTS[:, :2], of=model)


@pytest.mark.parametrize(
    "call",
    [
        lambda model, here, there: model(there, THETA, here),
        lambda model, here, there: model(here, THETA, there),
        lambda model, here, there: model.features(there, [1]),
        lambda model, here, there: model.extend(model.new_cache(2, 4, 4, 4), there),
        lambda model, here, there: model.extend(model_of("cpu").new_cache(2, 4, 4, 4), here),
        lambda model, here, there: model.denoise(there[:, 0], THETA[:, 0]),
        lambda model, here, there: model.denoise(here[:, 0], THETA[:, 0], clean=there),
        lambda model, here, there: model.denoise(here[:, 0], THETA[:, 0], model_of("cpu").new_cache(2, 4, 4, 4)),
        lambda model, here, there: VideoEncoder(model, 1, 5)(there),
        lambda model, here, there: rotate_to(here, there, THETA),
        lambda model, here, there: rotate_to(here, here, THETA),
        lambda model, here, there: rotate_back(here, there, 0.1),
        lambda model, here, there: denoising_loss(here, there, THETA),
        lambda model, here, there: denoising_loss(here, here, THETA),
        lambda model, here, there: DenoisingLoss.from_blocks(here[:, :, 0, 0, 0], THETA),
        lambda model, here, there: Guidance(2.0).combine(here, None, there),
        lambda model, here, there: Guidance(1.0, 2.0).combine(here, there, None),
    ],
)
def test_latents_on_another_device_are_refused(call: Callable[[GPDiT, Tensor, Tensor], object]) -> None:
    with pytest.raises(InputError, match=r"^(\S+|the cache) (is|are) on cpu, but .* (is|are) on sim:0: .*\.$"):
        call(model_of("sim"), LATENTS.to("sim"), LATENTS)


def test_labels_that_do_not_exist_are_found_before_they_are_on_the_device() -> None:
    model = model_of("sim")
    with pytest.raises(InputError, match=r"the condition is \[2, 3\]; this model takes a class from 0 to 2"):
        next(rollout(model, LATENTS[:, :1], 1, inputs=ClipInputs(0, LABELS.new_tensor([2, 3]))))


@pytest.mark.parametrize("fields", [{}, BLOCKS["squares"], BLOCKS["clip"]], ids=["frames", "squares", "clip"])
def test_a_pass_of_any_shape_waits_only_once_for_its_tables(fields: dict[str, Any]) -> None:
    """All clip lengths and frame sizes of the long-video stage."""
    model, theta = model_of("sim", layers=1, **fields), THETA.to("sim")
    shapes = [(frames, *size) for frames in range(2, 13) for size in ((2, 4), (4, 2))]

    @torch.no_grad()
    def pass_over_all_shapes() -> None:
        for frames, height, width in shapes:
            latents = LATENTS[:, :1, :, :height, :width].to("sim").expand(-1, frames, -1, -1, -1)
            blocks = count_blocks(model.config, range(frames), height, width)
            model(latents, theta[:, :1].expand(-1, blocks), latents)

    pass_over_all_shapes()
    with recording() as record:
        pass_over_all_shapes()
    assert {cause.partition(" at ")[2].partition(":")[0] for cause in record.waits} == {"on_sim/functions.py"}


def slow_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """A custom attention operator."""
    scores = torch.einsum("bmhd,bnhd->bhmn", query, key) / query.shape[-1] ** 0.5
    return torch.einsum("bhmn,bnhd->bmhd", scores.softmax(-1), value)


@pytest.mark.parametrize("backend", ["auto", "sdpa", f"{__name__}.slow_attention"])
def test_attention_backends_have_gradients_on_the_device(backend: str) -> None:
    def gradient(model: GPDiT, theta: Tensor) -> Tensor:
        noisy, clean = (latents.to(model.device) for latents in (LATENTS, OTHERS))
        model(noisy, theta, clean).square().sum().backward()
        return model.patch_embedding.weight.grad

    check_any_device(gradient, THETA, of=lambda device: model_of(device, attention_backend=backend))


def test_features_for_other_models_are_trained_on_the_device() -> None:
    latents = LATENTS[:, :2]

    def output(device: str) -> Tensor:
        encoder = VideoEncoder(model_of(device), 1, 5)
        nn.init.eye_(encoder.projection.weight)
        nn.init.zeros_(encoder.projection.bias)
        encoder(latents.to(device)).sum().backward()
        return encoder.projection.weight.grad.cpu()

    torch.testing.assert_close(output("sim"), output("cpu"))


def test_a_model_on_the_device_is_saved_and_loaded(tmp_path: Path) -> None:
    model_of("sim").save_pretrained(tmp_path)
    for device in ("cpu", "sim"):
        loaded = HubGPDiT.from_pretrained(tmp_path, map_location=device)
        assert loaded.device.type == device
        for name, weight in model_of("cpu").state_dict().items():
            assert torch.equal(loaded.state_dict()[name].cpu(), weight)


# --- diffusion and generation


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_schedules_compute_on_the_device_of_the_levels(name: Any) -> None:
    check_any_device(NoiseSchedule(name, shift=2.0).theta, THETA)
    levels = THETA.to("sim")
    with recording() as record:
        assert NoiseSchedule(name).theta(levels).device.type == "sim"
    assert not record.waits


@pytest.mark.parametrize(
    ("sampler", "settings"),
    [*((name, {}) for name in SAMPLERS), ("rotation", {"use_cache": False}), ("rotation", {"window": 2, "sinks": 1})],
)
def test_a_rollout_waits_once_per_frame(sampler: str, settings: dict[str, Any]) -> None:
    """For the noise, which is drawn on the CPU; the stochastic sampler draws it at each step."""
    config = GenerationConfig(SAMPLERS[sampler](2), Guidance(1.5, 2.0), **settings)

    def frames(model: GPDiT, context: Tensor, labels: Tensor) -> Tensor:
        return torch.stack(list(rollout(model, context, 2, config, ClipInputs([3, 5], labels))), dim=1)

    check_any_device(frames, LATENTS[:, :3], LABELS, of=model_of)
    model, context = model_of("sim"), LATENTS[:, :3].to("sim")
    with recording() as record:
        frames(model, context, LABELS)
    assert not record.random
    tables = sum(count for cause, count in record.waits.items() if "model/positions.py" in cause)
    assert tables <= 2 * 2  # the sinks' shifts
    labels = 2  # for the whole rollout: the given ones and those without a label
    assert record.waits.total() - tables - labels == 2 * (2 if sampler == "stochastic" else 1)


@of_blocks
def test_a_rollout_of_blocks_waits_once_per_block(fields: dict[str, Any]) -> None:
    """For its noise; the tables of positions are those of the first rollout."""
    sampler = RotationSampler(2, NoiseSchedule("linear"))
    layout = BlockLayout.of(CONFIG.replaced(**fields), *SHAPE[-2:])
    context, generated = layout.first_frames, layout.frames or 3

    def frames(model: GPDiT, latents: Tensor, labels: Tensor, use_cache: bool = True) -> Tensor:
        config = GenerationConfig(sampler, Guidance(1.5, 2.0), use_cache=use_cache)
        return torch.stack(list(rollout(model, latents, generated, config, ClipInputs([3, 5], labels))), dim=1)

    without_cache = [True, False] if fields["block_shape"][1:] == (0, 0) else [True]
    for use_cache in without_cache:
        generate = partial(frames, use_cache=use_cache)
        check_any_device(generate, LATENTS[:, :context], LABELS, of=partial(model_of, **fields))
    model, latents = model_of("sim", **fields), LATENTS[:, :context].to("sim")
    with recording() as record:
        frames(model, latents, LABELS)
    assert not record.random
    labels = 2
    assert record.waits.total() - labels == layout.blocks_per_group


def test_a_rollout_from_noise_alone_and_in_bf16() -> None:
    def frames(model: GPDiT, labels: Tensor, dtype: torch.dtype | None) -> Tensor:
        config = GenerationConfig(RotationSampler(2), autocast_dtype=dtype)
        return torch.stack(list(rollout(model, LATENTS[:, :0], 3, config, ClipInputs(0, labels))), dim=1)

    check_any_device(lambda model, labels: frames(model, labels, None), LABELS, of=model_of)
    model = model_of("sim")
    exact = frames(model, LABELS, None).cpu()
    cast_linear_weights(model, torch.bfloat16)
    rounded = frames(model, LABELS, torch.bfloat16).cpu()
    assert 0 < (exact - rounded).abs().max() < 0.2


@pytest.mark.parametrize("make_codec", [pca, wan])
@pytest.mark.parametrize("codec_device", ["cpu", "sim"])
def test_videos_are_continued_wherever_codec_and_context_are(
    make_codec: Callable[[], Codec], codec_device: str
) -> None:
    codec = make_codec()
    config = GenerationConfig(RotationSampler(2), Guidance(1.5))

    def continued(model: GPDiT, context: Tensor) -> Tensor:
        codec.to("cpu" if model.device.type == "cpu" else codec_device)
        return continue_video(model, codec, context, 4, config, ClipInputs(0, LABELS)).pixels

    check_any_device(continued, PIXELS[:, :5], of=model_of)


def test_frames_are_streamed_from_latents_on_any_device() -> None:
    def pixels(model: GPDiT, context: Tensor, labels: Tensor) -> Tensor:
        codec = pca().to(model.device)
        pieces = stream_video(model, codec, context, 6, GenerationConfig(RotationSampler(2)), ClipInputs(0, labels))
        return torch.cat([piece.pixels for piece in pieces], dim=1)

    check_any_device(pixels, LATENTS[:, :2], LABELS, of=model_of)


@pytest.mark.parametrize("fields", [{}, BLOCKS["squares"], BLOCKS["chunks"]], ids=["frames", "squares", "chunks"])
def test_a_context_is_compared_with_the_training_data_wherever_it_is(fields: dict[str, Any]) -> None:
    def loss(model: GPDiT, context: Tensor) -> float | None:
        validation = SimpleNamespace(quarters={"videos": [1.0]})
        geometry, schedule = SimpleNamespace(frames=4), NoiseSchedule("linear")
        trained: Any = SimpleNamespace(
            backbone=model, validation=validation, geometry=geometry, schedule=schedule, frames_without_loss=0
        )
        return relative_loss(trained, context, label=1)

    check_any_device(loss, LATENTS[0], of=partial(model_of, **fields))


def test_images_are_transformed_wherever_they_are() -> None:
    def targets(model: GPDiT, example: Tensor, target: Tensor, sources: Tensor) -> Tensor:
        config = GenerationConfig(RotationSampler(2))
        return transform(model, pca().to(model.device), [(example, target)], sources, config)

    check_any_device(targets, PIXELS[0, 0], PIXELS[1, 0], OTHER_PIXELS[:, 0], of=partial(model_of, classes=0))


# --- codecs and images


@pytest.mark.parametrize("make_codec", [pca, wan])
def test_codecs_take_tensors_on_any_device(make_codec: Callable[[], Codec]) -> None:
    codec = make_codec()
    check_any_device(Codec.encode, PIXELS[:, :5], of=codec.to)
    check_any_device(Codec.decode, LATENTS[:, :2], of=codec.to)
    check_any_device(reconstruct, PIXELS[:, :6], of=codec.to)
    for function in (codec.whitened, codec.unwhitened):
        check_any_device(function, LATENTS)


def test_the_codec_is_fitted_to_clips_on_any_device() -> None:
    def components(clip: Tensor, other: Tensor) -> list[Tensor]:
        codec = fit_pca.fit([clip, other])
        return [codec.weights["later_components"], torch.tensor(fit_pca.psnr(codec, [clip, other]))]

    check_any_device(components, PIXELS[0, :5], PIXELS[1, :9])


@pytest.mark.parametrize("name", image_tasks.TASKS)
def test_image_tasks_take_images_on_any_device(name: str) -> None:
    check_any_device(lambda image: image_tasks.make_pair(image_tasks.TASKS[name], image), PIXELS[0, :2])


# --- evaluation


class Clips(nn.Module):
    """A custom video network."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, videos: Tensor) -> Tensor:
        return videos.float().mean((3, 4)).flatten(1)[:, :3] * self.scale


def loaded(role: str, module: nn.Module) -> networks.LoadedNetwork:
    record = networks.NetworkRecord(role, role, "", "")
    return networks.LoadedNetwork(module, record, role, True, networks.CONTRACTS[role])


class Features(nn.Module):
    """Features of images, (N, 3, 299, 299)."""

    def forward(self, images: Tensor) -> Tensor:
        return images[:, :, ::50, ::70].flatten(1)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """Return a network with the same random weights at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()


def image_network(module: nn.Module, device: str) -> networks.ImageNetwork:
    return networks.ImageNetwork(loaded("image", module), device)


@pytest.mark.parametrize(
    ("network", "pixels"),
    [
        (lambda device: networks.load_video_network(NetworkOptions(kind=f"{__name__}.Clips"), device), PIXELS),
        (lambda device: image_network(PlainInception(Features()), device), PIXELS[:, 0]),
        (lambda device: image_network(NvidiaInception(seeded(ScriptedInception)), device), PIXELS[:, 0]),
        (
            lambda device: networks.ImageClassifier(
                loaded("classifier", LogitsClassifier(ScriptedClassifier(), "classes")), device
            ),
            PIXELS[:, 0],
        ),
    ],
    ids=["custom", "features", "Inception", "classifier"],
)
def test_networks_take_pixels_on_any_device(network: Callable[[str], nn.Module], pixels: Tensor) -> None:
    check_any_device(lambda network, pixels: network(pixels), pixels, of=network)


def test_i3d_computes_on_its_device() -> None:
    expected = seeded(I3D)(PIXELS[:1, :10])
    network = networks.VideoNetwork(loaded("video", seeded(I3D)), "sim")
    torch.testing.assert_close(network(PIXELS[:1, :10]).cpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("function", "tensors"),
    [
        (metrics.psnr, (PIXELS, OTHER_PIXELS)),
        (metrics.ssim, (PIXELS[:, :2], OTHER_PIXELS[:, :2])),
        (metrics.precision_recall, (FEATURES, OTHER_FEATURES)),
        (lambda values: metrics.inception_score(values.softmax(1), 2), (FEATURES,)),
        (
            metrics.frechet_distance,
            (FEATURES[0], FEATURES.T.cov(), OTHER_FEATURES[0], OTHER_FEATURES.T.cov()),
        ),
        (lambda videos: self_checks.add_noise(videos, 8.0, [0, 1]), (PIXELS,)),
        (lambda videos: self_checks.gaussian_blur(videos, 1.0), (PIXELS,)),
    ],
)
def test_scores_take_tensors_on_any_device(function: Callable[..., Any], tensors: tuple[Tensor, ...]) -> None:
    check_any_device(function, *tensors)


@pytest.mark.parametrize("on_device", [False, True])
def test_the_frechet_metric_takes_features_on_any_device(on_device: bool) -> None:
    def distance(real: Tensor, generated: Tensor) -> Tensor:
        metric = metrics.FrechetDistance(FEATURES.shape[1]).to("sim" if on_device else "cpu")
        metric.update(real, real=True)
        metric.update(generated, real=False)
        return metric.compute()

    check_any_device(distance, FEATURES, OTHER_FEATURES)


def test_videos_are_measured_wherever_they_are() -> None:
    settings = EvaluationSettings(5, 8, 1, (32, 32), (0,), GenerationConfig())

    def measured(video: nn.Module, videos: Tensor, ground_truth: Tensor) -> list[Tensor]:
        image = image_network(NvidiaInception(seeded(ScriptedInception)), video.device)
        return list(measure(videos, ground_truth, settings, MetricNetworks(video, image)).values())

    check_any_device(
        measured, PIXELS, OTHER_PIXELS, of=lambda device: networks.VideoNetwork(loaded("video", Clips()), device)
    )

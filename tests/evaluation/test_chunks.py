"""Variants and results of one chunk of videos."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gpdit_lightning import GPDiT, GPDiTConfig
from gpdit_lightning.codecs import load_codec
from gpdit_lightning.diffusion import Guidance, RotationSampler
from gpdit_lightning.errors import InputError
from gpdit_lightning.evaluation.chunk_files import ChunkFiles, write_chunk
from gpdit_lightning.evaluation.chunks import (
    Chunk,
    EvaluationSettings,
    MetricNetworks,
    evaluate_chunk,
    noise_seed,
    split_into_chunks,
)
from gpdit_lightning.evaluation.metrics import psnr, ssim
from gpdit_lightning.evaluation.networks import load_image_network, load_video_network
from gpdit_lightning.evaluation.self_checks import add_noise, gaussian_blur
from gpdit_lightning.evaluation.videos import Selection, read_clip, select_videos
from gpdit_lightning.generation import ClipInputs, GenerationConfig, continue_video
from gpdit_lightning.media.video_writer import write_video
from tests.evaluation.scripted import ScriptedI3D, ScriptedInception, saved

CODEC = load_codec("pca")
NAMES = ("a", "b", "c")
# The 15 frames of a clip are not 1 + 4k.
SETTINGS = EvaluationSettings(
    context_frames=5,
    generated_frames=10,
    stride=2,
    size=(32, 32),
    seeds=(0, 3),
    generation=GenerationConfig(RotationSampler(2), Guidance(1.5)),
    self_check_videos=12,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of thirty frames. The header of `damaged.mp4` is intact, but its frames are not."""
    folder = tmp_path_factory.mktemp("chunks")
    generator = torch.Generator().manual_seed(0)
    for name in (*NAMES, "damaged"):
        pixels = torch.randint(256, (30, 3, 4, 6), generator=generator, dtype=torch.uint8)
        write_video(folder / f"{name}.mp4", pixels.repeat_interleave(8, 2).repeat_interleave(8, 3), 24)
    content = bytearray((folder / "damaged.mp4").read_bytes())
    end = content.find(b"moov") - 8
    content[end // 2 : end] = bytes(end - end // 2)
    (folder / "damaged.mp4").write_bytes(content)
    assert select_videos([folder / "damaged.mp4"], 1, 0, 29).names
    return folder


@pytest.fixture(scope="module")
def model(randomise: Callable[[GPDiT], GPDiT]) -> GPDiT:
    return randomise(GPDiT(GPDiTConfig(size="tiny", layers=1, width=24, heads=2, mlp_width=48))).eval()


@pytest.fixture(scope="module")
def networks(folder: Path) -> MetricNetworks:
    return MetricNetworks(
        load_video_network(saved(ScriptedI3D(), folder)), load_image_network(saved(ScriptedInception(), folder))
    )


def chunk_of(folder: Path, *names: str, start: int = 10) -> Chunk:
    return Chunk(start, names, tuple(folder / f"{name}.mp4" for name in names))


@pytest.fixture(scope="module")
def evaluated(folder: Path, model: GPDiT, networks: MetricNetworks) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The variants of the three videos, and their results."""
    variants: dict[str, Tensor] = {}

    def on_variant(variant: str, names: list[str], videos: Tensor) -> None:
        assert names == list(NAMES[: len(videos)])
        variants[variant] = videos

    names, results = evaluate_chunk(chunk_of(folder, *NAMES), SETTINGS, model, CODEC, networks, on_variant)
    assert names == list(NAMES)
    return variants, results


def test_variants_match_an_independent_computation(
    folder: Path, model: GPDiT, evaluated: tuple[dict[str, Tensor], dict[str, Tensor]]
) -> None:
    variants = dict(evaluated[0])
    ground_truth = torch.stack([read_clip(folder / f"{name}.mp4", 15, 2, (32, 32)) for name in NAMES])
    assert torch.equal(variants.pop("truth"), ground_truth)
    longer = torch.cat([ground_truth, ground_truth[:, -1:], ground_truth[:, -1:]], dim=1)
    reconstruction = torch.cat((ground_truth[:, :5], CODEC.decode(CODEC.encode(longer))[:, 5:15]), dim=1)
    assert torch.equal(variants.pop("codec"), reconstruction)
    assert torch.equal(variants.pop("repeated"), ground_truth[:, [0, 1, 2, 3, *[4] * 11]])
    for seed in SETTINGS.seeds:
        batch = variants.pop(f"seed {seed}")
        for name, video, context in zip(NAMES, batch, ground_truth[:, :5], strict=True):
            alone = continue_video(
                model, CODEC, context[None], 10, SETTINGS.generation, ClipInputs([noise_seed(name, seed)])
            )
            assert (video.int() - alone.pixels[0].int()).abs().max() <= 1
            other = continue_video(
                model, CODEC, context[None], 10, SETTINGS.generation, ClipInputs([noise_seed(name, 7)])
            )
            assert (video[5:].int() - other.pixels[0, 5:].int()).abs().float().mean() > 5
    seeds = [noise_seed(name, 0) for name in NAMES[:2]]  # the chunk starts at video 10, and 12 videos are distorted
    for level in (8, 16, 32):
        assert torch.equal(variants.pop(f"noise {level}"), add_noise(ground_truth[:2], level, seeds))
    for sigma in (1, 2, 4):
        assert torch.equal(variants.pop(f"blur {sigma}"), gaussian_blur(ground_truth[:2], sigma))
    assert not variants
    assert len({noise_seed(name, seed) for name in NAMES for seed in range(50)}) == 150


def test_results_cover_whole_videos_and_each_generated_frame(
    networks: MetricNetworks, evaluated: tuple[dict[str, Tensor], dict[str, Tensor]]
) -> None:
    variants, results = evaluated
    assert set(results) == {
        f"{variant}/{quantity}" for variant in variants for quantity in ("video", "image", "classes", "psnr", "ssim")
    }
    for variant, videos in variants.items():
        ground_truth = variants["truth"][: len(videos)]
        torch.testing.assert_close(results[f"{variant}/video"], networks.video(videos))
        assert results[f"{variant}/image"].shape == (len(videos), 10, 6)
        for position in (0, 9):
            features, classes = networks.image.features_and_probabilities(videos[:, 5 + position])
            torch.testing.assert_close(results[f"{variant}/image"][:, position], features)
            torch.testing.assert_close(results[f"{variant}/classes"][:, position], classes)
        assert torch.equal(results[f"{variant}/psnr"], psnr(videos[:, 5:], ground_truth[:, 5:]))
        assert torch.equal(results[f"{variant}/ssim"], ssim(videos[:, 5:], ground_truth[:, 5:]))


def test_fvd_without_context_uses_only_generated_frames(folder: Path, model: GPDiT, networks: MetricNetworks) -> None:
    variants: dict[str, Tensor] = {}
    settings = replace(SETTINGS, fvd_includes_context=False, self_check_videos=0, seeds=(0,))
    chunk = chunk_of(folder, "a")
    _, results = evaluate_chunk(
        chunk, settings, model, CODEC, networks, lambda name, _, videos: variants.update({name: videos})
    )
    assert set(variants) == {"truth", "codec", "repeated", "seed 0"}
    for variant, videos in variants.items():
        torch.testing.assert_close(results[f"{variant}/video"], networks.video(videos[:, 5:]))


def test_an_unreadable_video_does_not_affect_the_others(
    folder: Path, model: GPDiT, networks: MetricNetworks, evaluated: tuple[dict[str, Tensor], dict[str, Tensor]]
) -> None:
    names, results = evaluate_chunk(chunk_of(folder, "a", "damaged", "b", "c"), SETTINGS, model, CODEC, networks)
    assert names == list(NAMES)
    assert results.keys() == evaluated[1].keys()
    for key, values in results.items():
        assert torch.equal(values, evaluated[1][key]), key


def test_unreadable_videos_are_left_out_but_a_missing_file_is_an_error(
    folder: Path, model: GPDiT, networks: MetricNetworks, tmp_path: Path
) -> None:
    names, results = evaluate_chunk(chunk_of(folder, "damaged"), SETTINGS, model, CODEC, networks)
    assert (names, results) == ([], {})
    write_chunk(tmp_path / "0.safetensors", names, results, {})
    write_chunk(tmp_path / "1.safetensors", ["a"], {"truth/video": torch.ones(1, 2)}, {})
    files = ChunkFiles([tmp_path / "0.safetensors", tmp_path / "1.safetensors"], {})
    assert files.names == ["a"]
    assert len(list(files.values("truth", "video"))) == 1
    with pytest.raises(InputError, match=r"gone.mp4"):
        evaluate_chunk(chunk_of(folder, "a", "gone"), SETTINGS, model, CODEC, networks)


def test_a_selection_is_divided_into_chunks() -> None:
    names = tuple("abcdefg")
    chunks = split_into_chunks(Selection(names, tuple(map(Path, names))), 3)
    assert [(chunk.start, "".join(chunk.names)) for chunk in chunks] == [(0, "abc"), (3, "def"), (6, "g")]
    assert all(tuple(map(str, chunk.paths)) == chunk.names for chunk in chunks)

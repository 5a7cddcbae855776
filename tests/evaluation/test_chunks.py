from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from gpdit_lightning import GPDiT, GPDiTConfig
from gpdit_lightning.codecs import load_codec
from gpdit_lightning.diffusion import Guidance, RotationSampler
from gpdit_lightning.errors import InputError
from gpdit_lightning.evaluation.chunks import (
    Chunk,
    ChunkFiles,
    EvaluationSettings,
    MetricNetworks,
    evaluate_chunk,
    noise_seed,
    split_into_chunks,
    write_chunk,
)
from gpdit_lightning.evaluation.metrics import psnr, ssim
from gpdit_lightning.evaluation.networks import open_image_network, open_video_network
from gpdit_lightning.evaluation.self_checks import add_noise, gaussian_blur
from gpdit_lightning.evaluation.videos import Selection, has_frames, read_clip
from gpdit_lightning.generation import ClipInputs, GenerationConfig, continue_video
from gpdit_lightning.media.video import write_video
from tests.evaluation.scripted import ScriptedI3D, ScriptedInception, saved

CODEC = load_codec("pca")
NAMES = ("a", "b", "c")
# 15 frames are not 1 + 4k.
TASK = EvaluationSettings(
    context_frames=5,
    generated_frames=10,
    stride=2,
    size=(32, 32),
    seeds=(0, 3),
    generation=GenerationConfig(RotationSampler(2), Guidance(1.5)),
    self_check_videos=12,
)
SETTINGS = {"guidance": {"context": 1.5}, "size": (32, 32)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of thirty frames; `lying.mp4` is one whose header is whole and whose frames are not."""
    folder = tmp_path_factory.mktemp("chunks")
    numbers = torch.Generator().manual_seed(0)
    for name in (*NAMES, "lying"):
        pixels = torch.randint(256, (30, 3, 4, 6), generator=numbers, dtype=torch.uint8)
        write_video(folder / f"{name}.mp4", pixels.repeat_interleave(8, 2).repeat_interleave(8, 3), 24)
    content = bytearray((folder / "lying.mp4").read_bytes())
    end = content.find(b"moov") - 8
    content[end // 2 : end] = bytes(end - end // 2)
    (folder / "lying.mp4").write_bytes(content)
    assert has_frames(folder / "lying.mp4", 29)
    return folder


@pytest.fixture(scope="module")
def model(randomise: Callable[[GPDiT], GPDiT]) -> GPDiT:
    return randomise(GPDiT(GPDiTConfig(size="tiny", layers=1, width=24, heads=2, mlp_width=48))).eval()


@pytest.fixture(scope="module")
def networks(folder: Path) -> MetricNetworks:
    return MetricNetworks(
        open_video_network(saved(ScriptedI3D(), folder)), open_image_network(saved(ScriptedInception(), folder))
    )


def chunk_of(folder: Path, *names: str, start: int = 10) -> Chunk:
    return Chunk(start, names, tuple(folder / f"{name}.mp4" for name in names))


@pytest.fixture(scope="module")
def evaluated(folder: Path, model: GPDiT, networks: MetricNetworks) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The three videos' variants, and what was found in them."""
    kept: dict[str, Tensor] = {}

    def keep(subject: str, names: list[str], videos: Tensor) -> None:
        assert names == list(NAMES)
        kept[subject] = videos

    names, found = evaluate_chunk(chunk_of(folder, *NAMES), TASK, model, CODEC, networks, keep)
    assert names == list(NAMES)
    return kept, found


def test_every_subject_is_what_it_is_called(
    folder: Path, model: GPDiT, evaluated: tuple[dict[str, Tensor], dict[str, Tensor]]
) -> None:
    kept = dict(evaluated[0])
    truth = torch.stack([read_clip(folder / f"{name}.mp4", 15, 2, (32, 32)) for name in NAMES])
    assert torch.equal(kept.pop("truth"), truth)
    longer = torch.cat([truth, truth[:, -1:], truth[:, -1:]], dim=1)
    through_codec = torch.cat((truth[:, :5], CODEC.decode(CODEC.encode(longer))[:, 5:15]), dim=1)
    assert torch.equal(kept.pop("codec"), through_codec)
    assert torch.equal(kept.pop("repeated"), truth[:, [0, 1, 2, 3, *[4] * 11]])
    for seed in TASK.seeds:
        together = kept.pop(f"seed {seed}")
        for name, video, context in zip(NAMES, together, truth[:, :5], strict=True):
            alone = continue_video(
                model, CODEC, context[None], 10, TASK.generation, ClipInputs([noise_seed(name, seed)])
            )
            assert (video.int() - alone.pixels[0].int()).abs().max() <= 1
            other = continue_video(model, CODEC, context[None], 10, TASK.generation, ClipInputs([noise_seed(name, 7)]))
            assert (video[5:].int() - other.pixels[0, 5:].int()).abs().float().mean() > 5
    seeds = [noise_seed(name, 0) for name in NAMES[:2]]  # of twelve videos these are the last
    for level in (8, 16, 32):
        assert torch.equal(kept.pop(f"noise {level}"), add_noise(truth[:2], level, seeds))
    for sigma in (1, 2, 4):
        assert torch.equal(kept.pop(f"blur {sigma}"), gaussian_blur(truth[:2], sigma))
    assert not kept
    assert len({noise_seed(name, seed) for name in NAMES for seed in range(50)}) == 150


def test_networks_see_the_whole_video_and_its_generated_frames_one_by_one(
    networks: MetricNetworks, evaluated: tuple[dict[str, Tensor], dict[str, Tensor]]
) -> None:
    kept, found = evaluated
    assert set(found) == {
        f"{subject}/{what}" for subject in kept for what in ("video", "image", "classes", "psnr", "ssim")
    }
    for subject, videos in kept.items():
        truth = kept["truth"][: len(videos)]
        torch.testing.assert_close(found[f"{subject}/video"], networks.video(videos))
        assert found[f"{subject}/image"].shape == (len(videos), 10, 6)
        for place in (0, 9):
            features, classes = networks.image.features_and_probabilities(videos[:, 5 + place])
            torch.testing.assert_close(found[f"{subject}/image"][:, place], features)
            torch.testing.assert_close(found[f"{subject}/classes"][:, place], classes)
        assert torch.equal(found[f"{subject}/psnr"], psnr(videos[:, 5:], truth[:, 5:]))
        assert torch.equal(found[f"{subject}/ssim"], ssim(videos[:, 5:], truth[:, 5:]))


def test_the_video_network_may_see_generated_frames_alone(folder: Path, model: GPDiT, networks: MetricNetworks) -> None:
    kept: dict[str, Tensor] = {}
    task = replace(TASK, video_of_all=False, self_check_videos=0, seeds=(0,))
    chunk = chunk_of(folder, "a")
    _, found = evaluate_chunk(chunk, task, model, CODEC, networks, lambda name, _, videos: kept.update({name: videos}))
    assert set(kept) == {"truth", "codec", "repeated", "seed 0"}
    for subject, videos in kept.items():
        torch.testing.assert_close(found[f"{subject}/video"], networks.video(videos[:, 5:]))


def test_a_video_that_cannot_be_read_is_left_out_and_all_else_stays(
    folder: Path, model: GPDiT, networks: MetricNetworks, evaluated: tuple[dict[str, Tensor], dict[str, Tensor]]
) -> None:
    names, found = evaluate_chunk(chunk_of(folder, "a", "lying", "b", "c"), TASK, model, CODEC, networks)
    assert names == list(NAMES)
    assert found.keys() == evaluated[1].keys()
    for key, values in found.items():
        assert torch.equal(values, evaluated[1][key]), key


def test_a_chunk_may_lose_all_its_videos_but_not_its_folder(
    folder: Path, model: GPDiT, networks: MetricNetworks, tmp_path: Path
) -> None:
    names, found = evaluate_chunk(chunk_of(folder, "lying"), TASK, model, CODEC, networks)
    assert (names, found) == ([], {})
    write_chunk(tmp_path / "0.safetensors", names, found, SETTINGS)
    write_chunk(tmp_path / "1.safetensors", ["a"], {"truth/video": torch.ones(1, 2)}, SETTINGS)
    files = ChunkFiles([tmp_path / "0.safetensors", tmp_path / "1.safetensors"], SETTINGS)
    assert files.names == ["a"]
    assert len(list(files.values("truth", "video"))) == 1
    with pytest.raises(InputError, match=r"gone.mp4"):
        evaluate_chunk(chunk_of(folder, "a", "gone"), TASK, model, CODEC, networks)


def test_chunks_are_of_fixed_videos() -> None:
    names = tuple("abcdefg")
    chunks = split_into_chunks(Selection(names, tuple(map(Path, names))), 3)
    assert [(chunk.start, "".join(chunk.names)) for chunk in chunks] == [(0, "abc"), (3, "def"), (6, "g")]
    assert all(tuple(map(str, chunk.paths)) == chunk.names for chunk in chunks)


def test_what_was_found_comes_back_chunk_by_chunk(tmp_path: Path) -> None:
    image, noise = torch.rand(5, 4, 2), torch.rand(3, 4, 2)
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    first = {"truth/image": image[:2], "noise 8/image": noise[:2]}
    write_chunk(paths[0], ["a", "b"], first, SETTINGS)
    write_chunk(paths[1], ["c", "d"], {"truth/image": image[2:4], "noise 8/image": noise[2:]}, SETTINGS)
    write_chunk(paths[2], ["e"], {"truth/image": image[4:]}, SETTINGS)
    files = ChunkFiles(paths, SETTINGS)
    assert files.names == list("abcde")
    assert [len(values) for values in files.values("truth", "image")] == [2, 2, 1]

    def together(*which: str, **how: int | str) -> Tensor:
        return torch.cat(list(files.values(*which, **how)))

    assert torch.equal(together("truth", "image"), image)
    assert torch.equal(together("truth", "image", place=3), image[:, 3])
    assert torch.equal(together("truth", "image", as_of="noise 8"), image[:3])
    assert torch.equal(together("noise 8", "image", place=0), noise[:, 0])
    assert not list(files.values("truth", "video"))
    assert [files.has(*which) for which in (("truth", "image"), ("truth", "video"), ("noise 8", "image"))] == [1, 0, 1]


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "nameless"])
def test_a_damaged_chunk_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "000016.safetensors"
    write_chunk(path, ["a"], {"truth/video": torch.ones(1, 9)}, SETTINGS)
    if damage == "nameless":
        save_file({"truth/video": torch.ones(1, 9)}, path)
    else:
        path.write_bytes({"cut": path.read_bytes()[:-5], "garbage": b"\x10" * 99, "empty": b""}[damage])
    with pytest.raises(InputError, match=r"000016.safetensors is damaged .*: delete it and run the same command again"):
        ChunkFiles([path], SETTINGS)


def test_chunks_of_other_settings_are_refused_by_the_first_that_differs(tmp_path: Path) -> None:
    write_chunk(tmp_path / "0.safetensors", ["a"], {"truth/video": torch.ones(1, 9)}, SETTINGS)
    for other, words in (
        ({**SETTINGS, "guidance": {"context": 2.0}, "size": (8, 8)}, r"another guidance\.context \(1.5, not 2.0\)"),
        ({**SETTINGS, "size": (64, 64)}, r"another size \(\[32, 32\], not \[64, 64\]\): give another --out"),
        ({**SETTINGS, "stride": 3}, r"another stride \(None, not 3\)"),
    ):
        with pytest.raises(InputError, match=words):
            ChunkFiles([tmp_path / "0.safetensors"], other)

import logging
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from gpdit_lightning.data.batches import LatentBatch
from gpdit_lightning.data.cache import CacheConfig
from gpdit_lightning.data.datamodule import LatentDataModule, SourceConfig
from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.errors import InputError
from gpdit_lightning.specs import ClipGeometry
from tests.conftest import TINY_CODEC

Shards = Callable[..., Manifest]
IMAGE, VIDEO = ("train", "image", (1, 8, 8)), ("train", "video", (3, 8, 8))


def source(*folders: Path, batch_size: int = 4, **settings: Any) -> SourceConfig:
    return SourceConfig([str(folder) for folder in folders], batch_size, **settings)


def module(shards: Path, **settings: Any) -> LatentDataModule:
    """Return a module with 4 images and 2 clips per step, in 3 micro-batches."""
    images, videos = source(shards, micro_batches=2), source(shards, batch_size=2)
    return LatentDataModule(**{"images": images, "videos": videos} | settings)


def at_step(
    data: LatentDataModule, step: int = 0, max_steps: int = 10, rank: int = 0, ranks: int = 1
) -> LatentDataModule:
    """Attach the module to a trainer whose current step is `step`."""
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_step=step, max_steps=max_steps, global_rank=rank, world_size=ranks, strategy=strategy
    )
    return data


def contents(loader: DataLoader[LatentBatch], count: int) -> list[tuple[Any, ...]]:
    return [
        (b.source, b.keys, b.context, b.weight, *(x.numpy().tobytes() for x in (b.latents, b.noise, b.t)))
        for b in islice(loader, count)
    ]


def test_a_step_has_the_batches_of_both_sources(tiny_shards: Path) -> None:
    data = at_step(module(tiny_shards))
    assert data.micro_batches_per_step == 3
    batches = list(islice(data.train_dataloader(), 3))
    assert [(b.source, len(b.keys), b.weight) for b in batches] == [("images", 2, 0.25)] * 2 + [("videos", 2, 0.5)]
    assert [tuple(b.latents.shape) for b in batches] == [(2, 1, 4, 8, 8)] * 2 + [(2, 3, 4, 8, 8)]
    assert all(key.startswith("train-") for b in batches for key in b.keys)


def test_the_loader_starts_at_the_trainers_step(tiny_shards: Path) -> None:
    whole = contents(at_step(module(tiny_shards)).train_dataloader(), 30)
    assert len(whole) == 30
    resumed = at_step(module(tiny_shards), step=7).train_dataloader()
    assert contents(resumed, 30) == whole[7 * 3 :]
    assert len(resumed) == 30


def test_a_run_without_max_steps_has_endless_batches(tiny_shards: Path) -> None:
    endless = at_step(module(tiny_shards), step=10**6, max_steps=-1).train_dataloader()
    assert len(contents(endless, 2)) == 2
    assert len(endless) > 10**9


def test_batches_are_independent_of_the_number_of_workers(tiny_shards: Path) -> None:
    in_process, with_workers = (
        at_step(module(tiny_shards, workers=workers), step=2).train_dataloader() for workers in (0, 2)
    )
    assert with_workers.num_workers == 2
    assert contents(with_workers, 24) == contents(in_process, 24)


def test_ranks_divide_every_micro_batch(tiny_shards: Path) -> None:
    settings: dict[str, Any] = {"max_ranks": 2, "context_dropout": 0.5}
    whole = list(islice(at_step(module(tiny_shards, **settings)).train_dataloader(), 12))
    shares = [
        list(islice(at_step(module(tiny_shards, **settings), rank=rank, ranks=2).train_dataloader(), 12))
        for rank in (0, 1)
    ]
    for batch, first, second in zip(whole, *shares, strict=True):
        assert sorted(batch.keys) == sorted(first.keys + second.keys)
        assert len(first.keys) == len(second.keys)
        assert first.context == second.context == batch.context / 2


def test_validation_batches_are_held_out_and_always_the_same(tiny_shards: Path) -> None:
    data = module(tiny_shards, validation_batches=2)
    first, later = (list(at_step(data, step=step).val_dataloader()) for step in (0, 9))
    assert len(first) == 2 * 3
    for before, after in zip(first, later, strict=True):
        assert before.keys == after.keys
        assert torch.equal(before.noise, after.noise)
        assert torch.equal(before.t, after.t)
    assert all(key.startswith("validation-") for batch in first for key in batch.keys)
    assert all(batch.context == len(batch.keys) for batch in first)  # all clips have context
    training = next(iter(at_step(data).train_dataloader()))
    assert not torch.equal(training.noise, first[0].noise)


def alternating(shards: Path, **settings: Any) -> LatentDataModule:
    """Return a module with a step of 4 images, then a step of 2 clips, each in 2 micro-batches."""
    videos = source(shards, batch_size=2, micro_batches=2)
    return module(shards, videos=videos, sampling="alternate", **settings)


def test_alternating_sources_take_turns_and_resume_within_a_cycle(tiny_shards: Path) -> None:
    data = at_step(alternating(tiny_shards))
    assert data.micro_batches_per_step == 2
    whole = contents(data.train_dataloader(), 20)
    assert [source for source, *_ in whole] == ["images", "images", "videos", "videos"] * 5
    assert {weight for _, _, _, weight, *_ in whole} == {0.5}
    assert contents(at_step(alternating(tiny_shards), step=3).train_dataloader(), 20) == whole[3 * 2 :]


def test_validation_is_joint_whatever_the_sampling_is(tiny_shards: Path) -> None:
    alternate = at_step(alternating(tiny_shards))
    joint = at_step(module(tiny_shards, videos=source(tiny_shards, batch_size=2, micro_batches=2)))
    expected = contents(joint.val_dataloader(), 16)
    assert [source for source, *_ in expected] == ["images", "images", "videos", "videos"] * 4
    assert contents(alternate.val_dataloader(), 16) == expected


def test_a_checkpoint_of_another_sampling_is_refused(tiny_shards: Path) -> None:
    joint, alternate = module(tiny_shards, videos=source(tiny_shards, micro_batches=2)), alternating(tiny_shards)
    saved = joint.state_dict()
    del saved["order"]["data.sampling"]  # as in checkpoints of earlier versions, whose sampling was joint
    joint.load_state_dict(saved)
    alternate.load_state_dict(alternate.state_dict())
    with pytest.raises(InputError, match=r"trained with data\.sampling = joint and the recipe has alternate"):
        alternating(tiny_shards, seed=0).load_state_dict(
            saved | {"order": alternate.state_dict()["order"] | {"data.sampling": "joint"}}
        )


def test_no_validation_without_held_out_samples(tmp_path: Path, write_shards: Shards) -> None:
    folder = write_shards(tmp_path, {VIDEO: 3}).directory
    assert at_step(LatentDataModule(videos=source(folder))).val_dataloader() == []


def test_validation_can_be_disabled(tiny_shards: Path) -> None:
    assert at_step(module(tiny_shards, validation_batches=0)).val_dataloader() == []


def test_a_source_uses_only_samples_of_its_kind(tiny_shards: Path) -> None:
    data = at_step(LatentDataModule(videos=source(tiny_shards, batch_size=11), context_dropout=0.0))
    (batch,) = islice(data.train_dataloader(), 1)
    assert sorted(batch.keys) == [f"train-video-3x8x8-0000{n // 5}-{n % 5:06d}" for n in range(11)]


def test_shards_of_several_manifests_are_grouped_by_shape(tmp_path: Path, write_shards: Shards) -> None:
    first = write_shards(tmp_path / "a", {VIDEO: 3, ("train", "video", (3, 4, 8)): 2}).directory
    second = write_shards(tmp_path / "b", {VIDEO: 4}).directory
    data = LatentDataModule(videos=source(first, second, batch_size=1))
    assert [bucket.counts for bucket in data.plan.sources[0].buckets] == [(2,), (3, 4)]
    assert data.geometry.sizes == ((32, 64), (64, 64))


def test_shards_with_the_same_clip_lengths_share_a_bucket(tmp_path: Path, write_shards: Shards) -> None:
    """For clips of 5, 6 and 8 latent frames."""
    counts = {("train", "video", (frames, 8, 8)): 3 for frames in (5, 6, 8)}
    folder = write_shards(tmp_path, counts | {("train", "video", (6, 4, 4)): 2}).directory

    def buckets(**settings: Any) -> dict[tuple[tuple[int, ...], int], tuple[int, ...]]:
        planned = LatentDataModule(videos=source(folder, **settings)).plan.sources[0].buckets
        return {(bucket.lengths, bucket.height): bucket.counts for bucket in planned}

    assert buckets(frames=5) == {((5,), 4): (2,), ((5,), 8): (3, 3, 3)}
    assert buckets() == {((6,), 4): (2,), ((5,), 8): (3,), ((6,), 8): (3,), ((8,), 8): (3,)}
    assert buckets(frames=7, least_frames=5) == {
        **{((5, 6), 4): (2,), ((5,), 8): (3,), ((5, 6), 8): (3,), ((5, 6, 7), 8): (3,)}
    }


@pytest.mark.parametrize(
    ("block_frames", "settings", "lengths"),
    [  # of clips of 5, 6 and 8 latent frames; first and later block; 0: all frames
        ((1, 1), {}, [(5,), (6,), (8,)]),
        ((3, 3), {}, [(3,), (6,), (6,)]),
        ((1, 3), {}, [(4,), (4,), (7,)]),
        ((2, 0), {}, [(5,), (6,), (8,)]),
        ((0, 0), {"frames": 7}, [(5,), (6,), (7,)]),
        ((3, 3), {"frames": 7, "least_frames": 3}, [(3,), (3, 6), (3, 6)]),
        ((4, 4), {"frames": 7, "least_frames": 6}, [(4,), (4,), (4,)]),
        ((2, 2), {"frames": 6, "frames_without_loss": 2}, [(4,), (6,), (6,)]),
        ((3, 3), {"frames": 5}, [(5,), (5,), (5,)]),  # as the recipe requests, which the stage refuses
        ((6, 6), {}, [(5,), (6,), (6,)]),  # no whole block in the shortest clips
    ],
)
def test_clips_are_cut_to_whole_blocks(
    tmp_path: Path,
    write_shards: Shards,
    caplog: pytest.LogCaptureFixture,
    block_frames: tuple[int, int],
    settings: dict[str, int],
    lengths: list[tuple[int, ...]],
) -> None:
    caplog.set_level(logging.INFO, "gpdit_lightning")
    available = (5, 6, 8)
    folder = write_shards(tmp_path, {("train", "video", (frames, 8, 8)): 3 for frames in available}).directory
    data = at_step(LatentDataModule(videos=source(folder, **settings), block_frames=block_frames))
    counts = Counter[tuple[int, ...]]()
    for of_clip in lengths:
        counts[of_clip] += 3
    assert {bucket.lengths: len(bucket) for bucket in data.buckets["train"]["videos"]} == counts
    limit = settings.get("frames", 8)
    cut = sum(3 for frames, of_clip in zip(available, lengths, strict=True) if of_clip[-1] < min(frames, limit))
    assert (f"{cut} samples of data.videos are cut to whole blocks" in caplog.text) == (cut > 0)
    assert {batch.latents.shape[1] for batch in data.train_dataloader()} <= {n for of_clip in lengths for n in of_clip}


def test_frames_without_loss_cannot_be_all_whole_blocks(tmp_path: Path, write_shards: Shards) -> None:
    folder = write_shards(tmp_path, {("train", "video", (5, 8, 8)): 3}).directory
    with pytest.raises(InputError, match="frames_without_loss is 3, but 3 latent frames of some samples are used"):
        LatentDataModule(videos=source(folder, frames_without_loss=3), block_frames=(3, 3))


def test_micro_batch_sizes_under_a_token_budget(tmp_path: Path, write_shards: Shards) -> None:
    """A frame of 8x8 has 16 tokens, a frame of 4x8 has 8."""
    shapes = [(frames, height, 8) for frames in (2, 3) for height in (4, 8)]
    folder = write_shards(tmp_path, {("train", "video", shape): 40 for shape in shapes}).directory
    clips = source(folder, batch_size=0, tokens=200, frames=3, least_frames=1)
    data = at_step(LatentDataModule(images=source(), videos=clips, max_ranks=2), max_steps=200)
    found = {tuple(batch.latents.shape[i] for i in (1, 3, 0)) for batch in data.train_dataloader()}
    assert found == {(1, 4, 24), (2, 4, 12), (3, 4, 8), (1, 8, 12), (2, 8, 6), (3, 8, 4)}
    with pytest.raises(InputError, match=r"data\.videos\.tokens is 200, too few for one sample of 3x8x8 latent pixels"):
        LatentDataModule(videos=clips, max_ranks=8)


def test_batch_size_and_tokens_together_are_rejected(tiny_shards: Path) -> None:
    with pytest.raises(InputError, match=r"data\.videos has batch_size = 4 and tokens = 90: give one of them"):
        LatentDataModule(videos=source(tiny_shards, tokens=90))


def test_reads_stay_within_a_window(tmp_path: Path, write_shards: Shards) -> None:
    folder = write_shards(tmp_path, {VIDEO: 60}).directory  # shards of 5
    data = at_step(LatentDataModule(videos=source(folder, batch_size=1, shuffle_window=15)), max_steps=60)
    shards = [batch.keys[0].split("-")[-2] for batch in data.train_dataloader()]
    windows = [set(shards[first : first + 15]) for first in range(0, 60, 15)]
    assert all(len(window) == 3 for window in windows)
    assert len(set.union(*windows)) == 12
    data = at_step(LatentDataModule(videos=source(folder, batch_size=1)), max_steps=60)
    assert len({batch.keys[0].split("-")[-2] for batch in islice(data.train_dataloader(), 30)}) > 8


def test_different_codecs_are_rejected(tmp_path: Path, write_shards: Shards) -> None:
    images = write_shards(tmp_path / "images", {IMAGE: 3}).directory
    videos = write_shards(tmp_path / "videos", {VIDEO: 3}, codec=replace(TINY_CODEC, fingerprint="f" * 16)).directory
    with pytest.raises(InputError, match="fingerprint '0123456789abcdef' and 'ffffffffffffffff'") as caught:
        LatentDataModule(source(images), source(videos))
    assert str(images / "manifest.json") in str(caught.value)
    assert str(videos / "manifest.json") in str(caught.value)


@pytest.mark.parametrize("field", ["mean", "std"])
def test_different_whitening_constants_are_rejected(tmp_path: Path, write_shards: Shards, field: str) -> None:
    first = write_shards(tmp_path / "a", {VIDEO: 3}).directory
    other: dict[str, Any] = {field: (1.0, 1.0, 1.0, 3.0)}
    second = write_shards(tmp_path / "b", {VIDEO: 3}, codec=replace(TINY_CODEC, **other)).directory
    with pytest.raises(InputError, match=rf"{field} \(.*\) and \(1.0, 1.0, 1.0, 3.0\)"):
        LatentDataModule(videos=source(first, second))


@pytest.mark.parametrize("least_frames", [0, 3, 4])
def test_samples_shorter_than_the_recipe_takes_are_used_in_full(
    tiny_shards: Path, caplog: pytest.LogCaptureFixture, least_frames: int
) -> None:
    caplog.set_level(logging.INFO, "gpdit_lightning")
    data = at_step(LatentDataModule(videos=source(tiny_shards, frames=4, least_frames=least_frames)))
    assert next(iter(data.train_dataloader())).latents.shape[:2] == (4, 3)
    assert "of data.videos have fewer than 4 latent frames" in caplog.text


def test_a_least_length_above_the_greatest_is_rejected(tiny_shards: Path) -> None:
    with pytest.raises(InputError, match=r"data\.videos\.least_frames is 3, more than the 2"):
        LatentDataModule(videos=source(tiny_shards, frames=2, least_frames=3))


def test_shorter_clips_are_cut_at_the_end(tiny_shards: Path) -> None:
    data = at_step(LatentDataModule(videos=source(tiny_shards, frames=2)))
    assert next(iter(data.train_dataloader())).latents.shape == (4, 2, 4, 8, 8)
    assert data.geometry.frames == 2


def test_varying_lengths_with_short_samples(tmp_path: Path, write_shards: Shards) -> None:
    """Each length is used equally often, and the batches are the same with and without workers."""
    folder = write_shards(tmp_path, {VIDEO: 6, ("train", "video", (5, 8, 8)): 6, ("validation", "video", (5, 8, 8)): 3})
    clips = source(folder.directory, batch_size=2, frames=4, least_frames=2)
    data = at_step(LatentDataModule(videos=clips), max_steps=1000)
    batches = list(islice(data.train_dataloader(), 90))
    by_bucket: dict[str, list[int]] = {"3x8x8": [], "5x8x8": []}
    for batch in batches:
        by_bucket[batch.keys[0].split("-")[2]].append(batch.latents.shape[1])
    for bucket, longest in (("3x8x8", 3), ("5x8x8", 4)):
        counts = Counter(by_bucket[bucket])
        assert set(counts) == set(range(2, longest + 1))
        assert max(counts.values()) - min(counts.values()) <= 1
        assert by_bucket[bucket][: longest - 1] != by_bucket[bucket][longest - 1 : 2 * (longest - 1)] or longest == 3
    again = list(
        islice(at_step(LatentDataModule(videos=clips, workers=2), step=40, max_steps=1000).train_dataloader(), 3)
    )
    for batch, same in zip(batches[40:], again, strict=False):
        assert torch.equal(batch.latents, same.latents)
    assert data.geometry.frames == 4
    validation = [batch.latents.shape[1] for batch in data.val_dataloader()]
    assert set(validation) <= {2, 3, 4}


def test_sequences_are_a_separate_source(tmp_path: Path, write_shards: Shards) -> None:
    folder = write_shards(tmp_path, {VIDEO: 3, ("train", "sequence", (6, 8, 8)): 4}).directory
    data = at_step(LatentDataModule(sequences=source(folder, batch_size=4)))
    batch = next(iter(data.train_dataloader()))
    assert batch.source == "sequences"
    assert batch.latents.shape == (4, 6, 4, 8, 8)
    assert all("-sequence-" in key for key in batch.keys)


def test_loss_frames_apply_to_training_and_validation(tmp_path: Path, write_shards: Shards) -> None:
    counts = {(split, "sequence", (6, 8, 8)): 4 for split in ("train", "validation")}
    folder = write_shards(tmp_path, counts | {IMAGE: 4, ("validation", "image", (1, 8, 8)): 4}).directory
    data = at_step(LatentDataModule(images=source(folder), sequences=source(folder, loss_frames="targets")))
    for loader in (data.train_dataloader(), data.val_dataloader()):
        images, sequences = islice(loader, 2)
        assert (images.frames, images.noise.shape) == (None, (4, 1, 4, 8, 8))
        assert (sequences.frames, sequences.noise.shape) == ((1, 3, 5), (4, 3, 4, 8, 8))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("videos", {}, r"data\.videos\.loss_frames is targets, which only data\.sequences has: set it to all"),
        ("images", {}, r"data\.images\.loss_frames is targets, which only data\.sequences has"),
        ("sequences", {"frames": 1}, r"data\.sequences\.loss_frames is targets, but a sequence of one latent frame"),
        ("sequences", {"least_frames": 1}, r"has none: take at least 2 frames of each, or set it to all"),
        ("sequences", {"frames_without_loss": 1}, r"frames_without_loss is 1, but loss_frames is targets"),
    ],
)
def test_a_loss_on_targets_without_targets_is_rejected(
    tmp_path: Path, write_shards: Shards, name: str, settings: dict[str, int], message: str
) -> None:
    folder = write_shards(tmp_path, {IMAGE: 3, VIDEO: 3, ("train", "sequence", (2, 8, 8)): 3}).directory
    with pytest.raises(InputError, match=message):
        LatentDataModule(**{name: source(folder, loss_frames="targets", **settings)})  # type: ignore[arg-type]


def test_frames_without_loss_apply_to_training_and_validation(tmp_path: Path, write_shards: Shards) -> None:
    counts = {(split, "video", (4, 8, 8)): 4 for split in ("train", "validation")}
    folder = write_shards(tmp_path, counts).directory
    data = at_step(LatentDataModule(videos=source(folder, frames_without_loss=2)))
    for loader in (data.train_dataloader(), data.val_dataloader()):
        batch = next(iter(loader))
        assert (batch.frames, batch.noise.shape, batch.latents.shape[1]) == ((2, 3), (4, 2, 4, 8, 8), 4)
    before = LatentDataModule(videos=source(folder)).state_dict()
    assert not any("frames_without_loss" in name for name in before["order"])
    with pytest.raises(InputError, match=r"data\.videos\.frames_without_loss = none and the recipe has 2;"):
        data.load_state_dict(before)
    with pytest.raises(InputError, match=r"frames_without_loss is 4, but 4 latent frames of some samples are used"):
        LatentDataModule(videos=source(folder, frames_without_loss=4))


def test_a_checkpoint_resumes_only_with_the_same_loss_frames(tmp_path: Path, write_shards: Shards) -> None:
    folder = write_shards(tmp_path, {("train", "sequence", (6, 8, 8)): 4}).directory
    everything, targets = (LatentDataModule(sequences=source(folder, loss_frames=x)) for x in ("all", "targets"))
    before = everything.state_dict()
    assert not any("loss_frames" in name for name in before["order"])
    everything.load_state_dict(before)
    targets.load_state_dict(targets.state_dict())
    with pytest.raises(InputError, match=r"with data\.sequences\.loss_frames = none and the recipe has targets;"):
        targets.load_state_dict(before)
    with pytest.raises(InputError, match=r"data\.sequences\.loss_frames = targets and the recipe has none"):
        everything.load_state_dict(targets.state_dict())


def test_a_source_without_manifests_is_not_used(tiny_shards: Path) -> None:
    """An overlay may set batch sizes of sources that a recipe does not use."""
    data = LatentDataModule(images=source(), videos=source(tiny_shards))
    assert [planned.name for planned in data.plan.sources] == ["videos"]


def test_a_source_without_training_samples_is_rejected(tmp_path: Path, write_shards: Shards) -> None:
    folder = write_shards(tmp_path, {IMAGE: 3, ("validation", "video", (3, 8, 8)): 2}).directory
    with pytest.raises(InputError, match="the source 'videos' holds no samples"):
        LatentDataModule(videos=source(folder))


def test_a_manifest_without_samples_of_the_kind_is_rejected(tmp_path: Path, write_shards: Shards) -> None:
    images = write_shards(tmp_path / "images", {IMAGE: 3}).directory
    videos = write_shards(tmp_path / "videos", {("train", "video", (3, 8, 8)): 4}).directory
    cure = r"data\.videos\.manifests names .*images/manifest\.json, which has image samples: give it to data.images"
    with pytest.raises(InputError, match=cure):
        LatentDataModule(videos=source(videos, images))


def test_repeated_data_are_announced(tmp_path: Path, write_shards: Shards, caplog: pytest.LogCaptureFixture) -> None:
    """Two spellings, a link and a copy give the same data: once by `data_dir`, as often as listed by `manifests`."""
    folder = write_shards(tmp_path / "a", {VIDEO: 4}).directory
    other = write_shards(tmp_path / "b", {VIDEO: 5}).directory
    (tmp_path / "link").symlink_to(folder)
    shutil.copytree(folder, tmp_path / "copy")
    same = [str(folder), f"{folder}/", f"{tmp_path}/b/../a/manifest.json", str(tmp_path / "link"), f"{tmp_path}/copy"]
    with caplog.at_level(logging.INFO):
        data = LatentDataModule(videos=SourceConfig(batch_size=2), data_dir=[*same, str(other)])
        assert data.number_of_samples()["videos"]["train"] == 9
        assert [f"as {same[0]} and as {path}: they are used once" in caplog.text for path in same[1:]] == [True] * 4
        caplog.clear()
        data = LatentDataModule(videos=SourceConfig([*same, str(other)], batch_size=2))
        assert data.number_of_samples()["videos"]["train"] == 5 * 4 + 5
        assert "data.videos.manifests gives the same data 5 times" in caplog.text
        caplog.clear()
        LatentDataModule(videos=source(folder, other, batch_size=2))
        assert "same data" not in caplog.text


def test_no_source_is_rejected(tiny_shards: Path) -> None:
    for unused in ({}, {"images": source()}):
        with pytest.raises(InputError, match=r"no source .*prepare --videos .* --images .*--data_dir latents/mine"):
            LatentDataModule(**unused)
    with pytest.raises(InputError, match=r"no source .*: give data\.images a batch_size"):
        LatentDataModule(images=source(tiny_shards, batch_size=0))


def test_noise_draws_apply_to_training_clips_only(tiny_shards: Path) -> None:
    data = at_step(module(tiny_shards, noise_draws=3))
    images, _, videos = islice(data.train_dataloader(), 3)
    assert (len(images.latents), len(images.noise)) == (2, 2)
    assert (len(videos.latents), len(videos.noise)) == (2, 6)
    assert all(len(batch.noise) == len(batch.latents) for batch in data.val_dataloader())
    single = next(islice(at_step(module(tiny_shards)).train_dataloader(), 2, None))
    assert torch.equal(videos.noise[: videos.context], single.noise[: single.context])
    with pytest.raises(InputError, match=r"data\.noise_draws is 0"):
        module(tiny_shards, noise_draws=0)


def test_a_negative_seed_is_rejected(tiny_shards: Path) -> None:
    with pytest.raises(InputError, match=r"data\.seed is -1"):
        module(tiny_shards, seed=-1)


def test_geometry_of_the_clips(tiny_shards: Path) -> None:
    assert module(tiny_shards).geometry == ClipGeometry(stride=3, sizes=((64, 64),), frames=3)
    assert LatentDataModule(images=source(tiny_shards)).geometry.frames == 1


def test_a_state_is_accepted_after_the_shards_moved(tmp_path: Path, write_shards: Shards) -> None:
    first, second = (write_shards(tmp_path / name, {VIDEO: 3}).directory for name in ("first", "second"))
    state = LatentDataModule(videos=source(first)).state_dict()
    LatentDataModule(videos=source(second)).load_state_dict(state)
    assert str(tmp_path) not in repr(state["order"])


@pytest.mark.parametrize(
    ("change", "setting"),
    [
        ({"seed": 1}, r"data\.seed = 0 and the recipe has 1"),
        ({"context_dropout": 0.2}, r"data\.context_dropout = 0\.1 and the recipe has 0\.2"),
        ({"noise_levels": "clip"}, r"data\.noise_levels = frame"),
        ({"max_ranks": 2}, r"data\.max_ranks = 1"),
        ({"noise_draws": 2}, r"data\.noise_draws = 1"),
    ],
)
def test_a_state_with_another_order_is_rejected(tiny_shards: Path, change: dict[str, Any], setting: str) -> None:
    with pytest.raises(InputError, match=f"was trained with {setting}"):
        module(tiny_shards, **change).load_state_dict(module(tiny_shards).state_dict())


@pytest.mark.parametrize(
    ("change", "setting"),
    [
        ({"batch_size": 4}, r"data\.videos\.batch_size = 2"),
        ({"micro_batches": 2}, r"data\.videos\.micro_batches = 1"),
        ({"frames": 2}, r"data\.videos\.frames = 0"),
        ({"least_frames": 2}, r"data\.videos\.least_frames = 0"),
        ({"weight": 2.0}, r"data\.videos\.weight = 1\.0"),
        ({"batch_size": 0, "tokens": 96}, r"data\.videos\.batch_size = 2 and the recipe has 0; .*tokens = 0 and .* 96"),
        ({"shuffle_window": 5}, r"data\.videos\.shuffle_window = 65536 and the recipe has 5"),
    ],
)
def test_a_state_with_another_mixture_is_rejected(tiny_shards: Path, change: dict[str, Any], setting: str) -> None:
    changed = module(tiny_shards, videos=source(tiny_shards, **{"batch_size": 2} | change))
    with pytest.raises(InputError, match=f"was trained with {setting}"):
        changed.load_state_dict(module(tiny_shards).state_dict())


def test_a_state_with_other_data_or_sources_is_rejected(
    tiny_shards: Path, tmp_path: Path, write_shards: Shards
) -> None:
    state = module(tiny_shards).state_dict()
    other = write_shards(tmp_path, {VIDEO: 3}).directory
    changed = module(tiny_shards, videos=source(other, batch_size=2))
    folders = rf"{tiny_shards} \(fingerprint \w+\) and the recipe has {other} \(fingerprint \w+\)"
    with pytest.raises(InputError, match=rf"data\.videos\.manifests = {folders}"):
        changed.load_state_dict(state)
    earlier = {name: value for name, value in state.items() if name != "folders"}
    with pytest.raises(InputError, match=r"data\.videos\.manifests = \['\w+'\] and the recipe"):
        changed.load_state_dict(earlier)
    with pytest.raises(InputError, match=r"with data\.images, which the recipe does not use now"):
        LatentDataModule(videos=source(tiny_shards, batch_size=2)).load_state_dict(state)


def test_extended_data_are_rejected_with_the_manifest_to_continue_with(tmp_path: Path, write_shards: Shards) -> None:
    folder = write_shards(tmp_path, {VIDEO: 3}).directory
    before = Manifest.load(folder)
    state = LatentDataModule(videos=source(folder)).state_dict()
    kept = before.path.rename(folder / f"manifest-{before.fingerprint()[:16]}.json")
    write_shards(tmp_path, {VIDEO: 3, ("train", "video", (3, 4, 4)): 2})
    with pytest.raises(
        InputError, match=rf"restore the old values \(the manifest before the data were extended is {kept}\)"
    ):
        LatentDataModule(videos=source(folder)).load_state_dict(state)
    LatentDataModule(videos=source(kept)).load_state_dict(state)


@pytest.mark.parametrize("workers", [0, 2])
def test_remote_shards_give_the_same_batches(tmp_path: Path, tiny_shards: Path, workers: int) -> None:
    cache = CacheConfig(str(tmp_path / "cache"), gib=0.01)

    def module_of(folder: str, **settings: Any) -> LatentDataModule:
        images, videos = SourceConfig([folder], 4, micro_batches=2), SourceConfig([folder], 2)
        return at_step(LatentDataModule(images, videos, **settings))

    remote, local = module_of(f"file://{tiny_shards}", cache=cache, workers=workers), module_of(str(tiny_shards))
    assert contents(remote.train_dataloader(), 30) == contents(local.train_dataloader(), 30)
    assert contents(remote.val_dataloader(), 12) == contents(local.val_dataloader(), 12)
    assert remote.state_dict()["order"] == local.state_dict()["order"]
    copies = [path for path in (tmp_path / "cache").glob("??/*") if not path.suffix]
    assert len(copies) == len(list(tiny_shards.glob("*-*.*"))), "each tar and index once"


def test_shards_of_the_current_and_next_windows_are_prefetched(tmp_path: Path, write_shards: Shards) -> None:
    folder = write_shards(tmp_path / "shards", {VIDEO: 100}).directory
    cache = CacheConfig(str(tmp_path / "cache"), gib=0.01)
    videos = SourceConfig([f"file://{folder}"], batch_size=2, shuffle_window=25)
    batches = iter(at_step(LatentDataModule(videos=videos, cache=cache)).train_dataloader())
    next(batches)
    copies = 0
    for _ in range(200):  # up to ten seconds
        copies = len([path for path in (tmp_path / "cache").glob("??/*") if not path.suffix])
        if copies == 2 * 2 * 5:
            break
        time.sleep(0.05)
    assert copies == 2 * 2 * 5, "tars and indices of two windows of five shards"


def test_a_cache_is_created_only_for_remote_shards_and_must_be_large_enough(tmp_path: Path, tiny_shards: Path) -> None:
    cache = CacheConfig(str(tmp_path / "cache"), gib=1e-5)
    with pytest.raises(InputError, match=r"data\.cache\.gib is 1e-05, but the shards .* take \S+: raise it"):
        LatentDataModule(videos=SourceConfig([f"file://{tiny_shards}"], 2), cache=cache)
    shutil.rmtree(tmp_path / "cache")
    LatentDataModule(videos=SourceConfig([str(tiny_shards)], 2), cache=cache)
    assert not (tmp_path / "cache").exists()

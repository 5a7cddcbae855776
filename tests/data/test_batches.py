import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from torch.utils.data import DataLoader

from gpdit_lightning.data import buckets as buckets_module
from gpdit_lightning.data.batches import LatentBatch, LatentDataset, RangeSampler
from gpdit_lightning.data.buckets import Bucket
from gpdit_lightning.data.cache import ShardCache
from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.data.plan import Plan, PlannedBucket, PlannedSource
from gpdit_lightning.data.shard_entry import ShardEntry
from gpdit_lightning.data.shards import ShardReader
from gpdit_lightning.data.source import LossFrames, SourceConfig
from gpdit_lightning.errors import InputError
from gpdit_lightning.randomness import TRAIN_NOISE, VALIDATION_NOISE
from tests.data.damage import damage

Shards = Callable[..., Manifest]
MEAN, STD = [0.5, -0.25, 2.0, 0.0], [2.0, 0.5, 4.0, 1.0]


@pytest.fixture
def manifest(tmp_path: Path, write_shards: Shards) -> Manifest:
    """11 clips of 3 latent frames in shards of 5, 5 and 1."""
    return write_shards(tmp_path, {("train", "video", (3, 4, 4)): 11})


def bucket_of(manifest: Manifest, frames: int = 3) -> Bucket:
    return Bucket([(manifest, entry) for entry in manifest.shards], [frames])


def dataset(
    manifest: Manifest,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    frames: int = 3,
    source: str = "videos",
    loss_frames: LossFrames = "all",
    **settings: Any,
) -> LatentDataset:
    """Steps of 2 micro-batches of 4 clips, a quarter of them without context."""
    planned = PlannedBucket((5, 5, 1), (frames,), 4, 4)
    sources = (PlannedSource(source, (planned,), SourceConfig(batch_size=8, micro_batches=2, loss_frames=loss_frames)),)
    plan = Plan(sources, seed, context_dropout=0.25, max_ranks=2)
    options: dict[str, Any] = {"noise_levels": "frame", "purpose": TRAIN_NOISE} | settings
    return LatentDataset(plan, [[bucket_of(manifest, frames)]], MEAN, STD, rank=rank, world_size=world_size, **options)


def by_key_and_noise(batches: list[LatentBatch]) -> list[tuple[str, bytes, bytes, bytes, bool]]:
    """Return the noisy rows of batches, sorted."""
    return sorted(
        (b.keys[i], *(x.numpy().tobytes() for x in (b.latents[i], b.noise[row], b.t[row])), i < b.context)
        for b in batches
        for row, i in enumerate(b.clip_of_row.tolist())
    )


def same(first: LatentBatch, second: LatentBatch) -> bool:
    tensors = all(torch.equal(getattr(first, name), getattr(second, name)) for name in ("latents", "noise", "t"))
    return tensors and (first.keys, first.context, first.weight) == (second.keys, second.context, second.weight)


def test_latents_are_whitened(manifest: Manifest) -> None:
    batch = dataset(manifest)[3]
    assert batch.latents.shape == batch.noise.shape == (4, 3, 4, 4, 4)
    assert batch.latents.dtype == torch.float32
    bucket = bucket_of(manifest)
    raw = {sample.metadata["key"]: sample.latents for sample in map(bucket.read, range(len(bucket)))}
    for latents, key in zip(batch.latents, batch.keys, strict=True):
        for channel in range(4):
            expected = (raw[key][:, channel].astype(np.float32) - MEAN[channel]) / STD[channel]
            np.testing.assert_allclose(latents[:, channel].numpy(), expected, rtol=1e-6, atol=1e-7)


def test_samples_of_a_bucket_are_numbered_through_its_shards(manifest: Manifest) -> None:
    bucket = bucket_of(manifest)
    assert len(bucket) == 11
    keys = [bucket.read(sample).metadata["key"] for sample in range(11)]
    assert keys == [
        f"train-video-3x4x4-{shard:05d}-{place:06d}" for shard, count in enumerate((5, 5, 1)) for place in range(count)
    ]


def test_a_shorter_clip_is_the_beginning_of_the_longer_one(manifest: Manifest) -> None:
    long, short = dataset(manifest)[0], dataset(manifest, frames=2)[0]
    assert short.latents.shape == (4, 2, 4, 4, 4)
    assert torch.equal(short.latents, long.latents[:, :2])


def test_source_weight_and_context_of_a_batch(manifest: Manifest) -> None:
    batch = dataset(manifest)[1]
    assert (batch.source, batch.weight, batch.context) == ("videos", 0.5, 2)
    assert batch.t.shape == (4, 3)


def test_a_batch_is_a_function_of_its_number(manifest: Manifest) -> None:
    batches = dataset(manifest)
    later = batches[9]
    assert same(dataset(manifest)[9], later)
    assert same(batches[9], later)
    assert not torch.equal(batches[8].noise, later.noise)


@pytest.mark.parametrize("noise_draws", [1, 3])
def test_two_ranks_together_have_the_batch_of_one_rank(manifest: Manifest, noise_draws: int) -> None:
    for number in range(8):
        whole = dataset(manifest, noise_draws=noise_draws)[number]
        shares = [dataset(manifest, rank, world_size=2, noise_draws=noise_draws)[number] for rank in range(2)]
        assert by_key_and_noise(shares) == by_key_and_noise([whole])
        assert [share.latents.shape[0] for share in shares] == [2, 2]
        assert [share.context for share in shares] == [whole.context / 2] * 2
        assert [share.weight for share in shares] == [whole.weight] * 2


def test_context_noise_is_that_of_the_clip_on_any_number_of_ranks(manifest: Manifest) -> None:
    """Angles are uniform up to the largest one, one for each block, and the rest of the batch is as without them."""
    plain, angles = dataset(manifest), []
    for number in range(8):
        batches = [
            dataset(manifest, rank, ranks, context_noise=0.4, noise_draws=2)[number]
            for rank, ranks in ((0, 1), (0, 2), (1, 2))
        ]
        by_key = [
            {
                (batch.keys[clip], noise.numpy().tobytes(), tuple(theta))
                for clip, (noise, theta) in enumerate(zip(batch.clean_noise, batch.clean_theta.tolist(), strict=True))
            }
            for batch in batches
            if batch.clean_noise is not None and batch.clean_theta is not None
        ]
        assert by_key[0] == by_key[1] | by_key[2]
        assert len(by_key[0]) == batches[0].context
        assert torch.equal(plain[number].noise, batches[0].noise[batches[0].clip_of_row.argsort(stable=True)][::2])
        angles += [angle for _, _, of_blocks in by_key[0] for angle in of_blocks]
    assert len(set(angles)) == len(angles) > 30
    assert 0 <= min(angles) < 0.05
    assert 0.35 < max(angles) < 0.4


def test_clips_with_context_come_first(manifest: Manifest) -> None:
    batches = dataset(manifest)
    mixed = 0
    for number in range(8):
        planned = batches.plan.micro_batch(number)
        bucket = bucket_of(manifest)
        with_context = sorted(bucket.read(int(s)).metadata["key"] for s in planned.samples[planned.context])
        batch = batches[number]
        assert sorted(batch.keys[: batch.context]) == with_context
        mixed += 0 < batch.context < 4
    assert mixed > 0


def test_noise_is_keyed_on_seed_step_and_place(manifest: Manifest) -> None:
    batches = dataset(manifest)
    first = batches[0].noise
    step = torch.cat([batches[0].noise, batches[1].noise])
    assert len({noise.numpy().tobytes() for noise in step}) == 8  # the noise of every place of a step is different
    assert not torch.equal(dataset(manifest, seed=1)[0].noise, first)
    assert not torch.equal(batches[2].noise, first)  # the same positions in the next step
    assert not torch.equal(dataset(manifest, purpose=VALIDATION_NOISE)[0].noise, first)


@pytest.mark.parametrize("noise_levels", ["frame", "clip"])
def test_copies_of_a_clip_have_different_noise_and_levels(manifest: Manifest, noise_levels: str) -> None:
    batch = dataset(manifest, noise_draws=3, noise_levels=noise_levels)[1]
    assert batch.latents.shape == (4, 3, 4, 4, 4)
    assert batch.noise.shape == (12, 3, 4, 4, 4)
    assert batch.t.shape == (12, 3)
    assert (batch.draws, batch.context) == (3, 2)
    assert batch.clip_of_row.tolist() == [0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3]
    for values in (batch.noise, batch.t):
        assert len({row.numpy().tobytes() for row in values}) == 12


@pytest.mark.parametrize("noise_levels", ["frame", "clip"])
def test_the_first_copy_is_that_of_a_single_draw(manifest: Manifest, noise_levels: str) -> None:
    for number in range(4):
        single = dataset(manifest, noise_levels=noise_levels)[number]
        batch = dataset(manifest, noise_levels=noise_levels, noise_draws=3)[number]
        assert torch.equal(batch.latents, single.latents)
        assert single.clip_of_row.tolist() == [0, 1, 2, 3]
        clips = batch.clip_of_row.tolist()
        first = [clips.index(clip) for clip in range(4)]
        assert torch.equal(batch.noise[first], single.noise)
        assert torch.equal(batch.t[first], single.t)


def test_an_image_has_one_copy(manifest: Manifest) -> None:
    assert same(dataset(manifest, frames=1, noise_draws=3)[0], dataset(manifest, frames=1)[0])


def test_zero_noise_draws_are_rejected(manifest: Manifest) -> None:
    with pytest.raises(InputError, match=r"data\.noise_draws is 0; it must be at least 1"):
        dataset(manifest, noise_draws=0)


def test_accumulation_changes_neither_noise_nor_levels(manifest: Manifest) -> None:
    def step(micro_batches: int) -> tuple[set[bytes], set[bytes]]:
        planned = PlannedBucket((5, 5, 1), (3,), 4, 4)
        plan = Plan(
            (PlannedSource("videos", (planned,), SourceConfig(batch_size=8, micro_batches=micro_batches)),),
            context_dropout=0.0,
        )
        batches = LatentDataset(plan, [[bucket_of(manifest)]], MEAN, STD, "frame", TRAIN_NOISE)
        drawn = [batches[micro_batches * 3 + within] for within in range(micro_batches)]
        return (
            {noise.numpy().tobytes() for batch in drawn for noise in batch.noise},
            {level.numpy().tobytes() for batch in drawn for level in batch.t},
        )

    assert step(1) == step(2) == step(8)


def test_noise_levels_per_frame_and_per_clip(manifest: Manifest) -> None:
    per_frame, per_clip = dataset(manifest)[0], dataset(manifest, noise_levels="clip")[0]
    assert all(len(set(levels)) == 3 for levels in per_frame.t.tolist())
    assert all(len(set(levels)) == 1 for levels in per_clip.t.tolist())
    assert len(set(per_clip.t[:, 0].tolist())) == 4
    assert torch.equal(per_clip.noise, per_frame.noise)


def test_noise_is_standard_gaussian_and_levels_are_uniform(manifest: Manifest) -> None:
    batches = [dataset(manifest)[number] for number in range(150)]
    noise = torch.cat([batch.noise for batch in batches]).double()  # 115,200 numbers
    t = torch.cat([batch.t for batch in batches]).double()  # 1,800 numbers
    assert abs(noise.mean().item()) < 4 / noise.numel() ** 0.5
    assert abs(noise.var().item() - 1) < 4 * (2 / noise.numel()) ** 0.5
    assert abs(noise.pow(4).mean().item() - 3) < 4 * (96 / noise.numel()) ** 0.5
    assert t.min() >= 0
    assert t.max() < 1
    assert abs(t.mean().item() - 0.5) < 4 * (1 / 12 / t.numel()) ** 0.5
    assert (torch.histc(t, 4, 0, 1) / t.numel() - 0.25).abs().max() < 0.05
    flat = noise.flatten(1)
    correlation = (flat[1:] * flat[:-1]).mean().item()  # between clips at neighbouring positions
    assert abs(correlation) < 4 / flat[1:].numel() ** 0.5
    assert abs((noise[:, 1:] * noise[:, :-1]).mean().item()) < 4 / noise[:, 1:].numel() ** 0.5  # between frames


@pytest.mark.parametrize(("damaged", "replacement"), [((1,), 2), ((4,), 0), ((3, 4), 0)])
def test_a_damaged_sample_is_replaced_by_the_next_intact_one(
    manifest: Manifest, caplog: pytest.LogCaptureFixture, damaged: tuple[int, ...], replacement: int
) -> None:
    names = tuple(damage(manifest, shard=1, number=number) for number in damaged)
    with caplog.at_level(logging.WARNING):
        sample = bucket_of(manifest).read(5 + damaged[0])
    assert sample.metadata["key"] == f"train-video-3x4x4-00001-{replacement:06d}"
    assert sample.damaged == names
    assert len(caplog.messages) == len(damaged)
    for number, message in zip(damaged, caplog.messages, strict=True):
        assert f"sample {number} of" in message
        assert "train-video-3x4x4-00001.tar is damaged (its checksum differs)" in message
        assert "replaced by the next intact sample" in message


def test_a_process_warns_of_a_damaged_sample_once(manifest: Manifest, caplog: pytest.LogCaptureFixture) -> None:
    damage(manifest, shard=1, number=1)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert bucket_of(manifest).read(6).damaged
    assert len(caplog.messages) == 1


def test_a_batch_lists_its_damaged_samples(manifest: Manifest) -> None:
    """Two samples of an epoch are damaged; it has 11, in three micro-batches of 4."""
    expected = {damage(manifest, shard, number) for shard, number in ((0, 1), (1, 4))}
    batches = [dataset(manifest)[number] for number in range(12)]
    assert {name for batch in batches[:3] for name in batch.damaged} == expected
    for number, batch in enumerate(batches):
        assert len(set(batch.damaged)) == len(batch.damaged)
        shares = [dataset(manifest, rank, world_size=2)[number] for rank in (0, 1)]
        assert {name for share in shares for name in share.damaged} == set(batch.damaged)
    assert not all(batch.damaged for batch in batches)


def test_a_replacement_keeps_the_noise_of_its_place(manifest: Manifest) -> None:
    before = dataset(manifest)[0]
    assert before.damaged == []
    place = next(i for i, key in enumerate(before.keys) if "-00002-" not in key)  # that shard has one sample
    shard, number = int(before.keys[place].split("-")[-2]), int(before.keys[place].split("-")[-1])
    damage(manifest, shard, number)
    after = dataset(manifest)[0]
    assert after.keys[place] != before.keys[place]
    assert torch.equal(after.noise, before.noise)
    assert torch.equal(after.t, before.t)
    others = [i for i in range(4) if i != place]
    assert torch.equal(after.latents[others], before.latents[others])


def test_a_sample_without_an_intact_one_in_its_shard_is_replaced_from_the_next_shard(manifest: Manifest) -> None:
    bucket = bucket_of(manifest)
    first = bucket.read(0)
    name = damage(manifest, shard=2, number=0)
    replaced = bucket.read(10)
    assert replaced.damaged == (name,)
    assert replaced.metadata == first.metadata
    for path in manifest.directory.glob("*.tar"):
        path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(InputError, match=r"no sample of 4x4 latent pixels in .* is intact: copy the folder again"):
        bucket.read(10)


def test_ranks_that_do_not_divide_max_ranks_are_rejected(manifest: Manifest) -> None:
    with pytest.raises(InputError, match=r"3 ranks do not divide data\.max_ranks = 2"):
        dataset(manifest, world_size=3)


def test_range_sampler() -> None:
    numbers = RangeSampler(3, 7)
    assert list(numbers) == [3, 4, 5, 6]
    assert list(numbers) == [3, 4, 5, 6]
    assert len(numbers) == 7


def test_loader_processes_give_the_same_batches(manifest: Manifest) -> None:
    batches = dataset(manifest)
    loader = DataLoader(batches, batch_size=None, sampler=RangeSampler(2, 6), num_workers=2)
    for number, batch in zip(range(2, 6), loader, strict=True):
        assert same(batch, batches[number])


# Loss on targets

TARGETS: dict[str, Any] = {"frames": 6, "source": "sequences", "loss_frames": "targets"}


@pytest.fixture
def sequences(tmp_path: Path, write_shards: Shards) -> Manifest:
    """11 sequences of three pairs in shards of 5, 5 and 1."""
    return write_shards(tmp_path, {("train", "sequence", (6, 4, 4)): 11})


@pytest.mark.parametrize(("noise_levels", "draws"), [("frame", 1), ("clip", 2)])
def test_only_targets_have_noise(sequences: Manifest, noise_levels: str, draws: int) -> None:
    batch = dataset(sequences, noise_draws=draws, noise_levels=noise_levels, **TARGETS)[1]
    assert batch.frames == (1, 3, 5)
    assert batch.noise.shape == (4 * draws, 3, 4, 4, 4)
    assert batch.t.shape == (4 * draws, 3)
    assert (batch.draws, batch.context) == (draws, 2)
    assert len({noise.numpy().tobytes() for noise in batch.noise.flatten(0, 1)}) == 4 * draws * 3
    assert [len(set(levels)) for levels in batch.t.tolist()] == [{"frame": 3, "clip": 1}[noise_levels]] * 4 * draws
    everything = dataset(sequences, **TARGETS | {"loss_frames": "all"})[1]
    assert everything.frames is None
    assert everything.noise.shape == everything.latents.shape
    assert torch.equal(batch.latents, everything.latents)  # sources are context
    assert batch.keys == everything.keys


def test_two_ranks_together_have_the_targets_of_one_rank(sequences: Manifest) -> None:
    for number in range(4):
        whole = dataset(sequences, noise_draws=2, **TARGETS)[number]
        shares = [dataset(sequences, rank, world_size=2, noise_draws=2, **TARGETS)[number] for rank in range(2)]
        assert by_key_and_noise(shares) == by_key_and_noise([whole])
        assert {share.frames for share in shares} == {(1, 3, 5)}


def test_frame_positions_stay_a_tuple_when_a_batch_moves_to_a_device(
    sequences: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tensor, "pin_memory", Tensor.clone)  # pinning needs a GPU
    (batch,) = DataLoader(dataset(sequences, **TARGETS), batch_size=None, sampler=[1], num_workers=1)
    moved = move_data_to_device(batch.pin_memory(), torch.device("meta"))
    assert moved.noise.device.type == "meta"
    assert moved.frames == (1, 3, 5)


# Many shards


def test_the_number_of_open_shards_is_limited(
    tmp_path: Path, write_shards: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    class RecordingReader(ShardReader):
        def __init__(self, directory: Path, entry: ShardEntry, cache: ShardCache | None) -> None:
            super().__init__(directory, entry, cache)
            opened.append(entry.path)

    monkeypatch.setattr(buckets_module, "ShardReader", RecordingReader)
    bucket = bucket_of(write_shards(tmp_path, {("train", "video", (3, 4, 4)): 200}, shard_size=1))
    for _ in range(2):
        for sample in range(100):
            bucket.read(sample)
    assert len(opened) == 100
    for sample in range(200):
        bucket.read(sample)
    assert buckets_module._reader.cache_info().currsize == 128
    bucket.read(0)
    assert opened.count(bucket.shards[0][1].path) == 2


def test_a_pickled_bucket_has_no_open_files(manifest: Manifest) -> None:
    bucket = bucket_of(manifest)
    pickled = pickle.dumps(bucket)
    sample = bucket.read(7)
    assert pickle.dumps(bucket) == pickled
    assert np.array_equal(pickle.loads(pickled).read(7).latents, sample.latents)


def test_shards_of_several_lengths_share_a_bucket(tmp_path: Path, write_shards: Shards) -> None:
    counts = {("train", "video", (frames, 4, 4)): 3 for frames in (3, 5, 12)}
    bucket = bucket_of(write_shards(tmp_path, counts))
    samples = [bucket.read(number) for number in range(9)]
    assert {sample.latents.shape for sample in samples} == {(3, 4, 4, 4)}
    assert {sample.metadata["key"].split("-")[2] for sample in samples} == {"3x4x4", "5x4x4", "12x4x4"}
    assert bucket.counts == (3, 3, 3)

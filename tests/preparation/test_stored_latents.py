"""Posteriors and flipped images: what `prepare` stores of them, and what training draws."""

import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gpdit_lightning.data.batches import LatentBatch
from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.data.shard_entry import ShardEntry
from gpdit_lightning.data.shards import ShardReader
from gpdit_lightning.errors import InputError
from gpdit_lightning.media.images import read_image
from gpdit_lightning.preparation import PrepareOptions, prepare
from gpdit_lightning.preparation.inspection.verification import verify_shard
from tests.codecs.small_sd import small_autoencoder
from tests.data.test_datamodule import at_step, module, source

SIDE, IMAGES, SEED = 16, 20, 3


@pytest.fixture(scope="module")
def autoencoder() -> Any:
    return small_autoencoder()


@pytest.fixture(scope="module")
def options(autoencoder: Any, tmp_path_factory: pytest.TempPathFactory) -> PrepareOptions:
    folder, numbers = tmp_path_factory.mktemp("stored"), np.random.default_rng(0)
    autoencoder.save_pretrained(folder / "vae")
    for number in range(IMAGES):
        path = folder / "images" / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(numbers.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(path)
    return PrepareOptions(
        images=[folder / "images"], labels=True, codec="sd", codec_source=str(folder / "vae"), out=folder / "shards",
        image_sizes=[f"{SIDE}x{SIDE}"], clip_frames=1, posterior=True, flips="images", shard_size=6, device="cpu",
        validation_fraction=0.2, workers=0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def manifest(options: PrepareOptions) -> Manifest:
    manifest = prepare(options)
    assert manifest is not None
    return manifest


def arrays_by_key(manifest: Manifest) -> dict[str, tuple[ShardEntry, dict[Any, np.ndarray], dict[str, Any]]]:
    return {
        metadata["key"]: (entry, arrays, metadata)
        for entry in manifest.shards
        for number in range(entry.count)
        for arrays, metadata in [ShardReader(manifest.directory, entry).read_arrays(number)]
    }


def test_stored_arrays_are_those_of_diffusers(manifest: Manifest, options: PrepareOptions, autoencoder: Any) -> None:
    stored = arrays_by_key(manifest)
    assert len(stored) == IMAGES
    for entry, arrays, metadata in stored.values():
        assert entry.shape == (1, 4, 2, 2)
        values = read_image(options.images[0] / metadata["source"]).float() / 127.5 - 1
        for prefix, version in (("", values), ("flipped_", values.flip(-1))):
            with torch.no_grad():
                posterior = autoencoder.encode(version).latent_dist
            for name in ("mean", "std"):
                expected = getattr(posterior, name).numpy()
                np.testing.assert_allclose(arrays[prefix + name].astype(np.float32), expected, rtol=2e-3, atol=2e-3)
        # The flip of an image does not flip its latents, so that these could not be flipped instead.
        assert np.abs(arrays["flipped_mean"] - arrays["mean"][..., ::-1]).max() > 0.1
    assert manifest == Manifest.load(options.out)
    assert not [fault for entry in manifest.shards for fault in verify_shard(options.out, entry)]


def test_an_interrupted_preparation_resumes_with_equal_shards(manifest: Manifest, options: PrepareOptions) -> None:
    copy = replace(options, out=options.out.with_name("copy"))
    shutil.copytree(options.out, copy.out)
    (copy.out / "manifest.json").unlink()
    (copy.out / "preparation" / "part-00000.json").unlink()
    (copy.out / manifest.shards[2].path).unlink()  # the last one for training
    resumed = prepare(copy)
    assert resumed is not None
    assert resumed.shards == manifest.shards
    with pytest.raises(InputError, match="shards of other options"):
        prepare(replace(copy, flips="none"))


def batches(manifest: Manifest, count: int, step: int = 0, rank: int = 0, ranks: int = 1, **settings: Any) -> Any:
    images = source(Path(str(manifest.directory)), batch_size=8)
    data = module(Path(), images=images, videos=source(batch_size=0), seed=SEED, max_ranks=2, **settings)
    return list(islice(at_step(data, step, rank=rank, ranks=ranks, max_steps=40).train_dataloader(), count))


def test_draws_are_a_function_of_seed_step_and_position(manifest: Manifest) -> None:
    """Recomputed with numpy's Philox from the stored arrays."""
    stored, flipped = arrays_by_key(manifest), []
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (manifest.codec.mean, manifest.codec.std))
    for step, batch in enumerate(batches(manifest, 20, context_dropout=0.0)):
        for position, (key, latents) in enumerate(zip(batch.keys, batch.latents.numpy(), strict=True)):
            counter = [0, step, position, 0]
            draws = [np.random.Generator(np.random.Philox(key=[SEED, use], counter=counter)) for use in (10, 9)]
            prefix = "flipped_" if draws[0].random() < 0.5 else ""
            flipped.append(bool(prefix))
            _, arrays, _ = stored[key]
            noise = draws[1].standard_normal(latents.shape, dtype=np.float32)
            raw = arrays[prefix + "mean"].astype(np.float32) + arrays[prefix + "std"].astype(np.float32) * noise
            np.testing.assert_allclose(latents, (raw - mean) / std, atol=1e-6)
    assert 0.35 < np.mean(flipped) < 0.65  # 160 draws


def test_draws_do_not_depend_on_workers_ranks_or_resumption(manifest: Manifest) -> None:
    def contents(loaded: list[LatentBatch]) -> list[dict[str, bytes]]:
        return [dict(zip(b.keys, (x.numpy().tobytes() for x in b.latents), strict=True)) for b in loaded]

    whole = contents(batches(manifest, 6))
    assert contents(batches(manifest, 4, step=2)) == whole[2:]
    assert contents(batches(manifest, 6, workers=2)) == whole
    shares = [contents(batches(manifest, 6, rank=rank, ranks=2)) for rank in (0, 1)]
    assert [first | second for first, second in zip(*shares, strict=True)] == whole


def test_validation_and_the_settings_without_draws_use_the_means(manifest: Manifest) -> None:
    stored = arrays_by_key(manifest)
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (manifest.codec.mean, manifest.codec.std))
    sources = {"images": source(Path(str(manifest.directory))), "videos": source(batch_size=0)}
    data, without = module(Path(), **sources), module(Path(), **sources, posterior="mean", flips=False)
    message = r"data\.flips = True and the recipe has False; with data\.posterior = sample and the recipe has mean"
    with pytest.raises(InputError, match=message):
        without.load_state_dict(data.state_dict())
    for batch in (*at_step(data).val_dataloader(), *batches(manifest, 2, posterior="mean", flips=False)):
        for key, latents in zip(batch.keys, batch.latents.numpy(), strict=True):
            np.testing.assert_allclose(latents, (stored[key][1]["mean"].astype(np.float32) - mean) / std, atol=1e-6)


def test_what_is_required_and_not_stored_is_named(tiny_shards: Path, options: PrepareOptions) -> None:
    with pytest.raises(InputError, match=r"data\.posterior is sample, but .*tar was prepared without --posterior"):
        module(tiny_shards, posterior="sample")
    with pytest.raises(InputError, match=r"data\.flips is true, but .* with it, or set data\.flips to false"):
        module(tiny_shards, flips=True)
    assert module(tiny_shards).state_dict()["order"].keys().isdisjoint({"data.posterior", "data.flips"})
    with pytest.raises(InputError, match="--posterior is given, but codec pca has no posterior"):
        prepare(replace(options, codec="pca", codec_source=None, out=options.out.with_name("pca")))

"""Labels of samples and classes of noisy rows."""

from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor
from torch.utils.data import DataLoader

from gpdit_lightning.data.batches import LatentBatch
from gpdit_lightning.data.datamodule import LatentDataModule, SourceConfig
from gpdit_lightning.errors import InputError
from tests.data.damage import damage
from tests.data.labelled import write_labelled

CLASSES = ("run", "jump", "swim")


def latent(frames: int) -> np.ndarray:
    return np.zeros((frames, 4, 4, 4))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images and clips of 2 latent frames with three labels and without a label. Do not change them."""
    of_each = [(label, latent(frames)) for frames in (1, 2) for label in (*CLASSES, None)]
    return write_labelled(tmp_path_factory.mktemp("labelled"), CLASSES, 3 * of_each, of_each).directory


def data_of(*shards: Path, step: int = 0, rank: int = 0, ranks: int = 1, **settings: Any) -> LatentDataModule:
    """Return a module with 8 images and 8 clips per step, in two micro-batches each, at step `step` of a trainer."""
    source = SourceConfig([str(folder) for folder in shards], batch_size=8, micro_batches=2)
    data = LatentDataModule(**{"images": source, "videos": source, "labels": True, "max_ranks": 2} | settings)
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_step=step, max_steps=1000, global_rank=rank, world_size=ranks, strategy=strategy
    )
    return data


def labels_of(batch: LatentBatch) -> Tensor:
    assert batch.labels is not None
    assert batch.labels.dtype == torch.int64
    assert batch.labels.shape == (len(batch.noise),)
    return batch.labels


def rows(loader: DataLoader[LatentBatch], count: int) -> list[list[tuple[str, bytes, int]]]:
    """Return the key, noise and class of the noisy rows of each batch, sorted."""
    return [
        sorted(
            (batch.keys[clip], noise.numpy().tobytes(), label)
            for clip, noise, label in zip(
                batch.clip_of_row.tolist(), batch.noise, labels_of(batch).tolist(), strict=True
            )
        )
        for batch in islice(loader, count)
    ]


def classes_of(data: LatentDataModule) -> dict[str, int]:
    """Return the class of each sample by its key."""
    buckets = [bucket for split in data.buckets.values() for source in split.values() for bucket in source]
    metadata = [bucket.read(sample).metadata for bucket in buckets for sample in range(len(bucket))]
    return {entry["key"]: CLASSES.index(entry["label"]) if "label" in entry else -1 for entry in metadata}


@pytest.mark.parametrize("noise_draws", [1, 3])
def test_every_noisy_row_has_the_class_of_its_clip(shards: Path, noise_draws: int) -> None:
    data = data_of(shards, label_dropout=0.0, context_dropout=0.25, noise_draws=noise_draws)
    expected = classes_of(data)
    found = [row for batch in rows(data.train_dataloader(), 40) for row in batch]
    assert {label for *_, label in found} == {-1, 0, 1, 2}
    assert all(label == expected[key] for key, _, label in found)


def test_labels_of_copies_are_dropped_independently(shards: Path) -> None:
    """Over 1500 images and 1500 clips in two copies, three quarters of them with labels."""
    data = data_of(shards, label_dropout=0.3, noise_draws=2, context_dropout=0.0)
    expected = classes_of(data)
    dropped: dict[str, list[Tensor]] = {"images": [], "videos": []}
    for batch in islice(data.train_dataloader(), 750):
        classes = torch.tensor([expected[key] for key in batch.keys])
        found = labels_of(batch).view(batch.draws, -1)
        assert ((found == classes) | (found == -1)).all()
        dropped[batch.source].append((found < 0)[:, classes >= 0].double())
    images, (first, second) = torch.cat(dropped["images"], 1)[0], torch.cat(dropped["videos"], 1)
    for values, mean in ((images, 0.3), (first, 0.3), (second, 0.3), (first * second, 0.3**2)):
        assert len(values) > 1000
        assert abs(values.mean().item() - mean) < 4 * (mean * (1 - mean) / len(values)) ** 0.5


def test_label_dropout_is_independent_of_workers_and_resuming(shards: Path) -> None:
    settings: dict[str, Any] = {"label_dropout": 0.5, "noise_draws": 2}
    found = rows(data_of(shards, **settings).train_dataloader(), 40)
    assert rows(data_of(shards, **settings).train_dataloader(), 40) == found
    assert rows(data_of(shards, **settings, workers=2).train_dataloader(), 40) == found
    assert rows(data_of(shards, **settings, step=7).train_dataloader(), 12) == found[28:]


def test_label_dropout_depends_on_seed_and_step(tmp_path: Path) -> None:
    """With 8 images of one class per step."""
    write_labelled(tmp_path, ["run"], [("run", latent(1))] * 8)

    def dropped(seed: int) -> list[tuple[int, ...]]:
        data = data_of(tmp_path, videos=SourceConfig(), label_dropout=0.5, seed=seed)
        return [tuple(labels_of(batch).tolist()) for batch in islice(data.train_dataloader(), 12)]

    assert len(set(dropped(0))) > 6  # of 2^4 possible patterns per micro-batch
    assert dropped(0) != dropped(1)


def test_label_dropout_is_independent_of_the_number_of_ranks(shards: Path) -> None:
    settings: dict[str, Any] = {"label_dropout": 0.5, "context_dropout": 0.5, "noise_draws": 2}
    whole = rows(data_of(shards, **settings).train_dataloader(), 40)
    shares = [rows(data_of(shards, **settings, rank=rank, ranks=2).train_dataloader(), 40) for rank in (0, 1)]
    assert [sorted(first + second) for first, second in zip(*shares, strict=True)] == whole


def test_the_label_of_the_first_copy_is_that_of_a_single_draw(shards: Path) -> None:
    loaders = (data_of(shards, label_dropout=0.5, noise_draws=draws).train_dataloader() for draws in (1, 3))
    for single, copies in islice(zip(*loaders, strict=True), 20):
        clips = copies.clip_of_row.tolist()
        first = [clips.index(clip) for clip in range(len(single.keys))]
        assert torch.equal(labels_of(copies)[first], labels_of(single))


def test_labels_do_not_change_other_random_numbers(shards: Path) -> None:
    def others(**settings: Any) -> list[tuple[Any, ...]]:
        batches = islice(data_of(shards, **settings).train_dataloader(), 20)
        return [
            (b.keys, b.context, b.weight, *(x.numpy().tobytes() for x in (b.latents, b.noise, b.t))) for b in batches
        ]

    assert others(label_dropout=0.9) == others(labels=False)
    assert next(iter(data_of(shards, labels=False).train_dataloader())).labels is None


def test_validation_drops_no_labels(shards: Path) -> None:
    data = data_of(shards, label_dropout=1.0)
    expected = classes_of(data)
    held_out = [row for batch in rows(data.val_dataloader(), 8) for row in batch]
    assert {label for *_, label in held_out} == {-1, 0, 1, 2}
    assert all(label == expected[key] for key, _, label in held_out)
    assert {label for batch in rows(data.train_dataloader(), 8) for *_, label in batch} == {-1}


def test_labels_move_with_the_batch(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_labels, without = (next(iter(data_of(shards, labels=labels).train_dataloader())) for labels in (True, False))
    assert labels_of(move_data_to_device(with_labels, torch.device("meta"))).device.type == "meta"
    assert move_data_to_device(without, torch.device("meta")).labels is None
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())
    pinned = with_labels.pin_memory()
    for name in ("latents", "noise", "t", "labels"):
        assert torch.equal(getattr(pinned, name), getattr(with_labels, name))
        assert getattr(pinned, name) is not getattr(with_labels, name)
    assert (pinned.keys, pinned.context, without.pin_memory().labels) == (with_labels.keys, with_labels.context, None)


def test_a_replaced_sample_has_the_label_of_its_replacement(tmp_path: Path) -> None:
    manifest = write_labelled(tmp_path, CLASSES, [(name, latent(1)) for name in CLASSES])
    damage(manifest, shard=0, number=1)
    data = data_of(tmp_path, videos=SourceConfig(), label_dropout=0.0, max_ranks=1)
    batches = list(islice(data.train_dataloader(), 4))
    assert any(batch.damaged for batch in batches)
    for batch in batches:
        assert labels_of(batch).tolist() == [int(key[-6:]) for key in batch.keys]


def test_a_label_that_no_manifest_lists_is_an_error(tmp_path: Path) -> None:
    write_labelled(tmp_path, CLASSES, [(name, latent(1)) for name in ("run", "fly")])
    data = data_of(tmp_path, videos=SourceConfig(), max_ranks=1)
    with pytest.raises(
        InputError, match=r"sample train-image-1x4x4-00000-000001 has the label 'fly', which no manifest"
    ):
        next(iter(data.train_dataloader()))


# Class names


def test_classes_are_the_labels_of_all_manifests_in_order(tmp_path: Path) -> None:
    """The class of a sample follows from its label, not from the position of the label in its manifest."""
    first, second = tmp_path / "first", tmp_path / "second"
    write_labelled(first, ["swim", "run"], [(name, latent(1)) for name in ("swim", "run")])
    write_labelled(second, ["jump", "run"], [(name, latent(1)) for name in ("jump", "run")])
    data = data_of(first, second, videos=SourceConfig(), label_dropout=0.0, max_ranks=1)
    assert data.classes == ("swim", "run", "jump")
    (batch,) = islice(data.train_dataloader(), 1)
    assert set(labels_of(batch).tolist()) == {0, 1, 2}
    assert data_of(second, first, videos=SourceConfig()).classes == ("jump", "run", "swim")
    assert data_of(first, labels=False, videos=SourceConfig()).classes == ()


def test_data_without_labels_are_rejected(tiny_shards: Path) -> None:
    with pytest.raises(
        InputError, match=r"data\.labels is true, but .*prepare the data with --labels or --annotations"
    ):
        LatentDataModule(videos=SourceConfig([str(tiny_shards)], batch_size=4), labels=True)


@pytest.mark.parametrize("dropout", [-0.1, 1.1])
def test_an_invalid_label_dropout_is_rejected(shards: Path, dropout: float) -> None:
    with pytest.raises(InputError, match=rf"data\.label_dropout is {dropout}; it must lie between 0 and 1"):
        data_of(shards, label_dropout=dropout)


def test_a_run_resumes_only_with_the_same_labels(shards: Path, tmp_path: Path) -> None:
    with_labels, without = data_of(shards).state_dict(), data_of(shards, labels=False).state_dict()
    assert with_labels["classes"] == list(CLASSES)
    assert without.keys() == {"order", "folders", "codec", "geometry"}
    assert not any("label" in setting for setting in without["order"])
    data_of(shards).load_state_dict(with_labels)
    data_of(shards, labels=False, label_dropout=0.5).load_state_dict(without)
    with pytest.raises(InputError, match=r"with data\.label_dropout = 0\.1 and the recipe has 0\.2; so its data order"):
        data_of(shards, label_dropout=0.2).load_state_dict(with_labels)
    with pytest.raises(InputError, match=r"data\.labels = \['run', 'jump', 'swim'\] and the recipe has none"):
        data_of(shards, labels=False).load_state_dict(with_labels)
    with pytest.raises(InputError, match=r"data\.labels = none and the recipe has \['run', 'jump', 'swim'\]"):
        data_of(shards).load_state_dict(without)

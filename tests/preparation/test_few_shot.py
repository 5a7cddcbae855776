"""Preparation of image pairs as few-shot sequences."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from gpdit_lightning.codecs import load_codec
from gpdit_lightning.data.datamodule import LatentDataModule, SourceConfig
from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.data.shards import ShardReader
from gpdit_lightning.errors import InputError
from gpdit_lightning.files import folder_lock
from gpdit_lightning.media.image_tasks import TASKS, make_pair
from gpdit_lightning.media.images import read_image, resize_and_crop
from gpdit_lightning.preparation import PreparePairsOptions, prepare_pairs

PAIRS = 9


@pytest.fixture
def options(tmp_path: Path) -> PreparePairsOptions:
    """Options for existing pairs, with two validation sequences."""
    numbers = np.random.default_rng(0)
    for folder in ("colour", "grayscale"):
        (tmp_path / folder).mkdir()
    for i in range(PAIRS):
        small = Image.fromarray(numbers.integers(0, 256, (4, 6, 3), dtype=np.uint8))
        image = small.resize((40, 32), Image.Resampling.BICUBIC)
        image.save(tmp_path / "colour" / f"p{i}.png")
        image.convert("L").save(tmp_path / "grayscale" / f"p{i}.jpg")
    return PreparePairsOptions(
        out=tmp_path / "out",
        sources=tmp_path / "colour",
        targets=tmp_path / "grayscale",
        sequences=5,
        validation_fraction=0.2,
        held_out_pairs=2,
        size="16x24",
        codec="pca",
        device="cpu",
    )


def with_task(options: PreparePairsOptions, task: str) -> PreparePairsOptions:
    """Return options for a built-in task on the same sources, with another output folder."""
    return replace(options, task=task, targets=None, out=options.out.with_name(task))


def samples(manifest: Manifest) -> list[tuple[str, np.ndarray, list[str]]]:
    stored = []
    for entry in manifest.shards:
        for number in range(entry.count):
            latents, metadata = ShardReader(manifest.directory, entry).read(number)
            assert metadata["task"] == manifest.preparation["task"]
            stored.append((entry.split, latents, metadata["source"].split()))
    return stored


def test_each_image_of_a_sequence_is_encoded_alone(options: PreparePairsOptions) -> None:
    manifest = prepare_pairs(options)
    assert manifest == Manifest.load(options.out)
    assert {entry.kind for entry in manifest.shards} == {"sequence"}
    codec = load_codec("pca")
    stored = samples(manifest)
    assert [split for split, *_ in stored].count("train") == 5
    for _, latents, names in stored:
        assert latents.shape == (6, 16, 2, 3)
        assert len(set(names)) == 3  # distinct pairs
        for i, name in enumerate(names):
            for frame, path in (
                (2 * i, options.sources / name),
                (2 * i + 1, (options.targets / name).with_suffix(".jpg")),
            ):
                expected = codec.encode(resize_and_crop(read_image(path), (16, 24))[None])[0, 0]
                assert np.abs(latents[frame] - expected.numpy()).max() < 0.02  # half precision


@pytest.mark.parametrize("task", TASKS)
def test_built_in_tasks(options: PreparePairsOptions, task: str) -> None:
    manifest = prepare_pairs(with_task(options, task))
    assert manifest.preparation["task_parameters"] == TASKS[task].parameters
    codec = load_codec("pca")
    for _, latents, names in samples(manifest):
        for i, name in enumerate(names):
            pixels = torch.stack(make_pair(TASKS[task], resize_and_crop(read_image(options.sources / name), (16, 24))))
            assert np.abs(latents[2 * i : 2 * i + 2] - codec.encode(pixels).numpy()[:, 0]).max() < 0.02


def test_only_the_last_pair_of_a_validation_sequence_is_held_out(options: PreparePairsOptions) -> None:
    manifest = prepare_pairs(options)
    stored = samples(manifest)
    training = {name for split, _, names in stored if split == "train" for name in names}
    validation = [names for split, _, names in stored if split == "validation"]
    assert len(validation) == 2
    held_out = {names[-1] for names in validation}
    assert len(held_out) == 2
    assert not held_out & training
    everything = {f"p{i}.png" for i in range(PAIRS)}
    assert {name for names in validation for name in names[:-1]} <= everything - held_out
    assert "hash" in manifest.validation["held_out_by"]


def test_the_manifest_lists_every_held_out_file(options: PreparePairsOptions, tmp_path: Path) -> None:
    """It includes unused files and duplicates, and distinguishes equal names in folders of equal names."""
    for side, folder in (("a", options.sources), ("b", options.targets)):
        (tmp_path / side / "train").mkdir(parents=True)
        for path in folder.iterdir():
            Image.open(path).save(tmp_path / side / "train" / f"{path.stem}.png")
    moved = replace(options, sources=tmp_path / "a/train", targets=tmp_path / "b/train", held_out_pairs=1, sequences=50)
    manifest = prepare_pairs(moved)
    used = {name for split, _, names in samples(manifest) if split == "train" for name in names}
    unused = {f"p{i}.png" for i in range(PAIRS)} - used
    assert len(unused) > manifest.validation["validation_sources"] == 1
    expected = [f"{side}/train/{name}" for side in "ab" for name in sorted(unused)]
    assert manifest.validation["held_out"] == expected
    for side in "ab":
        shutil.copy(tmp_path / side / "train" / min(unused), tmp_path / side / "train" / "q.png")
    again = prepare_pairs(replace(moved, out=tmp_path / "again"))
    assert again.validation["held_out"] == sorted([*expected, "a/train/q.png", "b/train/q.png"])


def test_all_tasks_hold_out_the_same_images(options: PreparePairsOptions) -> None:
    validations = [prepare_pairs(with_task(options, task)).validation for task in ("grayscale", "colourisation")]
    assert validations[0] == validations[1]
    assert validations[0]["held_out"]


def test_training_on_several_tasks_uses_all_of_their_sequences(options: PreparePairsOptions) -> None:
    manifests = [prepare_pairs(with_task(options, task)) for task in ("grayscale", "colourisation")]
    data = LatentDataModule(
        sequences=SourceConfig([str(manifest.directory) for manifest in manifests], batch_size=10), context_dropout=0.0
    )
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_step=0, max_steps=1, global_rank=0, world_size=1, strategy=strategy
    )
    (batch,) = data.train_dataloader()
    mean, std = (
        np.array(values, np.float32)[:, None, None] for values in (manifests[0].codec.mean, manifests[0].codec.std)
    )
    latents = [sample for manifest in manifests for split, sample, _ in samples(manifest) if split == "train"]
    distances = np.abs(batch.latents.numpy()[:, None] - [(sample - mean) / std for sample in latents]).max((2, 3, 4, 5))
    assert distances.min(axis=1).max() < 1e-3
    assert sorted(distances.argmin(axis=1)) == list(range(10))  # five sequences of each task


def test_defaults_are_those_of_the_paper() -> None:
    defaults = PreparePairsOptions(out=Path())
    assert (defaults.sequences, defaults.pairs_per_sequence, defaults.pairs) == (20, 3, 40)


def test_the_number_of_training_pairs_is_limited(options: PreparePairsOptions) -> None:
    manifest = prepare_pairs(replace(options, pairs=3, sequences=8, validation_fraction=0))
    assert len({name for _, _, names in samples(manifest) for name in names}) == 3
    assert manifest.validation["validation_sources"] == 0
    assert manifest.validation["held_out"] == []


def test_train_sources_counts_pairs_in_training_sequences(options: PreparePairsOptions) -> None:
    manifest = prepare_pairs(replace(options, sequences=1))
    assert manifest.validation["train_sources"] == 3  # of 6 that are not held out


def test_an_existing_result_is_reused_or_refused(
    options: PreparePairsOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    first = prepare_pairs(options)
    assert prepare_pairs(options) == first
    assert "already contains the result of these options" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"contains shards of other options \(--sequences was \d+ and is \d+\)"):
        prepare_pairs(replace(options, sequences=6))
    with pytest.raises(InputError, match=r"contains shards of other options \(--task was \w+ and is \w+\)"):
        prepare_pairs(replace(with_task(options, "grayscale"), out=options.out))
    again = prepare_pairs(replace(options, out=options.out.with_name("again")))
    replace(
        again, codec=replace(again.codec, fingerprint="0" * 16)
    ).save()  # as if the weights of the codec had changed
    with pytest.raises(
        InputError, match=r"again/manifest\.json and this preparation are of different codecs \(fingerp"
    ):
        prepare_pairs(replace(options, out=options.out.with_name("again")))
    assert [entry.sha256 for entry in again.shards] == [entry.sha256 for entry in first.shards]
    other = prepare_pairs(replace(options, seed=1, out=options.out.with_name("other")))
    assert other.fingerprint() != first.fingerprint()


def test_two_processes_do_not_write_to_one_folder(options: PreparePairsOptions) -> None:
    """Each would delete the shards of the other as leftovers."""
    with folder_lock(options.out), pytest.raises(InputError, match=f"another process is writing to {options.out}: "):
        prepare_pairs(options)
    assert not [*options.out.iterdir()]
    assert prepare_pairs(options).shards


def test_a_changed_image_of_the_same_name_and_size_is_detected(options: PreparePairsOptions) -> None:
    """One gray level changes, which may also move the pair to the other split."""
    used = prepare_pairs(options)
    name = samples(used)[0][2][0]
    path = options.sources / name
    pixels = np.array(Image.open(path))
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(path)
    with pytest.raises(InputError, match=r"shards of other options \(the names or the content of the images\)"):
        prepare_pairs(options)


def test_pairs_in_gives_the_same_as_sources_and_targets(options: PreparePairsOptions, tmp_path: Path) -> None:
    expected = samples(prepare_pairs(options))
    (tmp_path / "task").mkdir()
    options.sources.rename(tmp_path / "task" / "source")
    options.targets.rename(tmp_path / "task" / "target")
    moved = replace(options, sources=None, targets=None, pairs_in=tmp_path / "task", out=tmp_path / "again")
    for one, other in zip(samples(prepare_pairs(moved)), expected, strict=True):
        assert one[0] == other[0]
        assert one[2] == other[2]
        assert (one[1] == other[1]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequences": 0}, "sequences is 0: give at least 1"),
        ({"held_out_pairs": -1}, "held_out_pairs is -1"),
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0: give at least 0"),
        ({"size": "16"}, "'16' is not HEIGHTxWIDTH"),
        ({"task": "depth"}, "no task 'depth': give one of pairs, grayscale, colourisation, edges, edges_to_image"),
        ({"task": "edges"}, "the task edges makes both images .*: give --sources only"),
        ({"task": "edges", "targets": None, "sources": None}, "give --sources only"),
        ({"targets": None}, "but got --sources: correct these"),
        ({"sources": None, "targets": None}, "but got none of them"),
        ({"pairs_in": Path()}, "but got --sources and --targets and --pairs_in"),
        ({"pairs": 2}, "pairs is 2 but a sequence has 3: raise --pairs"),
        ({"seed": -1}, "seed is -1: give at least 0"),
        ({"source_pattern": "("}, "source_pattern '[(]' is not a regular expression"),
        ({"size": "18x24"}, "18x24|18 by 24"),
        ({"out": Path(__file__)}, r"test_few_shot\.py cannot be written, since .* is not a writable folder"),
        ({"out": Path(__file__) / "new"}, r"new cannot be written, since .*test_few_shot\.py is not a writable folder"),
    ],
)
def test_invalid_options_are_refused_before_an_image_is_read(
    options: PreparePairsOptions, changes: dict[str, object], message: str
) -> None:
    for path in options.sources.iterdir():
        path.write_text("not an image")
    with pytest.raises(InputError, match=message):
        prepare_pairs(replace(options, **changes))
    assert not options.out.exists()


def test_missing_opencv_is_reported_before_an_image_is_read(
    options: PreparePairsOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    for path in options.sources.iterdir():
        path.write_text("not an image")
    with pytest.raises(InputError, match=r"OpenCV.*pip install"):
        prepare_pairs(with_task(options, "sketch"))


def test_too_few_pairs_are_refused_with_the_reason(options: PreparePairsOptions) -> None:
    for i in range(3, PAIRS):
        (options.sources / f"p{i}.png").unlink()
        (options.targets / f"p{i}.jpg").unlink()
    folders = ".*colour and .*grayscale"
    with pytest.raises(InputError, match=f"has 4 different pairs, but {folders} contain only 3: add images"):
        prepare_pairs(replace(options, pairs_per_sequence=4))
    message = rf"^holding out \d of the 3 different pairs in {folders} leaves \d for training, .* 3: add images, or"
    with pytest.raises(InputError, match=message):
        prepare_pairs(options)
    for i in (1, 2):
        shutil.copy(options.targets / "p0.jpg", options.targets / f"p{i}.jpg")
    message = r"holding out 3 of the 3 .* share an image .* leaves 0 .*: add pairs that share none, or .* 0\.$"
    with pytest.raises(InputError, match=message):
        prepare_pairs(options)
    assert prepare_pairs(replace(options, validation_fraction=0)).validation["train_sources"] == 3


def test_fewer_pairs_than_allowed_are_reported(
    options: PreparePairsOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare_pairs(replace(options, validation_fraction=0, pairs=PAIRS))
    assert "--pairs" not in capsys.readouterr().out
    prepare_pairs(replace(options, validation_fraction=0, out=options.out.with_name("again")))
    assert f"drawn from {PAIRS} pairs; --pairs allows 40\n" in capsys.readouterr().out


def test_frames_of_a_recording_are_held_out_together(options: PreparePairsOptions) -> None:
    """Each file name begins with the name of one of three recordings."""
    for path in (*options.sources.iterdir(), *options.targets.iterdir()):
        path.rename(path.with_name(f"clip{int(path.stem[1:]) // 3}_{path.name}"))
    manifest = prepare_pairs(replace(options, source_pattern=r"clip\d+", validation_fraction=0.01))
    recordings = {Path(name).name.partition("_")[0] for name in manifest.validation["held_out"]}
    assert len(recordings) == 1
    assert len(manifest.validation["held_out"]) == 6
    assert "source_pattern" in manifest.validation["held_out_by"]
    assert manifest.preparation["source_pattern"] == r"clip\d+"
    with pytest.raises(InputError, match=r"other options \(--source_pattern was clip\\d\+ and is None\)"):
        prepare_pairs(replace(options, validation_fraction=0.01))

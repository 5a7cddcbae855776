import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gpdit_lightning.codecs import load_codec
from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.data.shards import ShardReader
from gpdit_lightning.errors import InputError
from gpdit_lightning.media.images import read_image, resize_and_crop
from gpdit_lightning.preparation import FewShotOptions, prepare_sequences

COMMAND = Path(__file__).parents[2] / "data_prep" / "build_few_shot.py"
PAIRS = 9


@pytest.fixture
def options(tmp_path: Path) -> FewShotOptions:
    numbers = np.random.default_rng(0)
    for folder in ("colour", "grey"):
        (tmp_path / folder).mkdir()
    for place in range(PAIRS):
        small = Image.fromarray(numbers.integers(0, 256, (4, 6, 3), dtype=np.uint8))
        picture = small.resize((40, 32), Image.Resampling.BICUBIC)
        picture.save(tmp_path / "colour" / f"p{place}.png")
        picture.convert("L").save(tmp_path / "grey" / f"p{place}.jpg")
    return FewShotOptions(
        out=tmp_path / "out",
        sources=tmp_path / "colour",
        targets=tmp_path / "grey",
        sequences=5,
        held_out_pairs=2,
        size="16x24",
        codec="pca",
        device="cpu",
    )


def samples(manifest: Manifest) -> list[tuple[str, np.ndarray, list[str]]]:
    found = []
    for entry in manifest.shards:
        for number in range(entry.count):
            latents, metadata = ShardReader(manifest.directory, entry).read(number)
            found.append((entry.split, latents, metadata["source"].split()))
    return found


def test_sequences_are_pairs_of_images_each_encoded_alone(options: FewShotOptions) -> None:
    manifest = prepare_sequences(options)
    assert manifest == Manifest.load(options.out)
    assert {entry.kind for entry in manifest.shards} == {"sequence"}
    codec = load_codec("pca")
    found = samples(manifest)
    assert [split for split, *_ in found].count("train") == 5
    for _, latents, names in found:
        assert latents.shape == (6, 16, 2, 3)
        assert len(set(names)) == 3  # no pair twice
        for place, name in enumerate(names):
            stem = Path(name).stem
            for frame, path in (
                (2 * place, options.sources / f"{stem}.png"),
                (2 * place + 1, options.targets / f"{stem}.jpg"),
            ):
                expected = codec.encode(resize_and_crop(read_image(path), (16, 24))[None])[0, 0]
                assert np.abs(latents[frame] - expected.numpy()).max() < 0.02  # half precision


def test_held_out_pairs_end_the_validation_sequences_and_appear_nowhere_else(options: FewShotOptions) -> None:
    found = samples(prepare_sequences(options))
    training = {name for split, _, names in found if split == "train" for name in names}
    validation = [names for split, _, names in found if split == "validation"]
    assert len(validation) == 2
    held_out = {names[-1] for names in validation}
    assert len(held_out) == 2
    assert not held_out & training
    everything = {f"p{place}.png" for place in range(PAIRS)}
    assert {name for names in validation for name in names[:-1]} <= everything - held_out


def test_the_paper_draws_20_sequences_of_three_from_40_pairs() -> None:
    defaults = FewShotOptions(Path(), Path(), Path())
    assert (defaults.sequences, defaults.pairs_per_sequence, defaults.pairs) == (20, 3, 40)


def test_training_pairs_are_limited(options: FewShotOptions) -> None:
    manifest = prepare_sequences(replace(options, pairs=3, sequences=8, held_out_pairs=0))
    assert len({name for _, _, names in samples(manifest) for name in names}) == 3
    assert manifest.validation["validation_sources"] == 0


def test_running_again_changes_nothing_and_other_data_are_refused(
    options: FewShotOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    first = prepare_sequences(options)
    assert prepare_sequences(options) == first
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(InputError, match="holds shards made differently"):
        prepare_sequences(replace(options, sequences=6))
    again = prepare_sequences(replace(options, out=options.out.with_name("again")))
    assert [entry.sha256 for entry in again.shards] == [entry.sha256 for entry in first.shards]
    other = prepare_sequences(replace(options, seed=1, out=options.out.with_name("other")))
    assert other.fingerprint() != first.fingerprint()


def test_what_is_missing_is_named(options: FewShotOptions, tmp_path: Path) -> None:
    (options.targets / "p3.jpg").unlink()
    with pytest.raises(InputError, match=r"p3\.png has no counterpart named p3 in .*grey"):
        prepare_sequences(options)
    (options.sources / "p3.png").unlink()
    (options.sources / "p4.png").unlink()
    with pytest.raises(InputError, match=r"p4\.jpg has no counterpart named p4 in .*colour"):
        prepare_sequences(options)
    with pytest.raises(InputError, match=r"nowhere holds no pictures"):
        prepare_sequences(replace(options, sources=tmp_path / "nowhere"))
    (options.targets / "p4.jpg").unlink()
    with pytest.raises(InputError, match=r"have 7 pairs, 5 of them held out, and a sequence takes 3"):
        prepare_sequences(replace(options, held_out_pairs=5))
    with pytest.raises(InputError, match="sequences is 0"):
        prepare_sequences(replace(options, sequences=0))


def test_the_command(options: FewShotOptions) -> None:
    arguments = ["--codec", "pca", "--size", "16x24", "--out", str(options.out), "--held_out_pairs", "2"]
    folders = ["--sources", str(options.sources), "--targets", str(options.targets)]
    done = subprocess.run(
        [sys.executable, str(COMMAND), *arguments, *folders], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "--config recipes/stage4_few_shot.yaml" in done.stdout
    assert sum(entry.count for entry in Manifest.load(options.out).of_split("train")) == 20
    failed = subprocess.run(
        [sys.executable, str(COMMAND), *arguments, "--sources", "nowhere", "--targets", "nowhere"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert failed.returncode == 2
    assert failed.stderr.count("\n") == 1

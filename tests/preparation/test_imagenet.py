"""ImageNet in the forms in which it is distributed gives the same samples, labels and class indices."""

import io
import random
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from webdataset import TarWriter

from gpdit_lightning.data.manifest import SKIPPED_NAME, Manifest
from gpdit_lightning.data.shards import ShardReader
from gpdit_lightning.errors import InputError
from gpdit_lightning.media.images import adm_resize_and_crop
from gpdit_lightning.preparation import PrepareOptions, prepare
from gpdit_lightning.preparation.annotations import read_annotations
from gpdit_lightning.preparation.inspection.explain import explain

# In the order of the development kit's numbers, which is not that of the synsets.
SYNSETS = ("n02119789", "n02100735", "n01440764", "n12998815")
CLASSES = tuple(sorted(SYNSETS))
PER_CLASS = 3
VALIDATION = [SYNSETS[number % len(SYNSETS)] for number in (2, 0, 3, 1, 0, 2)]
Labels = dict[str, str]


def jpeg(seed: int) -> bytes:
    """Return the bytes of an image that is unlike those of other seeds."""
    file, numbers = io.BytesIO(), np.random.default_rng(seed)
    low = Image.fromarray(numbers.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    low.resize((40, 32), Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
    return file.getvalue()


def val_name(number: int) -> str:
    return f"ILSVRC2012_val_{number + 1:08d}"


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders, the tars of the download, and WebDataset tars of the same images."""
    root = tmp_path_factory.mktemp("imagenet")
    train = {
        f"{synset}_{number}": (synset, jpeg(1000 * index + number))
        for index, synset in enumerate(SYNSETS)
        for number in range(PER_CLASS)
    }
    val = {val_name(number): (synset, jpeg(number)) for number, synset in enumerate(VALIDATION)}
    for name, (synset, content) in train.items():
        path = root / "train" / synset / f"{name}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (root / "val").mkdir()
    for name, (_, content) in val.items():
        (root / "val" / f"{name}.JPEG").write_bytes(content)
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as outer:
        for synset in SYNSETS:
            inner_file = io.BytesIO()
            with tarfile.open(fileobj=inner_file, mode="w") as inner:
                for name, (of_image, content) in train.items():
                    if of_image == synset:
                        add(inner, f"{name}.JPEG", content)
            add(outer, f"{synset}.tar", inner_file.getvalue())
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as tar:
        for name, (_, content) in val.items():
            add(tar, f"{name}.JPEG", content)
    for split, images in (("train", train), ("val", val)):
        with TarWriter(str(root / f"imagenet-{split}-000000.tar")) as writer:
            for name in random.Random(0).sample(sorted(images), len(images)):
                synset, content = images[name]
                writer.write({"__key__": name, "jpg": content, "cls": CLASSES.index(synset)})
    write_lists(root)
    return root


def write_lists(root: Path) -> None:
    numbers = [SYNSETS.index(synset) + 1 for synset in VALIDATION]
    (root / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{number}\n" for number in numbers))
    rows = [(n + 1, synset, f"words {n}", 0) for n, synset in enumerate(SYNSETS)] + [(5, "n00001740", "parents", 4)]
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    savemat(root / "meta.mat", {"synsets": np.array(rows, dtype=kinds)[:, None]})
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        for name in LISTS["kit"]:
            add(tar, f"ILSVRC2012_devkit_t12/data/{name}", (root / name).read_bytes())
    (root / "map_clsloc.txt").write_text("".join(f"{s} {n + 1} word_{n}\n" for n, s in enumerate(SYNSETS)))
    (root / "mapping.txt").write_text("".join(f"{n + 1} {s}\n" for n, s in enumerate(SYNSETS)))
    (root / "synset_words.txt").write_text("".join(f"{s} word, other word\n" for s in CLASSES))
    val = list(enumerate(VALIDATION))
    (root / "val.txt").write_text("".join(f"{val_name(n)}.JPEG {CLASSES.index(s)}\n" for n, s in val))
    (root / "synset_labels.txt").write_text("".join(f"{s}\n" for s in VALIDATION))
    rows_of_kaggle = "".join(f"{val_name(n)},{s} 10 20 30 40\n" for n, s in reversed(val))
    (root / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + rows_of_kaggle)


LISTS = {
    "kit": ["ILSVRC2012_validation_ground_truth.txt", "meta.mat"],
    "packed kit": ["ILSVRC2012_devkit_t12.tar.gz"],
    "clsloc": ["map_clsloc.txt", "ILSVRC2012_validation_ground_truth.txt"],
    "mapping": ["ILSVRC2012_validation_ground_truth.txt", "mapping.txt"],
    "kaggle": ["LOC_val_solution.csv", "synset_words.txt"],
    "caffe": ["val.txt", "synset_words.txt"],
    "tensorflow": ["synset_labels.txt"],
}


@pytest.mark.parametrize("name", LISTS)
def test_every_list_gives_the_classes_of_the_validation_images(imagenet: Path, name: str) -> None:
    annotations = read_annotations([imagenet / file for file in LISTS[name]])
    assert annotations.labels == CLASSES
    for number, synset in enumerate(VALIDATION):
        for file in (f"{val_name(number)}.JPEG", f"val/{val_name(number)}.JPEG", val_name(number)):
            assert annotations.get(file)[1:] == (synset, "validation")
    assert annotations.get("n02119789_1.JPEG").label is None


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["ILSVRC2012_validation_ground_truth.txt"], "class number 3 of ILSVRC2012_val_00000001 is not defined: give"),
        (["val.txt"], "give the list of classes too, synset_words.txt"),
        (["broken.txt"], r"broken.txt line 2 is 'cat', which has another form than the lines before"),
        (["broken.mat"], "broken.mat is not meta.mat of ImageNet's development kit"),
        (["broken.tar.gz"], "broken.tar.gz is not ImageNet's development kit"),
    ],
)
def test_lists_that_cannot_be_used_are_named(imagenet: Path, files: list[str], message: str) -> None:
    (imagenet / "broken.txt").write_text("n02119789 fox\ncat\n")
    for name in ("broken.mat", "broken.tar.gz"):
        (imagenet / name).write_bytes(b"neither a matrix nor a tar")
    with pytest.raises(InputError, match=message):
        read_annotations([imagenet / file for file in files])


def samples(manifest: Manifest) -> dict[str, tuple[str, str | None, bytes]]:
    """Return split, label and latents of each sample by the stem of its image."""
    found = {}
    for entry in manifest.shards:
        for number in range(entry.count):
            latent, metadata = ShardReader(manifest.directory, entry).read(number)
            stem = Path(metadata["source"]).name.partition(".")[0]
            found[stem] = (entry.split, metadata.get("label"), latent.tobytes())
    return found


@pytest.fixture(scope="module")
def options(imagenet: Path) -> PrepareOptions:
    return PrepareOptions(
        images=[imagenet / "train"], validation_images=[imagenet / "val"], labels=True, codec="pca", workers=0,
        annotations=[imagenet / name for name in LISTS["kit"]], image_sizes=["16x16"], image_scaling="adm",
        clip_frames=1, video_sizes=["16x16"], device="cpu", out=imagenet / "from_folders",
    )  # fmt: skip


@pytest.fixture(scope="module")
def from_folders(options: PrepareOptions) -> Manifest:
    manifest = prepare(options)
    assert manifest is not None
    return manifest


def test_folders_give_the_classes_in_the_order_of_the_synsets(from_folders: Manifest) -> None:
    assert from_folders.labels == CLASSES
    found = samples(from_folders)
    assert len(found) == len(SYNSETS) * PER_CLASS + len(VALIDATION)
    for name, (split, label, _) in found.items():
        expected = VALIDATION[int(name[-8:]) - 1] if name.startswith("ILSVRC") else name.partition("_")[0]
        assert (split, label) == ("validation" if name.startswith("ILSVRC") else "train", expected)


@pytest.mark.parametrize(
    ("form", "settings"),
    [
        ("whole", {"images": ["."], "validation_images": [], "image_tars": []}),
        ("tars", {"image_tars": ["ILSVRC2012_img_train.tar"], "validation_image_tars": ["ILSVRC2012_img_val.tar"]}),
        (
            "webdataset",
            {"image_tars": ["imagenet-train-000000.tar"], "validation_image_tars": ["imagenet-val-000000.tar"]},
        ),
        ("mixed", {"image_tars": ["ILSVRC2012_img_train.tar"], "validation_images": ["val"], "images": []}),
    ],
)
def test_every_form_gives_the_same_samples(
    form: str, settings: Any, options: PrepareOptions, from_folders: Manifest
) -> None:
    root = options.out.parent
    empty: dict[str, Any] = {"images": (), "validation_images": ()}
    given = {name: [str(root / path) for path in paths] for name, paths in settings.items()}
    if form == "webdataset":  # its images have a .cls
        given["annotations"] = [str(root / "synset_words.txt")]
    if form == "whole":  # without the tars and the shards
        given["images"] = [str(root / "train"), str(root / "val")]
    manifest = prepare(replace(options, **empty | given, workers=2, out=root / form))
    assert manifest is not None
    assert manifest.labels == CLASSES
    assert samples(manifest) == samples(from_folders)
    assert (manifest.directory / SKIPPED_NAME).read_text() == ""  # type: ignore[operator]
    if form == "tars":
        query = "ILSVRC2012_img_train.tar/n02119789.tar/n02119789_1"
        text = explain(manifest, str(root / query))
        assert "split: train, since it is in no held-out folder" in text
        assert "size: 32x40 pixels" in text


def test_indices_without_a_list_of_classes_are_the_classes(options: PrepareOptions) -> None:
    root = options.out.parent
    with TarWriter(str(root / "indices.tar")) as writer:
        for number, index in enumerate((10, 2, 11)):
            writer.write({"__key__": f"x{number}", "jpg": jpeg(number), "cls": index})
    manifest = prepare(
        replace(
            options, images=[], validation_images=[], annotations=[], labels=False, validation_fraction=0,
            image_tars=[str(root / "indices.tar")], out=root / "indices",
        )
    )  # fmt: skip
    assert manifest is not None
    assert manifest.labels == tuple(map(str, range(12)))
    assert {label for _, label, _ in samples(manifest).values()} == {"2", "10", "11"}


def test_a_truncated_tar_of_tars_is_reported_and_its_whole_tars_are_used(options: PrepareOptions) -> None:
    root = options.out.parent
    content = (root / "ILSVRC2012_img_train.tar").read_bytes()
    (root / "ILSVRC2012_cut.tar").write_bytes(content[: len(content) * 3 // 4])
    cut = replace(options, images=[], image_tars=[str(root / "ILSVRC2012_cut.tar")], out=root / "cut")
    manifest = prepare(cut)
    assert manifest is not None
    assert manifest.labels == CLASSES
    of_training = [name for name, (split, *_) in samples(manifest).items() if split == "train"]
    assert 0 < len(of_training) < len(SYNSETS) * PER_CLASS
    assert "it is broken after" in (root / "cut" / SKIPPED_NAME).read_text()


def test_held_out_images_without_classes_are_refused(options: PrepareOptions) -> None:
    with pytest.raises(
        InputError, match="name of its folder, val, which is no class of the training images: give --an"
    ):
        prepare(replace(options, annotations=[], out=options.out.with_name("unlabelled")))


@pytest.mark.parametrize(("height", "width"), [(500, 375), (1200, 2000), (256, 256), (120, 97), (513, 512)])
def test_adm_scaling_is_that_of_the_published_function(height: int, width: int) -> None:
    """`center_crop_arr` of ADM, in its published steps."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image, size = Image.fromarray(pixels), 256
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.Resampling.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.Resampling.BICUBIC)
    array = np.array(image)
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    expected = array[top : top + size, left : left + size]
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    assert (adm_resize_and_crop(tensor, (size, size))[0].permute(1, 2, 0).numpy() == expected).all()

"""Contexts from files, folders and shards, compared with the frames and latents that were written."""

import dataclasses
import io
import logging
import tarfile
import weakref
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from gpdit_lightning.codecs import Codec, load_codec
from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.errors import InputError
from gpdit_lightning.generation import frame_sources
from gpdit_lightning.generation.context_readers import read_contexts
from gpdit_lightning.generation.contexts import ContextSettings, VideoContext
from gpdit_lightning.media.video import VideoFrame
from gpdit_lightning.media.video_writer import write_video
from gpdit_lightning.preparation import PrepareOptions, prepare
from tests.data.damage import damage
from tests.media.timed import gray_numbers, write_timed

STEP = 6  # gray levels from frame to frame: more than what H.264 changes
FRAMES = 40
SETTINGS = ContextSettings(frames=5, stride=3, sizes=((32, 32), (32, 48)))


@pytest.fixture(scope="module")
def codec() -> Codec:
    return load_codec("pca")


def gray_steps(frames: int = FRAMES, height: int = 32, width: int = 48) -> Tensor:
    """Frame i has the gray level 6 i, from which `numbers` computes i."""
    return (torch.arange(frames) * STEP).byte().view(-1, 1, 1, 1).expand(-1, 3, height, width).contiguous()


def numbers(frames: Tensor) -> list[int]:
    return [round(value / STEP) for value in frames.float().mean(dim=(1, 2, 3)).tolist()]


def draw(folder: Path, names: dict[str, int], size: tuple[int, int] = (48, 32)) -> Path:
    """Write images of the gray levels of `gray_steps` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, number in names.items():
        Image.new("RGB", size, (number * STEP,) * 3).save(folder / name)
    return folder


def read_one(source: Path, codec: Codec, **changes: Any) -> VideoContext:
    (context,) = read_contexts([str(source)], dataclasses.replace(SETTINGS, **changes), codec)
    return context


@pytest.mark.parametrize("fps", [Fraction(24), Fraction(30000, 1001), Fraction(10)])
def test_context_begins_at_start_and_is_followed_by_ground_truth(fps: Fraction, tmp_path: Path, codec: Codec) -> None:
    write_video(tmp_path / "steps.mp4", gray_steps(), fps)
    context = read_one(tmp_path / "steps.mp4", codec, start=float(7 / fps), ground_truth_frames=4)
    assert numbers(context.pixels) == [7, 10, 13, 16, 19]
    assert numbers(context.ground_truth) == [22, 25, 28, 31]
    assert context.pixels.shape == (5, 3, 32, 48)
    assert (context.name, context.fps) == ("steps", fps / 3)
    assert context.latents is None
    all_later = read_one(tmp_path / "steps.mp4", codec, start=0.0, ground_truth_frames=99).ground_truth
    assert numbers(all_later) == list(range(15, 40, 3))


def test_without_start_the_context_is_the_end_of_the_video(tmp_path: Path, codec: Codec) -> None:
    write_video(tmp_path / "steps.mp4", gray_steps(), 24)
    context = read_one(tmp_path / "steps.mp4", codec, ground_truth_frames=4)
    assert numbers(context.pixels) == [27, 30, 33, 36, 39]
    assert context.ground_truth.shape == (0, 3, 32, 48)


@pytest.mark.parametrize(("frames", "expected"), [(38, [25, 28, 31, 34, 37]), (39, [26, 29, 32, 35, 38])])
def test_without_start_the_last_frame_of_the_video_is_in_the_context(
    tmp_path: Path, codec: Codec, frames: int, expected: list[int]
) -> None:
    write_video(tmp_path / "steps.mp4", gray_steps(frames), 24)
    assert numbers(read_one(tmp_path / "steps.mp4", codec).pixels) == expected
    draw(tmp_path / "frames", {f"f{number}.png": number for number in range(frames)})
    assert numbers(read_one(tmp_path / "frames", codec).pixels) == expected
    write_video(tmp_path / "short.mp4", gray_steps(12), 24)
    with pytest.raises(InputError, match=r"short\.mp4 has 4 frames at stride 3, but the context needs 5"):
        read_one(tmp_path / "short.mp4", codec)


def test_seconds_are_those_of_the_time_stamps(tmp_path: Path, codec: Codec, caplog: pytest.LogCaptureFixture) -> None:
    """A video of 10 frames per second for one second, then of 30."""
    times = [number / 10 for number in range(10)] + [1 + number / 30 for number in range(30)]
    path = write_timed(tmp_path / "video.mp4", times)
    context = read_one(path, codec, start=1.1)
    assert gray_numbers(context.pixels) == [13, 16, 19, 22, 25]
    assert context.fps == 10
    assert "uneven" not in caplog.text
    slow = read_one(path, codec, start=0.2, stride=1)
    assert (gray_numbers(slow.pixels), slow.fps) == ([2, 3, 4, 5, 6], 10)
    uneven = read_one(path, codec, start=0.6)
    assert gray_numbers(uneven.pixels) == [6, 9, 12, 15, 18]
    assert float(uneven.fps) == pytest.approx(4 / (times[18] - times[6]), rel=1e-3)
    assert "video.mp4 are uneven (0.1 to 0.3 s)" in caplog.text
    resampled = read_one(path, codec, start=0.6, video_fps=10.0, stride=2)
    assert (gray_numbers(resampled.pixels), resampled.fps) == ([6, 8, 10, 16, 22], 5)
    assert gray_numbers(read_one(path, codec, video_fps=10.0, stride=1).pixels) == [25, 28, 31, 34, 37]
    with pytest.raises(InputError, match=r"--start 2 is after the end of"):
        read_one(path, codec, start=2.0)


def test_a_context_may_be_as_short_as_its_video(shards: Path, tmp_path: Path, codec: Codec) -> None:
    """Videos of 1, 3 and 40 frames, a folder of frames and a shard of 17 frames, where 29 frames are preferred."""
    sources = [str(tmp_path / f"{frames}.mp4") for frames in (1, 3, 40)]
    for source in sources:
        write_video(source, gray_steps(int(Path(source).stem)), 24)
    draw(tmp_path / "frames", {f"f{number}.png": number for number in range(20)})
    sources += [str(tmp_path / "frames"), f"{tar_of(shards)}#0"]
    settings = dataclasses.replace(SETTINGS, frames=29, may_be_shorter=True)
    one, three, forty, folder, sample = read_contexts(sources, settings, codec)
    assert (numbers(one.pixels), numbers(three.pixels), numbers(folder.pixels)) == ([0], [2], [7, 10, 13, 16, 19])
    assert numbers(forty.pixels) == list(range(3, 40, 3))
    assert (len(sample.pixels), len(sample.ground_truth)) == (17, 0)
    from_start = read_one(Path(sources[3]), codec, start=0.0, may_be_shorter=True, frames=29, ground_truth_frames=5)
    assert (numbers(from_start.pixels), numbers(from_start.ground_truth)) == ([0, 3, 6, 9, 12], [15, 18])


def test_unusable_contexts_are_named_and_the_others_are_used(
    unusable: Path, codec: Codec, caplog: pytest.LogCaptureFixture
) -> None:
    sources = [str(unusable / name) for name in ("few", "text.mp4", "short.mp4", "text.png")]
    assert [context.name for context in read_contexts(sources, SETTINGS, codec)] == ["short"]
    warnings = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert [message.split(": ")[0] for message in warnings] == ["skipped"] * 3
    assert "few has 2 frames at stride 3, but the context needs 5: give a longer video or at most 1" in caplog.text
    with pytest.raises(InputError, match="none of the 2 contexts can be used, for the reasons above"):
        read_contexts(sources[:2], SETTINGS, codec)


def test_gif_is_read_as_a_video(tmp_path: Path, codec: Codec) -> None:
    images = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in gray_steps(20)]
    images[0].save(tmp_path / "steps.gif", save_all=True, append_images=images[1:], duration=100)
    context = read_one(tmp_path / "steps.gif", codec, start=0.2, ground_truth_frames=1)
    assert (numbers(context.pixels), numbers(context.ground_truth)) == ([2, 5, 8, 11, 14], [17])
    assert context.fps == Fraction(10, 3)


def test_images_of_a_folder_are_frames_in_natural_order(tmp_path: Path, codec: Codec) -> None:
    folder = draw(tmp_path / "frames", {f"f{number}.png": number for number in range(FRAMES)})
    (folder / "notes.txt").write_text("not an image")
    context = read_one(folder, codec, start=0.5, ground_truth_frames=2, fps=12)
    assert (numbers(context.pixels), numbers(context.ground_truth)) == ([6, 9, 12, 15, 18], [21, 24])
    assert (context.name, context.fps) == ("frames", Fraction(4))
    assert torch.equal(context.pixels, gray_steps()[6:21:3])  # images are lossless
    # Frames that the context does not need are not decoded.
    (folder / "f24.png").write_text("broken")
    context = read_one(folder, codec)
    assert numbers(context.pixels) == [27, 30, 33, 36, 39]
    assert context.fps == Fraction(24, 3)


def test_image_is_one_context_frame(tmp_path: Path, codec: Codec) -> None:
    draw(tmp_path, {"still.png": 9}, size=(60, 50))
    context = read_one(tmp_path / "still.png", codec, ground_truth_frames=4)
    assert torch.equal(context.pixels, torch.full((1, 3, 32, 32), 9 * STEP, dtype=torch.uint8))
    assert context.ground_truth.shape == (0, 3, 32, 32)
    assert context.fps == 8
    assert read_one(tmp_path / "still.png", codec, fps=30).fps == 10


def test_videos_of_a_folder_are_read_in_natural_order(tmp_path: Path, codec: Codec) -> None:
    for name, first in (("v10", 20), ("v2", 10), (".v3", 0)):
        write_video(tmp_path / f"{name}.mp4", gray_steps()[first:], 24)
    (tmp_path / "deeper").mkdir()
    write_video(tmp_path / "deeper" / "v1.mp4", gray_steps(), 24)
    found = read_contexts([str(tmp_path)], dataclasses.replace(SETTINGS, start=0.0), codec)
    assert [(context.name, numbers(context.pixels)[0]) for context in found] == [("v2", 10), ("v10", 20)]


def test_a_video_of_a_folder_and_a_link_to_it_are_one_context(tmp_path: Path, codec: Codec) -> None:
    write_video(tmp_path / "b.mp4", gray_steps(), 24)
    (tmp_path / "a.mp4").symlink_to(tmp_path / "b.mp4")
    assert [context.name for context in read_contexts([str(tmp_path)], SETTINGS, codec)] == ["b"]


def test_names_are_unique_and_valid_file_names(tmp_path: Path, codec: Codec) -> None:
    sources = ["a/b.png", "a/b-2.png", "c/b.png", "c/b.png", "c/so: what?.png", "c/?.png", f"c/{'ü' * 70}.png"]
    for source in sources:
        draw((tmp_path / source).parent, {Path(source).name: 1})
    found = read_contexts([str(tmp_path / source) for source in sources], SETTINGS, codec)
    assert [context.name for context in found] == ["b", "b-2", "b-3", "b-4", "so-what", "context", "ü" * 56]


def test_frames_are_scaled_to_the_size_closest_in_aspect(tmp_path: Path, codec: Codec) -> None:
    for height, width, size in ((64, 60, (32, 32)), (30, 50, (32, 48))):
        write_video(tmp_path / "a.mp4", gray_steps(20, height, width), 24)
        assert read_one(tmp_path / "a.mp4", codec).pixels.shape == (5, 3, *size)


def test_large_frames_are_in_memory_one_at_a_time(
    tmp_path: Path, codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_video(tmp_path / "long.mp4", gray_steps(1), 24)
    alive: list[weakref.ref[Tensor]] = []

    def frames(path: Path, start: int, *_: Any) -> Iterator[VideoFrame]:
        for number in range(start, 50):
            frame = torch.zeros(3, 64, 64, dtype=torch.uint8)
            alive.append(weakref.ref(frame))
            assert sum(reference() is not None for reference in alive) <= 2
            yield VideoFrame(number, number / 24, frame, Fraction(1), (64, 64))

    monkeypatch.setattr(frame_sources, "iterate_frames", frames)
    monkeypatch.setattr(frame_sources, "count_frames", lambda *_: 50)
    assert len(read_one(tmp_path / "long.mp4", codec, frames=33, stride=1).pixels) == 33
    assert len(alive) == 33


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents of two labelled videos of moving stripes, 17 frames of 32x32 at stride 3, and of two images."""
    folder = tmp_path_factory.mktemp("shards")
    (folder / "videos" / "stripes").mkdir(parents=True)
    for number in range(2):
        times, columns = torch.arange(60)[:, None], torch.arange(48)
        wave = (torch.sin((columns + times + 7 * number) / 5) * 100 + 128).byte()
        pixels = wave[:, None, None].expand(-1, 3, 32, -1).contiguous()
        write_video(folder / "videos" / "stripes" / f"{number}.mp4", pixels, Fraction(30000, 1001))
    draw(folder / "images", {"a.png": 5, "b.png": 6})
    prepare(
        PrepareOptions(
            out=folder / "latents",
            videos=[folder / "videos"],
            images=[folder / "images"],
            labels=True,
            codec="pca",
            clip_frames=17,
            video_sizes=["32x32"],
            image_sizes=["32x48"],
            validation_fraction=0,
            workers=0,
        )
    )
    return folder / "latents"


def tar_of(folder: Path, kind: str = "video") -> Path:
    (path,) = folder.glob(f"train-{kind}-*.tar")
    return path


def stored(tar: Path) -> dict[str, Tensor]:
    """Read the latents of a shard by key with tarfile."""
    with tarfile.open(tar) as file:
        contents = {name: file.extractfile(name) for name in file.getnames() if name.endswith(".npy")}
        arrays = {name: np.load(io.BytesIO(content.read())) for name, content in contents.items() if content}
    return {name.partition(".")[0]: torch.from_numpy(array).float() for name, array in arrays.items()}


def test_context_of_a_sample_is_its_latents(shards: Path, codec: Codec) -> None:
    tar = tar_of(shards)
    latents = stored(tar)
    assert len(latents) == 2
    assert next(iter(latents.values())).shape == (5, 16, 4, 4)
    settings = dataclasses.replace(SETTINGS, ground_truth_frames=6)
    for number, (key, whole) in enumerate(latents.items()):
        pixels = codec.decode(whole[None])[0]
        for name in (str(number), key):
            (context,) = read_contexts([f"{tar}#{name}"], settings, codec)
            assert context.name == key
            assert context.label == "stripes"
            assert context.fps == Fraction(10000, 1001)
            assert context.latents is not None
            assert context.latents.dtype == torch.float32
            assert torch.equal(context.latents, whole[:2])
            assert torch.equal(context.pixels, pixels[:5])
            assert torch.equal(context.ground_truth, pixels[5:11])
    assert torch.equal(
        read_one(Path(f"{tar}#0"), codec, frames=13, ground_truth_frames=99).ground_truth,
        codec.decode(next(iter(latents.values()))[None])[0, 13:],
    )


def test_shard_is_read_as_all_its_samples(shards: Path, codec: Codec) -> None:
    found = read_contexts([str(tar_of(shards)), str(tar_of(shards, "image"))], SETTINGS, codec)
    assert [context.name for context in found] == [*stored(tar_of(shards)), *stored(tar_of(shards, "image"))]
    assert [len(context.pixels) for context in found] == [5, 5, 1, 1]


def test_image_sample_is_one_context_frame(shards: Path, codec: Codec) -> None:
    context = read_one(Path(f"{tar_of(shards, 'image')}#1"), codec, ground_truth_frames=4, fps=12)
    (latents,) = list(stored(tar_of(shards, "image")).values())[1:]
    assert torch.equal(context.pixels, codec.decode(latents[None])[0])
    assert context.latents is not None
    assert torch.equal(context.latents, latents)
    assert (len(context.ground_truth), context.fps) == (0, 4)


def copied(shards: Path, folder: Path) -> Path:
    folder.mkdir(parents=True)
    for path in shards.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_manifest_may_be_in_a_folder_above_and_other_shards_missing(shards: Path, tmp_path: Path, codec: Codec) -> None:
    folder = copied(shards, tmp_path / "a")
    manifest = Manifest.load(folder)
    (folder / "b" / "c").mkdir(parents=True)
    for entry in manifest.shards:
        for name in (entry.path, entry.index):
            (folder / name).rename(folder / "b" / "c" / name)
    moved = [
        dataclasses.replace(entry, path=f"b/c/{entry.path}", index=f"b/c/{entry.index}") for entry in manifest.shards
    ]
    dataclasses.replace(manifest, shards=tuple(moved)).save()
    tar_of(folder / "b" / "c", "image").unlink()
    context = read_one(Path(f"{tar_of(folder / 'b' / 'c')}#0"), codec)
    assert torch.equal(context.pixels, read_one(Path(f"{tar_of(shards)}#0"), codec).pixels)


def test_damaged_sample_is_named_and_others_can_be_read(shards: Path, tmp_path: Path, codec: Codec) -> None:
    folder = copied(shards, tmp_path / "latents")
    manifest = Manifest.load(folder)
    index = next(i for i, entry in enumerate(manifest.shards) if entry.kind == "video")
    damage(manifest, index, 1)
    assert len(read_one(Path(f"{tar_of(folder)}#0"), codec).pixels) == 5
    with pytest.raises(InputError, match=r"sample 1 of .*\.tar is damaged \(its checksum differs\)"):
        read_one(Path(f"{tar_of(folder)}#1"), codec)
    assert len(read_contexts([str(tar_of(folder))], SETTINGS, codec)) == 1


def test_latents_of_another_codec_are_refused(shards: Path, tmp_path: Path, codec: Codec) -> None:
    folder = copied(shards, tmp_path / "latents")
    manifest = Manifest.load(folder)
    dataclasses.replace(manifest, codec=dataclasses.replace(manifest.codec, fingerprint="0123456789abcdef")).save()
    message = r"^the latents of .*manifest\.json and the checkpoint's codec from the package are of different codecs"
    with pytest.raises(InputError, match=message + r" \(fingerprint '0123"):
        read_one(Path(f"{tar_of(folder)}#0"), codec)


def test_shard_without_manifest_is_refused(shards: Path, tmp_path: Path, codec: Codec) -> None:
    (tmp_path / tar_of(shards).name).write_bytes(tar_of(shards).read_bytes())
    with pytest.raises(InputError, match=r"no manifest\.json in the folder of .*\.tar or the two above lists this"):
        read_one(Path(f"{tar_of(tmp_path)}#0"), codec)


def test_shard_of_sequences_is_refused(write_shards: Callable[..., Manifest], tmp_path: Path, codec: Codec) -> None:
    write_shards(tmp_path, {("train", "sequence", (6, 4, 4)): 1}, codec=codec.spec())
    with pytest.raises(InputError, match=r"train-sequence.*\.tar contains sequences of image pairs"):
        read_one(tar_of(tmp_path, "sequence"), codec)


@pytest.mark.parametrize(
    ("sample", "changes", "message"),
    [
        ("#2", {}, r"has no sample '2': give 0 to 1, or train-video-5x4x4-00000-00000-000000 to -000001"),
        ("#-1", {}, "has no sample '-1'"),
        ("#train-video-000000", {}, "has no sample 'train-video-000000'"),
        ("#", {}, "has no sample ''"),
        ("#0", {"stride": 2}, r"sample 0 of .*\.tar has stride 3, but the context is read at stride 2"),
        ("#0", {"sizes": ((32, 48), (64, 64))}, "samples of 32x32 pixels, .* trained on 32x48, 64x64: give others"),
        ("", {"frames": 21}, "has 17 frames at stride 3, but the context needs 21: give a longer video or at most 17 "),
        ("#0", {"start": 1.0}, "has no frame at 1 s: give --start for videos only"),
    ],
)
def test_unusable_sample_is_refused(
    sample: str, changes: dict[str, Any], message: str, shards: Path, codec: Codec
) -> None:
    with pytest.raises(InputError, match=message):
        read_one(Path(f"{tar_of(shards)}{sample}"), codec, **changes)


@pytest.fixture(scope="module")
def unusable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files and folders that cannot be contexts."""
    folder = tmp_path_factory.mktemp("unusable")
    write_video(folder / "short.mp4", gray_steps(20), 24)
    (folder / "text.mp4").write_text("not a video")
    (folder / "text.png").write_text("not an image")
    draw(folder / "still", {"still.png": 1})
    draw(folder / "both", {"a.png": 1})
    write_video(folder / "both" / "b.mp4", gray_steps(2), 24)
    (folder / "empty").mkdir()
    (folder / "run" / "checkpoints").mkdir(parents=True)
    (folder / "run" / "config.yaml").touch()
    draw(folder / "few", {f"{number}.png": number for number in range(4)})
    return folder


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        ("absent.mp4", {}, r"absent\.mp4 does not exist"),
        ("absent.tar", {}, r"absent\.tar does not exist"),
        ("absent.tar#3", {}, r"absent\.tar does not exist"),
        (f"{'x' * 300}.mp4", {}, r"x\.mp4 does not exist"),
        (f"{'x' * 300}.tar#3", {}, r"x\.tar does not exist"),
        ("text.mp4", {}, r"text\.mp4 is not a readable video"),
        ("text.png", {}, r"text\.png is not a readable image"),
        (
            "run",
            {},
            "run contains no videos and no images, since it is a run folder: .* [(]`sample --checkpoint` takes",
        ),
        ("run/config.yaml", {}, r"config\.yaml is no video, since it is a recipe: give a video or an image "),
        ("empty", {}, "empty contains no videos and no images"),
        ("both", {}, r"both contains both videos \(b\.mp4\) and images \(a\.png\)"),
        ("short.mp4", {"frames": 9}, r"short\.mp4 has 7 frames at stride 3, but the context needs 9: give a longer "),
        (
            "short.mp4",
            {"start": 0.5},
            "has 3 frames at stride 3, .* needs 5: give a longer video, an earlier --start",
        ),
        ("short.mp4", {"start": 1.0}, r"--start 1 is after the end of .*short\.mp4"),
        ("few", {}, "few has 2 frames at stride 3, but the context needs 5"),
        ("few", {"start": 9.0}, "--start 9 is after the end of .*few"),
        ("still/still.png", {"start": 2.0}, r"still\.png has no frame at 2 s"),
        ("short.mp4", {"frames": 4}, "--context_frames is 4, which is not 1 .*: give 1 or 5"),
    ],
)
def test_unusable_source_is_refused(
    source: str, changes: dict[str, Any], message: str, unusable: Path, codec: Codec
) -> None:
    with pytest.raises(InputError, match=message):
        read_one(unusable / source, codec, **changes)


def test_invalid_settings_are_refused() -> None:
    for name, value in (("start", -1.0), ("start", float("nan")), ("fps", 0.0), ("fps", -8.0)):
        with pytest.raises(InputError, match=f"--{name} is {value}"):
            dataclasses.replace(SETTINGS, **{name: value})

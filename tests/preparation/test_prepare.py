"""Preparation of videos, images and tars."""

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from webdataset import TarWriter

from gpdit_lightning.codecs import load_codec
from gpdit_lightning.data.manifest import NOTES_NAME, SKIPPED_NAME, Manifest
from gpdit_lightning.data.shards import ShardReader
from gpdit_lightning.errors import InputError
from gpdit_lightning.media.images import resize_and_crop
from gpdit_lightning.media.video import DamagedVideoError, VideoFrame, iterate_frames, video_info
from gpdit_lightning.media.video_writer import write_video
from gpdit_lightning.preparation import PrepareOptions, clips, parts, prepare, summary
from tests.media.encoding import encode, moving_texture, rgb_frame
from tests.media.videos import read_video
from tests.preparation.earlier_version import remove_hashes


def make_video(path: Path, frames: int = 12, height: int = 32, width: int = 48) -> None:
    generator = torch.Generator().manual_seed(sum(map(ord, path.name)))
    image = torch.nn.functional.interpolate(
        torch.rand(1, 3, 5, 7, generator=generator), (height, width + frames), mode="bilinear"
    )[0]
    pixels = torch.stack([image[..., frame : frame + width] for frame in range(frames)])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, (pixels * 255).to(torch.uint8), fps=24)


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    for number in range(6):
        make_video(tmp_path / "videos" / ("ball" if number % 2 else "dog") / f"v_{number // 2}_c{number}.mp4")
    return tmp_path / "videos"


@pytest.fixture
def options(tmp_path: Path, videos: Path) -> PrepareOptions:
    return PrepareOptions(
        out=tmp_path / "out",
        videos=[videos],
        codec="pca",
        stride=1,
        clip_frames=5,
        video_sizes=["16x24", "24x16"],
        image_sizes=["16x16", "24x16"],
        device="cpu",
        workers=0,
    )


def prepared(options: PrepareOptions) -> Manifest:
    manifest = prepare(options)
    assert manifest is not None
    return manifest


def samples(manifest: Manifest) -> list[tuple[str, np.ndarray, dict]]:
    return [
        (entry.split, *ShardReader(manifest.directory, entry).read(number))
        for entry in manifest.shards
        for number in range(entry.count)
    ]


def skipped(manifest: Manifest) -> list[dict[str, str]]:
    entries = read_json_lines(manifest.directory / SKIPPED_NAME)
    assert manifest.skipped == len(entries)
    return entries


def notes(manifest: Manifest) -> list[dict[str, str]]:
    return read_json_lines(manifest.directory / NOTES_NAME)


def read_json_lines(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_videos_become_consecutive_clips(options: PrepareOptions, videos: Path) -> None:
    manifest = prepared(options)
    assert manifest == Manifest.load(options.out)
    codec = load_codec("pca")
    assert manifest.codec == codec.spec()
    stored = samples(manifest)
    assert len(stored) == 12  # two clips of 5 frames from each of six videos
    for _, latents, metadata in stored:
        assert metadata["fps"] == 24
        assert metadata["pixel_size"] == [16, 24]
        assert metadata["first_frame"] in (0, 5)
        pixels = read_video(videos / metadata["source"], start=metadata["first_frame"], max_frames=5)
        expected = codec.encode(resize_and_crop(pixels, (16, 24))[None])[0]
        assert np.abs(latents - expected.numpy()).max() < 0.02  # half precision


def test_stride_and_clips_per_video(options: PrepareOptions, videos: Path) -> None:
    stored = samples(prepared(replace(options, stride=2, clips_per_video=1)))
    assert len(stored) == 6
    assert {(metadata["stride"], metadata["first_frame"]) for _, _, metadata in stored} == {(2, 0)}
    again = samples(prepared(replace(options, stride=1, clips_per_video=1, out=options.out.with_name("out2"))))
    assert len(again) == 6
    source = stored[0][2]["source"]
    pixels = resize_and_crop(read_video(videos / source, stride=2, max_frames=5), (16, 24))
    assert np.abs(stored[0][1] - load_codec("pca").encode(pixels[None])[0].numpy()).max() < 0.02


def test_remaining_frames_are_a_shorter_clip(options: PrepareOptions, videos: Path) -> None:
    """12 frames in clips of 9 leave three frames, of which 1 = 1 + 4k can be kept if clips may be that short."""
    kept = samples(prepared(replace(options, clip_frames=9, least_clip_frames=1)))
    assert (
        sorted((latents.shape[0], metadata["first_frame"]) for _, latents, metadata in kept)
        == [(1, 9)] * 6 + [(3, 0)] * 6
    )
    dropped = samples(prepared(replace(options, clip_frames=9, least_clip_frames=5, out=options.out.with_name("out2"))))
    assert [latents.shape[0] for _, latents, _ in dropped] == [3] * 6
    short = samples(prepared(replace(options, clip_frames=45, least_clip_frames=5, out=options.out.with_name("out3"))))
    assert [(latents.shape[0], metadata["first_frame"]) for _, latents, metadata in short] == [(3, 0)] * 6
    _, latents, metadata = short[0]
    pixels = resize_and_crop(read_video(videos / metadata["source"], max_frames=9), (16, 24))
    assert np.abs(latents - load_codec("pca").encode(pixels[None])[0].numpy()).max() < 0.02
    with pytest.raises(InputError, match="least_clip_frames is 9 and --clip_frames 5"):
        prepare(replace(options, least_clip_frames=9, out=options.out.with_name("out4")))


def test_all_clips_of_a_file_are_in_the_same_split(options: PrepareOptions) -> None:
    manifest = prepared(replace(options, validation_fraction=0.4))
    splits = {split: {m["source"] for s, _, m in samples(manifest) if s == split} for split in ("train", "validation")}
    assert splits["train"]
    assert splits["validation"]
    assert not splits["train"] & splits["validation"]
    assert manifest.validation["held_out_by"] == "source"
    assert manifest.validation["train_sources"] == len(splits["train"])
    assert manifest.validation["validation_sources"] == len(splits["validation"])


def test_a_new_file_does_not_change_the_splits_of_others(options: PrepareOptions, videos: Path) -> None:
    half = replace(options, validation_fraction=0.5)
    before = {metadata["source"]: split for split, _, metadata in samples(prepared(half))}
    make_video(videos / "dog" / "new.mp4")
    after = {
        metadata["source"]: split
        for split, _, metadata in samples(prepared(replace(half, out=options.out.with_name("out2"))))
    }
    assert {source: after[source] for source in before} == before
    assert len(after) == len(before) + 1


def test_files_of_a_recording_are_in_the_same_split(options: PrepareOptions) -> None:
    manifest = prepared(replace(options, source_pattern=r"v_\d+", validation_fraction=0.3))
    recordings = {
        split: {metadata["source"].split("/")[1][:3] for s, _, metadata in samples(manifest) if s == split}
        for split in ("train", "validation")
    }
    assert recordings["validation"]
    assert not recordings["train"] & recordings["validation"]


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.99])
def test_each_split_gets_a_file_unless_the_fraction_is_0(options: PrepareOptions, fraction: float) -> None:
    validation = prepared(replace(options, validation_fraction=fraction)).validation
    expected = {0.0: 0, 0.01: 1, 0.99: 5}[fraction]
    assert (validation["train_sources"], validation["validation_sources"]) == (6 - expected, expected)


def test_a_held_out_folder_replaces_the_fraction(options: PrepareOptions, videos: Path) -> None:
    manifest = prepare(
        replace(options, videos=[videos / "dog"], validation_videos=[videos / "ball"], validation_fraction=0.9)
    )
    assert (manifest.validation["train_sources"], manifest.validation["validation_sources"]) == (3, 3)
    assert {m["source"].split("/")[0] for split, _, m in samples(manifest) if split == "validation"} == {"ball"}
    both = prepared(replace(options, validation_videos=[videos / "ball"], out=options.out.with_name("out2")))
    assert {(split, m["source"].split("/")[0]) for split, _, m in samples(both)} == {
        ("train", "dog"),
        ("validation", "ball"),
    }


def test_images_are_scaled_to_the_closest_size(options: PrepareOptions, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name, size in (("wide", (30, 20)), ("square", (20, 20)), ("tall", (20, 30))):
        Image.new("RGB", size, (200, 100, 50)).save(tmp_path / "images" / f"{name}.png")
    manifest = prepared(replace(options, images=[tmp_path / "images"], validation_fraction=0))
    shapes = {m["source"]: latents.shape for _, latents, m in samples(manifest) if m["kind"] == "image"}
    assert shapes == {"wide.png": (1, 16, 2, 2), "square.png": (1, 16, 2, 2), "tall.png": (1, 16, 3, 2)}
    assert {shard.kind for shard in manifest.shards} == {"image", "video"}
    image = next(latents for _, latents, m in samples(manifest) if m["source"] == "square.png")
    color = load_codec("pca").decode(torch.tensor(image)[None])[0, 0].float().mean(dim=(1, 2))
    torch.testing.assert_close(color, torch.tensor([200.0, 100.0, 50.0]), atol=8, rtol=0)


def test_labels_are_folder_names(options: PrepareOptions) -> None:
    manifest = prepared(replace(options, labels=True))
    assert manifest.labels == ("ball", "dog")
    assert all(metadata["label"] == metadata["source"].split("/")[0] for _, _, metadata in samples(manifest))


def test_broken_and_short_files_are_skipped_and_listed(options: PrepareOptions, videos: Path) -> None:
    (videos / "broken.mp4").write_bytes(b"not a video at all")
    make_video(videos / "short.mp4", frames=4)
    manifest = prepared(options)
    reasons = {entry["source"]: entry["reason"] for entry in skipped(manifest)}
    assert set(reasons) == {"broken.mp4", "short.mp4"}
    assert "not a readable video" in reasons["broken.mp4"]
    assert "has 4 frames at stride 1 but a clip needs 5" in reasons["short.mp4"]
    assert sum(shard.count for shard in manifest.shards) == 12
    assert "skipped: 2" in summary(manifest)
    assert "broken.mp4" in summary(manifest)


def test_clips_before_damage_in_a_video_are_used(options: PrepareOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaking(path: Path, stride: int, fps: None) -> Iterator[VideoFrame]:
        yield from iterate_frames(path, 0, stride, 7)
        raise DamagedVideoError(path, 7, "broken")

    monkeypatch.setattr(clips, "iterate_frames", breaking)
    manifest = prepared(options)
    assert {metadata["first_frame"] for _, _, metadata in samples(manifest)} == {0}
    assert skipped(manifest) == []
    assert len(notes(manifest)) == 6
    reason = "is damaged at frame 7 (broken): replace or remove it. The clips before were used (1)."
    assert notes(manifest)[0]["reason"].endswith(reason)
    assert "notes: 6 (full list:" in summary(manifest)


@pytest.mark.parametrize("avoid_cuts", [False, True])
def test_damaged_videos_are_cut_or_dropped(options: PrepareOptions, tmp_path: Path, avoid_cuts: bool) -> None:
    if avoid_cuts:
        pytest.importorskip("scenedetect")
    path = tmp_path / "damaged" / "a.avi"
    path.parent.mkdir()
    encode(path, [rgb_frame(pixels) for pixels in moving_texture(40)], "mpeg4", {"b": "600000", "g": "10", "bf": "0"})
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][26]
        position, size = packet.pos + 8, packet.size  # after the header of the chunk
    content = bytearray(path.read_bytes())
    content[position + size // 2 : position + size // 2 + 40] = b"\xaa" * 40
    path.write_bytes(content)

    options = replace(options, videos=[path.parent], clip_frames=17, least_clip_frames=5, avoid_cuts=avoid_cuts)
    cut = prepared(options)
    assert sorted((m["first_frame"], len(latents)) for _, latents, m in samples(cut)) == [(0, 5), (17, 3)]
    reason = notes(cut)[0]["reason"]
    assert "a.avi is damaged at frame 26 (" in reason
    assert reason.endswith("The clips before were used (2).")
    assert skipped(cut) == []
    with pytest.raises(InputError, match=r"other options \(--damaged_videos was cut and is drop\)"):
        prepare(replace(options, damaged_videos="drop"))

    make_video(path.with_name("intact.mp4"), frames=17)
    dropped = prepared(replace(options, damaged_videos="drop", out=tmp_path / "dropped"))
    assert {metadata["source"] for _, _, metadata in samples(dropped)} == {"intact.mp4"}
    assert "a.avi is damaged at frame 26 (" in skipped(dropped)[0]["reason"]


def test_options_that_were_not_recorded_had_their_defaults(options: PrepareOptions) -> None:
    first = prepared(options)
    path = options.out / "preparation" / "options.json"
    remove_hashes(path.parent)
    content = json.loads(path.read_text())
    del content["options"]["damaged_videos"]
    path.write_text(json.dumps(content))
    assert prepared(options) == first
    with pytest.raises(InputError, match=r"other options \(--damaged_videos was cut and is drop\)"):
        prepare(replace(options, damaged_videos="drop"))


def test_an_unexpected_exception_skips_one_file_only(options: PrepareOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(path: Path) -> Any:
        return 1 / 0 if path.name == "v_1_c3.mp4" else video_info(path)

    monkeypatch.setattr(clips, "video_info", raising)
    manifest = prepared(options)
    assert [entry["source"] for entry in skipped(manifest)] == ["ball/v_1_c3.mp4"]
    assert "(ZeroDivisionError: division by zero): replace or remove it." in skipped(manifest)[0]["reason"]
    assert sum(shard.count for shard in manifest.shards) == 10


def test_output_is_deterministic(options: PrepareOptions) -> None:
    first = prepared(options)
    second = prepared(replace(options, out=options.out.with_name("out2")))
    assert [shard.sha256 for shard in first.shards] == [shard.sha256 for shard in second.shards]
    assert first.fingerprint() == second.fingerprint()


def test_a_finished_folder_is_reused_and_never_overwritten(
    options: PrepareOptions, videos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepared(options)
    monkeypatch.setattr(parts, "load_codec", None)
    assert prepared(replace(options, batch_size=1)) == first
    assert "already covers all of these input files" in capsys.readouterr().out
    with pytest.raises(
        InputError, match=r"contains shards of other options \(--stride was 1 and is 2\): give another --out"
    ):
        prepare(replace(options, stride=2))
    (videos / "dog" / "v_0_c0.mp4").write_bytes(b"another file")
    with pytest.raises(InputError, match=r"v_0_c0\.mp4 has 12 bytes but had \d+ when it was encoded"):
        prepare(options)
    (videos / "dog" / "v_0_c0.mp4").unlink()
    assert prepared(options) == first  # encoded files may be removed
    with pytest.raises(InputError, match=r"v_0_c1\.mp4 is already in .*, as ball/v_0_c1\.mp4: specify the same folder"):
        prepare(replace(options, videos=[videos / "ball"]))


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("changed", ["label", "caption"])
def test_another_annotation_of_an_encoded_file_is_refused(
    changed: str, finished: bool, options: PrepareOptions, tmp_path: Path
) -> None:
    table = tmp_path / "table.jsonl"
    row = {"source": "dog/v_0_c0.mp4", "label": "dog", "caption": "a dog"}
    table.write_text(json.dumps(row))
    annotated = replace(options, annotations=[table])
    first = prepared(annotated)
    if not finished:
        (options.out / "manifest.json").unlink()
        (options.out / "preparation" / "part-00000.json").unlink()
    for content in (json.dumps(row | {changed: "other"}), json.dumps({"source": "new.mp4", "label": "dog"})):
        table.write_text(content)
        with pytest.raises(InputError, match=r"v_0_c0\.mp4 has another label or other captions than when it was enc"):
            prepare(annotated)
    table.write_text(f"{json.dumps({'source': 'new.mp4', 'label': 'new'})}\n{json.dumps(row)}")
    assert prepared(annotated).shards == first.shards


def test_shards_without_records_are_refused(options: PrepareOptions) -> None:
    options.out.mkdir()
    (options.out / "train-video-2x2x3-00000-00000.tar").write_text("unknown content")
    with pytest.raises(InputError, match=r"00000-00000\.tar was not written by this command"):
        prepare(options)


def test_the_output_folder_contains_listed_files_and_records(options: PrepareOptions) -> None:
    options.out.mkdir()
    (options.out / "notes.txt").write_text("mine")
    manifest = prepared(options)
    listed = {name for shard in manifest.shards for name in (shard.path, shard.index)}
    others = {"manifest.json", "skipped.jsonl", "notes.jsonl", "preparation", "notes.txt"}
    assert {path.name for path in options.out.iterdir()} == listed | others
    records = {path.name for path in (options.out / "preparation").iterdir()}
    assert records == {
        *("options.json", "part-00000.sources.jsonl", "part-00000.shards.json", "part-00000.json", "lock")
    }


def test_latents_that_overflow_float16_are_skipped(options: PrepareOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = load_codec("pca")
    encode = codec.encode
    monkeypatch.setattr(codec, "encode", lambda pixels: encode(pixels) * 1e6)
    monkeypatch.setattr(parts, "load_codec", lambda *_: codec)
    with pytest.raises(InputError, match=r"none of the 6 input files could .*first reason: .*not finite in float16"):
        prepare(options)
    assert not (options.out / "manifest.json").exists()
    monkeypatch.undo()
    assert sum(shard.count for shard in prepared(options).shards) == 12


def test_paths_in_a_list_are_relative_to_its_folder(options: PrepareOptions, videos: Path) -> None:
    (videos / "list.txt").write_text("dog/v_0_c0.mp4\n\nball/v_0_c1.mp4\n")
    manifest = prepared(replace(options, videos=[videos / "list.txt"], labels=True))
    assert {metadata["source"] for _, _, metadata in samples(manifest)} == {"dog/v_0_c0.mp4", "ball/v_0_c1.mp4"}
    assert manifest.labels == ("ball", "dog")
    (videos / "list.txt").write_text("gone.mp4\n")
    with pytest.raises(InputError, match=r"list\.txt contains .*gone\.mp4 in line 1, which does not exist"):
        prepare(replace(options, videos=[videos / "list.txt"], out=options.out.with_name("out2")))


def test_invalid_options_are_refused(options: PrepareOptions, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for change, message in (
        ({"videos": []}, "there are no input files"),
        ({"videos": [tmp_path / "empty"]}, "empty has no video files"),
        ({"videos": [tmp_path / "gone"]}, "gone does not exist"),
        ({"clip_frames": 6}, r"--clip_frames is 6, which is not 1 \+ 4 k: give 5 or 9"),
        ({"stride": 0}, "stride is 0"),
        ({"clips_per_video": 0}, "clips_per_video is 0"),
        ({"video_sizes": ["12x16"]}, "12x16 pixels are not multiples of 8"),
        ({"video_sizes": ["big"]}, "HEIGHTxWIDTH"),
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0"),
        ({"source_pattern": "("}, "not a regular expression"),
        ({"codec": "dct"}, "codec 'dct' is not known"),
        ({"device": "abacus"}, "device 'abacus'"),
    ):
        with pytest.raises(InputError, match=message):
            prepare(replace(options, **change))
    assert not options.out.exists()


def make_tar(path: Path, keys: range, damaged: int | None = None) -> None:
    """Write a tar as img2dataset does: images, captions and JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with TarWriter(str(path)) as tar:
        for key in keys:
            image = io.BytesIO()
            size = ((30, 20), (20, 20), (20, 30))[key % 3]
            Image.new("RGB", size, (key * 10 % 255, 100, 50)).save(image, format="JPEG")
            fields = {
                "caption": f"image {key}",
                "url": f"http://images/{key}",
                "width": size[0],
                "status": "success",
            }
            content = b"not an image" if key == damaged else image.getvalue()
            tar.write({"__key__": f"{key:09d}", "jpg": content, "txt": f"image {key}", "json": fields})


def test_tars_of_img2dataset(options: PrepareOptions, tmp_path: Path) -> None:
    laion = tmp_path / "laion"
    for number in range(3):
        make_tar(laion / f"{number:05d}.tar", range(number * 10, number * 10 + 10), damaged=17)
    tars = replace(options, videos=[], image_tars=[f"{laion}/{{00000..00001}}.tar"], validation_fraction=0.3)
    manifest = prepared(tars)
    stored = {metadata["source"]: (split, latents.shape, metadata) for split, latents, metadata in samples(manifest)}
    assert len(stored) == 19
    _, shape, metadata = stored["00001.tar/000000012"]
    assert shape == (1, 16, 2, 2)
    assert metadata["caption"] == "image 12"
    assert metadata["url"] == "http://images/12"
    assert [entry["source"] for entry in skipped(manifest)] == ["00001.tar/000000017"]
    assert {shape for _, shape, _ in stored.values()} == {(1, 16, 2, 2), (1, 16, 3, 2)}
    validation = {source for source, (split, _, _) in stored.items() if split == "validation"}
    assert 2 <= len(validation) <= 10, "images are held out one by one"
    assert manifest.validation["validation_sources"] == len(validation)

    more = prepared(replace(tars, image_tars=[f"{laion}/{{00000..00002}}.tar"]))
    assert set(manifest.shards) < set(more.shards)
    assert sum(shard.count for shard in more.shards) == 29
    whole_folder = prepared(replace(tars, image_tars=[str(laion)], out=options.out.with_name("out2"), workers=2))
    assert {(s, m["source"], m["caption"]) for s, _, m in samples(whole_folder)} == {
        (s, m["source"], m["caption"]) for s, _, m in samples(more)
    }
    with pytest.raises(InputError, match=r"00003\.tar does not exist"):
        prepare(replace(tars, image_tars=[f"{laion}/{{00000..00003}}.tar"]))


def test_ucf101_lists_determine_splits_and_class_numbers(options: PrepareOptions, tmp_path: Path) -> None:
    (tmp_path / "trainlist01.txt").write_text("dog/v_0_c0.mp4 2\nball/v_0_c1.mp4 1\nball/v_1_c3.mp4 1\n")
    (tmp_path / "testlist01.txt").write_text("dog/v_1_c2.mp4\n")
    (tmp_path / "classInd.txt").write_text("1 ball\n2 dog\n3 zebra\n")
    lists = [tmp_path / name for name in ("trainlist01.txt", "testlist01.txt", "classInd.txt")]
    manifest = prepared(replace(options, annotations=lists))
    stored = {metadata["source"]: (split, metadata["label"]) for split, _, metadata in samples(manifest)}
    assert stored == {
        "dog/v_0_c0.mp4": ("train", "dog"),
        "ball/v_0_c1.mp4": ("train", "ball"),
        "ball/v_1_c3.mp4": ("train", "ball"),
        "dog/v_1_c2.mp4": ("validation", "dog"),
    }
    assert manifest.labels == ("ball", "dog", "zebra")
    excluded = {entry["source"]: entry["reason"] for entry in skipped(manifest)}
    assert excluded == dict.fromkeys(
        ("ball/v_2_c5.mp4", "dog/v_2_c4.mp4"), "the annotation files list other files for training, and not this one"
    )
    held_out_only = prepared(replace(options, annotations=lists[1:2], out=options.out.with_name("out2")))
    assert held_out_only.validation["train_sources"] == 5


def test_msr_vtt_captions_are_stored(options: PrepareOptions, tmp_path: Path, videos: Path) -> None:
    content = {
        "videos": [
            {"video_id": path.stem, "split": "test" if path.parent.name == "dog" else "train", "category": 1}
            for path in videos.rglob("*.mp4")
        ],
        "sentences": [
            {"video_id": "v_0_c0", "caption": "a dog", "sen_id": 1},
            {"video_id": "v_0_c0", "caption": "it runs", "sen_id": 0},
            {"video_id": "v_0_c1", "caption": "a ball", "sen_id": 2},
        ],
    }
    (tmp_path / "videodatainfo.json").write_text(json.dumps(content))
    manifest = prepared(replace(options, annotations=[tmp_path / "videodatainfo.json"]))
    stored = {metadata["source"]: (split, metadata) for split, _, metadata in samples(manifest)}
    assert {source.split("/")[0] for source, (split, _) in stored.items() if split == "validation"} == {"dog"}
    assert stored["dog/v_0_c0.mp4"][1]["caption"] == "it runs"
    assert stored["dog/v_0_c0.mp4"][1]["captions"] == ["it runs", "a dog"]
    assert stored["ball/v_0_c1.mp4"][1]["caption"] == "a ball"
    assert "caption" not in stored["ball/v_1_c3.mp4"][1]

"""Where a source went, and why: its split, its size, its frames, its samples, or what kept it out."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from gpdit_lightning.data.manifest import SKIPPED_NAME, Kind, Manifest, Split
from gpdit_lightning.data.shards import Shape, ShardReader
from gpdit_lightning.errors import InputError
from gpdit_lightning.media.images import Size, closest_size, parse_size, read_image
from gpdit_lightning.media.video import iterate_frames, video_info
from gpdit_lightning.preparation.clips import DECODER_THREADS, Clip, Lanes, Skipped
from gpdit_lightning.preparation.input_files import ENDINGS, InputFile, held_out, reason_of_hash, recording_of
from gpdit_lightning.preparation.inspection.lookup import Match, look_up, place_of
from gpdit_lightning.preparation.options import PrepareOptions
from gpdit_lightning.preparation.prepare import PLACES
from gpdit_lightning.preparation.records import FOLDER_NAME, RecordedSource, Records
from gpdit_lightning.preparation.tars import iterate_images


class Sample(NamedTuple):
    """A sample that a source gave, or would give."""

    title: str
    """Its key and its shard; empty for one that is not there."""
    first_frame: int | None
    split: Split
    pixel_size: Sequence[int]
    shape: Shape
    """Of its latents."""


def why(manifest: Manifest, file: str) -> str:
    """What is known of one source, in plain lines.

    Args:
        manifest: of the folder.
        file: path of the source; or its name, as metadata and records have it, or the end of that; for a picture in a
            tar TAR/KEY.

    Returns:
        Where it is recorded; its split, size and frames, with the reasons; every sample that it gave; what was left
        out. For a file that is not in the data set: what would become of it with the same options.

    Raises:
        InputError: the folder has no records of its sources, or `file` may mean several of them.
    """
    return "\n".join(Inquiry(manifest).answer(file))


class Inquiry:
    """What can be asked about the sources of one folder.

    Args:
        manifest: of the folder.

    Raises:
        InputError: the folder has no records of its sources.
    """

    def __init__(self, manifest: Manifest) -> None:
        assert isinstance(manifest.directory, Path)
        self.codec, self.folder = manifest.codec, manifest.directory
        self.records = Records(self.folder)
        if not self.records.parts:
            raise InputError(
                f"{self.folder} has no folder {FOLDER_NAME!r} that says where sources went (build_few_shot.py makes "
                "none): copy it from where the data were prepared, or ask without --why."
            )
        noted = manifest.preparation
        names = ({field.name for field in fields(PrepareOptions)} - {*PLACES}) & noted.keys()
        self.options = PrepareOptions(out=self.folder, **{name: noted[name] for name in names})
        # The last part of each alone; what lay above is not noted.
        self.places: dict[str, list[str]] = {name: noted.get(name, []) for name in PLACES}

    def answer(self, file: str) -> Iterator[str]:
        """The lines on what `file` means; raises `InputError` where that may be several sources."""
        skipped = self._skipped()
        match = look_up(file, self.records, [entry["source"] for entry in skipped])
        if match is None:
            yield from self._about_other(Path(file))
        elif match.source is None:
            yield f"{match.name} is in no part"
            yield from (f"left out: {entry['reason']}" for entry in skipped if entry["source"] == match.name)
        else:
            yield from self._about_recorded(match, match.source)

    def _skipped(self) -> list[dict[str, str]]:
        path = self.folder / SKIPPED_NAME
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []

    def _about_recorded(self, match: Match, source: RecordedSource) -> Iterator[str]:
        key = match.reading.key
        what = source.kind if source.split else "picture in a tar" if key else "tar"
        yield f"{match.name}: {what} of {source.bytes} bytes, in part {match.part}"
        if match.reading.size not in (None, source.bytes):
            yield f"the file has {match.reading.size} bytes now, so it is not the one that was encoded"
        if not self.records.finished(match.part):
            yield "its part is not finished: run shard_latents.py again to go on with it"
            return
        result = self.records.results()[match.part]

        def is_meant(name: str) -> bool:
            return name == match.name or (source.split is None and not key and name.startswith(f"{match.name}/"))

        samples: list[Sample] = []
        unknown: list[str] = []
        for entry in result.shards:
            if source.split in (None, entry.split):
                reader = ShardReader(self.folder, entry)
                for number in range(len(reader)):
                    try:
                        _, metadata = reader.read(number, frames=1)  # the metadata, and no more latents than must be
                    except InputError as error:
                        unknown.append(f"not known whether one more: {error}")
                    else:
                        if is_meant(metadata["source"]):
                            title = f"{metadata['key']} of {entry.path}: "
                            samples.append(_sample(title, metadata, entry.split, entry.shape))
        yield from self._described(
            match.name, source.kind, source.split, source.reason, key, self._file_of(match, source), samples
        )
        yield from dict.fromkeys(unknown)  # an index says the same of all its samples
        yield from (f"left out: {entry['reason']}" for entry in result.skipped if is_meant(entry["source"]))

    def _about_other(self, path: Path) -> Iterator[str]:
        if not path.is_file():
            yield f"{path} is not in the data set, and no such file is here to try (name a picture in a tar TAR/KEY)"
            return
        source = self._as_source(path)
        if source is None:
            yield f"{path} is not in the data set: files with the ending {path.suffix!r} are not prepared"
            return
        yield f"{path} is not in the data set; with the same options, it would be there as {source.name}"
        samples: list[Sample] = []
        reasons: list[str] = []
        for item in Lanes([source], self.options, self.codec.temporal_factor):
            if isinstance(item, Clip):
                samples.append(_sample("", item.metadata, item.split, self._latent_shape(item)))
            elif isinstance(item, Skipped):
                reasons.append(f"left out: {item.reason}")
        yield from self._described(source.name, source.kind, source.split, source.reason, "", path, samples)
        yield from reasons

    def _described(
        self,
        name: str,
        kind: Kind,
        split: Split | None,
        reason: str,
        key: str,
        path: Path | None,
        samples: Sequence[Sample],
    ) -> Iterator[str]:
        """The lines that recorded sources and others share.

        Args:
            name: of the source; of a picture in a tar TAR/KEY.
            kind: "video" or "image".
            split: None for a tar and what is in it.
            reason: why it has that split.
            key: of the picture in the tar.
            path: of the source; None if it is not known where it lies.
            samples: what it gave, or would give.
        """
        fraction = self.options.validation_fraction
        if split is None and not key:
            counts = Counter((sample.split, "x".join(map(str, sample.pixel_size))) for sample in samples)
            yield f"split: each picture is held out if the hash of its name is below the fraction {fraction:g}"
            yield f"samples: {len(samples)}"
            yield from (f"  {count} of {size} pixels for {of}" for (of, size), count in sorted(counts.items()))
            return
        fraction = self.options.validation_fraction
        if split is None:
            split, reason = "validation" if held_out(name, fraction) else "train", reason_of_hash(name, fraction)
        yield f"split: {split}: {reason}"
        if path is not None:
            with suppress(InputError):  # of what cannot be read the report says why
                yield f"size: {self._why_size(path, kind, key)}"
                if kind == "video":
                    yield f"frames: {self._why_frames(path, samples)}"
        elif samples:
            height, width = samples[0].pixel_size
            yield f"size: {height}x{width} pixels were chosen; to see why, give the path of the file"
        yield f"samples: {len(samples)}"
        for sample in samples:
            shape = "x".join(map(str, sample.shape))
            cut = f", {self._frames(sample)} frames from {sample.first_frame} on" if kind == "video" else ""
            yield f"  {sample.title}latents {shape}{cut}"

    def _why_size(self, path: Path, kind: Kind, key: str) -> str:
        height, width = _pixel_size(path, kind, key)
        texts = self.options.video_sizes if kind == "video" else self.options.image_sizes
        candidates = [parse_size(text) for text in texts]
        chosen = closest_size(height, width, candidates)

        def distance(size: Size) -> float:
            return abs(math.log(height / width) - math.log(size[0] / size[1]))

        named = [
            f"{size[0]}x{size[1]} {distance(size):.3f}{' (chosen)' if size == chosen else ''}"
            for size in sorted(candidates, key=distance)
        ]
        return f"{height}x{width} pixels; distances in log aspect ratio: {', '.join(named)}"

    def _why_frames(self, path: Path, samples: Sequence[Sample]) -> str:
        options, count = self.options, 0
        with suppress(InputError):  # broken midway
            for _ in iterate_frames(path, threads=DECODER_THREADS):
                count += 1
        used = {
            sample.first_frame + frame * options.stride
            for sample in samples
            if sample.first_frame is not None
            for frame in range(self._frames(sample))
        }
        if options.avoid_cuts:  # each shot has a stride of its own, and a rest
            return f"{count}, {len(used)} of them in clips, which have stride {options.stride} and end at cuts"
        at_stride = math.ceil(count / options.stride)
        told = f"{count}, {at_stride} of them at stride {options.stride}: {len(used)} in clips"
        if not (left := at_stride - len(used)):
            return told
        if len(samples) == options.clips_per_video:
            return f"{told}, {left} left over, since clips_per_video is {options.clips_per_video}"
        lengths = f"{options.clip_frames} frames"
        if options.shortest_clip < options.clip_frames:
            lengths = f"{options.shortest_clip} to {lengths}, 1 + {self.codec.temporal_factor} k"
        if options.step != options.clip_frames:
            lengths += f", and the next begins {options.step} after its first"
        return f"{told}, {left} left over, since a clip has {lengths}"

    def _frames(self, sample: Sample) -> int:
        return self.codec.pixel_frames(sample.shape[0])

    def _latent_shape(self, clip: Clip) -> Shape:
        return self.codec.latent_shape(clip.pixels.shape)

    def _file_of(self, match: Match, source: RecordedSource) -> Path | None:
        """The file of a source, if it was given or lies where it lay; None if that is not to be found."""
        if match.reading.size == source.bytes:
            return match.reading.path
        for root in (Path.cwd(), *self.folder.absolute().parents):
            for place in (name for names in self.places.values() for name in names):
                for path in (root / place / source.name, root / source.name):
                    # The place proves that it is no other file of that name.
                    if place_of(path) == source.place and path.is_file() and path.stat().st_size == source.bytes:
                        return path
        return None

    def _as_source(self, path: Path) -> InputFile | None:
        """A file as preparation would take it, if it were at one of the places; None where it takes no such file."""
        size, ending = path.stat().st_size, path.suffix.lower()
        if ending == ".tar":
            return InputFile(path, _name_at(path, self.places["image_tars"]) or path.name, "image", None, size)
        kind = next((kind for kind, endings in ENDINGS.items() if ending in endings), None)
        if kind is None:
            return None
        held_out_name = _name_at(path, self.places[f"validation_{kind}s"], with_place=True)
        name = held_out_name or _name_at(path, self.places[f"{kind}s"]) or path.name
        recording = recording_of(name, self.options.source_pattern)
        if held_out_name:
            return InputFile(path, name, kind, "validation", size, "it lies in a held-out place")
        if split := self._split_of_recording(recording):
            return InputFile(path, name, kind, split, size, "files of the same recording were prepared before")
        if self.places[f"validation_{kind}s"]:
            return InputFile(path, name, kind, "train", size, "it lies in no held-out place")
        fraction = self.options.validation_fraction
        split = "validation" if held_out(recording, fraction) else "train"
        return InputFile(path, name, kind, split, size, reason_of_hash(recording, fraction))

    def _split_of_recording(self, recording: str) -> Split | None:
        """The split of the other files of a recording; None if there are none."""
        for part in self.records.parts:
            for source in self.records.of_part(part):
                if source.split and recording_of(source.name, self.options.source_pattern) == recording:
                    return source.split
        return None


def _sample(title: str, metadata: dict[str, Any], split: Split, shape: Shape) -> Sample:
    return Sample(title, metadata.get("first_frame"), split, metadata["pixel_size"], shape)


def _pixel_size(path: Path, kind: Kind, key: str) -> Size:
    """Height and width of a source, or of the picture with this key in it."""
    if kind == "video":
        info = video_info(path, DECODER_THREADS)
        return info.height, info.width
    if key:
        pixels = next((sample.pixels for sample in iterate_images(path) if sample.key == key), None)
    else:
        pixels = read_image(path)
    if pixels is None:
        raise InputError(f"{path} has no picture {key!r} that can be read")
    return pixels.shape[2], pixels.shape[3]


def _name_at(path: Path, places: Iterable[str], with_place: bool = False) -> str | None:
    """What a file is called if it lies below one of these places, or is one."""
    parts = path.absolute().parts
    for place in places:
        if place in parts[:-1]:
            return "/".join(parts[parts.index(place) + (0 if with_place else 1) :])
    return None

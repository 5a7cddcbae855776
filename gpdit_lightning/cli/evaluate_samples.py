"""`evaluate` of samples from noise alone: FID, IS, precision, recall and FVD against real images or videos."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from gpdit_lightning.cli.evaluation_output import (
    VIDEOS,
    are_finished,
    settings_of_chunks,
    video_writer,
    write_and_print_report,
)
from gpdit_lightning.cli.evaluation_settings import (
    Evaluation,
    make_protocol,
    name_of_data,
    network_records,
    resize_of,
    uses_labels,
)
from gpdit_lightning.devices import rank_of_process
from gpdit_lightning.errors import InputError
from gpdit_lightning.evaluation.chunk_files import (
    ChunkFiles,
    claim_folder,
    complete_chunks,
    source_identities,
    write_chunk,
)
from gpdit_lightning.evaluation.chunks import (
    measure_real,
    read_clips,
    seed_variant,
    split_into_chunks,
)
from gpdit_lightning.evaluation.metrics import Moments
from gpdit_lightning.evaluation.reference import (
    FILE,
    MAX_MANIFOLD,
    AdmFile,
    Reference,
    ReferenceRecord,
    check_reference,
)
from gpdit_lightning.evaluation.report import Protocol, Report
from gpdit_lightning.evaluation.report_text import TABLES
from gpdit_lightning.evaluation.sample_scores import make_reference, make_sample_report
from gpdit_lightning.evaluation.samples import (
    class_drawer,
    evaluate_samples_of_chunk,
    label_sentence,
    split_samples,
)
from gpdit_lightning.evaluation.videos import select_videos
from gpdit_lightning.files import check_writable
from gpdit_lightning.names import as_text
from gpdit_lightning.progress import progress_bar
from gpdit_lightning.regular_files import sha256_of

log = logging.getLogger(__name__)

REAL, SAMPLES = "reference", "chunks"  # folders of the files of chunks
NUM_SAMPLES = 50_000  # images by default (FID-50K)


class RealData(NamedTuple):
    """Real images or videos, of which statistics are computed unless they are given.

    Attributes:
        record: what the statistics are computed from.
        chunks: numbers of the first image or video of each chunk that has to be computed, with the function that reads
            its clips by their names, each uint8 (T, 3, H, W).
        paths: of the images or videos of each chunk; empty if they are not in files of their own.
        given: statistics of a file, or None.
        moments: given ones of image features, or None.
    """

    record: ReferenceRecord
    chunks: Mapping[int, Callable[[], Mapping[str, Tensor]]]
    paths: Mapping[int, Sequence[Path]]
    given: Reference | None = None
    moments: Moments | None = None

    def reference(self, files: ChunkFiles, device: torch.device) -> Reference:
        """Return the given statistics, or those of the files of all chunks, computed on a device."""
        record = replace(self.record, items=len(files.names))
        return self.given or make_reference(files, record, self.moments, device)


def evaluate_samples(evaluation: Evaluation) -> None:
    """Generate samples from noise alone and score them.

    The statistics of the real data are written to `reference.safetensors`, for --reference of further evaluations.

    Raises:
        InputError: as `evaluate`.
    """
    rank, ranks, _ = rank_of_process()
    options, settings, pipeline, networks, _ = evaluation
    trained, model, out = pipeline.trained, pipeline.model, options.out
    real = real_data(evaluation)
    class_of = None
    if uses_labels(options, trained):
        class_of = class_drawer(options.sample_labels, trained.classes, real.record.labels)
    protocol = protocol_of_samples(evaluation, real)
    chunk_settings = settings_of_chunks(options, protocol, model.config)
    stored = (path for folder in (REAL, SAMPLES) for path in sorted((out / folder).glob("*.safetensors")))
    real_files = {start: out / REAL / f"{start:06d}.safetensors" for start in real.chunks}
    videos = {real_files[start]: paths for start, paths in real.paths.items()}
    complete = complete_chunks(stored, chunk_settings, videos)
    chunks = split_samples(protocol.samples or 0, options.chunk, trained.classes, class_of)
    files = {chunk: out / SAMPLES / f"{chunk.numbers.start:06d}.safetensors" for chunk in chunks}
    kept = [name for chunk in chunks for name in chunk.names][: options.keep_videos]
    on_variant = video_writer(out / VIDEOS, map(seed_variant, settings.seeds), kept)

    missing_real = [start for start in list(real.chunks)[rank::ranks] if real_files[start] not in complete]
    missing = [chunk for chunk in chunks[rank::ranks] if files[chunk] not in complete]
    if missing_real or missing:
        check_writable(out / SAMPLES, is_folder=True)
        (out / TABLES).unlink(missing_ok=True)
    noun = f" {settings.medium}s"
    with progress_bar(total=len(missing_real), desc=f"real{noun}", unit=" chunks", disable=rank > 0) as bar:
        for start in missing_real:
            sources = source_identities(real.paths.get(start, ()))
            clips = real.chunks[start]()
            results = measure_real(start, clips, settings, pipeline.codec, networks)
            claim_folder(out / SAMPLES, chunk_settings)
            write_chunk(real_files[start], list(clips), results, chunk_settings, sources)
            bar.update()
    total = sum(len(chunk.numbers) for chunk in missing)
    with progress_bar(total=total, desc="generating", unit=noun, disable=rank > 0) as bar:
        for chunk in missing:
            names, results = evaluate_samples_of_chunk(chunk, settings, model, pipeline.codec, networks, on_variant)
            claim_folder(out / SAMPLES, chunk_settings)
            write_chunk(files[chunk], names, results, chunk_settings)
            bar.update(len(chunk.numbers))
    if are_finished([*real_files.values(), *files.values()], chunk_settings, videos):
        paths = list(real_files.values()), list(files.values())
        write_and_print_report(out, lambda: compute_report(out, real, protocol, *paths, chunk_settings, model.device))


def protocol_of_samples(evaluation: Evaluation, real: RealData) -> Protocol:
    """Return everything that the scores of samples depend on, for the report."""
    options, settings, trained = evaluation.options, evaluation.settings, evaluation.pipeline.trained
    record, file = real.record, options.reference and file_of(options.reference)
    # By default 50,000 images, or as many videos as there are real ones.
    by_default = NUM_SAMPLES if settings.medium == "image" else record.items
    has_labels = uses_labels(options, trained)
    return make_protocol(
        evaluation,
        data=options.data or record.data,
        choice=record.choice,
        split_sha256=record.names_sha256,
        videos=record.items,
        labels=label_sentence(options.sample_labels, len(trained.classes), record.labels) if has_labels else None,
        resize=record.resize,
        samples=by_default if options.samples is None else options.samples,
        reference=file and f"{as_text(file.name)}, sha256 {sha256_of(file)}",
        manifold=min(MAX_MANIFOLD, record.items) if real.given is None else len_of_manifold(real.given),
    )


def compute_report(
    out: Path,
    real: RealData,
    protocol: Protocol,
    real_files: Sequence[Path],
    files: Sequence[Path],
    chunk_settings: Mapping[str, object],
    device: torch.device,
) -> Report:
    """Write the statistics of the real data, and return the report from the files of all chunks."""
    of_real = ChunkFiles(real_files, chunk_settings)
    reference = real.reference(of_real, device)
    unreadable = 0
    if real.given is None:
        measured = len(of_real.names)
        unreadable = real.record.items - measured
        reference.save(out / FILE)
        protocol = replace(protocol, videos=measured, manifold=min(MAX_MANIFOLD, measured))
    of_samples = ChunkFiles(files, chunk_settings)
    return make_sample_report(of_samples, reference, protocol, unreadable, device)


def len_of_manifold(reference: Reference) -> int:
    """Return the number of real samples for precision and recall."""
    return max(map(len, reference.manifold.values()), default=0)


def file_of(reference: Path) -> Path:
    """Return the file of statistics that --reference names: a file, or one in the folder of an evaluation."""
    return reference / FILE if reference.is_dir() else reference


def real_data(evaluation: Evaluation) -> RealData:
    """Return the real images or videos of the options, or their statistics.

    Raises:
        InputError: they cannot be read, or do not match the model and the networks.
    """
    options, settings = evaluation.options, evaluation.settings
    if options.reference is None:
        return selected_data(evaluation)
    path = file_of(options.reference)
    if path.suffix == ".npz":
        return adm_data(path, evaluation)
    reference = Reference.load(path)
    names = (
        ("medium", "frames", "size") if settings.medium == "image" else ("medium", "frames", "size", "stride", "fps")
    )
    expected = {name: getattr(settings, name) for name in names} | {"resize": resize_of(settings)}
    check_reference(path, reference.record, expected, network_records(evaluation.networks))
    return RealData(reference.record, {}, {}, reference)


def new_record(evaluation: Evaluation) -> ReferenceRecord:
    """Return the record of statistics, without data."""
    settings = evaluation.settings
    return ReferenceRecord(
        data=name_of_data(evaluation.options),
        choice="",
        names_sha256="",
        items=0,
        medium=settings.medium,
        frames=settings.frames,
        size=settings.size,
        stride=settings.stride,
        fps=settings.fps,
        resize=resize_of(settings),
        networks=network_records(evaluation.networks),
        codec_sha256=evaluation.pipeline.trained.codec.fingerprint,
    )


def selected_data(evaluation: Evaluation) -> RealData:
    """Return the images or videos of folders, with the numbers of their labels."""
    options, settings = evaluation.options, evaluation.settings
    paths, medium = options.images or options.videos, settings.medium
    span, is_first = 1 + (settings.frames - 1) * settings.stride, rank_of_process()[0] == 0
    selection = select_videos(paths, options.count, options.selection_seed, span, is_first, settings.fps, medium=medium)
    labels = Counter(
        evaluation.annotations.get(name).label or as_text(path.absolute().parent.name)
        for name, path in zip(selection.names, selection.paths, strict=True)
    )
    order = f"in the order of a hash of name and seed {options.selection_seed}"
    choice = f"{'all' if options.count is None else 'the first ones'}, {order}"
    if medium == "video":
        choice = f"the first ones that are long enough, {order}; each clip is the beginning of its video"
    record = replace(
        new_record(evaluation),
        choice=choice,
        names_sha256=selection.sha256,
        items=len(selection.names),
        labels=dict(sorted(labels.items())),
    )
    chunks = {chunk.start: chunk for chunk in split_into_chunks(selection, options.chunk)}
    readers = {start: lambda chunk=chunk: read_clips(chunk, settings) for start, chunk in chunks.items()}
    return RealData(record, readers, {start: chunk.paths for start, chunk in chunks.items()})


def adm_data(path: Path, evaluation: Evaluation) -> RealData:
    """Return the images and moments of an .npz file of ADM.

    Raises:
        InputError: it cannot be read, or does not match the model and the networks.
    """
    settings, networks, chunk = evaluation.settings, evaluation.networks, evaluation.options.chunk
    if settings.medium != "image" or networks.image is None:
        raise InputError(f"{path} has statistics of images: give an image_network and a model of images, or --videos.")
    file = AdmFile.load(path)
    if file.moments is not None and len(file.moments.mean) != networks.image.num_features:
        raise InputError(
            f"{path} has moments of {len(file.moments.mean)} features, but the image network has "
            f"{networks.image.num_features}: give Inception-v3."
        )
    images = 0 if file.images is None else len(file.images)
    if file.images is not None and tuple(file.images.shape[1:3]) != settings.size:
        found, wanted = (f"{height}x{width}" for height, width in (file.images.shape[1:3], settings.size))
        raise InputError(
            f"{path} has images of {found} pixels, but samples have {wanted}: give another file or --size."
        )
    record = replace(
        new_record(evaluation),
        choice=f"the {images:,} images of {path.name}"
        + ("" if file.moments is None else "; mean and covariance for FID are those of the file"),
        names_sha256=sha256_of(path),
        items=images,
        resize="as in the file",
    )

    def read(start: int) -> dict[str, Tensor]:
        numbers = range(start, min(start + chunk, images))
        return {f"{number:06d}": file.clip(number) for number in numbers}

    chunks = {start: lambda start=start: read(start) for start in range(0, images, chunk)}
    return RealData(record, chunks, {}, moments=file.moments)

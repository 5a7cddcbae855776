"""`evaluate`: continue videos, or generate samples from noise alone, and score them (GPDiT, section 5.2)."""

import hashlib
import json
import logging
from dataclasses import replace
from typing import NamedTuple

from gpdit_lightning.checkpoints.reading import TrainedModel, find_weights
from gpdit_lightning.cli.evaluate_samples import evaluate_samples
from gpdit_lightning.cli.evaluation_output import (
    VIDEOS,
    are_finished,
    settings_of_chunks,
    video_writer,
    write_and_print_report,
)
from gpdit_lightning.cli.evaluation_settings import (
    Evaluation,
    check_real_data,
    load_networks,
    make_protocol,
    make_settings,
    name_of_data,
    resize_of,
    uses_labels,
)
from gpdit_lightning.devices import available_device, rank_of_process
from gpdit_lightning.errors import InputError
from gpdit_lightning.evaluation.chunk_files import (
    ChunkFiles,
    claim_folder,
    complete_chunks,
    source_identities,
    write_chunk,
)
from gpdit_lightning.evaluation.chunks import (
    GROUND_TRUTH,
    evaluate_chunk,
    seed_variant,
    split_into_chunks,
)
from gpdit_lightning.evaluation.report import Report
from gpdit_lightning.evaluation.report_text import TABLES
from gpdit_lightning.evaluation.scores import make_report
from gpdit_lightning.evaluation.videos import Selection, find_videos, select_videos
from gpdit_lightning.files import check_writable
from gpdit_lightning.generation.pipeline import load_pipeline
from gpdit_lightning.names import as_text
from gpdit_lightning.options.evaluate import EvaluateOptions
from gpdit_lightning.path_kinds import Medium
from gpdit_lightning.preparation.annotations import Annotations, read_annotations
from gpdit_lightning.progress import progress_bar

log = logging.getLogger(__name__)

CHUNKS = "chunks"
MAX_CLASSES = 10  # that a message lists


def evaluate(options: EvaluateOptions) -> None:
    """Generate continuations or samples, compute the scores, and write and print the report.

    Under torchrun or srun the chunks are distributed over the processes, and the last process to finish writes the
    report. A stopped command resumes: complete chunks are not computed again.

    Raises:
        InputError: an option, the checkpoint, a network or the real data cannot be used, or `out` contains an
            evaluation with other settings.
    """
    # Cheap checks come before gigabytes of weights are loaded.
    check_real_data(options)
    checkpoint = find_weights(options.checkpoint)
    medium: Medium = "image" if options.images else "video"
    files = find_videos(options.images or options.videos, medium=medium)
    annotations = read_annotations(options.annotations)
    networks = load_networks(options, available_device(options.device))
    pipeline = load_pipeline(replace(options, checkpoint=str(checkpoint)))
    settings = make_settings(options, pipeline, networks, files)
    evaluation = Evaluation(options, settings, pipeline, networks, annotations)
    if settings.context_frames:
        evaluate_continuations(evaluation)
    else:
        evaluate_samples(evaluation)


def evaluate_continuations(evaluation: Evaluation) -> None:
    """Continue videos and score the continuations; errors as of `evaluate`."""
    rank, ranks, _ = rank_of_process()
    options, settings, pipeline, networks, annotations = evaluation
    trained, out = pipeline.trained, options.out
    span = 1 + (settings.frames - 1) * settings.stride
    selection = select_videos(options.videos, options.count, options.selection_seed, span, rank == 0, settings.fps)
    labels = find_labels(selection, annotations, trained, options) if uses_labels(options, trained) else None
    choice = (
        "the first ones that are long enough, in the order of a hash of name and seed "
        f"{options.selection_seed}; each clip is the beginning of its video"
    )
    protocol = make_protocol(
        evaluation,
        data=name_of_data(options),
        choice=choice,
        split_sha256=selection.sha256,
        videos=len(selection.names),
        labels=labels and labels.description,
        resize=resize_of(settings),
    )

    chunk_settings = settings_of_chunks(options, protocol, pipeline.model.config)
    chunks = split_into_chunks(selection, options.chunk, labels and labels.classes)
    files = {chunk: out / CHUNKS / f"{chunk.start:06d}.safetensors" for chunk in chunks}
    videos = {file: chunk.paths for chunk, file in files.items()}
    complete = complete_chunks(sorted((out / CHUNKS).glob("*.safetensors")), chunk_settings, videos)
    missing = [chunk for chunk in chunks[rank::ranks] if files[chunk] not in complete]
    if missing:
        check_writable(out / CHUNKS, is_folder=True)
        (out / TABLES).unlink(missing_ok=True)
    written = (GROUND_TRUTH, *map(seed_variant, settings.seeds))
    on_variant = video_writer(out / VIDEOS, written, selection.names[: options.keep_videos])
    total = sum(len(chunk.names) for chunk in missing)
    with progress_bar(total=total, desc="generating", unit=" videos", disable=rank > 0) as bar:
        for chunk in missing:
            sources = source_identities(chunk.paths)
            results = evaluate_chunk(chunk, settings, pipeline.model, pipeline.codec, networks, on_variant)
            claim_folder(out / CHUNKS, chunk_settings)
            write_chunk(files[chunk], *results, chunk_settings, sources)
            bar.update(len(chunk.names))
    if are_finished(list(files.values()), chunk_settings, videos):

        def compute() -> Report:
            read = ChunkFiles(list(files.values()), chunk_settings)
            return make_report(read, protocol, unreadable=set(selection.names) - set(read.names))

        write_and_print_report(out, compute)


class VideoLabels(NamedTuple):
    """The labels of the videos of a selection.

    Attributes:
        classes: class number of each video.
        description: how they were found, for the report.
    """

    classes: tuple[int, ...]
    description: str


def find_labels(
    selection: Selection, annotations: Annotations, trained: TrainedModel, options: EvaluateOptions
) -> VideoLabels:
    """Return the labels of the selected videos: those of the annotations, else the names of their folders.

    Raises:
        InputError: a label is no class of the model.
    """
    classes, sources = [], set()
    for name, path in zip(selection.names, selection.paths, strict=True):
        annotated = annotations.get(name).label
        label = annotated or as_text(path.absolute().parent.name)
        source = "annotations" if annotated else "names of folders"
        if label not in trained.classes:
            known = ", ".join(trained.classes[:MAX_CLASSES]) + (", ..." if len(trained.classes) > MAX_CLASSES else "")
            raise InputError(
                f"{path} has the label {label!r} by the {source}, which is no class of {options.checkpoint} ({known}): "
                "give its label by --annotations, or --no_labels to score without labels."
            )
        classes.append(trained.classes.index(label))
        sources.add(source)
    sha256 = hashlib.sha256(json.dumps([trained.classes[number] for number in classes]).encode()).hexdigest()
    description = f"of each video, from {' and '.join(sorted(sources))}; sha256 of them in order `{sha256}`"
    return VideoLabels(tuple(classes), description)

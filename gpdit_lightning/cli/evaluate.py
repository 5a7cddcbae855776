"""`evaluate`: continue the videos of a data set and score the continuations (GPDiT, section 5.2)."""

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from gpdit_lightning.checkpoints.reading import TrainedModel, find_weights
from gpdit_lightning.devices import available_device, device_name, rank_of_process
from gpdit_lightning.errors import InputError
from gpdit_lightning.evaluation.chunk_files import ChunkFiles, write_chunk
from gpdit_lightning.evaluation.chunks import (
    GROUND_TRUTH,
    Chunk,
    EvaluationSettings,
    MetricNetworks,
    evaluate_chunk,
    seed_variant,
    split_into_chunks,
)
from gpdit_lightning.evaluation.network_files import missing_scores
from gpdit_lightning.evaluation.networks import load_image_network, load_video_network
from gpdit_lightning.evaluation.report import Protocol, library_versions
from gpdit_lightning.evaluation.report_text import TABLES, plot_self_checks, write_report
from gpdit_lightning.evaluation.scores import make_report
from gpdit_lightning.evaluation.videos import Selection, find_videos, select_videos
from gpdit_lightning.files import process_lock
from gpdit_lightning.generation.pipeline import GPDiTPipeline, load_pipeline
from gpdit_lightning.generation.plans import block_window, latent_frames
from gpdit_lightning.generation.settings import check_context_frames, layout_of, trained_size
from gpdit_lightning.media.video_writer import write_video
from gpdit_lightning.names import as_text
from gpdit_lightning.options.evaluate import EvaluateOptions
from gpdit_lightning.preparation.annotations import Annotations, read_annotations
from gpdit_lightning.progress import progress_bar

log = logging.getLogger(__name__)

CHUNKS, VIDEOS, LOCK = "chunks", "videos", ".lock"
FPS = 8  # of kept videos
PAPER_CONTEXT, PAPER_GENERATED = 5, 12  # pixel frames (GPDiT, section 5.2)
MAX_CLASSES = 10  # that a message lists
# Fields of the protocol that do not affect the results of a chunk: chunks with different values may be combined.
FIELDS_WITHOUT_EFFECT = {"checkpoint", "hardware"}


def evaluate(options: EvaluateOptions) -> None:
    """Generate the continuations, compute the scores, and write and print the report.

    Under torchrun or srun the chunks of videos are distributed over the processes, and the last process to finish
    writes the report. A stopped command resumes: existing chunks are not computed again.

    Raises:
        InputError: an option, the checkpoint, a network or the videos cannot be used, or `out` contains an
            evaluation with other settings.
    """
    rank, ranks, _ = rank_of_process()
    device = available_device(options.device)
    # Cheap checks come before gigabytes of weights are loaded.
    checkpoint = find_weights(options.checkpoint)
    videos = find_videos(options.videos)
    annotations = read_annotations(options.annotations)
    networks = load_networks(options, device)
    pipeline = load_pipeline(replace(options, checkpoint=str(checkpoint)))
    trained = pipeline.trained
    settings = make_settings(options, pipeline, networks, videos)
    span = 1 + (settings.frames - 1) * settings.stride
    selection = select_videos(options.videos, options.count, options.selection_seed, span, rank == 0, settings.fps)
    labels = find_labels(selection, annotations, trained, options) if uses_labels(options, trained) else None
    protocol = make_protocol(options, settings, trained, selection, networks, labels)

    chunk_settings = {name: value for name, value in asdict(protocol).items() if name not in FIELDS_WITHOUT_EFFECT}
    chunk_settings |= {name: getattr(options, name) for name in ("chunk", "self_check_videos")}
    ChunkFiles(sorted((options.out / CHUNKS).glob("*.safetensors")), chunk_settings)  # raises if settings differ
    chunks = split_into_chunks(selection, options.chunk, labels and labels.classes)
    files = {chunk: options.out / CHUNKS / f"{chunk.start:06d}.safetensors" for chunk in chunks}
    missing = [chunk for chunk in chunks[rank::ranks] if not files[chunk].exists()]
    if missing:
        (options.out / TABLES).unlink(missing_ok=True)
    on_variant = video_writer(options.out / VIDEOS, options.keep_videos, settings, selection.names)
    with videos_bar(missing, hidden=rank > 0) as bar:
        for chunk in missing:
            results = evaluate_chunk(chunk, settings, pipeline.model, pipeline.codec, networks, on_variant)
            write_chunk(files[chunk], *results, chunk_settings)
            bar.update(len(chunk.names))
    if not all(path.exists() for path in files.values()):
        log.info("this process has finished; the last one to finish writes the results (or run the same command again)")
        return
    write_and_print_report(options.out, list(files.values()), chunk_settings, protocol, selection)


def videos_bar(chunks: Sequence[Chunk], hidden: bool) -> "tqdm[Any]":
    """Return a progress bar over the videos of chunks."""
    total = sum(len(chunk.names) for chunk in chunks)
    return progress_bar(total=total, desc="generating", unit=" videos", disable=hidden)


def write_and_print_report(
    out: Path, chunk_files: Sequence[Path], chunk_settings: Mapping[str, Any], protocol: Protocol, selection: Selection
) -> None:
    """Compute the scores from the files of all chunks, unless the report exists. Only one process does so at a time."""
    with suppress(BlockingIOError), process_lock(out / LOCK):
        if not (out / TABLES).exists():  # this file is written last
            chunks = ChunkFiles(list(chunk_files), chunk_settings)
            report = make_report(chunks, protocol, unreadable=set(selection.names) - set(chunks.names))
            if report.self_checks:
                plot_self_checks(report, out / "self_checks.png")
            write_report(report, out)
        scores, _, _ = (out / TABLES).read_text(encoding="utf-8").partition("\n## ")
        scores = re.sub(r"\*\*Missing:\*\* .*\n\n", "", scores)  # printed before the generation
        print(f"{scores}\nProtocol, self-checks and the paper's scores: {out / TABLES}")


class VideoLabels(NamedTuple):
    """The labels of the videos of a selection.

    Attributes:
        classes: class number of each video.
        description: how they were found, for the report.
    """

    classes: tuple[int, ...]
    description: str


def uses_labels(options: EvaluateOptions, trained: TrainedModel) -> bool:
    """Return whether continuations are conditioned on labels.

    Raises:
        InputError: the options need labels, but the model was trained without them.
    """
    if not trained.classes and (options.annotations or options.label_guidance != 1):
        option = "--annotations" if options.annotations else "--label_guidance"
        raise InputError(f"{options.checkpoint} was trained without labels: leave {option} out.")
    return bool(trained.classes) and options.labels


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


def load_networks(options: EvaluateOptions, device: torch.device) -> MetricNetworks:
    """Load the networks of the scores; a warning names the scores that are left out for lack of a network.

    Raises:
        InputError: a network cannot be loaded.
    """
    video = load_video_network(options.video_network, device) if options.video_network else None
    image = load_image_network(options.image_network, device, options.classifier) if options.image_network else None
    roles = {role for role, network in (("video", video), ("image", image)) if network is not None}
    for sentence in missing_scores(roles, image is not None and image.has_classes):
        log.warning("warning: %s", sentence)
    if not roles:
        log.info("without networks the scores are PSNR and SSIM, with those of the codec alone and of a repeated frame")
    return MetricNetworks(video, image)


def make_settings(
    options: EvaluateOptions, pipeline: GPDiTPipeline, networks: MetricNetworks, videos: Sequence[Path]
) -> EvaluationSettings:
    """Return the settings that apply to every video.

    Args:
        options: of the verb.
        pipeline: the model with its codec.
        networks: of the scores.
        videos: paths, from whose sizes the default size is chosen.

    Raises:
        InputError: model, codec or video network cannot use the size or a number of frames, or the model is
            conditioned on text.
    """
    trained = pipeline.trained
    if pipeline.model.config.text_width:
        raise InputError(
            f"{options.checkpoint} is conditioned on text, but the videos have no text: give another checkpoint."
        )
    context_frames, generated_frames = clip_lengths(options, pipeline)
    if context_frames:
        check_context_frames(context_frames, layout_of(trained, pipeline.codec), pipeline.codec)
    elif networks.video is None and networks.image is None:
        reason = "--context_frames is 0" if trained.backbone.config.takes_context else "the model takes no context"
        raise InputError(
            f"{reason}, so frames cannot be compared with real ones: give a video_network or an image_network."
        )
    window, sinks = selected_window(options, pipeline, context_frames + generated_frames)
    settings = EvaluationSettings(
        context_frames=context_frames,
        generated_frames=generated_frames,
        stride=options.stride or trained.geometry.stride,
        size=trained_size(options.size, trained, videos),
        seeds=tuple(options.seeds),
        generation=pipeline.generation_config(
            options,
            options.label_guidance,
            window=window,
            sinks=sinks,
        ),
        fvd_includes_context=options.fvd_frames == "all",
        self_check_videos=options.self_check_videos,
        fps=trained.geometry.fps,
    )
    if networks.video is not None:
        networks.video.check_frames(settings.frames if settings.fvd_includes_context else settings.generated_frames)
    return settings


def clip_lengths(options: EvaluateOptions, pipeline: GPDiTPipeline) -> tuple[int, int]:
    """Return the pixel frames of context and the generated ones: those of the paper, limited to the training clips.

    Raises:
        InputError: the model was trained on single images, and the options give no lengths.
    """
    codec, frames = pipeline.codec, pipeline.trained.geometry.frames
    layout, in_training = layout_of(pipeline.trained, codec), codec.pixel_frames(frames)
    context, generated = options.context_frames, options.generated_frames
    if in_training == 1 and (context is None or generated is None):
        raise InputError(
            f"{options.checkpoint} was trained on single images, which have no continuation: give a model that was "
            "trained on videos, or --context_frames and --generated_frames."
        )
    if context is None:
        wanted = codec.encodable_frames(min(PAPER_CONTEXT, in_training - codec.temporal_factor))
        latents = layout.context_within(frames, codec.latent_frames(wanted))
        context = codec.pixel_frames(latents) if latents else 0
    if generated is None:
        generated = max(codec.temporal_factor, in_training - context)
        # A block of all frames that follow the context is as long as in training.
        generated = min(PAPER_GENERATED, generated) if layout.frames else generated
    return context, generated


def selected_window(options: EvaluateOptions, pipeline: GPDiTPipeline, frames: int) -> tuple[int | None, int]:
    """Return window and sinks in latent frames, for videos of `frames` pixel frames; warn if it exceeds training.

    Raises:
        InputError: the window does not consist of blocks of the model.
    """
    trained, codec = pipeline.trained, pipeline.codec
    layout, in_training = layout_of(trained, codec), trained.geometry.frames
    window, sinks = block_window(layout, in_training, latent_frames(frames, codec), options.window)
    most = max(1, layout.last_group(in_training).start)
    if window is not None and window > most:
        log.warning(
            "warning: --window is %d latent frames, but in training frames attended to at most %d: scores may be worse",
            window,
            most,
        )
    return window, sinks


def make_protocol(
    options: EvaluateOptions,
    settings: EvaluationSettings,
    trained: TrainedModel,
    selection: Selection,
    networks: MetricNetworks,
    labels: VideoLabels | None,
) -> Protocol:
    """Return everything that the scores depend on, for the report."""
    roles = {
        "video": networks.video,
        "image": networks.image,
        "classifier": networks.image and networks.image.classifier,
    }
    device = trained.backbone.device
    return Protocol(
        data=options.data or as_text(" ".join(os.path.basename(os.path.abspath(path)) for path in options.videos)),
        choice="the first ones that are long enough, in the order of a hash of name and seed "
        f"{options.selection_seed}; each clip is the beginning of its video",
        split_sha256=selection.sha256,
        videos=len(selection.names),
        context_frames=settings.context_frames,
        generated_frames=settings.generated_frames,
        fvd_frames=options.fvd_frames,
        size=settings.size,
        stride=settings.stride,
        fps=settings.fps,
        resize="short side scaled, then cropped at the centre",
        sampler=options.sampler,
        steps=options.steps,
        guidance=settings.generation.guidance,
        schedule=trained.schedule,
        seeds=settings.seeds,
        window=settings.generation.window,
        precision=str(settings.generation.autocast_dtype or torch.float32).removeprefix("torch."),
        checkpoint=options.checkpoint,
        checkpoint_sha256=trained.sha256,
        step=trained.step,
        weights=trained.weights,
        codec=trained.codec.name,
        codec_sha256=trained.codec.fingerprint,
        networks={role: network.record for role, network in roles.items() if network is not None},
        versions=library_versions(),
        hardware=device_name(device),
        labels=labels and labels.description,
    )


def video_writer(
    folder: Path, number: int, settings: EvaluationSettings, names: Sequence[str]
) -> Callable[[str, Sequence[str], Tensor], None]:
    """Return a callback for :func:`evaluate_chunk` that writes ground truth and continuations as mp4.

    Args:
        folder: gets a subfolder for each variant.
        number: of videos to write, the first ones.
        settings: give the seeds.
        names: of all videos.
    """
    kept = set(names[:number])
    variants = {GROUND_TRUTH, *map(seed_variant, settings.seeds)}

    def on_variant(variant: str, names: Sequence[str], videos: Tensor) -> None:
        if variant in variants:
            for name, video in zip(names, videos, strict=True):
                if name in kept:
                    write_video(folder / variant.replace(" ", "_") / f"{Path(name).with_suffix('')}.mp4", video, FPS)

    return on_variant

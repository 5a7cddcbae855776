"""Settings and protocol of an evaluation, from its options and the trained model."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gpdit_lightning.checkpoints.reading import TrainedModel
from gpdit_lightning.devices import device_name
from gpdit_lightning.errors import InputError
from gpdit_lightning.evaluation.chunks import EvaluationSettings, MetricNetworks
from gpdit_lightning.evaluation.network_files import NetworkRecord, missing_scores
from gpdit_lightning.evaluation.networks import load_image_network, load_video_network
from gpdit_lightning.evaluation.report import Protocol, library_versions
from gpdit_lightning.generation.pipeline import GPDiTPipeline
from gpdit_lightning.generation.plans import block_window
from gpdit_lightning.generation.settings import check_context_frames, layout_of, trained_size, warn_of_short_context
from gpdit_lightning.generation.video import num_latent_frames
from gpdit_lightning.names import as_text
from gpdit_lightning.options.evaluate import EvaluateOptions
from gpdit_lightning.options.shared import check_has_effect
from gpdit_lightning.path_kinds import Medium
from gpdit_lightning.preparation.annotations import Annotations

log = logging.getLogger(__name__)

PAPER_CONTEXT, PAPER_GENERATED = 5, 12  # pixel frames (GPDiT, section 5.2)


class Evaluation(NamedTuple):
    """What `evaluate` reads and loads, for both of its modes.

    Attributes:
        options: of the verb.
        settings: that apply to every video or image.
        pipeline: the model with its codec.
        networks: of the scores.
        annotations: labels of the real data, by their names.
    """

    options: EvaluateOptions
    settings: EvaluationSettings
    pipeline: GPDiTPipeline
    networks: MetricNetworks
    annotations: Annotations


def uses_labels(options: EvaluateOptions, trained: TrainedModel) -> bool:
    """Return whether continuations are conditioned on labels.

    Raises:
        InputError: the options need labels, but the model was trained without them.
    """
    if not trained.classes and (options.annotations or options.label_guidance != 1):
        option = "--annotations" if options.annotations else "--label_guidance"
        raise InputError(f"{options.checkpoint} was trained without labels: leave {option} out.")
    return bool(trained.classes) and options.labels


def load_networks(options: EvaluateOptions, device: torch.device) -> MetricNetworks:
    """Load the networks of the scores; raises `InputError` if one cannot be loaded."""
    video = load_video_network(options.video_network, device) if options.video_network else None
    image = load_image_network(options.image_network, device, options.classifier) if options.image_network else None
    return MetricNetworks(video, image)


def report_missing_scores(networks: MetricNetworks, medium: Medium) -> None:
    """Log which scores are left out for lack of a network."""
    has_classes = networks.image is not None and networks.image.has_classes
    for sentence in missing_scores(network_records(networks), has_classes, medium):
        log.warning("warning: %s", sentence)
    if networks.video is None and networks.image is None:
        log.info("without networks the scores are PSNR and SSIM, with those of the codec alone and of a repeated frame")


def make_settings(
    options: EvaluateOptions, pipeline: GPDiTPipeline, networks: MetricNetworks, files: Sequence[Path]
) -> EvaluationSettings:
    """Return the settings that apply to every video or image.

    Args:
        options: of the verb.
        pipeline: the model with its codec.
        networks: of the scores.
        files: paths of real videos or images, from whose sizes the default size is chosen.

    Raises:
        InputError: model, codec or video network cannot use the size or a number of frames, options do not match the
            mode, or the model is conditioned on text.
    """
    trained = pipeline.trained
    if pipeline.model.config.text_width:
        raise InputError(
            f"{options.checkpoint} is conditioned on text, but the videos have no text: give another checkpoint."
        )
    context_frames, generated_frames = clip_lengths(options, pipeline)
    medium: Medium = "video" if context_frames or generated_frames > 1 else "image"
    check_mode(options, context_frames, medium)
    if context_frames:
        check_context_frames(context_frames, layout_of(trained, pipeline.codec), pipeline.codec)
    elif networks.video is None and networks.image is None:
        reason = "--context_frames is 0" if trained.backbone.config.takes_context else "the model takes no context"
        raise InputError(
            f"{reason}, so frames cannot be compared with real ones: give a video_network or an image_network."
        )
    report_missing_scores(networks, medium)
    warn_of_short_context(context_frames, trained, pipeline.codec)
    window, sinks = selected_window(options, pipeline, context_frames + generated_frames)
    settings = EvaluationSettings(
        context_frames=context_frames,
        generated_frames=generated_frames,
        stride=options.stride or trained.geometry.stride,
        size=trained_size(options.size, trained, files, "image" if options.images else "video"),
        seeds=tuple(options.seeds),
        generation=pipeline.generation_config(
            options,
            options.label_guidance,
            window=window,
            sinks=sinks,
            context_noise=options.context_noise,
        ),
        fvd_includes_context=options.fvd_frames == "all",
        self_check_videos=options.self_check_videos,
        fps=trained.geometry.fps,
        medium=medium,
        image_scaling=options.image_scaling,
    )
    if networks.video is not None:
        networks.video.check_frames(settings.frames if settings.fvd_includes_context else settings.generated_frames)
    return settings


def clip_lengths(options: EvaluateOptions, pipeline: GPDiTPipeline) -> tuple[int, int]:
    """Return the pixel frames of context and the generated ones: those of the paper, limited to the training clips.

    Without a context they are those of the training clips. A model of images, or of whole clips, has no context.

    Raises:
        InputError: the model was trained on single images, and the options give only a context.
    """
    codec, frames = pipeline.codec, pipeline.trained.geometry.frames
    layout, in_training = layout_of(pipeline.trained, codec), codec.pixel_frames(frames)
    context, generated = options.context_frames, options.generated_frames
    if in_training == 1 and context and generated is None:
        raise InputError(
            f"{options.checkpoint} was trained on single images, which have no continuation: leave --context_frames "
            "out to score images from noise alone, or give --generated_frames."
        )
    if context is None and in_training == 1:
        context = 0
    elif context is None:
        wanted = codec.encodable_frames(min(PAPER_CONTEXT, in_training - codec.temporal_factor))
        latents = layout.context_within(frames, codec.latent_frames(wanted))
        context = codec.pixel_frames(latents) if latents else 0
    if generated is None and context == 0:
        generated = in_training
    elif generated is None:
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
    window, sinks = block_window(layout, in_training, num_latent_frames(codec, 0, frames), options.window)
    most = max(1, layout.last_group(in_training).start)
    if window is not None and window > most:
        log.warning(
            "warning: --window is %d latent frames, but in training frames attended to at most %d: scores may be worse",
            window,
            most,
        )
    return window, sinks


def check_real_data(options: EvaluateOptions) -> None:
    """Raise an InputError unless the options give real data in exactly one form."""
    given = [name for name in ("videos", "images", "reference") if getattr(options, name)]
    if len(given) != 1:
        found = f"the options {' and '.join(f'--{name}' for name in given)} are" if given else "nothing is"
        raise InputError(f"{found} given to compare with: give one of --videos, --images and --reference.")


def check_mode(options: EvaluateOptions, context_frames: int, medium: Medium) -> None:
    """Check that options match the mode: continuations of videos, or samples from noise alone.

    Raises:
        InputError: an option belongs to the other mode, or the real data are of another medium.
    """
    if medium == "video":
        check_has_effect(options, "on videos", "image_scaling")
    if context_frames:
        if not options.videos:
            raise InputError(
                f"{context_frames} frames of context are continued, which needs --videos; for samples from noise alone "
                "give --context_frames 0."
            )
        check_has_effect(options, "without --context_frames 0", "samples", "sample_labels")
    elif medium == "image":
        if options.videos or options.video_network:
            problem = "compared with --images or --reference" if options.videos else "not scored by a video_network"
            raise InputError(f"the samples of {options.checkpoint} are images, which are {problem}: change the option.")
    elif options.images:
        raise InputError(
            f"the samples of {options.checkpoint} are videos, which are compared with --videos or --reference: give "
            "one of these, or --generated_frames 1."
        )


def make_protocol(
    evaluation: Evaluation,
    *,
    data: str,
    choice: str,
    split_sha256: str,
    videos: int,
    labels: str | None,
    resize: str,
    **of_samples: Any,
) -> Protocol:
    """Return everything that the scores depend on, for the report.

    Args:
        evaluation: what was read and loaded.
        data: name of the data set.
        choice, split_sha256, videos: how real videos or images were selected, the sha256 of their names, their number.
        labels: how labels were found.
        resize: how real frames were brought to their size.
        of_samples: fields for samples from noise alone.
    """
    options, settings, trained = evaluation.options, evaluation.settings, evaluation.pipeline.trained
    return Protocol(
        data=data,
        choice=choice,
        split_sha256=split_sha256,
        videos=videos,
        context_frames=settings.context_frames,
        generated_frames=settings.generated_frames,
        fvd_frames=options.fvd_frames,
        size=settings.size,
        stride=settings.stride,
        fps=settings.fps,
        resize=resize,
        sampler=options.sampler,
        steps=options.steps,
        guidance=settings.generation.guidance,
        schedule=trained.schedule,
        seeds=settings.seeds,
        window=settings.generation.window,
        context_noise=settings.generation.context_noise,
        precision=str(settings.generation.autocast_dtype or torch.float32).removeprefix("torch."),
        checkpoint=options.checkpoint,
        checkpoint_sha256=trained.sha256,
        step=trained.step,
        weights=trained.weights,
        codec=trained.codec.name,
        codec_sha256=trained.codec.fingerprint,
        networks=network_records(evaluation.networks),
        versions=library_versions(),
        hardware=device_name(trained.backbone.device),
        labels=labels,
        medium=settings.medium,
        **of_samples,
    )


def name_of_data(options: EvaluateOptions) -> str:
    """Return the given name of the data set, or the names of the folders and files of the real data."""
    given = options.images or options.videos or (str(options.reference),)
    return options.data or as_text(" ".join(os.path.basename(os.path.abspath(path)) for path in given))


def resize_of(settings: EvaluationSettings) -> str:
    """Return how frames are brought to the size of the evaluation, for the report."""
    as_adm = settings.medium == "image" and settings.image_scaling == "adm"
    return f"short side scaled{' as by ADM' if as_adm else ''}, then cropped at the centre"


def network_records(networks: MetricNetworks) -> dict[str, NetworkRecord]:
    """Return the records of the networks by their roles."""
    roles = {
        "video": networks.video,
        "image": networks.image,
        "classifier": networks.image and networks.image.classifier,
    }
    return {role: network.record for role, network in roles.items() if network is not None}

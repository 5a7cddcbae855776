"""`sample`: continue videos with a trained model, or generate them from noise alone."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import NoReturn

from tqdm import tqdm

from gpdit_lightning.generation.outputs import VideoOutput, output_formats, output_path
from gpdit_lightning.generation.pipeline import GPDiTPipeline, load_pipeline
from gpdit_lightning.generation.plans import Clip, GenerationPlan
from gpdit_lightning.options.sample import SampleOptions
from gpdit_lightning.progress import progress_bar
from gpdit_lightning.signals import signals_delayed

log = logging.getLogger(__name__)

MAX_GROUND_TRUTH = 96  # frames of ground truth for a strip or GIF, all of which are held in memory


def sample(options: SampleOptions) -> None:
    """Generate videos and write them frame by frame. Ctrl-C keeps the frames so far as a playable file.

    Raises:
        InputError: an option, a context or the checkpoint cannot be used.
        KeyboardInterrupt: on Ctrl-C, after the files were completed.
    """
    pipeline = load_pipeline(options, compile=options.compile)
    ground_truth_frames = options.frames if options.side_by_side else min(options.frames, MAX_GROUND_TRUTH)
    plan = pipeline.plan(options.context, options, ground_truth_frames, skip_unusable=True)
    outputs = make_outputs(options, plan, pipeline.codec.temporal_factor)

    log.info("%d x %d frames with the weights of step %d", len(plan.clips), options.frames, pipeline.trained.step)
    with progress_bar(total=len(plan.clips) * options.frames, unit=" frames", desc="generating") as bar:
        for batch in plan.batches:
            generate(batch, plan, pipeline, outputs, bar)


def make_outputs(options: SampleOptions, plan: GenerationPlan, temporal_factor: int) -> dict[Clip, VideoOutput]:
    """Return the output files of each video.

    Raises:
        InputError: they cannot be written.
    """
    formats = output_formats(options.out, options.formats, len(plan.clips))
    return {
        clip: VideoOutput(
            output_path(options.out, clip.context.name, clip.seed if options.samples > 1 else None),
            formats,
            clip.context,
            clip.frames,
            temporal_factor=temporal_factor,
            mark=options.mark,
            side_by_side=options.side_by_side,
        )
        for clip in plan.clips
    }


def generate(
    batch: Sequence[Clip],
    plan: GenerationPlan,
    pipeline: GPDiTPipeline,
    outputs: Mapping[Clip, VideoOutput],
    bar: "tqdm[NoReturn]",
) -> None:
    """Generate the videos of a batch and print their files; after Ctrl-C, those of the frames so far.

    Raises:
        KeyboardInterrupt: on Ctrl-C, after the files were completed.
    """
    interrupted = False
    with ExitStack() as files:
        opened = [files.enter_context(outputs[clip]) for clip in batch]
        try:
            context = pipeline.encode(batch)
            for clip, output, latents in zip(batch, opened, context.cpu(), strict=True):
                if clip.context.latents is None:
                    output.write(clip.context.pixels[:0], latents)
            for piece in pipeline.generate(batch, context, plan.config):
                with signals_delayed():  # so that all videos of a batch have the same frames
                    for output, pixels, latents in zip(opened, piece.pixels, piece.latents, strict=True):
                        output.write(pixels, latents)
                bar.update(piece.pixels.shape[0] * piece.pixels.shape[1])
        except KeyboardInterrupt:
            interrupted = True
    for output in opened:
        if output.files:
            bar.write(f"{output.frames_written} frames: {', '.join(str(path) for path in output.files)}")
    if interrupted:
        raise KeyboardInterrupt

"""`sample`: continue videos with a trained model, or generate them from noise alone."""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from typing import NoReturn

from tqdm import tqdm

from gpdit_lightning.files import announce_replaced, check_keeps_inputs
from gpdit_lightning.generation.outputs import VideoOutput, output_formats, output_path
from gpdit_lightning.generation.pipeline import GPDiTPipeline, load_pipeline
from gpdit_lightning.generation.plans import Clip, GenerationPlan, generated_frames
from gpdit_lightning.generation.sheets import ClassSheets, sheets_of
from gpdit_lightning.names import counted
from gpdit_lightning.options.sample import SampleOptions
from gpdit_lightning.options.shared import check_has_effect
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
    frames = generated_frames(options, pipeline.trained, pipeline.codec)
    ground_truth_frames = frames if options.side_by_side else min(frames, MAX_GROUND_TRUTH)
    plan = pipeline.plan(options.context, options, ground_truth_frames, skip_unusable=True)
    make_output = output_maker(options, plan, pipeline.codec.temporal_factor)
    results = [path for clip in plan.clips for path in make_output(clip).paths.values()]  # or raises
    check_keeps_inputs(results, options.context, "give another --out")
    announce_replaced(results)

    report_short_ground_truth(options, plan)
    log.info("%d x %d frames with the weights of step %d", len(plan.clips), frames, pipeline.trained.step)
    with (
        progress_bar(total=len(plan.clips) * frames, unit=" frames", desc="generating") as bar,
        sheets_of(options.out, plan.clips) or nullcontext() as sheets,
    ):
        for batch in plan.batches:
            generate(batch, plan, pipeline, make_output, bar, sheets)
    if sheets:
        shown = ", ".join(map(str, sheets.files))
        print(f"{counted(len(plan.clips), 'sample')} in folders of classes: {options.out}; sheets: {shown}")


def report_short_ground_truth(options: SampleOptions, plan: GenerationPlan) -> None:
    """Log a line if a file shows the ground truth of a part of a video only, or, side by side, of none."""
    formats = output_formats(options.out, options.formats, plan.clips)
    effects = {
        "png": "the strip shows it as far as it is known",
        "gif": "a GIF leaves it out",
        "mp4": "it is black afterwards in the mp4" if options.side_by_side else "",
    }
    shown = [effects[name] for name in formats if effects.get(name)]
    short = {  # by context, which may have several samples
        clip.context.name: clip
        for clip in plan.clips
        if len(clip.context.ground_truth) < clip.frames and (len(clip.context.ground_truth) or options.side_by_side)
    }
    if not short or not shown:
        return
    first = next(iter(short.values()))
    known = len(first.context.ground_truth)
    reason = "its video ends there (an earlier --start shows more)"
    if known == MAX_GROUND_TRUTH and not options.side_by_side:
        reason = "more are read with --side_by_side only"
    others = f", and likewise of {counted(len(short) - 1, 'other video')}" if len(short) > 1 else ""
    log.info(
        "the ground truth of %s has %d of the %d generated frames, since %s%s: %s",
        first.context.name,
        known,
        first.frames,
        reason,
        others,
        ", and ".join(shown),
    )


def output_maker(options: SampleOptions, plan: GenerationPlan, temporal_factor: int) -> Callable[[Clip], VideoOutput]:
    """Return a function that makes the output files of a video; it raises `InputError` if they cannot be written."""
    formats = output_formats(options.out, options.formats, plan.clips)
    if "mp4" not in formats:
        check_has_effect(options, "without an mp4, which --out and --formats leave out", "mark", "side_by_side")

    def make_output(clip: Clip) -> VideoOutput:
        return VideoOutput(
            output_path(options.out, clip, several=options.samples > 1),
            formats,
            clip,
            temporal_factor=temporal_factor,
            mark=options.mark,
            side_by_side=options.side_by_side,
        )

    return make_output


def generate(
    batch: Sequence[Clip],
    plan: GenerationPlan,
    pipeline: GPDiTPipeline,
    make_output: Callable[[Clip], VideoOutput],
    bar: "tqdm[NoReturn]",
    sheets: ClassSheets | None,
) -> None:
    """Generate the videos of a batch and print their files; after Ctrl-C, those of the frames so far.

    Raises:
        KeyboardInterrupt: on Ctrl-C, after the files were completed.
    """
    interrupted = False
    with ExitStack() as files:
        opened = [files.enter_context(make_output(clip)) for clip in batch]
        try:
            context = pipeline.encode(batch)
            for clip, output, latents in zip(batch, opened, context.cpu(), strict=True):
                if clip.context.latents is None:
                    output.write(clip.context.pixels[:0], latents)
            for piece in pipeline.generate(batch, context, plan.config):
                with signals_delayed():  # so that all videos of a batch have the same frames
                    for clip, output, pixels, latents in zip(batch, opened, *piece, strict=True):
                        output.write(pixels, latents)
                        if sheets:
                            sheets.add(clip, pixels)
                bar.update(piece.pixels.shape[0] * piece.pixels.shape[1])
        except KeyboardInterrupt:
            interrupted = True
    for output in opened:
        if output.files and not sheets:
            bar.write(f"{output.frames_written} frames: {', '.join(str(path) for path in output.files)}")
    if interrupted:
        raise KeyboardInterrupt

"""Files of an evaluation: those of its chunks, kept videos and images, and the report."""

import logging
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from gpdit_lightning.errors import InputError, TransientError
from gpdit_lightning.evaluation.chunk_files import complete_chunks
from gpdit_lightning.evaluation.report import Protocol, Report
from gpdit_lightning.evaluation.report_text import RESULTS, TABLES, plot_self_checks, to_markdown, write_report
from gpdit_lightning.files import atomic_write, process_lock
from gpdit_lightning.media.video_writer import write_video
from gpdit_lightning.model import GPDiTConfig
from gpdit_lightning.options.evaluate import EvaluateOptions
from gpdit_lightning.regular_files import read_bounded
from gpdit_lightning.retries import NOT_WRITABLE_ERRORS

log = logging.getLogger(__name__)

VIDEOS, LOCK = "videos", ".lock"
FPS = 8  # of kept videos
# Fields of the protocol that do not affect the results of a chunk: chunks with different values may be combined.
FIELDS_WITHOUT_EFFECT = {"checkpoint", "hardware"}
FIELDS_OF_SAMPLES = {"medium", "samples", "reference", "manifold"}  # only in evaluations of samples


def settings_of_chunks(options: EvaluateOptions, protocol: Protocol, model: GPDiTConfig) -> dict[str, Any]:
    """Return everything that the results of a chunk depend on, as JSON values.

    The configuration of the model is among it, since exported models with the same file of weights may differ in it.
    """
    left_out = FIELDS_WITHOUT_EFFECT | (FIELDS_OF_SAMPLES if protocol.samples is None else set())
    settings = {name: value for name, value in asdict(protocol).items() if name not in left_out}
    of_options = {name: getattr(options, name) for name in ("chunk", "self_check_videos")}
    return settings | of_options | {"architecture": model.architecture()}


def are_finished(files: Collection[Path], settings: Mapping[str, Any], videos: Mapping[Path, Sequence[Path]]) -> bool:
    """Return whether the files of all chunks are complete; arguments as of `complete_chunks`.

    The log explains what follows if not.
    """
    if all(path.exists() for path in files) and complete_chunks(files, settings, videos) == set(files):
        return True
    log.info("this process has finished; the last one to finish writes the results (or run the same command again)")
    return False


def is_written(out: Path) -> bool:
    """Return whether a folder has a report whose two files agree; a warning says if they do not."""
    if not (out / TABLES).exists():  # this file is written last
        return False
    try:
        text = to_markdown(Report.load(out / RESULTS)).encode("utf-8", "backslashreplace")
        agrees = text == read_bounded(out / TABLES)
    except TransientError:
        raise
    except InputError:
        agrees = False
    if not agrees:
        log.warning("%s and %s do not agree: they are computed again", out / RESULTS, TABLES)
    return agrees


def write_and_print_report(out: Path, compute: Callable[[], Report]) -> None:
    """Write and print the report of a folder; compute it unless it is written. Only one process does so at a time.

    A report that is written is printed in a folder too that is not writable.
    """
    with suppress(BlockingIOError), ExitStack() as stack:
        try:
            stack.enter_context(process_lock(out / LOCK))
        except OSError as error:
            if error.errno not in NOT_WRITABLE_ERRORS or not is_written(out):
                raise
        if not is_written(out):
            report = compute()
            if report.self_checks:
                plot_self_checks(report, out / "self_checks.png")
            write_report(report, out)
        scores, _, _ = read_bounded(out / TABLES).decode().partition("\n## ")
        scores = re.sub(r"\*\*Missing:\*\* .*\n\n", "", scores)  # printed before the generation
        print(f"{scores}\nProtocol, self-checks and the paper's scores: {out / TABLES}")


def video_writer(
    folder: Path, variants: Iterable[str], kept: Iterable[str]
) -> Callable[[str, Sequence[str], Tensor], None]:
    """Return a callback for the evaluation of chunks that writes videos as mp4, and single frames as PNG.

    Args:
        folder: gets a subfolder for each variant.
        variants: that are written.
        kept: names of the videos or images that are written.
    """
    written, names_kept = set(variants), set(kept)

    def on_variant(variant: str, names: Sequence[str], videos: Tensor) -> None:
        for name, video in zip(names, videos, strict=True) if variant in written else ():
            if name in names_kept:
                write_clip(folder / variant.replace(" ", "_") / Path(name).with_suffix(""), video)

    return on_variant


def write_clip(path: Path, video: Tensor) -> None:
    """Write a video uint8 (T, 3, H, W) as mp4, or its only frame as PNG; the path has no extension."""
    if len(video) > 1:
        write_video(path.with_name(f"{path.name}.mp4"), video, FPS)
        return
    with atomic_write(path.with_name(f"{path.name}.png")) as temporary:
        Image.fromarray(video[0].permute(1, 2, 0).numpy()).save(temporary, format="PNG")

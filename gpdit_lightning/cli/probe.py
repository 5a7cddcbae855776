"""`probe`: what a linear classifier reads out of each layer of trained models (GPDiT, section 5.3)."""

import argparse
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tqdm.contrib.logging import logging_redirect_tqdm

from gpdit_lightning.checkpoints.reading import identity_of, place_of_weights
from gpdit_lightning.cli.argparse_options import Help, add_opening, opened, trained_sizes
from gpdit_lightning.errors import InputError
from gpdit_lightning.evaluation.report import Report
from gpdit_lightning.evaluation.videos import find_videos
from gpdit_lightning.files import written_whole
from gpdit_lightning.probing.probe import C_GRID, extract_layer_features, probe_layers
from gpdit_lightning.probing.report import (
    ProbeResult,
    make_protocol,
    markdown,
    plot_probe,
    write_json,
)
from gpdit_lightning.probing.splits import (
    UCF_NAME,
    UCF_TEST_GROUPS,
    LabelledVideo,
    split_by_folders,
    split_by_lists,
    split_by_ucf_groups,
)

log = logging.getLogger(__name__)

FOLDERS = "folders"


def parser() -> argparse.ArgumentParser:
    """The verb's options."""
    options = argparse.ArgumentParser(
        prog="python -m gpdit_lightning probe",
        description="Linear probing: classify videos by logistic regression on the frozen features of every layer "
        "(clean stream alone, theta = 0, mean over frames and tokens). Writes probe.json, probe.md and probe.png to "
        "--out. Features stay there too: a killed command goes on, and another --split takes no second pass.",
        formatter_class=Help,
    )
    add = options.add_argument
    add("--out", required=True, type=Path, help="folder for the results and, in features/, for what they are made of")

    add = options.add_argument_group("models").add_argument
    add(
        "--checkpoint",
        required=True,
        nargs="+",
        help="checkpoints, run folders or exported folders; several make the figure show accuracy against steps",
    )
    add(
        "--evaluations",
        nargs="+",
        default=[],
        type=Path,
        metavar="RESULTS.JSON",
        help="what `evaluate` wrote of these checkpoints: the figure shows accuracy against FVD",
    )

    add = options.add_argument_group("videos").add_argument
    add("--videos", required=True, nargs="+", help="folders of videos, searched in depth, and single videos")
    add(
        "--split",
        choices=[*map(str, UCF_TEST_GROUPS), FOLDERS],
        help="a published split of UCF-101, by the groups in "
        "file names; or `folders`: videos lie in train/CLASS and test/CLASS (default: 1, unless lists are given)",
    )
    add("--train_list", type=Path, help="file that lists the training half, a line CLASS/FILE, as UCF-101's trainlist")
    add("--test_list", type=Path, help="file that lists the test half")
    add(
        "--group_pattern",
        default=UCF_NAME,
        metavar="REGEX",
        help="with lists and folders: the part of a file's name, "
        "in parentheses, that videos share which are not independent (one recording, one person); '.+' where all are",
    )
    add("--frames", type=int, default=13, help="frames of the clip in the middle of each video, 1 + 4k")
    add("--stride", type=int, default=3, help="every stride-th frame; shorter videos are sampled more densely")
    add("--size", help="HEIGHTxWIDTH in pixels, one that was trained on (default: the first of these)")

    add = options.add_argument_group("computing").add_argument
    grid = ", ".join(f"{C:g}" for C in C_GRID)
    add(
        "--regularisation",
        default="auto",
        metavar="C",
        help="inverse strength of the L2 penalty; auto chooses for "
        f"each layer among {grid} by cross-validation over groups of the training half",
    )
    add("--batch_size", type=int, default=8, help="clips that the model takes at once; of no effect on the result")
    add("--workers", type=int, default=2, help="threads that read videos")
    add_opening(add)
    return options


def run(verb: str, arguments: Sequence[str]) -> None:
    """Extract, classify, and write."""
    options = parser().parse_args(arguments)
    regularisation = check(options)
    evaluations = [evaluation_at(path) for path in options.evaluations]
    check_alike(options.evaluations, evaluations)
    places = [place_of_weights(place) for place in options.checkpoint]
    halves, split = halves_of(list(dict.fromkeys(find_videos(options.videos))), options)
    with logging_redirect_tqdm([logging.getLogger("gpdit_lightning")]):
        results = [probe(place, halves, split, regularisation, options) for place in places]
    probed = {(result.identity, result.weights) for result in results}
    for path, evaluation in zip(options.evaluations, evaluations, strict=True):
        if (evaluation.protocol.checkpoint_sha256, evaluation.protocol.weights) not in probed:
            log.warning("warning: %s is of none of these checkpoints, so it is not drawn", path)
    write_json(results, options.out / "probe.json")
    with written_whole(options.out / "probe.md") as temporary:
        temporary.write_text(markdown(results))
    plot_probe(results, options.out / "probe.png", evaluations)
    print(f"{markdown(results)}\n{options.out / 'probe.json'}, probe.md, probe.png")


def check(options: argparse.Namespace) -> float | None:
    """Check what argparse does not; returns C, None for one that is chosen."""
    for name in ("frames", "stride", "batch_size", "workers"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name} is {getattr(options, name)}: give at least 1.")
    if (options.train_list is None) != (options.test_list is None):
        raise InputError("One list of videos is given: give both --train_list and --test_list.")
    if options.train_list and options.split:
        raise InputError(f"Both --split {options.split} and lists are given: leave one out.")
    if options.regularisation == "auto":
        return None
    try:
        C = float(options.regularisation)
    except ValueError:
        C = math.nan
    if not 0 < C < math.inf:
        raise InputError(f"--regularisation is {options.regularisation!r}: give auto or a number above 0.")
    return C


def evaluation_at(path: Path) -> Report:
    """What `evaluate` found; raises `InputError` where there is no FVD."""
    report = Report.load(path)
    if "fvd" not in report.scores:
        raise InputError(f"{path} holds no FVD: evaluate with a video network, or leave it out of --evaluations.")
    return report


def check_alike(paths: Sequence[Path], evaluations: Sequence[Report]) -> None:
    """Raise `InputError` where scores of evaluations do not belong on one axis, or two are of one checkpoint."""
    of_model = ("checkpoint", "checkpoint_sha256", "step", "weights", "hardware", "versions")
    seen: dict[tuple[str, str], Path] = {}
    for path, report in zip(paths, evaluations, strict=True):
        first, other = asdict(evaluations[0].protocol), asdict(report.protocol)
        for name in first:
            if name not in of_model and first[name] != other[name]:
                raise InputError(
                    f"{paths[0]} and {path} differ in {name} ({first[name]}, not {other[name]}), so that their FVD do "
                    "not compare: give evaluations of one protocol."
                )
        model = report.protocol.checkpoint_sha256, report.protocol.weights
        if model in seen:
            raise InputError(f"{seen[model]} and {path} are of one checkpoint: give one of them.")
        seen[model] = path


def halves_of(videos: Sequence[Path], options: argparse.Namespace) -> tuple[list[LabelledVideo], str]:
    """Classes and halves, and in words who divided them."""
    if options.train_list:
        names = f"lists {options.train_list.name} and {options.test_list.name}"
        return split_by_lists(videos, options.train_list, options.test_list, options.group_pattern), names
    if options.split == FOLDERS:
        return split_by_folders(videos, options.group_pattern), "folders train and test"
    split = int(options.split or 1)
    return split_by_ucf_groups(videos, split), f"UCF-101's published split {split}"


def probe(
    place: Path, halves: Sequence[LabelledVideo], split: str, regularisation: float | None, options: argparse.Namespace
) -> ProbeResult:
    """The probes of one checkpoint."""
    trained, codec = opened(argparse.Namespace(**vars(options) | {"checkpoint": place}))
    size = trained_sizes(options.size, trained)[0]
    pooled = extract_layer_features(
        trained.backbone,
        codec,
        sorted(video.path for video in halves),  # the same chunks in every split
        size,
        frames=options.frames,
        stride=options.stride,
        batch_size=options.batch_size,
        workers=options.workers,
        cache=options.out / "features",
        progress=True,
    )
    readable = set(pooled.paths)
    used = [video for video in halves if video.path in readable]
    return ProbeResult(
        checkpoint=str(place),
        identity=identity_of(place),
        step=trained.step,
        weights=trained.backbone.facts.get("weights", options.weights),
        codec=f"{codec.name} {codec.fingerprint}",
        layers=tuple(probe_layers(pooled, used, regularisation, progress=True)),
        protocol=make_protocol(
            used,
            left_out=len(halves) - len(used),
            squeezed=pooled.squeezed,
            regularisation=regularisation,
            data=", ".join(options.videos),
            split=split,
            frames=options.frames,
            stride=options.stride,
            size=size,
        ),
    )

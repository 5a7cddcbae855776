"""`probe`: linear classification of videos by the features of each layer of trained models (GPDiT, section 5.3)."""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from gpdit_lightning.checkpoints.reading import find_weights, load_trained_model
from gpdit_lightning.devices import available_device
from gpdit_lightning.errors import InputError
from gpdit_lightning.evaluation.report import Report, other_setting
from gpdit_lightning.evaluation.videos import find_videos
from gpdit_lightning.files import atomic_write, check_writable
from gpdit_lightning.generation.settings import layout_of, load_codec_of, trained_size
from gpdit_lightning.names import as_text
from gpdit_lightning.options.probe import ProbeOptions
from gpdit_lightning.options.shared import check_has_effect
from gpdit_lightning.probing.encoder import clip_frames
from gpdit_lightning.probing.layer_features import extract_layer_features
from gpdit_lightning.probing.probe import probe_layers
from gpdit_lightning.probing.report import (
    ProbeResult,
    make_protocol,
    markdown,
    plot_probe,
    write_json,
)
from gpdit_lightning.probing.splits import (
    LabelledVideo,
    fitting_split,
    split_by_folders,
    split_by_hash,
    split_by_lists,
    split_by_ucf_groups,
)
from gpdit_lightning.schema import differences

log = logging.getLogger(__name__)

PAPER_FRAMES = 13  # pixel frames of a clip (GPDiT, section 5.3)
# Fields of an evaluation's protocol that may differ between evaluations whose FVD are compared.
MODEL_FIELDS = ("checkpoint", "checkpoint_sha256", "step", "weights", "hardware", "versions")


def probe(options: ProbeOptions) -> None:
    """Extract features, fit the classifiers, and write probe.json, probe.md and probe.png.

    Features are kept in `out`, so a stopped command resumes, and another split does not run the model again.

    Raises:
        InputError: an option, a checkpoint, an evaluation or the videos cannot be used.
    """
    check_writable(options.out, is_folder=True)
    evaluations = read_evaluations(options.evaluations)
    checkpoints = [find_weights(checkpoint) for checkpoint in options.checkpoint]
    videos, split = split_videos(list(dict.fromkeys(find_videos(options.videos))), options)
    results = [probe_checkpoint(checkpoint, videos, split, options) for checkpoint in checkpoints]
    probed = {(result.identity, result.weights) for result in results}
    for path, evaluation in zip(options.evaluations, evaluations, strict=True):
        if (evaluation.protocol.checkpoint_sha256, evaluation.protocol.weights) not in probed:
            log.warning("warning: %s evaluates none of these checkpoints, so the figure does not include it", path)
    write_json(results, options.out / "probe.json")
    with atomic_write(options.out / "probe.md") as temporary:
        temporary.write_text(markdown(results), encoding="utf-8")
    plot_probe(results, options.out / "probe.png", evaluations)
    print(f"{markdown(results)}\n{options.out / 'probe.json'}, probe.md, probe.png")


def read_evaluations(paths: Sequence[Path]) -> list[Report]:
    """Read the reports of the evaluations whose FVD the figure shows.

    Raises:
        InputError: a report has no FVD, or two reports have different protocols or the same checkpoint.
    """
    reports = [Report.load(path) for path in paths]
    path_of_model: dict[tuple[str, str], Path] = {}
    for path, report in zip(paths, reports, strict=True):
        if "fvd" not in report.scores:
            raise InputError(f"{path} has no FVD: evaluate with a video network, or leave it out of --evaluations.")
        compared, of_first = (
            {name: value for name, value in asdict(one.protocol).items() if name not in MODEL_FIELDS}
            for one in (report, reports[0])
        )
        if different := list(differences(compared, of_first)):
            raise InputError(
                f"{path} has another {other_setting(different)} than {paths[0]}, so their "
                "FVD cannot be compared: give evaluations with the same settings."
            )
        model = report.protocol.checkpoint_sha256, report.protocol.weights
        if model in path_of_model:
            raise InputError(f"{path_of_model[model]} and {path} evaluate the same checkpoint: give one of them.")
        path_of_model[model] = path
    return reports


def split_videos(videos: Sequence[Path], options: ProbeOptions) -> tuple[list[LabelledVideo], str]:
    """Divide videos with their classes into training and test videos; return them and a description of the split."""
    pattern = options.group_pattern
    if options.train_list and options.test_list:
        description = f"lists {options.train_list.name} and {options.test_list.name}"
        return split_by_lists(videos, options.train_list, options.test_list, pattern), description
    split = options.split or fitting_split(videos)
    if split == "folders":
        return split_by_folders(videos, pattern), "folders train and test"
    if split == "classes":
        return split_by_hash(videos, pattern), "a quarter of the groups of each class as test videos, by a hash"
    check_has_effect(options, f"with split {split} of UCF-101, whose groups are in the file names", "group_pattern")
    return split_by_ucf_groups(videos, split), f"UCF-101's published split {split}"


def probe_checkpoint(
    checkpoint: Path, videos: Sequence[LabelledVideo], split: str, options: ProbeOptions
) -> ProbeResult:
    """Train and test a linear classifier on each layer of one checkpoint.

    Args:
        checkpoint: path of the checkpoint.
        videos: training and test videos.
        split: description of the split.
        options: of the verb.
    """
    trained = load_trained_model(checkpoint, available_device(options.device), options.weights)
    codec = load_codec_of(trained, options.codec, options.codec_source, str(checkpoint))
    size = trained_size(options.size, trained, [video.path for video in videos])
    frames = clip_frames(options.frames, trained, codec, layout_of(trained, codec), PAPER_FRAMES)
    stride = options.stride or trained.geometry.stride
    regularisation = None if options.regularisation == "auto" else options.regularisation
    features = extract_layer_features(
        trained.backbone,
        codec,
        sorted(video.path for video in videos),  # the same order for every split, so the cached features are reused
        size,
        frames=frames,
        stride=stride,
        batch_size=options.batch_size,
        workers=options.workers,
        cache=options.out / "features",
        progress=True,
        fps=trained.geometry.fps,
    )
    readable = set(features.paths)
    used = [video for video in videos if video.path in readable]
    return ProbeResult(
        checkpoint=as_text(checkpoint),
        identity=trained.sha256,
        step=trained.step,
        weights=trained.weights,  # a run may have no EMA weights
        codec=f"{codec.name} {codec.fingerprint}",
        layers=tuple(probe_layers(features, used, regularisation, progress=True)),
        protocol=make_protocol(
            used,
            left_out=len(videos) - len(used),
            num_resampled=features.num_resampled,
            regularisation=regularisation,
            data=as_text(", ".join(options.videos)),
            split=split,
            frames=frames,
            stride=stride,
            fps=trained.geometry.fps,
            size=size,
        ),
    )

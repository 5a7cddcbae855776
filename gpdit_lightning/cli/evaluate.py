"""`evaluate`: continue the videos of a data set, and score what comes (GPDiT, section 5.2)."""

import logging
import platform
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import ActionConfigFile
from torch import Tensor
from tqdm import tqdm

from gpdit_lightning.checkpoints.reading import TrainedModel, identity_of, load_trained_model, place_of_weights
from gpdit_lightning.cli.argparse_options import config_of, trained_sizes
from gpdit_lightning.cli.recipe_files import with_bases
from gpdit_lightning.cli.recipe_parser import RecipeParser
from gpdit_lightning.codecs import Codec, load_codec_from_spec
from gpdit_lightning.devices import available_device, rank_of_process
from gpdit_lightning.errors import InputError
from gpdit_lightning.evaluation.chunks import (
    GROUND_TRUTH,
    ChunkFiles,
    EvaluationSettings,
    MetricNetworks,
    evaluate_chunk,
    seed_variant,
    split_into_chunks,
    write_chunk,
)
from gpdit_lightning.evaluation.networks import open_image_network, open_video_network
from gpdit_lightning.evaluation.report import TABLES, Protocol, library_versions, plot_self_checks
from gpdit_lightning.evaluation.scores import make_report
from gpdit_lightning.evaluation.videos import Selection, find_videos, select_videos
from gpdit_lightning.files import held_by_one_process
from gpdit_lightning.generation import cast_linear_weights
from gpdit_lightning.media.video import write_video
from gpdit_lightning.options.evaluate import NetworkOptions

log = logging.getLogger(__name__)

CHUNKS, VIDEOS, LOCK = "chunks", "videos", ".lock"
FPS = 8  # of kept videos
LEAST = {"count": 2, "generated_frames": 1, "stride": 1, "chunk": 1, "self_check_videos": 0, "keep_videos": 0}
# What a report says of the protocol, and what does not change the scores.
ONLY_SAID = {"checkpoint", "hardware"}


@dataclass(frozen=True)
class EvaluationOptions:
    """What to evaluate, on which videos, and by whose eyes."""

    checkpoint: str
    """A checkpoint, a run folder or an exported folder."""
    videos: list[str]
    """Folders of videos, searched in depth, and single videos."""
    data: str
    """The data set's name, for the report."""
    out: str
    """Folder for the results and for what they are made of; the same command goes on in it."""
    count: int = 10000
    """Videos to continue (paper: 10,000 of UCF-101, 7,000 of MSR-VTT)."""
    selection_seed: int = 0
    """Of the drawing of videos, by a hash of their names."""
    context_frames: int = 5
    """Frames that are given, 1 + 4k (paper: 5)."""
    generated_frames: int = 12
    """Frames to generate (paper: 12)."""
    stride: int | None = None
    """Every stride-th frame of a video; by default as the checkpoint was trained."""
    size: str | None = None
    """HEIGHTxWIDTH in pixels, one that was trained on; needed where there are several."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Of the noise: every seed continues all videos, and scores are given as mean and deviation over them."""
    sampler: str = "rotation"
    """From noise to a frame; see docs/generation.md."""
    steps: int = 25
    """Sampler steps for each latent frame."""
    guidance: float = 1.0
    """Scale over the context (paper: 1.2 for H, 2.0 for B)."""
    guidance_levels: tuple[float, float] = (0.0, 1.0)
    """Noise levels that are guided."""
    window: int | None = None
    """Latest latent frames that a frame sees; by default as many as in training."""
    precision: Literal["auto", "32", "bf16"] = "auto"
    """Of products; auto is bf16 on CUDA, else 32."""
    weights: Literal["ema", "raw"] = "ema"
    """Averaged or last trained weights."""
    codec_source: str | None = None
    """Where the codec's weights are now, if they moved since preparation."""
    video_network: NetworkOptions | None = None
    """The I3D network behind FVD, precision and recall; without, these are left out."""
    image_network: NetworkOptions | None = None
    """The Inception network behind FID; without, it is left out."""
    classifier: NetworkOptions | None = None
    """The classifier behind IS, where the image network does not know classes."""
    fvd_frames: Literal["all", "generated"] = "all"
    """Whether the video network sees the context too (paper: entire videos)."""
    self_check_videos: int = 512
    """Videos whose truth is made noisy and blurred, to see the distances rise; 0 for none."""
    keep_videos: int = 0
    """Continuations to keep as mp4 beside their truth: of the first so many videos, where they are still to come."""
    chunk: int = 16
    """Videos side by side, and lost at most when a process is killed; scores do not depend on processes, but their last
    digits do on this."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""


def read_options(arguments: Sequence[str]) -> EvaluationOptions:
    """The options of the command line and its recipes; raises `InputError` for those that cannot be used."""
    parser = RecipeParser(
        prog="python -m gpdit_lightning evaluate",
        description="Continue the videos of a data set and score the result: FID, IS, FVD, precision, recall, PSNR and "
        "SSIM, with self-checks. Under torchrun or srun the processes share the work; ended anywhere, the same command "
        "goes on. See docs/evaluation.md.",
        parser_mode="omegaconf+",
    )
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="A recipe; later ones override.")
    parser.add_argument("--base", type=str | list[str], default=[], help="Recipes that this one builds on.")
    parser.add_class_arguments(EvaluationOptions)
    settings = parser.instantiate_classes(parser.parse_args(with_bases(arguments)))
    options = EvaluationOptions(**{field.name: settings[field.name] for field in fields(EvaluationOptions)})
    for name, least in LEAST.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise InputError(f"{name} is {value}: give at least {least}.")
    if not options.seeds or min(options.seeds) < 0 or len(set(options.seeds)) < len(options.seeds):
        raise InputError(f"the seeds are {options.seeds}: give one or more, each once, from 0 on.")
    return options


def run(verb: str, arguments: Sequence[str]) -> None:
    """Continue, look, and write the report when nothing is left to do."""
    options = read_options(arguments)
    rank, ranks, _ = rank_of_process()
    device = available_device("auto" if options.device == "cuda" and torch.cuda.is_available() else options.device)
    place_of_weights(options.checkpoint)  # what is cheap to check comes before a model of gigabytes
    find_videos(options.videos)
    networks = open_networks(options, device)
    trained = load_trained_model(options.checkpoint, device, options.weights)
    codec = load_codec_from_spec(trained.codec, device, options.codec_source, where=options.checkpoint)
    task = task_of(options, trained, codec, networks)
    span = 1 + (task.frames - 1) * task.stride
    selection = select_videos(options.videos, options.count, options.selection_seed, span, progress=rank == 0)
    protocol = protocol_of(options, task, trained, selection, networks)
    if task.generation.autocast_dtype is not None:
        cast_linear_weights(trained.backbone, task.generation.autocast_dtype)

    out = Path(options.out)
    made_by = {name: value for name, value in asdict(protocol).items() if name not in ONLY_SAID}
    made_by |= {name: getattr(options, name) for name in ("chunk", "self_check_videos")}
    ChunkFiles(sorted((out / CHUNKS).glob("*.safetensors")), made_by)  # raises where they are not ours
    chunks = split_into_chunks(selection, options.chunk)
    files = {chunk: out / CHUNKS / f"{chunk.start:06d}.safetensors" for chunk in chunks}
    mine = [chunk for chunk in chunks[rank::ranks] if not files[chunk].exists()]
    if mine:
        (out / TABLES).unlink(missing_ok=True)
    keep = video_writer(out / VIDEOS, options.keep_videos, task, selection.names)
    with tqdm(
        total=sum(len(chunk.names) for chunk in mine), desc="continuing", unit=" videos", disable=rank > 0
    ) as bar:
        for chunk in mine:
            write_chunk(files[chunk], *evaluate_chunk(chunk, task, trained.backbone, codec, networks, keep), made_by)
            bar.update(len(chunk.names))
    if not all(path.exists() for path in files.values()):
        log.info("done; the process that ends last writes the results, or the same command once more")
        return
    with suppress(BlockingIOError), held_by_one_process(out / LOCK):
        if not (out / TABLES).exists():  # which is written last
            found = ChunkFiles(list(files.values()), made_by)
            report = make_report(found, protocol, lost=set(selection.names) - set(found.names))
            if report.self_checks:
                plot_self_checks(report, out / "self_checks.png")
            report.write(out)
        scores, _, _ = (out / TABLES).read_text(encoding="utf-8").partition("\n## ")
        print(f"{scores}\nProtocol, self-checks and the paper's scores: {out / TABLES}")


def open_networks(options: EvaluationOptions, device: torch.device) -> MetricNetworks:
    """The networks that the options name.

    Raises:
        InputError: a classifier alone, or as the functions that open them.
    """
    if options.classifier is not None and options.image_network is None:
        raise InputError("a classifier is given without an image_network: give both, since frames pass them together.")
    video = open_video_network(options.video_network, device) if options.video_network else None
    image = open_image_network(options.image_network, device, options.classifier) if options.image_network else None
    for name, network in (("video_network", video), ("image_network", image)):
        if network is None:
            log.warning("warning: no %s is given, so its scores are left out", name)
    if image is not None and not image.has_classes:
        log.warning("warning: the image_network knows no classes and no classifier is given, so IS is left out")
    return MetricNetworks(video, image)


def task_of(
    options: EvaluationOptions, trained: TrainedModel, codec: Codec, networks: MetricNetworks
) -> EvaluationSettings:
    """What is done to every video.

    Raises:
        InputError: no size where several were trained on, frames that make no latents or are too few for the video
            network, or a model that takes texts.
    """
    sizes = trained_sizes(options.size, trained)
    if len(sizes) > 1:
        known = ", ".join(f"{height}x{width}" for height, width in sizes)
        raise InputError(f"the checkpoint was trained on {known}: give one of them as size, since scores are of one.")
    if trained.backbone.config.text_width:
        raise InputError(f"{options.checkpoint} takes embeddings of texts, which videos lack: give another model.")
    codec.latent_frames(options.context_frames)
    seen_in_training = max(1, trained.geometry.frames - 1)
    window = seen_in_training if options.window is None else options.window
    if window > seen_in_training:
        log.warning(
            "warning: the window is %d latent frames, but in training a frame saw at most %d: farther ones may do harm",
            window,
            seen_in_training,
        )
    task = EvaluationSettings(
        context_frames=options.context_frames,
        generated_frames=options.generated_frames,
        stride=options.stride or trained.geometry.stride,
        size=sizes[0],
        seeds=tuple(options.seeds),
        generation=config_of(options, trained, window=window),
        video_of_all=options.fvd_frames == "all",
        self_check_videos=options.self_check_videos,
    )
    if networks.video is not None:
        networks.video.check_frames(task.frames if task.video_of_all else task.generated_frames)
    return task


def protocol_of(
    options: EvaluationOptions,
    task: EvaluationSettings,
    trained: TrainedModel,
    selection: Selection,
    networks: MetricNetworks,
) -> Protocol:
    """All that the scores depend on."""
    roles = {
        "video": networks.video,
        "image": networks.image,
        "classifier": networks.image and networks.image.classifier,
    }
    device = next(trained.backbone.parameters()).device
    return Protocol(
        data=options.data,
        choice=f"the first by a hash of their names and the seed {options.selection_seed} of those that are long "
        "enough; a clip begins with its video",
        split_sha256=selection.sha256,
        videos=len(selection.names),
        context_frames=task.context_frames,
        generated_frames=task.generated_frames,
        fvd_frames=options.fvd_frames,
        size=task.size,
        stride=task.stride,
        resize="short side scaled, then cropped in the middle",
        sampler=options.sampler,
        steps=options.steps,
        guidance=task.generation.guidance,
        schedule=trained.schedule,
        seeds=task.seeds,
        window=task.generation.window,
        precision=str(task.generation.autocast_dtype or torch.float32).removeprefix("torch."),
        checkpoint=options.checkpoint,
        checkpoint_sha256=identity_of(place_of_weights(options.checkpoint)),
        step=trained.step,
        weights=trained.weights,
        codec=trained.codec.name,
        codec_sha256=trained.codec.fingerprint,
        networks={role: network.record for role, network in roles.items() if network is not None},
        versions=library_versions(),
        hardware=torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
    )


def video_writer(
    folder: Path, most: int, task: EvaluationSettings, first: Sequence[str]
) -> Callable[[str, Sequence[str], Tensor], None]:
    """What writes the truth and the continuations of the first videos as mp4."""
    wanted = set(first[:most])

    def keep(subject: str, names: Sequence[str], videos: Tensor) -> None:
        if subject == GROUND_TRUTH or subject in map(seed_variant, task.seeds):
            for name, video in zip(names, videos, strict=True):
                if name in wanted:
                    write_video(folder / subject.replace(" ", "_") / f"{Path(name).with_suffix('')}.mp4", video, FPS)

    return keep

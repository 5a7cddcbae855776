"""The readers of the library: what is damaged, the command that reads it, and what the command gives."""

import hashlib
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import av
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.fuzz.corpus import ABLATE, EVALUATE, FEATURES, PAIRS, PREPARE, SAMPLE, SCORE_SAMPLES
from gpdit_lightning.app.uploads import UploadLimits, read_upload
from gpdit_lightning.cli import main as command
from gpdit_lightning.data.manifest import Manifest
from gpdit_lightning.data.shards import ShardReader
from gpdit_lightning.errors import InputError
from gpdit_lightning.generation.pipeline import GPDiTPipeline
from gpdit_lightning.media.containers import open_video
from gpdit_lightning.media.decoding import decoded_frames
from gpdit_lightning.names import printable
from gpdit_lightning.probing.features import CHECKSUMS, SOURCES
from gpdit_lightning.regular_files import sha256_of

OUT = "out"


@dataclass(frozen=True)
class Target:
    """A command that reads files of one kind.

    Attributes:
        name: for reports.
        files: patterns of the files that are damaged, in the corpus.
        needs: entries of the corpus that are copied.
        arguments: verb and options; `{file}` stands for the damaged file.
        result: returns what the command has computed; None to compare the printed lines.
        detects: whether the command must report every change of the files, even if it uses none of them.
        is_uploaded: whether the file is one that was uploaded, so that it exists and is a regular one.
        covered: whether hashes of the files are recorded elsewhere.
        command: called with the arguments; returns the exit status.
    """

    name: str
    files: Sequence[str]
    needs: Sequence[str]
    arguments: Sequence[str]
    result: Callable[[], Any] | None
    detects: bool = False
    covered: bool = True
    is_uploaded: bool = False
    command: Callable[[Sequence[str]], int] = command


def trained_weights(run: str = OUT) -> str:
    """Return a hash of the weights of a run's last checkpoint."""
    path = Path(run, "checkpoints", "last.ckpt", "training.ckpt")
    return state_sha256(torch.load(path, map_location="cpu", weights_only=True)["state_dict"])


def written_files(folder: str = OUT) -> dict[str, str]:
    """Return the hashes of the files in the output folder, or of the file."""
    out = Path(folder)
    files = [
        path
        for path in out.rglob("*")
        if path.is_file() and not path.name.startswith((".", "README", CHECKSUMS, SOURCES))
    ]
    return {str(path): content_sha256(path) for path in files or [next(Path().glob(f"{folder}.*"))]}


def content_sha256(path: Path) -> str:
    """Return a hash of a file: of safetensors, whose metadata have a random order, that of the tensors; of JSON, that
    of its values.
    """
    if path.suffix == ".json":
        with suppress(ValueError):
            return hashlib.sha256(json.dumps(json.loads(path.read_bytes()), sort_keys=True).encode()).hexdigest()
    return state_sha256(load_file(path)) if path.suffix == ".safetensors" else sha256_of(path)


def state_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of named tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def evaluated(folder: str = OUT) -> Any:
    """Return the scores of an evaluation, and what its report says, without the hash of the file of a reference.

    That hash changes with the order of the metadata, which means nothing.
    """
    text = re.sub("sha256 [0-9a-f]{64}", "", Path(folder, "results.md").read_text())
    return json.loads(Path(folder, "results.json").read_text())["scores"], text


def ablated() -> Any:
    """Return the results of an ablation without its times."""
    arms = json.loads(Path("ablation", "results.json").read_text())["arms"]
    return [[arm["name"], arm["overrides"], arm["steps"], arm["loss"]] for arm in arms]


def planned() -> Any:
    """Return the data of a planned recipe; what it prints contains measured times."""
    return yaml.safe_load(Path(f"{OUT}.yaml").read_text())["data"]


def prepared(folder: str = OUT) -> dict[str, str]:
    """Return a hash of every sample of a folder, by its source and first frame; a repeated one has another name."""
    samples: dict[str, str] = {}
    manifest = Manifest.load(folder)
    for entry in manifest.shards:
        reader = ShardReader(manifest.directory, entry)
        for number in range(len(reader)):
            latents, metadata = reader.read(number)
            name = f"{metadata['source']} {metadata.get('first_frame')}"
            samples[f"{name} again" if name in samples else name] = hashlib.sha256(latents.tobytes()).hexdigest()
    return samples


def annotated() -> dict[str, Any]:
    """Return split, label and caption of every sample of a folder, by its source."""
    manifest, found = Manifest.load(OUT), dict[str, Any]()
    for entry in manifest.shards:
        reader = ShardReader(manifest.directory, entry)
        for number in range(len(reader)):
            metadata = reader.read(number)[1]
            found[metadata["source"]] = [entry.split, metadata.get("label"), metadata.get("caption")]
    return found


def upload(arguments: Sequence[str]) -> int:
    """Read a file as the web page does with an upload; write the pixels of the context."""
    try:
        pipeline = GPDiTPipeline.from_pretrained("model")
        read = read_upload(Path(arguments[1]), Path(arguments[1]).name, pipeline, UploadLimits(10, 60.0))
    except InputError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    Path(OUT).mkdir()
    Path(OUT, "pixels").write_bytes(read.context.pixels.numpy().tobytes())
    return 0


def uses_marked_frames(path: Path) -> bool:
    """Return whether the library uses a frame that FFmpeg marks as corrupt, by an independent decoding with PyAV."""
    marked = set()
    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            stream = container.streams.video[0]
            stream.thread_count = 1
            for packet in container.demux(stream):
                try:
                    marked |= {_identity(frame) for frame in packet.decode() if frame.is_corrupt}
                except av.FFmpegError:
                    continue
    except (av.FFmpegError, OSError, IndexError, ValueError):
        pass
    try:
        if marked:
            with open_video(path) as video:
                return any(_identity(decoded.frame) in marked for decoded in decoded_frames(video))
    except InputError:
        pass
    return False


def _identity(frame: "av.VideoFrame") -> tuple[int | None, str]:
    return frame.pts, hashlib.sha256(b"".join(bytes(plane) for plane in frame.planes)).hexdigest()


FIT = ("fit", "--config=recipe.yaml", f"--run_dir={OUT}")
VALIDATE = ("validate", "--config=recipe.yaml", "--run_dir=run")
VERIFY = ("inspect", "latents", "--verify", "--workers=1")
SAMPLED = ("sample", "--frames=5", "--steps=1", "--device=cpu", f"--out={OUT}.safetensors")
CONTINUED = ("sample", "--checkpoint=model", *SAMPLE, f"--out={OUT}.safetensors")
PREPARED = ("prepare", f"--out={OUT}", *PREPARE)
MADE_PAIRS = ("prepare-pairs", f"--out={OUT}", *PAIRS)
TRANSFORM = (
    *("transform", "--checkpoint=few_shot_model", "--task=grayscale", "--examples=images", "--source={file}"),
    *("--steps=1", "--device=cpu", f"--out={OUT}.png"),
)
DATA = ("latents", "base.yaml", "recipe.yaml")


def _prepared_data(pattern: str) -> tuple[Target, ...]:
    """Return the readers of shards, or of their indexes."""
    files = (f"latents/{pattern}",)
    videos = (f"latents/train-video-{pattern}",)
    return (
        Target("fit", files, DATA, FIT, trained_weights),
        Target("inspect --verify", files, ("latents",), VERIFY, None, detects=True),
        Target("validate", files, (*DATA, "run"), VALIDATE, None),
        Target("sample", videos, ("latents", "model"), (*CONTINUED, "--context={shard}#0"), written_files),
    )


def _manifests() -> tuple[Target, ...]:
    manifest = ("latents/manifest.json",)
    state = ("latents/preparation/*.json", "latents/preparation/*.jsonl", "latents/*.jsonl", *manifest)
    again = ("prepare", "--videos=videos", "--images=images", "--out=latents", *PREPARE)
    plan = ("plan", "--data_dir=latents", "--no_trial", f"--out={OUT}.yaml")
    return (
        Target("fit", manifest, DATA, FIT, trained_weights),
        Target("inspect", manifest, ("latents",), ("inspect", "latents"), None),
        Target("inspect --verify", manifest, ("latents",), VERIFY, None),
        Target("plan", manifest, ("latents",), plan, planned),
        Target("prepare again", state, ("latents", "videos", "images"), again, partial(prepared, "latents")),
        Target("inspect --why", state, ("latents",), ("inspect", "latents", "--why", "a.mp4"), None, covered=False),
    )


def _models(files: Sequence[str], name: str) -> tuple[Target, ...]:
    """Return the readers of a run's checkpoint, or of an exported model."""
    checkpoint, initial = f"--checkpoint={name}", f"--model.init_args.initial_weights={name}"
    return (
        Target("sample", files, (name,), (*SAMPLED, checkpoint), written_files),
        Target("features", files, (name, "videos"), (*FEATURES, checkpoint, f"--out={OUT}"), written_files),
        Target("initial weights", files, (*DATA, name), (*FIT, initial), trained_weights),
    )


def _checkpoints(run: str) -> tuple[Target, ...]:
    files = (f"{run}/checkpoints/step-2.ckpt/*", f"{run}/checkpoints/*.complete")
    of_run = ("--config=recipe.yaml", f"--run_dir={run}")
    resume, export = ("fit", *of_run, "--trainer.max_steps=3"), ("export", f"--checkpoint={run}", f"--out={OUT}")
    return (
        *_models(files, run),
        Target("resume", files, (*DATA, run), resume, partial(trained_weights, run)),
        Target("validate", files, (*DATA, run), ("validate", *of_run), None),
        Target("export", files, (run,), export, written_files),
    )


def _exports() -> tuple[Target, ...]:
    targets = _models(("model/model.safetensors", "model/config.json"), "model")
    return (*targets, Target("evaluate", targets[0].files, ("model", "videos"), (*EVALUATE, f"--out={OUT}"), evaluated))


def _recipes() -> tuple[Target, ...]:
    files, recipe = ("recipe.yaml", "base.yaml"), "--config=recipe.yaml"
    targets = (
        Target("fit", files, DATA, (*FIT, "--trainer.max_steps=1"), trained_weights),
        Target("fit --print_config", files, DATA, ("fit", recipe, "--print_config"), None),
        Target("estimate", files, DATA, ("estimate", recipe), None),
        Target("validate", files, (*DATA, "run"), VALIDATE, None),
    )
    return tuple(replace(target, covered=False) for target in targets)


def _annotations() -> tuple[Target, ...]:
    needs = ("annotations", "images")
    prepare = (*PREPARED, "--images=images")
    folder = "annotations"
    ucf = tuple(f"{folder}/{name}.txt" for name in ("trainlist01", "testlist01", "classInd"))
    kit = tuple(f"{folder}/{name}.txt" for name in ("map_clsloc", "truth", "synset_words"))
    kaggle = tuple(f"{folder}/{name}" for name in ("synset_words.txt", "val.txt", "LOC_val_solution.csv"))
    tables = (f"{folder}/rows.*", f"{folder}/*.json")
    targets = (
        Target("prepare by a table", tables, needs, (*prepare, "--annotations={file}"), annotated),
        Target("prepare by lists", ucf, needs, (*prepare, "--annotations", *ucf), annotated),
        Target("prepare by ImageNet's kit", kit, needs, (*prepare, "--annotations", *kit), annotated),
        Target("prepare by Kaggle's lists", kaggle, needs, (*prepare, "--annotations", *kaggle), annotated),
        Target("prepare a list", (f"{folder}/images.txt",), needs, (*PREPARED, "--images={file}"), annotated),
        Target(
            "prepare labelled tars", ("tars/*",), ("tars",), (*PREPARED, "--labels", "--image_tars=tars"), annotated
        ),
    )
    return tuple(replace(target, covered=False) for target in targets)


def _curves() -> tuple[Target, ...]:
    """Return the readers of the curves of runs and of references."""
    run, needs = ("run/events*", "run/config.yaml"), ("run", "reference.json")
    diagnose = ("diagnose", "run", f"--out={OUT}.png")
    of_runs = ("diagnose", "run", "--reference", "sharded_run", f"--out={OUT}.png")
    targets = (
        Target("diagnose", run, needs, diagnose, None),
        Target("diagnose by a file", ("reference.json",), needs, (*diagnose, "--reference=reference.json"), None),
        Target("diagnose by a run", ("sharded_run/events*",), ("run", "sharded_run"), of_runs, None),
    )
    return tuple(replace(target, covered=False) for target in targets)


def _results() -> tuple[Target, ...]:
    """Return the commands that read results of earlier ones again."""
    data, again = ("model", "videos"), ("evaluation/*", "evaluation/chunks/*")
    scores = ("scores/*", "scores/chunks/*", "scores/reference/*")
    new = (*SCORE_SAMPLES, "--reference=scores/reference.safetensors", f"--out={OUT}")
    ablation = (*DATA, "ablation")
    return (
        Target(
            "evaluate again",
            again,
            (*data, "evaluation"),
            (*EVALUATE, "--out=evaluation"),
            partial(evaluated, "evaluation"),
        ),
        Target(
            "score samples again",
            scores,
            (*data, "scores"),
            (*SCORE_SAMPLES, "--videos=videos", "--out=scores"),
            partial(evaluated, "scores"),
        ),
        Target("score by a reference", ("scores/reference.safetensors",), ("model", "scores"), new, evaluated),
        Target(
            "features again",
            ("features/*",),
            (*data, "features"),
            (*FEATURES, "--checkpoint=model", "--out=features"),
            partial(written_files, "features"),
        ),
        Target("ablate again", ("ablation/*.*",), ablation, ABLATE, ablated, covered=False),
    )


def _media() -> tuple[Target, ...]:
    videos, images, context = ("videos/*",), ("images/*",), "--context={file}"
    image = [word for word in CONTINUED if "context_frames" not in word]
    both = ("videos", "images", "model")
    targets = (
        Target("prepare videos", videos, ("videos",), (*PREPARED, "--videos=videos"), prepared),
        Target("prepare images", images, ("images",), (*PREPARED, "--images=images"), prepared),
        Target("prepare tars", ("tars/*",), ("tars",), (*PREPARED, "--image_tars=tars"), prepared),
        Target("prepare pairs", images, ("images",), (*MADE_PAIRS, "--sources=images"), prepared),
        Target("transform", images, ("images", "few_shot_model"), TRANSFORM, written_files),
        Target("sample after a video", videos, ("videos", "model"), (*CONTINUED, context), written_files),
        Target("sample after an image", images, ("images", "model"), (*image, context), written_files),
        Target(
            "upload", (*videos, *images), both, ("upload", "{file}"), written_files, is_uploaded=True, command=upload
        ),
        Target("evaluate", videos, ("videos", "model"), (*EVALUATE, f"--out={OUT}"), evaluated),
        Target(
            "features", videos, ("videos", "model"), (*FEATURES, "--checkpoint=model", f"--out={OUT}"), written_files
        ),
    )
    return tuple(replace(target, covered=False) for target in targets)


TARGETS: Mapping[str, Sequence[Target]] = {
    "shards": _prepared_data("*.tar"),
    "indexes": _prepared_data("*.index.npy"),
    "manifests": _manifests(),
    "checkpoints": _checkpoints("run"),
    "parts": _checkpoints("sharded_run"),
    "exports": _exports(),
    "recipes": _recipes(),
    "media": _media(),
    "annotations": _annotations(),
    "curves": _curves(),
    "results": _results(),
}
KINDS = tuple(TARGETS)

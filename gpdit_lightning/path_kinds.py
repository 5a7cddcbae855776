"""What a path holds, for messages about a path of another kind than an option takes.

The kinds are recognized by the names of files, whose content is not read. What cannot be searched, such as a folder of
another user, counts as not found, so that a message about one path does not become an error about another.
"""

import os
from itertools import islice
from os.path import isdir, isfile  # unlike the methods of `Path`, False after any error
from pathlib import Path
from typing import Literal, NamedTuple

from gpdit_lightning.names import as_text

Kind = Literal["run", "checkpoint", "data", "recipe", "media"]
Medium = Literal["video", "image"]

CHECKPOINTS, TRAINING = "checkpoints", "training.ckpt"  # the folder in a run folder, a file of a checkpoint
RECIPE = "config.yaml"  # of a run folder
MANIFEST = "manifest.json"  # of prepared data
EXPORTED_CONFIG, EXPORTED_WEIGHTS = "config.json", "model.safetensors"
# Extensions in common use of the formats that FFmpeg reads, without those of sound, subtitles and still images.
VIDEO_EXTENSIONS = (
    *(".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ts", ".gif"),
    *(".3g2", ".3gp", ".amv", ".apng", ".asf", ".av1", ".dav", ".dif", ".divx", ".dv", ".f4v", ".flc", ".fli", ".gxf"),
    *(".264", ".265", ".266", ".h261", ".h263", ".h264", ".h265", ".hevc", ".ismv", ".ivf", ".jpgv", ".m1v", ".m2p"),
    *(".m2t", ".m2ts", ".m2v", ".mj2", ".mjpeg", ".mjpg", ".mk3d", ".mod", ".movie", ".mp4v", ".mpe", ".mpv", ".mts"),
    *(".mxf", ".nsv", ".nut", ".obu", ".ogm", ".ogv", ".ogx", ".qt", ".rm", ".rmvb", ".roq", ".swf", ".tod", ".tp"),
    *(".trp", ".vc1", ".vob", ".vro", ".vvc", ".wm", ".wtv", ".xvid", ".y4m"),
)
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff")
# Also those of common images that Pillow cannot read: a search finds them, so that each is reported.
SEARCHED_EXTENSIONS = (*IMAGE_EXTENSIONS, ".heic", ".heif", ".hif", ".jxl")
EXTENSIONS: dict[Medium, tuple[str, ...]] = {"video": VIDEO_EXTENSIONS, "image": SEARCHED_EXTENSIONS}

TAKEN_BY: dict[Kind, str] = {
    "run": "`sample --checkpoint`",
    "checkpoint": "`sample --checkpoint`",
    "data": "`fit --data_dir`",
    "recipe": "`fit --config`",
    "media": "`prepare`",
}
NOUNS: dict[Medium, str] = {"video": "a video", "image": "an image"}
SEARCHED = 1000  # entries of a folder
MAX_LISTED = 5  # paths in a message
NUM_PARENTS = 3


class Found(NamedTuple):
    """What a path holds.

    Attributes:
        kind: its kind; None for another one.
        noun: with an article, for messages.
        medium: of a video or image, or a folder with some.
    """

    kind: Kind | None
    noun: str
    medium: Medium | None = None


def found_at(path: Path) -> Found:
    """Return what an existing path holds."""
    if not isdir(path):
        return _found_in_file(path)
    if marked := _marked(path):
        return marked
    entries = _entries(path)
    if entries is None:
        return Found(None, "a folder that cannot be read")
    media = (medium for entry in entries if (medium := _found_in_file(entry).medium) and isfile(entry))
    if medium := next(media, None):
        return Found("media", f"a folder with {medium}s", medium)
    return Found(None, "a folder" if entries else "an empty folder")


def reason_and_cure(path: Path, wanted: Kind, cure: str) -> str:
    """Return why a path does not hold what an option takes, with the cure, as the end of a sentence.

    For example "since it is a video: prepare it with `...`, and give latents/mine" or "since it does not exist: ...".

    Args:
        path: local.
        wanted: what the option takes.
        cure: for a path of which nothing better is known.
    """
    if not os.path.exists(path):  # unlike `Path.exists`, False for a name that is too long
        return f"since it {does_not_exist(path)}: {cure}"
    found = found_at(path)
    inside = _inside(path, wanted) if isdir(path) and path.name != CHECKPOINTS else []
    if inside:
        reason = "since it is a folder of such folders" if wanted != "recipe" else f"since it is {found.noun}"
        if len(inside) == 1:
            return f"{reason}: give {inside[0]}"
        if len(inside) <= MAX_LISTED:
            how_many = "some" if wanted == "data" else "one"
            return f"{reason}: give {how_many} of those in it: {' '.join(map(str, inside))}"
        return f"{reason}: give one of the {len(inside)} in it, such as {inside[0]}"
    reason = f"since it is {found.noun}"
    if found.kind != "media" and (near := _above(path, wanted)):
        return f"{reason}: give {near}"
    if wanted == "data" and found.medium:
        command = f"python -m gpdit_lightning prepare --{found.medium}s {path} --out latents/mine"
        return f"{reason}: prepare it first, with `{command}`, and give latents/mine"
    if wanted == "checkpoint" and found.kind == "run":
        return f"{reason} without one: {cure}"
    return f"{reason}: {cure}{f' ({TAKEN_BY[found.kind]} takes this one)' if found.kind else ''}"


def does_not_exist(path: str | Path) -> str:
    r"""Return the words "does not exist" for a message about a path.

    They name the working directory for a relative path, and the cure for one with the `\` of Windows on another system.
    """
    if os.sep != "\\" and "\\" in str(path):
        return "does not exist (folders are separated by /, not by \\)"
    if os.path.isabs(path):
        return "does not exist"
    try:
        return f"does not exist in {as_text(os.getcwd())}"
    except OSError:  # it was removed
        return "does not exist"


def _marked(folder: Path) -> Found | None:
    """Return what a folder holds by the names that only a run, a model or data have; None for another one."""
    if isfile(folder / TRAINING):
        return Found("checkpoint", "a checkpoint")
    if isdir(folder / CHECKPOINTS):
        return Found("run", "a run folder")
    if isfile(folder / EXPORTED_WEIGHTS):
        return Found("checkpoint", "an exported model")
    return Found("data", "a folder of prepared data") if isfile(folder / MANIFEST) else None


def _found_in_file(path: Path) -> Found:
    suffix, folder = path.suffix.lower(), path.parent
    if suffix in (".yaml", ".yml"):
        return Found("recipe", "a recipe")
    if path.name == MANIFEST:
        return Found("data", "the manifest of prepared data")
    if suffix == ".tar" and isfile(folder / MANIFEST):
        return Found("data", "a shard of prepared data")
    if suffix in (".ckpt", ".safetensors") and isfile(folder / TRAINING):
        return Found("checkpoint", "a file of a checkpoint")
    if path.name in (EXPORTED_CONFIG, EXPORTED_WEIGHTS) and isfile(folder / EXPORTED_WEIGHTS):
        return Found("checkpoint", "a file of an exported model")
    medium = next((medium for medium, extensions in EXTENSIONS.items() if suffix in extensions), None)
    return Found("media", NOUNS[medium], medium) if medium else Found(None, "a file")


def _entries(folder: Path) -> list[Path] | None:
    """Return some entries of a folder that are not hidden; None if it cannot be read."""
    try:
        return [entry for entry in islice(folder.iterdir(), SEARCHED) if not entry.name.startswith(".")]
    except OSError:
        return None


def _holds(path: Path, wanted: Kind) -> bool:
    """Return whether an option that takes a kind takes this path: a folder, or the file of a recipe."""
    if wanted == "recipe":
        return not isdir(path) and _found_in_file(path).kind == wanted
    marked = _marked(path)  # its files are not searched: a folder may contain a thousand folders of images
    return marked is not None and marked.kind in (("checkpoint", "run") if wanted == "checkpoint" else (wanted,))


def _inside(folder: Path, wanted: Kind) -> list[Path]:
    """Return the entries of a folder that an option takes; of a run folder, its recipe."""
    if wanted == "media":  # is searched for before this
        return []
    if wanted == "recipe" and isfile(folder / RECIPE):
        return [folder / RECIPE]
    return sorted(entry for entry in _entries(folder) or () if _holds(entry, wanted))


def _above(path: Path, wanted: Kind) -> Path | None:
    """Return the closest folder above a path that an option takes, or of a run folder its recipe."""
    folders = list(islice(path.parents, NUM_PARENTS))
    if wanted == "recipe":
        return next((folder / RECIPE for folder in folders if isfile(folder / RECIPE)), None)
    return next((folder for folder in folders if _holds(folder, wanted)), None) if wanted != "media" else None

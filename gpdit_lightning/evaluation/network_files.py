"""The files of published networks: where they are, their sha256, and how long a batch may take.

A network that loops without end cannot be recognized, nor interrupted: a batch that exceeds `MAX_SECONDS` ends the
process.
"""

import os
import sys
import threading
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gpdit_lightning.errors import InputError
from gpdit_lightning.hashes import remembered_sha256
from gpdit_lightning.path_kinds import Medium

I3D_URL = "https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt?dl=1"
I3D_SHA256 = "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2"
INCEPTION_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"


@dataclass(frozen=True)
class NetworkRecord:
    """Identifies a network in a report."""

    name: str
    file: str
    """Name of the file, or import path of the class."""
    sha256: str
    """sha256 of the file. For a class without a file: a fingerprint of its weights, or empty if it has no weights."""
    preprocessing: str
    """How uint8 pixels are resized and normalised."""


PREPROCESSING_OF_FILE = "preprocessing inside the network"

MAX_SECONDS = 1800.0  # of the computation of one batch
STATUS = 2  # exit status if it is exceeded

REMEDIES = {
    "video": f"give I3D's weights as .safetensors, or i3d_torchscript.pt from {I3D_URL} (sha256 {I3D_SHA256})",
    "image": f"give inception-2015-12-05.pt from {INCEPTION_URL} (sha256 {INCEPTION_SHA256})",
    "classifier": "give a TorchScript that takes uint8 (N, 3, H, W) and returns logits (N, classes)",
}
"""What error messages advise, by the role of the network."""


def missing_scores(roles: Container[str], has_classes: bool, medium: Medium = "video") -> list[str]:
    """Return a sentence about the scores that cannot be computed for lack of each network, and where to get it.

    Args:
        roles: of the networks that are given.
        has_classes: whether class probabilities are available.
        medium: of what is scored; images have no FVD, and their precision and recall are those of image features.
    """
    sentences = []
    if "video" not in roles and medium == "video":
        sentences.append(f"FVD, precision and recall need --video_network.path: {REMEDIES['video']}.")
    if "image" not in roles:
        scores = "FID and IS" if medium == "video" else "FID, IS, precision and recall"
        sentences.append(f"{scores} need --image_network.path: {REMEDIES['image']}.")
    elif not has_classes:
        sentences.append(
            "IS needs class probabilities, which the image network does not return: "
            f"{REMEDIES['image']}, or --classifier.path."
        )
    return sentences


def network_error(role: str, path: Path | str, reason: str) -> InputError:
    """Return the error for a file that cannot be used as the network of a role."""
    return InputError(f"the {role} network {path} {reason}: {REMEDIES[role]}.")


def verify_file(role: str, path: str, sha256: str | None, remedy: str) -> tuple[Path, str]:
    """Verify the file of a network; return its path and its sha256.

    Args:
        role: of the network, for messages.
        path: of the file.
        sha256: expected value; None accepts any file.
        remedy: what the message about a missing file advises.

    Raises:
        InputError: the file is missing, or has another sha256.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError(f"the {role} network {file} is not a file on this machine: {remedy}.")
    actual = remembered_sha256(file)
    if sha256 is not None and sha256.strip().lower() != actual:
        raise InputError(
            f"the {role} network {file} has sha256 {actual}, but {sha256} is expected: download it again, or correct "
            "the sha256."
        )
    return file, actual


@contextmanager
def time_limit(role: str, path: Path | str) -> Iterator[None]:
    """End the process with a message if the block takes more than `MAX_SECONDS`.

    Args:
        role: of the network that computes in the block.
        path: its file or class, for the message.
    """

    def end() -> None:
        reason = f"has computed one batch for {MAX_SECONDS / 60:g} minutes, so its code may not end"
        print(f"error: {network_error(role, path, reason)}", file=sys.stderr, flush=True)
        os._exit(STATUS)

    timer = threading.Timer(MAX_SECONDS, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()

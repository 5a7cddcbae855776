"""Options of `evaluate`."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class NetworkFile:
    """A network that scores are computed with."""

    path: str
    """A file on this machine: .safetensors (I3D) or TorchScript."""
    sha256: str | None = None
    """Expected sha256 of the file; a file with another one is refused before it is opened."""

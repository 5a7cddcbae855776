"""Options of `evaluate`."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """A network whose features or class probabilities scores are computed from.

    Give the file of a published network, or a class of your own (docs/extending.md):

        video_network: {path: weights/i3d_torchscript.pt}
        video_network: {kind: my_package.metrics.ClipFeatures, arguments: {layer: 8}}
    """

    path: str | None = None
    """File of the weights on this machine; for a class of your own it is passed on as the argument `path`."""
    sha256: str | None = None
    """Expected sha256 of the file; another file is refused before it is opened."""
    kind: str | None = None
    """Import path of a class of your own; by default the published network of the score: I3D for FVD, Inception-v3 for
    FID and IS."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Arguments of your own class."""

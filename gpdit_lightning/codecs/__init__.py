"""Codecs: uint8 pixels to latents and back."""

import torch

from gpdit_lightning.codecs.base import Codec
from gpdit_lightning.codecs.pca import PcaCodec
from gpdit_lightning.codecs.wan import WanCodec
from gpdit_lightning.errors import InputError
from gpdit_lightning.specs import CodecSpec

__all__ = ["CODECS", "Codec", "PcaCodec", "WanCodec", "load_codec", "load_codec_from_spec"]

CODECS: dict[str, type[PcaCodec] | type[WanCodec]] = {"pca": PcaCodec, "wan": WanCodec}


def load_codec(name: str, source: str | None = None, device: str | torch.device = "cpu") -> Codec:
    """Load a codec.

    Args:
        name: "pca", or "wan" for the WanVAE.
        source: where the weights are; None for the codec's own default: the shipped file (`pca`), the hub (`wan`).
        device: where it computes.

    Raises:
        InputError: for an unknown name, or weights that cannot be had.
    """
    if name not in CODECS:
        raise InputError(f"There is no codec {name!r}: choose one of {', '.join(CODECS)}.")
    return CODECS[name].load(source).to(device)


def load_codec_from_spec(
    spec: CodecSpec, device: str | torch.device = "cpu", source: str | None = None, owner: str = "The latents"
) -> Codec:
    """Load the codec that a manifest or checkpoint names, and check that it is the one that was used.

    Args:
        spec: what the manifest or checkpoint records of it.
        device: where it computes.
        source: where its weights are now; None for where they were then.
        owner: the manifest or checkpoint, for the message.

    Raises:
        InputError: as `load_codec`, or when the weights or constants found there differ from the spec's.
    """
    codec = load_codec(spec.name, source or spec.source, device)
    spec.check_same(codec.spec(), owner, f"the codec loaded from {codec.source or 'the package'}")
    return codec

"""Codecs between uint8 pixels and latents."""

from gpdit_lightning.codecs.base import Codec, fingerprint_of
from gpdit_lightning.codecs.loading import (
    CODECS,
    CodecNotAllowedError,
    find_codec,
    load_codec,
    load_codec_from_spec,
    register_codec,
)
from gpdit_lightning.codecs.pca import PcaCodec
from gpdit_lightning.codecs.sd import SdCodec
from gpdit_lightning.codecs.wan import WanCodec

__all__ = [
    "CODECS",
    "Codec",
    "CodecNotAllowedError",
    "PcaCodec",
    "SdCodec",
    "WanCodec",
    "find_codec",
    "fingerprint_of",
    "load_codec",
    "load_codec_from_spec",
    "register_codec",
]

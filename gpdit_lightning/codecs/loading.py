"""Loading of codecs by the name that a user gives or a file records."""

import shlex

import torch

from gpdit_lightning.codecs.base import Codec, describe
from gpdit_lightning.codecs.custom import load_custom_codec
from gpdit_lightning.codecs.pca import DigitsPcaCodec, PcaCodec
from gpdit_lightning.codecs.sd import SdCodec
from gpdit_lightning.codecs.wan import WanCodec
from gpdit_lightning.errors import InputError
from gpdit_lightning.imports import resolve
from gpdit_lightning.schema import shown
from gpdit_lightning.specs import CodecSpec

CODECS: dict[str, type[Codec]] = {}
BUILT_IN: tuple[type[Codec], ...] = (PcaCodec, DigitsPcaCodec, WanCodec, SdCodec)


class CodecNotAllowedError(InputError):
    """A file names a codec by an import path, and the user has not named that codec."""


def register_codec(name: str, codec: type[Codec]) -> None:
    """Register a name of a codec for commands and files; without a name, its import path can be used.

    Raises:
        InputError: the name belongs to another codec, or the class is not a subclass of :class:`Codec`.
    """
    if not (isinstance(codec, type) and issubclass(codec, Codec)):
        raise InputError(
            f"the codec '{name}' is {describe(codec)}; it must be a subclass of gpdit_lightning.codecs.Codec."
        )
    if CODECS.setdefault(name, codec) is not codec:
        raise InputError(f"a codec '{name}' is registered already: register yours under another name.")
    codec.name = name


register_codec("pca", PcaCodec)
register_codec("pca_digits", DigitsPcaCodec)
register_codec("wan", WanCodec)
register_codec("sd", SdCodec)


def load_codec(name: str, source: str | None = None, device: str | torch.device = "cpu") -> Codec:
    """Load a codec by its name.

    Args:
        name: `pca`, `pca_digits`, `wan` (the WanVAE), `sd` (the image VAE of Stable Diffusion), another registered
            name, or the import path of a subclass of :class:`Codec`, whose module is imported.
        source: folder, file or hub name of the weights; None for the default: the shipped file (`pca`,
            `pca_digits`), the hub (`wan`, `sd`).
        device: device of the codec.

    Raises:
        InputError: the name is unknown, the weights are not available, or a custom codec breaks a rule of
            :class:`Codec`.
    """
    codec_class = find_codec(name)
    if codec_class in BUILT_IN:
        return codec_class.load(source).to(device)
    return load_custom_codec(codec_class, source, device)


def find_codec(name: str) -> type[Codec]:
    """Return the class of a codec; argument and errors as in :func:`load_codec`."""
    return resolve(name, CODECS, "codec", base=Codec)


def load_codec_from_spec(
    spec: CodecSpec,
    device: str | torch.device = "cpu",
    source: str | None = None,
    owner: str = "the manifest",
    codec: str | None = None,
    option: str = "--codec",
) -> Codec:
    """Load the codec that a manifest or checkpoint records, and check that its weights are the recorded ones.

    A file must not choose code to import, since it may come from an untrusted source. So a codec that is recorded by
    its import path is loaded only if the user names it too. Nor must it choose which files are opened or downloaded:
    recorded weights other than the default of a codec of this package are used only if the user names them.

    Args:
        spec: the record in the manifest or checkpoint.
        device: device of the codec.
        source: folder, file or hub name of the weights; None for the default, which must be the recorded one, or for
            the recorded source of a custom codec.
        owner: the manifest or checkpoint, for messages.
        codec: the name or import path given by the user; None for the recorded one.
        option: the option that `codec` was given by, for messages.

    Raises:
        CodecNotAllowedError: an import path is recorded, and `codec` is None; or weights other than the codec's default
            are recorded, and `source` is None.
        InputError: as `load_codec`, or the weights or constants differ from the spec's.
    """
    if codec is None and spec.name not in CODECS and spec.is_custom:
        raise CodecNotAllowedError(
            f"{owner} records the custom codec {spec.name}, and a file must not choose code to import: if you trust "
            f"that class, give {option} {spec.name}."
        )
    codec_class = find_codec(codec or spec.name)
    if codec_class in BUILT_IN and source is None and spec.source not in (None, codec_class.default_source):
        raise CodecNotAllowedError(
            f"{owner} records {shown(spec.source)} as the weights of its codec, and a file must not choose which files "
            f"are opened or downloaded: give {option}_source {shlex.quote(spec.source)} if you trust it, or the path "
            "of these weights."
        )
    loaded = load_codec(codec or spec.name, source or spec.source, device)
    spec.check_same(loaded.spec(), owner, f"the codec loaded from {loaded.source or 'the package'}")
    return loaded

"""From a codec's name, as a user or a file gives it, to the codec."""

import torch

from gpdit_lightning.codecs.base import Codec
from gpdit_lightning.codecs.pca import PcaCodec
from gpdit_lightning.codecs.wan import WanCodec
from gpdit_lightning.errors import InputError
from gpdit_lightning.imports import is_import_path, resolve
from gpdit_lightning.specs import CodecSpec

CODECS: dict[str, type[Codec]] = {}


class CodecNotAllowedError(InputError):
    """A file names a codec by an import path that the user has not named."""


def register_codec(name: str, codec: type[Codec]) -> None:
    """Give a codec a name for commands and files; one at an import path can be used without this.

    Raises:
        InputError: another codec has this name.
    """
    if CODECS.setdefault(name, codec) is not codec:
        raise InputError(f"a codec '{name}' is registered already: register yours under another name.")
    codec.name = name


register_codec("pca", PcaCodec)
register_codec("wan", WanCodec)


def load_codec(name: str, source: str | None = None, device: str | torch.device = "cpu") -> Codec:
    """Load the codec that the user names.

    Args:
        name: `pca`, `wan` (the WanVAE), another registered name, or the import path of a subclass of :class:`Codec`,
            whose module is imported.
        source: where the weights are; None for the codec's default: the shipped file (`pca`), the hub (`wan`).
        device: where it computes.

    Raises:
        InputError: the name is unknown, or the weights are not available.
    """
    return resolve(name, CODECS, "codec", base=Codec).load(source).to(device)


def load_codec_from_spec(
    spec: CodecSpec,
    device: str | torch.device = "cpu",
    source: str | None = None,
    owner: str = "The manifest",
    codec: str | None = None,
    option: str = "--codec",
) -> Codec:
    """Load the codec that a manifest or checkpoint records, and check that it is the one that was used.

    A file must not choose code to import, since it may come from anybody. So a codec that is recorded by its import
    path is loaded only where the user names it too.

    Args:
        spec: what the manifest or checkpoint records.
        device: where it computes.
        source: where its weights are now; None for where they were then.
        owner: the manifest or checkpoint, for messages.
        codec: the name or import path that the user gives; None for the recorded one.
        option: how the user gives it, for messages.

    Raises:
        CodecNotAllowedError: an import path is recorded, and `codec` is None.
        InputError: as `load_codec`, or the weights or constants differ from the spec's.
    """
    if codec is None and spec.name not in CODECS and is_import_path(spec.name):
        raise CodecNotAllowedError(
            f"{owner} records the custom codec {spec.name}, and a file must not choose code to import: if you trust "
            f"that class, give {option} {spec.name}."
        )
    loaded = load_codec(codec or spec.name, source or spec.source, device)
    spec.check_same(loaded.spec(), owner, f"the codec loaded from {loaded.source or 'the package'}")
    return loaded

"""Names of files as text that JSON can store and terminals can print, names on the Hugging Face hub, and of scores.

A file name is any sequence of bytes. Python represents bytes that are not UTF-8 as lone surrogates, which UTF-8 text
cannot contain.
"""

import codecs
import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePath

from gpdit_lightning.errors import InputError

MAX_NAME_BYTES = 255  # of a file name, on most file systems
ESCAPING = "gpdit_lightning.escaping"
"""Error handler for encoding: characters that the encoding lacks are written as escapes."""

UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # controls, line separators, surrogates
MAX_DIGITS = 18  # of a count or an index, which fits into 64 bits
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+:)/+(.*)", re.DOTALL)  # of two letters at least: no drive of Windows
SCORE_NAMES = {
    "fid": "FID ↓",
    "is": "IS ↑",
    "fvd": "FVD ↓",
    "precision": "Precision ↑",
    "recall": "Recall ↑",
    "psnr": "PSNR ↑",
    "ssim": "SSIM ↑",
    "rollout_error_ratio": "Error relative to repeating the last frame ↓",
}
"""Names of scores with the better direction, by their keys."""

ESCAPED_BYTE = re.compile(r"\\x([89a-f][0-9a-f])")


def counted(number: int, noun: str) -> str:
    """Return a number with a noun, in the plural unless it is one: "1 clip", "1,024 clips"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def number_in(text: str) -> int | None:
    """Return the number that a text of decimal digits states; None for another text, or for more than `MAX_DIGITS`."""
    return int(text) if text.isdecimal() and len(text) <= MAX_DIGITS else None


def nearest_names(wanted: str, names: Sequence[str], most: int = 10) -> str:
    """Return names as text: all, or of more than `most` those most like the wanted one, and how many there are."""
    if len(names) <= most:
        return ", ".join(names)
    near = difflib.get_close_matches(wanted, names, n=most, cutoff=0.5)
    near += [name for name in names if wanted.lower() in name.lower()]
    shown = list(dict.fromkeys([*near, *names[: 0 if near else most]]))[:most]
    return f"{', '.join(shown)}, ... ({len(names):,} classes, listed in config.json of an exported model)"


def as_text(name: str | PurePath) -> str:
    r"""Return a name as valid Unicode: bytes that are not UTF-8 are written as \xHH, all else is unchanged."""
    return os.fspath(name).encode("utf-8", ESCAPING).decode()


def from_text(text: str) -> str:
    r"""Return the name that `as_text` writes as this text: each \xHH from \x80 on is the byte HH."""
    return ESCAPED_BYTE.sub(lambda match: chr(0xDC00 + int(match[1], 16)), text)


def printable(text: str) -> str:
    r"""Return text on one line: line breaks, other control characters and invalid Unicode are written as escapes."""
    return UNPRINTABLE.sub(lambda match: _escape(match[0]), text)


def figure_text(text: str) -> str:
    r"""Return text as a figure of matplotlib shows it: on one line, without formulas, and also in a legend.

    matplotlib takes what is between two dollar signs for a formula, unless it has \$ for each, and leaves what begins
    with an underscore out of a legend.
    """
    shown = printable(text).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def is_hub_name(text: str) -> bool:
    """Return whether a text is a name on the Hugging Face hub, like `user/model`, unless a folder `user` exists."""
    return HUB_NAME.fullmatch(text) is not None and not Path(text).parent.is_dir()


def check_local(name: str, path: str | PurePath) -> None:
    """Raise `InputError` if a path is an address such as https://host/file; `Path` makes https:/host/file of it.

    A relative path through an existing folder whose name ends in a colon is no address.

    Args:
        name: the option, for the message.
        path: the path, or the address.
    """
    address = ADDRESS.fullmatch(os.fspath(path))
    if address and not os.path.lexists(address[1]):
        raise InputError(
            f"{name} is {address[1]}//{address[2]}, an address: give a path on this machine (of data, only data_dir "
            "and the manifests of a recipe may be addresses)."
        )


def _escape(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # a byte that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def _escape_unencodable(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_escape, error.object[error.start : error.end])), error.end


codecs.register_error(ESCAPING, _escape_unencodable)

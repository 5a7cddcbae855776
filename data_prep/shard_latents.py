"""Encode folders of videos and pictures to latent shards: python data_prep/shard_latents.py --videos DIR --out DIR"""

import argparse
import sys
from dataclasses import MISSING, fields
from typing import get_args, get_type_hints

from gpdit_lightning.errors import InputError
from gpdit_lightning.preparation import PrepareOptions, prepare, summary


def parser() -> argparse.ArgumentParser:
    """One option for each field of `PrepareOptions`, with its type, default and help."""
    parser = argparse.ArgumentParser(description=__doc__)
    hints = get_type_hints(PrepareOptions)
    for option in fields(PrepareOptions):
        flag, text, hint = f"--{option.name}", option.metadata["help"], hints[option.name]
        if hint is bool:
            parser.add_argument(flag, action="store_true", help=text)
            continue
        several = isinstance(option.default, tuple)
        kind = get_args(hint)[0] if get_args(hint) else hint  # of Sequence[X] and X | None: X
        if option.default is MISSING:
            parser.add_argument(flag, type=kind, required=True, help=text)
            continue
        default = " ".join(option.default) if isinstance(option.default, tuple) else option.default
        shown = f"{text} (default: {default})" if default not in (None, "") else text
        parser.add_argument(flag, type=kind, nargs="+" if several else None, default=option.default, help=shown)
    return parser


def main() -> None:
    """The command; exits with status 2 and one sentence when what was given cannot be used."""
    options = PrepareOptions(**vars(parser().parse_args()))
    try:
        manifest = prepare(options)
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(summary(manifest))
    sources = {"video": "videos", "image": "images"}
    kinds = sorted({shard.kind for shard in manifest.shards}, reverse=True)
    named = " ".join(f"--data.{sources[kind]}.manifests \"['{options.out}']\"" for kind in kinds)
    print(f"next: python -m gpdit_lightning fit --config RECIPE.yaml {named}")


if __name__ == "__main__":
    main()

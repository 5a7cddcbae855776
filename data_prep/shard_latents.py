"""Encode videos, pictures and tars of pictures to latent shards: shard_latents.py --videos DIR --out DIR

Interrupted at any moment, the same command goes on. With new sources it extends what is there. On several GPUs, or
machines that share the folder: torchrun --nproc_per_node 8 data_prep/shard_latents.py ..., or the same command several
times at once.
"""

import sys

from gpdit_lightning.errors import InputError
from gpdit_lightning.preparation import PrepareOptions, argument_parser, prepare, summary


def main() -> None:
    """The command; exits with status 2 and one sentence when what was given cannot be used."""
    options = PrepareOptions(**vars(argument_parser(PrepareOptions, __doc__).parse_args()))
    try:
        manifest = prepare(options)
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    if manifest is None:
        print(
            f"Others still work for {options.out}: the last of them writes its manifest (run this again if one died)."
        )
        return
    print(summary(manifest))
    sources = {"video": "videos", "image": "images"}
    kinds = sorted({shard.kind for shard in manifest.shards}, reverse=True)
    named = " ".join(f"--data.{sources[kind]}.manifests \"['{options.out}']\"" for kind in kinds)
    print(f"next: python -m gpdit_lightning fit --config RECIPE.yaml {named}")


if __name__ == "__main__":
    main()

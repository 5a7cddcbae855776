"""Encode pairs of pictures as few-shot sequences: build_few_shot.py --task grayscale --sources PICTURES --out DIR"""

import sys

from gpdit_lightning.errors import InputError
from gpdit_lightning.preparation import PreparePairsOptions, argument_parser, prepare_pairs, summary


def main() -> None:
    """The command; exits with status 2 and one sentence when what was given cannot be used."""
    options = PreparePairsOptions(**vars(argument_parser(PreparePairsOptions, __doc__).parse_args()))
    try:
        manifest = prepare_pairs(options)
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(summary(manifest))
    recipe = "stage4_few_shot.yaml"
    if options.codec == "pca":  # a laptop, where tasks are learned after the copying of pictures
        run_dir = f"runs/tiny/few_shot_{options.out.absolute().name}"
        recipe = "few_shot/warmup.yaml" if options.task == "copy" else f"few_shot/grayscale.yaml --run_dir {run_dir}"
    print(
        f"next: python -m gpdit_lightning fit --config recipes/{recipe} "
        f"--data.sequences.manifests \"['{options.out}']\""
    )


if __name__ == "__main__":
    main()

"""The command line: `python -m gpdit_lightning VERB`."""

import errno
import importlib
import logging
import os
import sys
from collections.abc import Sequence

from gpdit_lightning.errors import InputError

VERBS = {
    "demo": ("demo", "draw moving pictures, train a small model on them, and show what it generates"),
    "fit": ("fit", "train from a recipe; running the same command again resumes"),
    "chain": ("chain", "train the stages of a chain one after another; running it again goes on"),
    "validate": ("fit", "evaluate a run's last checkpoint on the held-out sources"),
    "test": ("fit", "the same, named test/loss"),
    "sample": ("sample", "continue a video with a trained model"),
    "transform": ("transform", "do to pictures what examples show, with a model trained on such pairs"),
    "evaluate": (
        "evaluate",
        "continue the videos of a data set and score them: FVD, FID, IS, precision, recall, PSNR, SSIM",
    ),
    "probe": ("probe", "say how much of a video's class each layer's features know, by a linear probe"),
    "features": ("features", "write the features of videos for another model to train on"),
    "estimate": ("estimate", "say what a recipe needs: memory on each GPU, FLOPs, days; and what would fit"),
    "export": ("export", "write the model of a checkpoint as a folder to share: safetensors, config.json, a card"),
}

# What a disk refuses for reasons that a user can mend.
REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)


# Lightning advertises its services, names accelerators that it does not find, and the seed whenever it reads a recipe.
NOT_SHOWN = ("litlogger", "GPU available: False", "TPU available: False", "Seed set to")


def usage() -> str:
    """What there is, one line a verb."""
    lines = [f"  {verb:<10}{text}" for verb, (_, text) in VERBS.items()]
    return (
        "usage: python -m gpdit_lightning VERB [options]\n\n" + "\n".join(lines) + "\n\nVERB --help explains the rest."
    )


def _show_log() -> None:
    """This library's messages as plain lines; other libraries keep their own handlers.

    Where several processes train, the first speaks for all of them; the others only warn.
    """
    log = logging.getLogger("gpdit_lightning")
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(f"{_rank()}%(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.WARNING if _rank() else logging.INFO)
        log.propagate = False
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).addFilter(lambda record: not any(words in record.getMessage() for words in NOT_SHOWN))


def _rank() -> str:
    """Who speaks, where several processes train."""
    names = ("RANK", "LOCAL_RANK", "SLURM_PROCID")  # of torchrun, Lightning's launcher and srun
    rank = next((os.environ[name] for name in names if name in os.environ), "0")
    return "" if rank == "0" else f"[rank {rank}] "


def main(arguments: Sequence[str] | None = None) -> int:
    """Dispatch on the first word; returns the exit status: 0, or 2 with one sentence for what the user can mend."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    verb, *rest = arguments
    if verb not in VERBS:
        print(f"error: there is no verb '{verb}': choose one of {', '.join(VERBS)}.", file=sys.stderr)
        return 2
    _show_log()
    try:
        importlib.import_module(f"gpdit_lightning.cli.{VERBS[verb][0]}").run(verb, rest)
    except InputError as error:
        print(f"{_rank()}error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        path = error.filename or "a file that is being written"
        print(f"{_rank()}error: {path}: {error.strerror}: make room or choose another place.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped.", file=sys.stderr)
        return 130
    return 0

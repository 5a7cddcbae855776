"""`python -m benchmarks.time_conditioning`: a training step of ACDiT's blocks and adaLN beside one of GPDiT.

All networks have the same number of layers and the same width, and the same clips. The table shows parameters, and
FLOPs and time of a training step (on a CPU: CPU time), relative to GPDiT: blocks of one frame and rotation.
"""

import argparse
from collections.abc import Sequence
from datetime import datetime
from functools import partial

import torch

from benchmarks.block_size import machine_name, seconds_of, training_step
from gpdit_lightning import GPDiT, GPDiTConfig
from gpdit_lightning.estimation.flops import PassShape, training_flops
from gpdit_lightning.estimation.memory import parameter_count
from gpdit_lightning.media.images import parse_size
from gpdit_lightning.model.config import TimeConditioningName

NAMES: tuple[TimeConditioningName, ...] = ("rotation", "adaln")


def option_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m benchmarks.time_conditioning",
        description=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--size", default="tiny", help="size of the backbone: tiny, B, acdit-l, ..., H")
    add("--layers", type=int, default=0, help="number of blocks; 0: as in the size")
    add("--frames", type=int, default=8, help="latent frames of the clip, a multiple of --block_frames")
    add("--block_frames", type=int, default=4, help="frames of a block of ACDiT")
    add("--latent_size", default="32x32", help="HEIGHTxWIDTH of a latent frame, in latent pixels")
    add("--repeats", type=int, default=5, help="timed runs of each computation")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    options = option_parser().parse_args(arguments)
    device, size, frames = torch.device(options.device), parse_size(options.latent_size), options.frames
    torch.manual_seed(0)
    configs = [
        GPDiTConfig(size=options.size, layers=options.layers, block_shape=(of_block, 0, 0), time_conditioning=name)
        for of_block in (1, options.block_frames)
        for name in NAMES
    ]
    with device:
        models = [GPDiT(config) for config in configs]
    # The networks alternate, so that other load on the machine affects all alike. It only adds to the times, so the
    # least ones are used; the first round is a warm-up.
    rounds = [
        [seconds_of(partial(training_step, model, frames, size), device) for model in models]
        for _ in range(options.repeats + 1)
    ]
    seconds = [min(times) for times in zip(*rounds[1:], strict=True)]
    flops = [sum(training_flops(config, PassShape(1, 1, frames, *size)).values()) for config in configs]
    print(
        f"{options.size}, {models[0].config.layers} layers, {frames} latent frames of {options.latent_size}, "
        f"{machine_name(device)}, torch {torch.__version__}, {datetime.now():%Y-%m-%d}\n\n"
        "| block_shape | time_conditioning | parameters | FLOPs of a step | relative | seconds | relative |\n"
        + "|---" * 7
        + "|"
    )
    for config, work, taken in zip(configs, flops, seconds, strict=True):
        print(
            f"| {config.block_shape} | {config.time_conditioning} | {parameter_count(config):,} | "
            f"{work / 1e9:.1f} G | {work / flops[0]:.3f} | {taken:.3f} | {taken / seconds[0]:.2f} |"
        )


if __name__ == "__main__":
    main()

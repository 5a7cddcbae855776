"""`python -m benchmarks.startup`: time to the first step, and host memory of a rank until then, on CPU ranks.

The backbone has the layers of GPDiT-H at a smaller width. It is built in two ways: every rank builds the whole model,
as with a custom `configure_model`, or it is built on the meta device and each rank fills its shards. The weights are
random, or those of a checkpoint. Memory is the largest increase of the resident set of a rank between the call of `fit`
and the first batch; seconds are those of the slowest rank.
"""

import argparse
import importlib
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from benchmarks.data_plan import process_memory
from benchmarks.ranks import on_ranks, random_latents, trainer_settings
from gpdit_lightning import GPDiTConfig
from gpdit_lightning.estimation.memory import parameter_count
from gpdit_lightning.estimation.units import MIB
from gpdit_lightning.stages import GPDiTStage
from gpdit_lightning.training.callbacks.ema import EMA
from gpdit_lightning.training.callbacks.run_checkpoint import RunCheckpoint
from gpdit_lightning.training.strategies.fsdp import FSDP2
from gpdit_lightning.training.strategies.sharding import ShardedStrategy
from gpdit_lightning.training.strategies.zero import ZeRO

STRATEGIES: dict[str, Callable[[], ShardedStrategy]] = {
    "fsdp2": FSDP2,
    "zero2": lambda: ZeRO(stage=2),
    "zero3": lambda: ZeRO(stage=3),
}


class WholeModelStage(GPDiTStage):
    """Builds the whole model on every rank."""

    def configure_model(self) -> None:
        """Build the model as a custom stage does."""
        super().configure_model()


class AtFirstBatch(Callback):
    """Records the time and the largest resident set at the first batch."""

    def __init__(self) -> None:
        self.at = self.peak = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Record them once."""
        if not self.at:
            self.at, self.peak = time.perf_counter(), process_memory("VmHWM")


def start(
    rank: int,
    ranks: int,
    folder: Path,
    strategy: str,
    config: GPDiTConfig,
    stage: type[GPDiTStage],
    resumes: bool,
) -> dict[str, list[float]]:
    """Start a training, and train a step; return the seconds and MiB of this rank."""
    if strategy.startswith("zero"):
        importlib.import_module("deepspeed")  # else its memory and time would count
    first, resumed = AtFirstBatch(), folder / "run/checkpoints/step-1.ckpt"
    trainer = Trainer(
        strategy=STRATEGIES[strategy](),
        max_steps=2 if resumes else 1,
        callbacks=[EMA(), first, RunCheckpoint(keep_last=2)],
        **trainer_settings(ranks, folder),
    )
    module = stage(config)
    Path("/proc/self/clear_refs").write_text("5")  # resets the largest resident set
    before, begun = process_memory("VmRSS"), time.perf_counter()
    trainer.fit(module, random_latents(ranks, folder), ckpt_path=resumed if resumes else None, weights_only=True)
    return {"seconds": [first.at - begun], "mebibytes": [first.peak - before]}


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=STRATEGIES)
    options = parser.parse_args()
    config = GPDiTConfig.preset("H", width=options.width, mlp_width=4 * options.width, heads=8, latent_channels=4)
    parameters = parameter_count(config)
    print(f"{config.layers} layers, {parameters:,} parameters, {4 * parameters / MIB:.0f} MiB in float32")
    print("| strategy | ranks | weights | built | seconds to the first batch | MiB per rank |")
    print("|---" * 6 + "|")
    ways = {"whole": WholeModelStage, "by shards": GPDiTStage}
    for strategy, ranks in product(options.strategies, options.ranks):
        with tempfile.TemporaryDirectory() as root:
            for weights, resumes in (("random", False), ("of a checkpoint", True)):
                for built, stage in ways.items():
                    folder = Path(root, built)
                    folder.mkdir(exist_ok=True)
                    found = on_ranks(folder, ranks, start, strategy, config, stage, resumes)
                    seconds, size = (max(of_rank[name][0] for of_rank in found) for name in ("seconds", "mebibytes"))
                    row = (strategy, ranks, weights, built, f"{seconds:.1f}", f"{size:.0f}")
                    print(f"| {' | '.join(map(str, row))} |", flush=True)


if __name__ == "__main__":
    main()

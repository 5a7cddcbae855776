"""Size of a checkpoint, the time for which it stalls the training, and the host memory that its copy takes."""

from dataclasses import dataclass

from gpdit_lightning.estimation.memory import ShardingStrategy, parameter_count
from gpdit_lightning.model import GPDiTConfig

BYTES_PER_PARAMETER = 16  # the weight, Adam's two moment estimates and the average, in float32


@dataclass(frozen=True)
class SavingSpeeds:
    """Speeds from which the duration of saving is computed, in bytes per second; assumed unless measured.

    Attributes:
        copy: of a copy from a device to host memory, which is not pinned, on each rank.
        digest: of sha256 on each rank.
        disk: of the disk or file server that all ranks share.
    """

    copy: float = 4e9
    digest: float = 1e9
    disk: float = 1e9


@dataclass(frozen=True)
class SavingCosts:
    """What a checkpoint costs.

    Attributes:
        bytes: size of the checkpoint.
        copied: bytes of the copy in the host memory of each rank, which writes it in the background; 0 if the first
            rank writes the checkpoint while the training waits.
        stall: seconds for which the training waits.
        background: seconds from then on until the checkpoint is complete.
    """

    bytes: int
    copied: int
    stall: float
    background: float


def saving_costs(
    config: GPDiTConfig, strategy: ShardingStrategy, ranks: int, speeds: SavingSpeeds | None = None
) -> SavingCosts:
    """Return what a checkpoint costs.

    Args:
        config: the architecture.
        strategy: sharding strategy; under one that shards, each of several ranks writes its part.
        ranks: number of ranks.
        speeds: of copies, hashes and disk.
    """
    speeds = speeds or SavingSpeeds()
    size = BYTES_PER_PARAMETER * parameter_count(config)
    if strategy.stage == 0 or ranks == 1:
        seconds = size / speeds.copy + size / speeds.disk + size / speeds.digest
        return SavingCosts(size, 0, seconds, 0.0)
    part = size // ranks
    return SavingCosts(size, part, part / speeds.copy, part / speeds.digest + size / speeds.disk)

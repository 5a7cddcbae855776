"""Statistics of latents, compared with the constants of their codec: whitened latents are roughly standard normal."""

import numpy as np

from gpdit_lightning.specs import CodecSpec

# The constants of a codec are averages over many kinds of images, so no data set matches them exactly. For most
# channels of most data sets, the absolute mean and the factor between std and 1 are at most these.
USUAL_MEAN, USUAL_FACTOR = 1.0, 2.0
# No channel of any data set exceeds these. The std has no lower bound: it is 0 for constant images.
MAX_MEAN, MAX_STD = 3.0, 4.0


class LatentStatistics:
    """Running mean and standard deviation of each channel.

    Attributes:
        count: number of values per channel.
        mean: float64 (C,).
    """

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.mean, self._squares = np.zeros(channels), np.zeros(channels)

    def add(self, latent: np.ndarray) -> None:
        """Add one latent (F, C, h, w); all positions have equal weight."""
        values = latent.astype(np.float64)
        mean = values.mean(axis=(0, 2, 3))
        squares = np.square(values - mean[:, None, None]).sum(axis=(0, 2, 3))
        count = values[:, 0].size
        # Update of Chan, Golub and LeVeque; sums of squares would lose precision.
        difference, share = mean - self.mean, count / (self.count + count)
        self._squares += squares + difference**2 * self.count * share
        self.mean += difference * share
        self.count += count

    @property
    def std(self) -> np.ndarray:
        """Float64 (C,); NaN before the first latent."""
        return np.sqrt(self._squares / self.count) if self.count else np.full_like(self.mean, np.nan)


def statistics_table(statistics: LatentStatistics, codec: CodecSpec) -> str:
    """Return a table of measured, codec's and whitened mean and std per channel, and a line with the assessment.

    Args:
        statistics: statistics of raw latents.
        codec: codec of the latents.
    """
    mean, std = np.array(codec.mean), np.array(codec.std)
    whitened_mean, whitened_std = (statistics.mean - mean) / std, statistics.std / std
    lines = [
        f"{'':<8}{'measured':^20}{'codec':^20}{'whitened':^20}",
        f"{'channel':<8}" + f"{'mean':>9}{'std':>9}  " * 3,
    ]
    columns = (statistics.mean, statistics.std, mean, std, whitened_mean, whitened_std)
    for channel, row in enumerate(zip(*columns, strict=True)):
        pairs = (f"{row[i]:>9.3f}{row[i + 1]:>9.3f}  " for i in (0, 2, 4))
        lines.append(f"{channel:<8}" + "".join(pairs))
    return "\n".join(line.rstrip() for line in [*lines, assessment(whitened_mean, whitened_std)])


def assessment(mean: np.ndarray, std: np.ndarray) -> str:
    """Assess in one line whether whitened latents are as expected.

    Wrong constants or a different codec shift most channels, or a few of them far. A small or unusual data set shifts a
    few channels slightly.

    Args:
        mean: mean of whitened latents, (C,).
        std: standard deviation of whitened latents, (C,).
    """
    measured = f"whitened: mean {mean.min():.2f} to {mean.max():.2f}, std {std.min():.2f} to {std.max():.2f}"
    usual = f"mean within {USUAL_MEAN:g} of 0, std {1 / USUAL_FACTOR:g} to {USUAL_FACTOR:g}"
    unusual = (abs(mean) > USUAL_MEAN) | (std < 1 / USUAL_FACTOR) | (std > USUAL_FACTOR)
    if not unusual.any():
        return f"{measured}: as expected"
    numbers = np.flatnonzero(unusual)
    named = f"channel {numbers[0]} is" if len(numbers) == 1 else f"channels {', '.join(map(str, numbers))} are"
    if unusual.mean() >= 0.5 or (abs(mean) > MAX_MEAN).any() or (std > MAX_STD).any():
        return (
            f"WARNING: {measured}: {named} outside the usual range ({usual}). Either the latents are "
            "of another codec, or its constants are wrong, or the images are unusual: decode some with --show."
        )
    return f"{measured}: {named} outside the usual range ({usual}), as with few, dark or static images"

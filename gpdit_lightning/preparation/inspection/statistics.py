"""Latents compared with the constants of their codec: whitened, they should be about standard normal."""

import numpy as np

from gpdit_lightning.specs import CodecSpec

# A codec's constants are averages over all kinds of images, so no data set matches them exactly.
USUAL_MEAN, USUAL_FACTOR = 1.0, 2.0  # most channels of most data sets stay within; the factor is of the std
# No data set goes beyond these. There is no lower bound of the std: constant images have none.
LARGEST_MEAN, LARGEST_STD = 3.0, 4.0


class LatentStatistics:
    """Mean and standard deviation of each channel, over latents that are added one by one.

    Attributes:
        count: values per channel so far.
        mean: float64 (C,).
    """

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.mean, self._squares = np.zeros(channels), np.zeros(channels)

    def add(self, latent: np.ndarray) -> None:
        """Add one latent (F, C, h, w); all its positions count equally."""
        values = latent.astype(np.float64)
        mean = values.mean(axis=(0, 2, 3))
        squares = np.square(values - mean[:, None, None]).sum(axis=(0, 2, 3))
        count = values[:, 0].size
        # The update of Chan, Golub and LeVeque; sums of squares would lose digits.
        difference, share = mean - self.mean, count / (self.count + count)
        self._squares += squares + difference**2 * self.count * share
        self.mean += difference * share
        self.count += count

    @property
    def std(self) -> np.ndarray:
        """Float64 (C,); NaN before the first latent."""
        return np.sqrt(self._squares / self.count) if self.count else np.full_like(self.mean, np.nan)


def statistics_table(statistics: LatentStatistics, codec: CodecSpec) -> str:
    """A table per channel of measured, codec's and whitened mean and std, and a line with the assessment.

    Args:
        statistics: of raw latents.
        codec: that made the latents.
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
    """One line on whether whitened latents are as expected.

    Wrong constants, or another codec, shift most channels, or some very far; a small or unusual data set shifts some.

    Args:
        mean, std: (C,) of whitened latents.
    """
    measured = f"whitened: mean {mean.min():.2f} to {mean.max():.2f}, std {std.min():.2f} to {std.max():.2f}"
    usual = f"mean within {USUAL_MEAN:g} of 0, std {1 / USUAL_FACTOR:g} to {USUAL_FACTOR:g}"
    off = (abs(mean) > USUAL_MEAN) | (std < 1 / USUAL_FACTOR) | (std > USUAL_FACTOR)
    if not off.any():
        return f"{measured}: as expected"
    channels = ", ".join(map(str, np.flatnonzero(off)))
    if off.mean() >= 0.5 or (abs(mean) > LARGEST_MEAN).any() or (std > LARGEST_STD).any():
        return (
            f"WARNING: {measured}: channels {channels} are outside the usual range ({usual}). Are these the latents of "
            "another codec, or are its constants wrong? If not, the images are unusual: decode some with --show."
        )
    return f"{measured}: channels {channels} are outside the usual range ({usual}), as with few, dark or static images"

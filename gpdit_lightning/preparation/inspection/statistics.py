"""Latents measured against the constants of their codec: whitened, they should be about standard normal."""

import numpy as np

from gpdit_lightning.specs import CodecSpec

# A codec's constants are those of all pictures, so no data set meets them quite.
USUAL_MEAN, USUAL_FACTOR = 1.0, 2.0  # most channels of most data sets stay within; the factor is one of the std
# Whatever is in the pictures, no channel goes so far. There is no such bound below: blank pictures have no variance.
FARTHEST_MEAN, FARTHEST_STD = 3.0, 4.0


class Moments:
    """Mean and standard deviation of each channel, over latents that are added one by one.

    Attributes:
        count: values of a channel so far.
        mean: float64 (C,).
    """

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.mean, self._squares = np.zeros(channels), np.zeros(channels)

    def add(self, latent: np.ndarray) -> None:
        """Take in one latent (F, C, h, w), all its positions alike."""
        values = latent.astype(np.float64)
        mean = values.mean(axis=(0, 2, 3))
        squares = np.square(values - mean[:, None, None]).sum(axis=(0, 2, 3))
        count = values[:, 0].size
        # Exact for parts of any size (Chan, Golub and LeVeque), where sums of squares would lose digits.
        difference, share = mean - self.mean, count / (self.count + count)
        self._squares += squares + difference**2 * self.count * share
        self.mean += difference * share
        self.count += count

    @property
    def std(self) -> np.ndarray:
        """Float64 (C,), over all values; NaN while there are none."""
        return np.sqrt(self._squares / self.count) if self.count else np.full_like(self.mean, np.nan)


def statistics(moments: Moments, codec: CodecSpec) -> str:
    """A table of what was measured in each channel, the codec's constants and what whitening makes of it; a verdict.

    Args:
        moments: of raw latents.
        codec: which made the latents.
    """
    mean, std = np.array(codec.mean), np.array(codec.std)
    whitened_mean, whitened_std = (moments.mean - mean) / std, moments.std / std
    lines = [
        f"{'':<8}{'measured':^20}{'codec':^20}{'whitened':^20}",
        f"{'channel':<8}" + f"{'mean':>9}{'std':>9}  " * 3,
    ]
    columns = (moments.mean, moments.std, mean, std, whitened_mean, whitened_std)
    for channel, row in enumerate(zip(*columns, strict=True)):
        pairs = (f"{row[i]:>9.3f}{row[i + 1]:>9.3f}  " for i in (0, 2, 4))
        lines.append(f"{channel:<8}" + "".join(pairs))
    return "\n".join(line.rstrip() for line in [*lines, verdict(whitened_mean, whitened_std)])


def verdict(mean: np.ndarray, std: np.ndarray) -> str:
    """One line on whether whitened latents are what they should be.

    Other constants, or another codec, move most channels or some very far; a small or odd data set moves some.

    Args:
        mean, std: (C,) of whitened latents.
    """
    measured = f"whitened: mean {mean.min():.2f} to {mean.max():.2f}, std {std.min():.2f} to {std.max():.2f}"
    usual = f"mean within {USUAL_MEAN:g} of 0, std {1 / USUAL_FACTOR:g} to {USUAL_FACTOR:g}"
    off = (abs(mean) > USUAL_MEAN) | (std < 1 / USUAL_FACTOR) | (std > USUAL_FACTOR)
    if not off.any():
        return f"{measured}: as it should be"
    channels = ", ".join(map(str, np.flatnonzero(off)))
    if off.mean() >= 0.5 or (abs(mean) > FARTHEST_MEAN).any() or (std > FARTHEST_STD).any():
        return (
            f"WARNING: {measured}: channels {channels} beyond the usual ({usual}): latents of another codec, or other "
            "constants? If not, pictures unlike most: look at some with --show."
        )
    return f"{measured}: channels {channels} beyond the usual ({usual}), as in few, dark, still or drawn pictures"

"""Counter-based random numbers: a function of their keys, without state, so that runs resume exactly."""

import operator

import numpy as np

from gpdit_lightning.errors import InputError

# Each use of a seed has its own stream of random numbers.
SAMPLE_ORDER, MICRO_BATCH_ORDER, TRAIN_NOISE, VALIDATION_NOISE, CLIP_LENGTH, SHARD_ORDER = range(6)
LABEL_DROPOUT, GENERATION_NOISE, CONTEXT_NOISE = 6, 7, 8
POSTERIOR_SAMPLE, FLIP, SAMPLE_LABEL, MIXING = 9, 10, 11, 12
TRAIN_CONTEXT_NOISE, ROLLOUT_CONTEXT_NOISE = 13, 14


def generator(seed: int, purpose: int, *counter: int) -> np.random.Generator:
    """Return a generator (Philox) with the same numbers for the same arguments on every machine, rank and worker.

    Args:
        seed: the seed of a run or of a generated video.
        purpose: one of the constants above.
        counter: up to three further integers, such as an epoch or a position in the batch.

    Raises:
        InputError: the seed is not an integer of 64 bits.
    """
    try:
        # Without the data type, NumPy rounds seeds from 2^63 on, so that neighbours get the same numbers.
        key = np.array([operator.index(seed), purpose], dtype=np.uint64)
    except (TypeError, OverflowError):
        raise InputError(f"a seed is {seed!r}: give an integer from 0 to 2^64 - 1.") from None
    words = [0, *counter, *[0] * (3 - len(counter))]
    return np.random.Generator(np.random.Philox(key=key, counter=words))

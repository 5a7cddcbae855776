"""Counter-based random numbers: they depend on their keys alone, not on a state, so that runs resume exactly."""

import numpy as np

# Each use of a seed has its own stream of random numbers.
SAMPLE_ORDER, MICRO_BATCH_ORDER, TRAIN_NOISE, VALIDATION_NOISE, CLIP_LENGTH, SHARD_ORDER = range(6)
LABEL_DROPOUT, GENERATION_NOISE = 6, 7


def generator(seed: int, purpose: int, *counter: int) -> np.random.Generator:
    """A generator (Philox) that gives the same numbers for the same arguments on every machine, rank and worker.

    Args:
        seed: of the run, or of a generated video.
        purpose: one of the constants above.
        counter: up to three further integers, such as an epoch or a place in the batch.
    """
    words = [0, *counter, *[0] * (3 - len(counter))]
    return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=words))

"""Random numbers from a counter, not from a state: the same at any step, on any rank, after any interruption."""

import numpy as np

# First words of the counter-based generators' keys: every use of the seed draws from a stream of its own.
SAMPLE_ORDER, MICRO_BATCH_ORDER, TRAIN_NOISE, VALIDATION_NOISE, CLIP_LENGTH, SHARD_ORDER = range(6)
LABEL_DROPOUT, GENERATION_NOISE = 6, 7


def generator(seed: int, purpose: int, *counter: int) -> np.random.Generator:
    """A counter-based generator: the same numbers for the same words on every machine, rank and worker.

    Args:
        seed: the run's.
        purpose: one of the constants above.
        counter: up to three further words.
    """
    words = [0, *counter, *[0] * (3 - len(counter))]
    return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=words))

"""Random numbers are a function of the seed, the purpose and a counter."""

import numpy as np

from gpdit_lightning.randomness import generator


def test_numbers_differ_for_each_seed_purpose_and_counter() -> None:
    keys = [(0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 1, 0), (0, 1, 0, 0), (1, 0, 0, 0)]
    draws = {tuple(generator(*key).integers(0, 2**62, 4)) for key in keys}
    assert len(draws) == len(keys)


def test_the_same_key_gives_the_same_numbers() -> None:
    assert generator(5, 2, 7).random() == generator(5, 2, 7, 0, 0).random()
    assert np.array_equal(generator(0, 1, 2).permutation(9), generator(0, 1, 2).permutation(9))

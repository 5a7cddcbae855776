"""Random numbers are a function of the seed, the purpose and a counter."""

from typing import Any

import numpy as np
import pytest

from gpdit_lightning import InputError
from gpdit_lightning.randomness import generator


def test_numbers_differ_for_each_seed_purpose_and_counter() -> None:
    keys = [(0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 1, 0), (0, 1, 0, 0), (1, 0, 0, 0)]
    draws = {tuple(generator(*key).integers(0, 2**62, 4)) for key in keys}
    assert len(draws) == len(keys)


def test_the_same_key_gives_the_same_numbers() -> None:
    assert generator(5, 2, 7).random() == generator(5, 2, 7, 0, 0).random()
    assert np.array_equal(generator(0, 1, 2).permutation(9), generator(0, 1, 2).permutation(9))


def test_neighbouring_seeds_of_64_bits_differ_and_others_are_refused() -> None:
    seeds = [*range(2**53, 2**53 + 3), *range(2**63 - 1, 2**63 + 3), 2**64 - 2, 2**64 - 1]
    assert len({generator(seed, 3).integers(0, 2**62) for seed in seeds}) == len(seeds)
    unusable: list[Any] = [-1, 2**64, 1.5, None, "1"]
    for seed in unusable:
        with pytest.raises(InputError, match=r"a seed is .*: give an integer from 0 to"):
            generator(seed, 3)

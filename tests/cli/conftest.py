"""Shared by tests of the command line."""

from collections.abc import Callable
from pathlib import Path

import pytest

from gpdit_lightning import GPDiT
from tests.cli import sampling


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory, randomise: Callable[[GPDiT], GPDiT]) -> Path:
    """The folder of `sampling.make_sampling_folder`. Do not change it."""
    place = tmp_path_factory.mktemp("sample")
    sampling.make_sampling_folder(place, randomise)
    return place

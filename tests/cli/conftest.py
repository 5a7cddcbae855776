"""Shared by tests of the command line."""

from collections.abc import Callable
from pathlib import Path

import pytest

from gpdit_lightning import GPDiT
from tests.cli import sampling


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory, randomise: Callable[[GPDiT], GPDiT]) -> Path:
    """The folder of `sampling.make_sampling_folder`. Do not change it."""
    workspace = tmp_path_factory.mktemp("sample")
    sampling.make_sampling_folder(workspace, randomise)
    return workspace

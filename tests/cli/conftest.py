"""Shared by tests of the command line."""

import logging
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


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Messages that verbs log; with a handler, the command line leaves the logger of the package as it is."""
    logging.getLogger("gpdit_lightning").addHandler(logging.NullHandler())
    caplog.set_level(logging.INFO, "gpdit_lightning")
    return caplog

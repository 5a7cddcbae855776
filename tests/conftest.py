"""Shared by all tests."""

from pathlib import Path

import pytest
import torch

# Two OpenMP threads that wait for each other make small tests slower by an order of magnitude on a busy machine.
torch.set_num_threads(1)

ASSETS = Path(__file__).parents[2] / "shared" / "assets"


@pytest.fixture(scope="session")
def assets() -> Path:
    """Real videos and images for tests; a test that asks for them is skipped where they are absent."""
    if not ASSETS.is_dir():
        pytest.skip("the shared test assets are not on this machine")
    return ASSETS

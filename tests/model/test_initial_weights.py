"""The weights of a model on the meta device, drawn one tensor after the other, are those of its constructor."""

from typing import Any

import pytest
import torch

from gpdit_lightning.model import GPDiT, GPDiTConfig
from gpdit_lightning.model.initial_weights import weights_of_new


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"classes": 3, "time_conditioning": "adaln"},
        {"text_width": 5, "time_conditioning": "embedding"},
        {"time_conditioning": "rotation_modulation", "factorized": True, "block_shape": (2, 0, 0)},
    ],
)
def test_weights_are_those_of_the_constructor(settings: dict[str, Any]) -> None:
    """Bit for bit; and so are the random numbers that follow."""
    config = GPDiTConfig(size="tiny", layers=2, width=24, heads=2, mlp_width=48, latent_channels=4, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        expected, number = GPDiT(config).state_dict(), torch.rand(1)
        with torch.device("meta"):
            model = GPDiT(config)
        torch.manual_seed(1)
        weights = dict(weights_of_new(model, config.layers))
        assert torch.equal(torch.rand(1), number)
    assert weights.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(weights[name], values), name
    assert sum(values.norm() > 0 for values in weights.values()) > 10


def test_a_reset_restores_the_initial_weights() -> None:
    config = GPDiTConfig(size="tiny", layers=1, width=24, heads=2, mlp_width=48, latent_channels=4)
    model = GPDiT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    model.reset_parameters()
    assert all((parameter != 7).all() for parameter in model.parameters())
    assert (model.output.weight == 0).all()
    assert (model.output_norm.weight == 1).all()

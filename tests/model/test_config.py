"""The configuration: sizes, errors, what counts as architecture."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from gpdit_lightning import GPDiTConfig, InputError
from tests.model.toys import toy_config


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"size": "XXL"}, "size 'XXL' is not known: choose one of tiny, B, H"),
        ({"attention": "full"}, "attention 'full' is not known: choose one of of2, of"),
        ({"time_site": "adaln"}, "time_site 'adaln' is not known"),
        ({"layers": -1}, "layers is -1"),
        ({"heads": -2}, "heads is -2"),
        ({"latent_channels": 0}, "latent_channels is 0"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"rope_lengths": (32, 32)}, "three positive"),
        ({"rope_lengths": (32, 0, 32)}, "three positive"),
        ({"width": 100, "heads": 3}, "width 100 does not divide into 3 heads"),
        ({"width": 63, "heads": 9}, "head width 7"),
        ({"width": 21, "heads": 1}, "head width 21"),
        ({"width": 8, "heads": 2}, "head width 4"),
    ],
)
def test_config_errors(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        GPDiTConfig(**{"size": "tiny", **fields})


def test_preset_names_unknown_fields() -> None:
    with pytest.raises(InputError, match=r"no field 'hidden'.*mlp_width"):
        GPDiTConfig.preset("B", hidden=3)
    with pytest.raises(InputError, match="size 'L' is not known"):
        GPDiTConfig.preset("L")


def test_a_size_sets_the_fields_that_are_zero() -> None:
    config = GPDiTConfig.preset("B", layers=3)
    assert (config.layers, config.width, config.mlp_width, config.heads) == (3, 768, 3072, 12)
    assert config == GPDiTConfig(size="B", layers=3)


def test_the_size_is_that_of_its_four_fields() -> None:
    tiny = GPDiTConfig.preset("tiny", classes=3)
    assert tiny.replaced(size="H") == GPDiTConfig.preset("H", classes=3)
    assert tiny.replaced(size="H", layers=2) == GPDiTConfig.preset("H", classes=3, layers=2)
    assert GPDiTConfig.preset("B").replaced(size="H") == GPDiTConfig.preset("H")
    assert GPDiTConfig.preset("B").replaced(size="H").width == 2816

    smaller = tiny.replaced(layers=2)
    assert smaller.size == "custom"
    assert smaller.replaced(layers=4) == tiny
    # Stored configurations, also of earlier versions, in which the size remained the one of the recipe.
    for config in (smaller, tiny):
        for size in (config.size, "tiny", "B"):
            assert GPDiTConfig.from_dict(config.to_dict() | {"size": size}) == config
    with pytest.raises(InputError, match="layers is 0; it must be at least 1"):
        GPDiTConfig(size="custom", width=48)


@pytest.mark.parametrize(
    "make",
    [
        lambda: dataclasses.replace(GPDiTConfig.preset("B"), size="H"),
        lambda: GPDiTConfig(**{**GPDiTConfig.preset("B").to_dict(), "size": "H"}),
        lambda: GPDiTConfig.preset(**{**GPDiTConfig.preset("B", classes=3).to_dict(), "size": "H"}),
        lambda: GPDiTConfig.preset("tiny").replaced(size="H", layers=12, width=768, mlp_width=3072, heads=12),
    ],
)
def test_a_size_with_the_fields_of_another_one_is_refused(make: Callable[[], GPDiTConfig]) -> None:
    with pytest.raises(
        InputError, match=r"size is H, but layers, width, mlp_width, heads are those of B: leave them at 0"
    ):
        make()


def test_head_channels_are_divided_among_three_axes() -> None:
    for head_width, expected in ((6, (2, 2, 2)), (20, (8, 6, 6)), (64, (24, 20, 20)), (128, (44, 42, 42))):
        assert GPDiTConfig(size="tiny", width=2 * head_width, heads=2).rope_widths == expected


def test_architecture_ignores_execution() -> None:
    config = toy_config()
    faster = config.replaced(attention_backend="sdpa", activation_checkpointing=True, compile=True)
    assert faster.architecture() == config.architecture()
    assert GPDiTConfig(**{**config.to_dict(), "size": "B"}).architecture() == config.architecture()
    for change in ({"attention": "of"}, {"time_site": "none"}, {"rope_lengths": (8, 8, 8)}, {"norm_eps": 1e-5}):
        assert config.replaced(**change).architecture() != config.architecture()

"""Settings that follow from options and a trained model."""

import torch

from gpdit_lightning.generation.settings import batches_by_shape


def test_batches_have_one_shape_and_keep_the_order() -> None:
    shapes = {"a": (5, 32, 32), "b": (1, 32, 32), "c": (5, 32, 32), "d": (5, 32, 48), "e": (5, 32, 32)}

    def batches(batch_size: int) -> list[list[str]]:
        return batches_by_shape(list(shapes), batch_size, lambda name: torch.Size(shapes[name]))

    assert batches(2) == [["a", "c"], ["e"], ["b"], ["d"]]
    assert batches(9) == [["a", "c", "e"], ["b"], ["d"]]

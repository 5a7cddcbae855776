"""Conditions other than context, as a prefix of tokens (GPDiT, section 4.2: "in the standard manner")."""

import torch
from torch import Tensor, nn

from gpdit_lightning.errors import InputError
from gpdit_lightning.model.config import GPDiTConfig

NO_LABEL = -1


class Prefix(nn.Module):
    """Tokens that say what a clip shows: one for a class label, or those of a text that any encoder has embedded.

    Args:
        config: with `classes` or `text_width`.
    """

    def __init__(self, config: GPDiTConfig) -> None:
        super().__init__()
        self.classes, self.text_width = config.classes, config.text_width
        self.embedding: nn.Module
        if self.classes:
            self.embedding = nn.Embedding(self.classes + 1, config.width)  # the last one says: no label
        else:
            self.embedding = nn.Linear(self.text_width, config.width)

    def forward(self, condition: Tensor | None, rows: int) -> Tensor:
        """The tokens (R, L, D) of R rows.

        Args:
            condition: (R,) class numbers, `NO_LABEL` for none, as is None; or (R, L, text width) embeddings.
            rows: R.

        Raises:
            InputError: a condition of another kind, shape or range.
        """
        weight = self.embedding.weight
        assert isinstance(weight, Tensor)
        if self.text_width:
            if condition is None or condition.shape[::2] != (rows, self.text_width) or condition.ndim != 3:
                raise InputError(
                    f"the condition is {None if condition is None else tuple(condition.shape)}; this model takes text "
                    f"embeddings (B, L, {self.text_width}) with B = {rows}, those of an empty text where there is none."
                )
            return self.embedding(condition.to(weight))
        if condition is None:
            condition = torch.full((rows,), NO_LABEL, device=weight.device)
        wrong = condition.shape != (rows,) or condition.is_floating_point()
        if wrong or (condition.device.type == "cpu" and not -1 <= condition.min() <= condition.max() < self.classes):
            raise InputError(
                f"the condition is {condition.tolist()}; this model takes a class from 0 to {self.classes - 1}, or "
                f"{NO_LABEL} for none, for each of {rows} clips."
            )
        return self.embedding(torch.where(condition < 0, self.classes, condition))[:, None]

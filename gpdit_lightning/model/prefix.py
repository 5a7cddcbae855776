"""Conditions other than context, as a prefix of tokens (GPDiT, section 4.2: "in the standard manner")."""

import torch
from torch import Tensor, nn

from gpdit_lightning.model.config import GPDiTConfig

NO_LABEL = -1


class Prefix(nn.Module):
    """Tokens of the condition of a clip: one for a class label, or those of a text embedded by any encoder.

    Args:
        config: an architecture with `classes` or `text_width`.
    """

    def __init__(self, config: GPDiTConfig) -> None:
        super().__init__()
        self.classes = config.classes
        self.embedding: nn.Module
        if config.classes:
            self.embedding = nn.Embedding(config.classes + 1, config.width)  # the last one is for no label
        else:
            self.embedding = nn.Linear(config.text_width, config.width)

    def forward(self, condition: Tensor | None, rows: int) -> Tensor:
        """Return the tokens (R, L, D) of R rows.

        Args:
            condition: (R,) class numbers, `NO_LABEL` for none (None: none for all rows); or (R, L, text width)
                embeddings. On any device.
            rows: R.
        """
        weight = self.embedding.weight
        assert isinstance(weight, Tensor)
        if not self.classes:
            assert condition is not None
            return self.embedding(condition.to(weight))
        if condition is None:
            condition = torch.full((rows,), NO_LABEL, device=weight.device)
        condition = condition.to(weight.device)
        return self.embedding(torch.where(condition < 0, self.classes, condition))[:, None]

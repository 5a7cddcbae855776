"""Conditions other than context: class labels and texts (GPDiT, section 4.2: "in the standard manner")."""

import torch
from torch import Tensor, nn

from gpdit_lightning.model.config import GPDiTConfig

NO_LABEL = -1


class LabelEmbedding(nn.Embedding):
    """One vector for each class, and a last one for no label.

    Args:
        config: an architecture with `classes`.
    """

    def __init__(self, config: GPDiTConfig) -> None:
        super().__init__(config.classes + 1, config.width)

    def forward(self, condition: Tensor | None, rows: int) -> Tensor:  # type: ignore[override]
        """Return the vectors (R, D) of R rows.

        Args:
            condition: (R,) class numbers, `NO_LABEL` for none; None: none for all rows. On any device.
            rows: R.
        """
        if condition is None:
            condition = torch.full((rows,), NO_LABEL, device=self.weight.device)
        condition = condition.to(self.weight.device)
        return super().forward(torch.where(condition < 0, self.num_embeddings - 1, condition))


class Prefix(nn.Module):
    """Tokens of the condition of a clip: one for a class label, or those of a text embedded by any encoder.

    Args:
        config: an architecture with `classes` or `text_width`.
    """

    def __init__(self, config: GPDiTConfig) -> None:
        super().__init__()
        self.embedding = LabelEmbedding(config) if config.classes else nn.Linear(config.text_width, config.width)

    def forward(self, condition: Tensor | None, rows: int) -> Tensor:
        """Return the tokens (R, L, D) of R rows.

        Args:
            condition: (R,) class numbers, as for :class:`LabelEmbedding`; or (R, L, text width) embeddings. On any
                device.
            rows: R.
        """
        if isinstance(self.embedding, LabelEmbedding):
            return self.embedding(condition, rows)[:, None]
        assert condition is not None
        return self.embedding(condition.to(self.embedding.weight))

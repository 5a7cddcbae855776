"""Which tokens attend to which, observed in the computation of the backbone, for figures and tests.

The attention runs with queries of zero, so that its weights are equal, and with values that number the tokens. The
outputs then show the tokens that each token attends to, whatever the way in which masked scores are left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gpdit_lightning.model.attention import Sliced
from gpdit_lightning.model.config import CUSTOM_SIZE, GPDiTConfig
from gpdit_lightning.model.gpdit import GPDiT
from gpdit_lightning.model.layout import BlockLayout, ClipBlocks
from gpdit_lightning.model.streams import LayerPlans, PassBlocks


@dataclass(frozen=True)
class AttentionPattern:
    """The attention of a training pass over the packed tokens: all clean blocks, then all noisy ones.

    Attributes:
        attends: (queries, keys), whether a token attends to another one.
        clean, noisy: tokens of each block of the streams, in order; without noisy ones in classification.
        first_noisy: number of the first noisy block; context alone precedes it.
    """

    attends: Tensor
    clean: tuple[int, ...]
    noisy: tuple[int, ...]
    first_noisy: int


def attention_patterns(
    config: GPDiTConfig, length: int, noisy: Sequence[int], rows: int, columns: int
) -> dict[str, AttentionPattern]:
    """Return the attention of a training pass of one clip, without a prefix.

    Args:
        config: the architecture; its sizes have no influence.
        length: number of latent frames of the clip.
        noisy: positions of the latent frames with noise, increasing, the last of which ends the clip; none for a pass
            of the clean stream alone, as in classification.
        rows, columns: tokens of a frame.

    Returns:
        the pattern by its name: `attention`; or, if the architecture is factorized, `within frames` and `along time`.

    Raises:
        InputError: the frames are not those of whole blocks, or a frame does not divide into blocks.
    """
    small = {"size": CUSTOM_SIZE, "layers": 1, "heads": 1, "width": 8, "mlp_width": 1, "latent_channels": 1}
    plain = {"patch_size": 1, "classes": 0, "text_width": 0, "time_conditioning": "rotation"}
    config = config.replaced(**small, **plain, attention_backend="sdpa")
    if noisy:
        blocks = PassBlocks.of_clip(ClipBlocks.of(config, noisy, rows, columns))
    else:
        layout = BlockLayout.of(config, rows, columns)
        blocks = PassBlocks(layout, length, clean=range(layout.count(length)))
    sizes = blocks.sizes(config.causal_in_block)
    latents = torch.zeros(1, length, 1, rows, columns, device="cpu")
    with torch.device("cpu"), torch.no_grad():
        model = GPDiT(config)
        clean = latents if sizes.clean else None
        noisy_stream = (latents[:, list(noisy)], torch.zeros(1, len(blocks.noisy))) if noisy else ()
        x, streams = model.embed(blocks, clean, *noisy_stream)
        average = {
            name: replace(planned, backend=Sliced(_average))
            for name in LayerPlans._fields
            if (planned := getattr(streams, name)) is not None
        }
        streams = replace(streams, **average)
        zeros, numbers = x.new_zeros(len(x), 1, config.head_width), torch.eye(len(x))[:, None]
        observed = {"attention": streams.attend(zeros, zeros, numbers)}
        if config.factorized:
            within = streams.attend_within_frames(zeros, zeros, numbers)
            observed = {"within frames": within, "along time": observed["attention"]}
    return {
        name: AttentionPattern(weights.flatten(1) > 0, sizes.clean, sizes.noisy, blocks.noisy[0] if noisy else 0)
        for name, weights in observed.items()
    }


def _average(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return the attention of queries of zero: the mean of the values, (B, queries, 1, value width)."""
    return value.mean(dim=1, keepdim=True).expand(-1, query.shape[1], -1, -1)

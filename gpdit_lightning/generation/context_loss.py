"""The loss of contexts relative to that of held-out data, to find contexts unlike the training data.

Shapes: k context frames, C channels, h x w latent pixels.
"""

import logging
from collections.abc import Iterable

import torch
from torch import Tensor

from gpdit_lightning.checkpoints.reading import TrainedModel
from gpdit_lightning.diffusion import rotate_to, training_target
from gpdit_lightning.generation.precision import autocast
from gpdit_lightning.model.layout import BlockLayout, ClipBlocks
from gpdit_lightning.randomness import CONTEXT_NOISE, generator

# Quotient from which a context counts as unlike the training data. Measured (docs/generation.md): at most 1.3 for
# held-out videos, at least 2.4 for videos of other kinds.
UNLIKE_TRAINING = 2.0
# The middle of each half of the first quarter. At stronger noise, the loss of a clip depends on its contrast and motion
# as much as on the training data: that of held-out videos of UCF-101 was up to 3.6 times the mean.
NOISE_LEVELS = (1 / 16, 3 / 16)
MAX_NAMED = 3  # contexts in the warning

log = logging.getLogger(__name__)


@torch.inference_mode()
def relative_loss(
    trained: TrainedModel, context: Tensor, label: int | None = None, autocast_dtype: torch.dtype | None = None
) -> float | None:
    """Return the loss of a context at weak noise, relative to the validation loss of the model there.

    The loss of the context is that of its first frame and, with more weight, its last frame given the others, with
    fixed noise; in a model whose blocks are not frames, that of the frames of the first and the last block. The first
    frame of a video is the first one that had a loss in training. This is one network call for four noisy frames or
    blocks. No generator of random numbers changes its state.

    Args:
        trained: the model.
        context: (k, C, h, w) whitened latents, on any device.
        label: class number, or `NO_LABEL`; None for a model without classes.
        autocast_dtype: as in :class:`GenerationConfig`.

    Returns:
        The quotient; None without a context, if none of its frames had a loss in training, or if no validation loss of
        images (k = 1) or videos (k > 1) is recorded.
    """
    backbone, geometry = trained.backbone, trained.geometry
    layout = BlockLayout.of(backbone.config, *context.shape[-2:])
    length = layout.context_length(min(len(context), geometry.frames))
    quarters = trained.validation and trained.validation.quarters.get("images" if len(context) == 1 else "videos")
    without_loss = layout.context_length(trained.frames_without_loss) if len(context) > 1 else 0
    if length <= without_loss or not quarters or not quarters[0]:
        return None
    context = context[-length:].to(backbone.device)
    frames = sorted({*layout.group_after(without_loss, length), *layout.last_group(length)})
    blocks = ClipBlocks.of(backbone.config, frames, *context.shape[-2:])
    shape = (len(NOISE_LEVELS), len(frames), *context.shape[1:])
    noise = torch.from_numpy(generator(0, CONTEXT_NOISE).standard_normal(shape, "float32")).to(context)
    levels = torch.tensor(NOISE_LEVELS).to(context)[:, None].expand(-1, len(blocks.blocks))
    theta = trained.schedule.theta(levels)
    sample = rotate_to(context[frames].expand(shape), noise, blocks.spread(theta))
    condition = None if label is None else torch.full((len(NOISE_LEVELS),), label, device=context.device)
    with autocast(context, autocast_dtype):
        prediction = backbone(sample.noisy, theta, context[None], condition, draws=len(NOISE_LEVELS), frames=frames)
    errors = (prediction - training_target(sample, noise, backbone.config.target)).float().square()
    losses = blocks.mean(errors).unflatten(1, (-1, layout.blocks_per_group)).mean(dim=(0, 2)).tolist()  # one per group
    # The first blocks, which are the hardest, have the weight that they have in the validation loss.
    groups = len(layout.blocks_of(range(without_loss, geometry.frames))) // layout.blocks_per_group
    first = 1 / groups if len(losses) > 1 else 1.0
    return (first * losses[0] + (1 - first) * losses[-1]) / quarters[0]


def warn_of_unlike(losses: Iterable[tuple[str, float | None]]) -> None:
    """Warn, in one line, of contexts that are unlike the training data, by their names and relative losses."""
    unlike = [
        f"{name} (loss {loss:.1f} times the validation loss)"
        for name, loss in losses
        if loss is not None and loss > UNLIKE_TRAINING
    ]
    if unlike:
        more = f" and {len(unlike) - MAX_NAMED} more" if len(unlike) > MAX_NAMED else ""
        shown = ", ".join(unlike[:MAX_NAMED])
        log.warning("warning: contexts are unlike the training data, so that results may be poor: %s%s", shown, more)

"""`attention`: draw which tokens attend to which when a recipe trains."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jsonargparse import Namespace

from gpdit_lightning.cli.recipe_cli import parse_recipe
from gpdit_lightning.data.selection import sources_of_run
from gpdit_lightning.data.source import KINDS, SourceConfig, whole_blocks
from gpdit_lightning.errors import InputError
from gpdit_lightning.files import announce_replaced, atomic_write, check_writable
from gpdit_lightning.model.attention_pattern import AttentionPattern, attention_patterns
from gpdit_lightning.model.config import GPDiTConfig
from gpdit_lightning.names import counted, figure_text, number_in
from gpdit_lightning.options.attention import AttentionOptions

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DEFAULT_BLOCKS = 4
# Colours of the pairs of a query and a key: none, and those of `LEGEND`.
COLOURS = ("white", "#9aa5b1", "#3b7dd8", "#e4743c")
LEGEND = ("clean to clean", "noisy to clean", "noisy to noisy")
MOST_LABELS = 24
MOST_TOKENS = 4096  # of a figure, whose pattern has the square of them


class ClipFrames(NamedTuple):
    """The frames of a clip that a figure shows.

    Attributes:
        length: number of latent frames.
        noisy: positions of the frames with noise and loss; none in classification.
    """

    length: int
    noisy: Sequence[int]


def attention(options: AttentionOptions) -> None:
    """Draw the attention of a recipe's training.

    Raises:
        InputError: the recipe or an option cannot be used, or the figure cannot be written.
    """
    check_writable(options.out, extension=".png")
    backends = logging.getLogger("gpdit_lightning.model.attention.backends")
    settings = parse_recipe("attention", options.fit_arguments)
    rows, columns = tokens_of(options.frame_tokens)
    backbone = GPDiTConfig(**vars(settings.model.init_args.backbone))
    if not backbone.whole_frames:  # blocks that are parts of frames are drawn in two rows and columns
        backbone = replace(backbone, block_shape=(backbone.block_shape[0], rows, columns))
        rows, columns = 2 * rows, 2 * columns
    clip = frames_of(settings.data, backbone, options.frames)
    of_classifier = settings.model.init_args.get("classification") is not None
    clip = clip._replace(noisy=()) if of_classifier else clip
    if (tokens := (clip.length + len(clip.noisy)) * rows * columns) > MOST_TOKENS:
        raise InputError(
            f"the clip would be drawn as {tokens:,} tokens, more than {MOST_TOKENS:,}: give fewer --frames or "
            "--frame_tokens."
        )
    backends.disabled = True  # no backend is used for a figure, so that its name would mislead
    try:
        patterns = attention_patterns(backbone, clip.length, clip.noisy, rows, columns)
    finally:
        backends.disabled = False
    noisy = f", {len(clip.noisy)} with noise" if 0 < len(clip.noisy) < clip.length else ""
    name = Path(options.config[-1]).stem if options.config else "recipe"
    title = f"{name}: {counted(clip.length, 'latent frame')}{noisy}"
    announce_replaced([options.out])
    draw(patterns, title, options.out)
    print(f"wrote {options.out}")
    print(summary(patterns))


def tokens_of(text: str) -> tuple[int, int]:
    """Return the rows and columns of ROWSxCOLUMNS; raises `InputError` for another form."""
    sides = [number_in(part) for part in text.lower().split("x")]
    if len(sides) != 2 or not sides[0] or not sides[1]:
        raise InputError(f"--frame_tokens is {text}: give ROWSxCOLUMNS, such as 2x2.")
    return sides[0], sides[1]


def frames_of(data: Namespace, backbone: GPDiTConfig, wanted: int | None) -> ClipFrames:
    """Return the frames of the longest clips of a recipe.

    Args:
        data: data settings of the recipe.
        backbone: its architecture.
        wanted: the number of latent frames; None for that of the recipe.

    Raises:
        InputError: the frames have no whole block, or none has noise.
    """
    names = sources_of_run(data.sources, data.stage_sources) or tuple(KINDS)
    sources = {name: SourceConfig(**vars(getattr(data, name))) for name in names}
    used = [name for name, source in sources.items() if source.batch_size or source.tokens] or list(sources)
    name = max(used, key=lambda name: (name != "images", sources[name].frames))
    first, later = backbone.block_frames
    of_blocks = 1 if name == "images" else (first or DEFAULT_BLOCKS) + (DEFAULT_BLOCKS - 1) * (later or 1)
    frames = wanted or sources[name].frames or of_blocks
    length = whole_blocks(frames, backbone.block_frames)
    if not length:
        raise InputError(f"--frames is {frames}, less than the first block of the recipe: give at least {first}.")
    noisy = sources[name].noisy_frames(length) or ()
    if sources[name].noisy_frames(length) is not None and not noisy:
        raise InputError(
            f"--frames is {frames}, of which none has noise (data.{name}.frames_without_loss is "
            f"{sources[name].frames_without_loss}): give more."
        )
    return ClipFrames(length, noisy or range(length))


def summary(patterns: Mapping[str, AttentionPattern]) -> str:
    """Return one line for each pattern: its blocks, and how many pairs of tokens attend."""
    lines = []
    for name, pattern in patterns.items():
        pairs, tokens = int(pattern.attends.sum()), len(pattern.attends)
        blocks = f"{len(pattern.clean)} clean and {len(pattern.noisy)} noisy blocks"
        blocks = blocks if pattern.noisy else f"{counted(len(pattern.clean), 'clean block')}, no noisy ones"
        lines.append(f"{name}: {blocks}; {pairs} of {tokens**2} pairs of tokens attend ({pairs / tokens**2:.1%})")
    return "\n".join(lines)


def draw(patterns: Mapping[str, AttentionPattern], title: str, path: Path) -> None:
    """Draw patterns beside each other.

    Args:
        patterns: by their names.
        title: of the figure.
        path: of the PNG.
    """
    from matplotlib.figure import Figure  # takes half a second to import
    from matplotlib.patches import Patch

    figure = Figure(figsize=(1 + 5 * len(patterns), 6), layout="constrained")
    for axes, (name, pattern) in zip(
        figure.subplots(1, len(patterns), squeeze=False)[0], patterns.items(), strict=True
    ):
        _draw_pattern(axes, pattern)
        axes.set_title(name if len(patterns) > 1 else "", fontsize=10)
    shown = LEGEND if any(pattern.noisy for pattern in patterns.values()) else LEGEND[:1]
    entries = [Patch(color=colour, label=label) for colour, label in zip(COLOURS[1:], shown, strict=False)]
    figure.legend(handles=entries, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(figure_text(title), fontsize=11)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _draw_pattern(axes: "Axes", pattern: AttentionPattern) -> None:
    from matplotlib.colors import ListedColormap

    clean = sum(pattern.clean)
    kinds = pattern.attends.int()
    kinds[clean:, :clean] *= 2
    kinds[clean:, clean:] *= 3
    axes.imshow(kinds.numpy(), cmap=ListedColormap(COLOURS), vmin=0, vmax=len(COLOURS) - 1, interpolation="nearest")
    edges = [0, *accumulate((*pattern.clean, *pattern.noisy))]
    for edge in edges:
        heavy = edge in (0, clean, edges[-1])
        for line in (axes.axhline, axes.axvline):
            line(edge - 0.5, color="black", linewidth=1.2 if heavy else 0.3)
    centres = [(start + end - 1) / 2 for start, end in pairwise(edges)]
    labels = list(_labels(pattern))
    every = -(-len(labels) // MOST_LABELS)
    axes.set_xticks(centres[::every], labels[::every], fontsize=8)
    axes.set_yticks(centres[::every], labels[::every], fontsize=8)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set_ylabel("blocks of the queries")
    axes.set_xlabel("blocks of the keys")


def _labels(pattern: AttentionPattern) -> Iterator[str]:
    """Yield the names of the blocks as in the figures of the papers: c0, c1, ... and n0, n1, ..."""
    for number in range(len(pattern.clean)):
        yield f"$c_{{{number}}}$"
    for number in range(len(pattern.noisy)):
        yield f"$n_{{{pattern.first_noisy + number}}}$"

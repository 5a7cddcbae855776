"""Blocks of tokens, the units of autoregression: their sizes, their order, and the places of their tokens.

All tokens of a block have one angle theta. A block of GPDiT is a latent frame (GPDiT, 4.1); one of ACDiT is several
frames of a video, or a rectangle of an image (ACDiT, 4.1). Blocks are ordered by frame, row and column, and so are the
tokens of a block. The boundaries depend on absolute positions, so those of a clip and of its beginning agree.

Shapes: B clips, F latent frames, C channels, H x W latent pixels, S blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from gpdit_lightning.errors import InputError
from gpdit_lightning.model.config import GPDiTConfig

NO_CONTEXT = (
    "the model generates a clip as one block, which no context precedes (block_shape has 0 frames, and "
    "first_block_frames is 0): leave the context out."
)

Part = tuple[slice, slice]
"""Rows and columns of a block in its frames, in latent pixels."""


@dataclass(frozen=True)
class BlockLayout:
    """The blocks of clips of one frame size.

    Attributes:
        frames: latent frames of a block; 0: all frames of the clip that follow the first block.
        first_frames: latent frames of the first block.
        block_rows, block_columns: tokens of a block in a frame.
        rows, columns: tokens of a frame.
        patch_size: side of a token in latent pixels.
    """

    frames: int
    first_frames: int
    block_rows: int
    block_columns: int
    rows: int
    columns: int
    patch_size: int

    @classmethod
    def of(cls, config: GPDiTConfig, height: int, width: int) -> "BlockLayout":
        """Return the layout for frames of `height` x `width` latent pixels, multiples of the patch size.

        Raises:
            InputError: the frame does not divide into the rectangles of `block_shape`.
        """
        rows, columns = height // config.patch_size, width // config.patch_size
        _, block_rows, block_columns = config.block_shape
        block_rows, block_columns = block_rows or rows, block_columns or columns
        if rows % block_rows or columns % block_columns:
            raise InputError(
                f"latent frames of {height}x{width} are {rows}x{columns} tokens, which do not divide into the blocks "
                f"of {block_rows}x{block_columns} tokens of block_shape {config.block_shape}: choose another size of "
                "frames, or another block_shape."
            )
        first, frames = config.block_frames
        return cls(frames, first, block_rows, block_columns, rows, columns, config.patch_size)

    @property
    def frame_tokens(self) -> int:
        """Return N, the number of tokens per frame."""
        return self.rows * self.columns

    @property
    def blocks_per_group(self) -> int:
        """Return the number of blocks that share the same frames: 1 unless blocks are parts of frames."""
        return (self.rows // self.block_rows) * (self.columns // self.block_columns)

    @property
    def block_pixels(self) -> tuple[int, int]:
        """Return the height and width of a block in latent pixels."""
        return self.block_rows * self.patch_size, self.block_columns * self.patch_size

    def blocks_of(self, frames: Sequence[int]) -> tuple[int, ...]:
        """Return the blocks that consist of `frames`, increasing positions, of which the last one ends the clip.

        Raises:
            InputError: the frames are not those of whole blocks.
        """
        chosen, length, per_group = set(frames), frames[-1] + 1, self.blocks_per_group
        blocks: list[int] = []
        for number in sorted({self._group_number(frame, length) for frame in frames}):
            group = self.group(number, length)
            if not chosen.issuperset(group):
                raise InputError(
                    f"the frames {frames[0]} to {frames[-1]} contain only a part of a block, which has the frames "
                    f"{group.start} to {group.stop - 1} (block_shape and first_block_frames): give whole blocks."
                )
            blocks += range(number * per_group, (number + 1) * per_group)
        return tuple(blocks)

    def count(self, frames: int) -> int:
        """Return S, the number of blocks of a clip with `frames` latent frames.

        Raises:
            InputError: the frames do not divide into blocks.
        """
        return len(self.blocks_of(range(frames)))

    def following(self, block: int, frames: int, height: int, width: int) -> tuple[range, int]:
        """Return the blocks that given latents contain if the first of them is `block`.

        Args:
            block: the number of the first block.
            frames: latent frames that are given.
            height, width: their size in latent pixels: that of a frame, or that of one block.

        Returns:
            the numbers of the blocks, and the number of latent frames of a clip that ends with them.

        Raises:
            InputError: the latents are neither whole frames of whole blocks nor one block.
        """
        start = self._start(block // self.blocks_per_group, frames)
        end, frame_pixels = start + frames, (self.rows * self.patch_size, self.columns * self.patch_size)
        if (height, width) == frame_pixels and block % self.blocks_per_group == 0:
            blocks = self.blocks_of(range(start, end))
            return range(blocks[0], blocks[-1] + 1), end
        of_block = len(self.group_of(block, end)), *self.block_pixels
        if (frames, height, width) != of_block:
            raise InputError(
                f"latents of {frames}x{height}x{width} are not the next block, which has {of_block[0]} frames of "
                f"{of_block[1]}x{of_block[2]} latent pixels; whole frames can follow whole frames only."
            )
        return range(block, block + 1), end

    def _group_number(self, frame: int, frames: int) -> int:
        first = self.first_frames or frames
        return 0 if frame < first else 1 + ((frame - first) // self.frames if self.frames else 0)

    def _start(self, number: int, frames: int) -> int:
        return 0 if number == 0 else (self.first_frames or frames) + (number - 1) * self.frames

    def group(self, number: int, frames: int) -> range:
        """Return the frames of a group of blocks, those that share their frames."""
        start = self._start(number, frames)
        return range(start, start + ((self.frames if number else self.first_frames) or frames - start))

    def group_of(self, block: int, frames: int) -> range:
        """Return the frames of a block of a clip with `frames` latent frames."""
        return self.group(block // self.blocks_per_group, frames)

    def frames_before(self, block: int, frames: int) -> int:
        """Return the number of frames that contain all blocks before `block`, of a clip with `frames` latent frames."""
        return self.group_of(block - 1, frames).stop if block else 0

    def sizes(self, blocks: Sequence[int], frames: int) -> tuple[int, ...]:
        """Return the tokens of each block of a clip with `frames` latent frames."""
        return tuple(len(self.group_of(block, frames)) * self.block_rows * self.block_columns for block in blocks)

    def contexts(self, blocks: Sequence[int], frames: int) -> tuple[int, ...]:
        """Return for each block the number of tokens of all blocks before it."""
        sizes = self.sizes(blocks, frames)
        return tuple(
            self.group_of(block, frames).start * self.frame_tokens + block % self.blocks_per_group * size
            for block, size in zip(blocks, sizes, strict=True)
        )

    def corner(self, block: int) -> tuple[int, int]:
        """Return the first row and column of a block, in tokens."""
        row, column = divmod(block % self.blocks_per_group, self.columns // self.block_columns)
        return row * self.block_rows, column * self.block_columns

    def places(self, blocks: Sequence[int], frames: int) -> Tensor:
        """Return the (frame, row, column) of every token of some blocks, in packed order: (tokens, 3) on the CPU."""
        parts = []
        for block in blocks:
            row, column = self.corner(block)
            axes = (
                self.group_of(block, frames),
                range(row, row + self.block_rows),
                range(column, column + self.block_columns),
            )
            parts.append(torch.cartesian_prod(*(torch.tensor(axis, device="cpu") for axis in axes)).view(-1, 3))
        return torch.cat(parts) if parts else torch.empty(0, 3, dtype=torch.long, device="cpu")

    def pack(self, tokens: Tensor, blocks: Sequence[int], frames: int) -> Tensor:
        """Order the tokens of frames by blocks: (B, F, tokens of a frame, ...) -> (B, tokens of the blocks, ...).

        Args:
            tokens: of whole frames, beginning with those of the blocks, or of a single block.
            blocks: the blocks; tokens after theirs are left out.
            frames: latent frames of the clip.
        """
        if self.blocks_per_group > 1 and tokens.shape[2] == self.frame_tokens:
            order, _ = _packing(self, tuple(blocks), frames, tokens.device)
            return tokens.flatten(1, 2)[:, order]
        return tokens.flatten(1, 2)[:, : sum(self.sizes(blocks, frames))]

    def unpack(self, packed: Tensor, blocks: Sequence[int], frames: int) -> Tensor:
        """Order the tokens of whole frames by frame, row and column: (B, tokens, ...) -> (B, F, N, ...)."""
        if self.blocks_per_group > 1:
            _, places = _packing(self, tuple(blocks), frames, packed.device)
            packed = packed[:, places]
        return packed.unflatten(1, (-1, self.frame_tokens))

    @property
    def parts(self) -> tuple[Part, ...]:
        """Return where each block of a group, the blocks that share their frames, is in these frames."""
        height, width = self.block_pixels
        corners = (self.corner(block) for block in range(self.blocks_per_group))
        pixels = ((row * self.patch_size, column * self.patch_size) for row, column in corners)
        return tuple((slice(y, y + height), slice(x, x + width)) for y, x in pixels)

    def joined(self, blocks: Sequence[Tensor]) -> Tensor:
        """Join the blocks (..., C, h, w) of a group to whole frames (..., C, H, W)."""
        in_row = self.columns // self.block_columns
        rows = [torch.cat(list(blocks[k : k + in_row]), dim=-1) for k in range(0, len(blocks), in_row)]
        return torch.cat(rows, dim=-2) if len(blocks) > 1 else blocks[0]

    def context_length(self, frames: int) -> int:
        """Return the largest number of frames, at most `frames`, that a context can have: those of whole blocks.

        It is 0 if there is none, and always if one block has all frames of a clip.
        """
        if frames < self.first_frames:
            return 0
        return frames - (frames - self.first_frames) % self.frames if self.frames else self.first_frames

    def contexts_near(self, frames: int) -> tuple[int, ...]:
        """Return the possible lengths of a context next to `frames`, of which there are at most two."""
        shorter = self.context_length(frames)
        longer = shorter + self.frames if shorter else self.first_frames
        return tuple(sorted({shorter, longer} - {0}))

    def context_within(self, frames: int, wanted: int) -> int:
        """Return the length of a context in a clip of `frames` latent frames: at least `wanted` if that is possible.

        It is 0 if the clip is one block.
        """
        lengths = [length for length in range(1, frames) if self.context_length(length) == length]
        return next((length for length in lengths if length >= wanted), lengths[-1] if lengths else 0)

    def check_context(self, frames: int) -> None:
        """Check the length of a context.

        Raises:
            InputError: the context ends within a block, or no block can follow it.
        """
        if self.context_length(frames) == frames:
            return
        if not self.first_frames:
            raise InputError(NO_CONTEXT)
        raise InputError(
            f"the context has {frames} latent frames, which are not whole blocks of the model (the first block has "
            f"{self.first_frames} latent frames, a later one {self.frames or 'all others'}): give a context of "
            f"{' or '.join(map(str, self.contexts_near(frames)))} latent frames."
        )

    def group_after(self, context: int, frames: int) -> range:
        """Return the frames of the first blocks after a context of whole blocks, in a clip of `frames` latent frames.

        They are all frames of these blocks, also if the clip cuts them.
        """
        return self.group(1 + self._group_number(context - 1, frames) if context else 0, frames)

    def last_group(self, frames: int) -> range:
        """Return the frames of the last blocks of a clip with `frames` latent frames, which may cut them."""
        return range(self._start(self._group_number(frames - 1, frames), frames), frames)

    def frames_before_last(self, frames: int) -> int:
        """Return the number of frames that contain all blocks before the last one of a clip, which may cut this one.

        Blocks that are parts of frames have others before them in the same frames, up to the last of these.
        """
        blocks = (self._group_number(frames - 1, frames) + 1) * self.blocks_per_group if frames else 0
        return self.frames_before(max(blocks - 1, 0), frames)


@dataclass(frozen=True)
class ClipBlocks:
    """Some blocks of clips of one length and size, those of whole frames.

    Attributes:
        layout: the blocks of clips of this frame size.
        blocks: the numbers of the S blocks, all those of their F frames.
        frames: latent frames of a clip.
    """

    layout: BlockLayout
    blocks: tuple[int, ...]
    frames: int

    @classmethod
    def of(cls, config: GPDiTConfig, frames: Sequence[int], height: int, width: int) -> "ClipBlocks":
        """Return the blocks that consist of `frames`, increasing positions, of which the last one ends the clip.

        Raises:
            InputError: the frames are not those of whole blocks.
        """
        layout = BlockLayout.of(config, height, width)
        return cls(layout, layout.blocks_of(frames), frames[-1] + 1)

    @property
    def lengths(self) -> list[int]:
        """Return the number of frames of each group of blocks that share their frames."""
        return [len(self.layout.group_of(block, self.frames)) for block in self.blocks[:: self.layout.blocks_per_group]]

    def spread(self, per_block: Tensor) -> Tensor:
        """Spread values of blocks over latents: (B, S) -> (B, F, 1, H, W), or (B, F, 1, 1, 1) for whole frames."""
        layout, lengths = self.layout, self.lengths
        grid = per_block.unflatten(1, (-1, layout.rows // layout.block_rows, layout.columns // layout.block_columns))
        if set(lengths) != {1}:
            groups = zip(grid.split(1, dim=1), lengths, strict=True)
            grid = torch.cat([group.expand(-1, length, -1, -1) for group, length in groups], dim=1)
        if layout.blocks_per_group > 1:
            height, width = layout.block_pixels
            grid = grid[:, :, :, None, :, None].expand(-1, -1, -1, height, -1, width).flatten(4).flatten(2, 3)
        return grid[:, :, None]

    def mean(self, latents: Tensor) -> Tensor:
        """Average latents over each block: (B, F, C, H, W) -> (B, S)."""
        height, width = self.layout.block_pixels
        parts = latents.unflatten(4, (-1, width)).unflatten(3, (-1, height))
        per_frame = parts.mean(dim=(2, 4, 6))  # (B, F, rows of blocks, columns of blocks)
        if set(self.lengths) != {1}:
            per_frame = torch.stack([group.mean(dim=1) for group in per_frame.split(self.lengths, dim=1)], dim=1)
        return per_frame.flatten(1)


def count_blocks(config: GPDiTConfig, frames: Sequence[int], height: int, width: int) -> int:
    """Return the number of blocks that consist of `frames`, as :meth:`ClipBlocks.of`."""
    return len(ClipBlocks.of(config, frames, height, width).blocks)


# The copy of an index to a GPU makes the host wait.
@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _packing(layout: BlockLayout, blocks: tuple[int, ...], frames: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the index of each packed token among the tokens of the blocks' frames, and the inverse permutation."""
    frame, row, column = layout.places(blocks, frames).unbind(1)
    compact = torch.unique(frame, return_inverse=True)[1]  # the frames of these blocks, counted from 0
    order = (compact * layout.rows + row) * layout.columns + column
    return order.to(device), order.argsort().to(device)

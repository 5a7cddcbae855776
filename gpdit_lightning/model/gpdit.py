"""GPDiT: a transformer that denoises each block of latents given the clean blocks before it (GPDiT, section 4).

A block is a latent frame by default, and otherwise what `GPDiTConfig.block_shape` says (ACDiT, section 4).

Shapes: B clips, F latent frames, S blocks, C channels, H x W latent pixels, N tokens per frame, D hidden width.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gpdit_lightning.devices import check_device
from gpdit_lightning.errors import InputError
from gpdit_lightning.model.attention import find_backend
from gpdit_lightning.model.block import Block, run_block, run_compiled_block
from gpdit_lightning.model.checks import (
    check_cache_size,
    check_clean_theta,
    check_denoise,
    check_extend,
    check_features,
    check_forward,
)
from gpdit_lightning.model.config import GPDiTConfig
from gpdit_lightning.model.initial_weights import initial_weights
from gpdit_lightning.model.kv_cache import KVCache
from gpdit_lightning.model.layout import BlockLayout, ClipBlocks
from gpdit_lightning.model.patches import patchify, unpatchify
from gpdit_lightning.model.precision import RMSNorm, product_dtype, stream_dtype
from gpdit_lightning.model.prefix import Prefix
from gpdit_lightning.model.streams import PassBlocks, Streams, describe_streams
from gpdit_lightning.model.time_conditioning import (
    StochasticDepth,
    TimeConditioning,
    TimeEmbedding,
    TimeRotation,
    Unconditioned,
    conditioning_by_embedding,
)


class GPDiT(nn.Module):
    """The backbone: patch embedding, blocks of the transformer, output layer (GPDiT, figure 2; ACDiT, figure 4).

    No parameter sits directly on this module: DeepSpeed ZeRO-3 gathers those of submodules in any method, but the
    root's only in `forward`.

    All methods take latents and caches on the device of the weights. Angles and conditions may be on any device; on
    another one they are copied at each call.

    Args:
        config: the architecture.

    Raises:
        InputError: the attention backend does not exist.
    """

    def __init__(self, config: GPDiTConfig) -> None:
        super().__init__()
        find_backend(config.attention_backend)  # an unknown name fails here, not at the first step
        self.config = config
        patch_values = config.latent_channels * config.patch_size**2
        values = sum(config.modulation_widths[:-1])
        self.patch_embedding = nn.Linear(patch_values, config.width)
        self.prefix = Prefix(config) if config.has_prefix else None
        self.time_embedding = TimeEmbedding(config) if config.time_conditioning != "rotation" else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.output_modulation = nn.Linear(config.width, values) if values else None
        self.output_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.output = nn.Linear(config.width, patch_values)
        self.reset_parameters()

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.patch_embedding.weight.device

    def layout(self, height: int, width: int) -> BlockLayout:
        """Return the blocks of clips of `height` x `width` latent pixels.

        Raises:
            InputError: the frame does not divide into blocks.
        """
        return BlockLayout.of(self.config, height, width)

    def reset_parameters(self) -> None:
        """Set the parameters to their initial values (initial_weights.py)."""
        parameters = dict(self.named_parameters())
        with torch.no_grad():
            for name, values in initial_weights(self, self.config.layers):
                parameters[name].copy_(values)

    def forward(
        self,
        noisy: Tensor,
        theta: Tensor,
        clean: Tensor | None = None,
        condition: Tensor | None = None,
        draws: int = 1,
        frames: Sequence[int] | None = None,
        clean_theta: Tensor | None = None,
    ) -> Tensor:
        """Predict the target of every noisy block given the clean blocks before it.

        Args:
            noisy: (B, F, C, H, W).
            theta: (B, S) radians, one angle per noisy block; S = F if blocks are frames.
            clean: (B', F, C, H, W); with `frames`, at least the frames of all blocks before the last noisy one. The
                first K * B' <= B noisy clips have context, the others have none; None: no clip has context. No block
                attends to the last clean block, so it is not computed.
            condition: condition of each noisy clip, with or without context, for a model with `classes` or
                `text_width`: (B,) class numbers, -1 for none (None: none for all clips), or (B, L, text width)
                embeddings of any text encoder, those of the empty text for none. It has no effect on clean blocks.
            draws: K, number of noisy clips that share one clean clip as context, whose stream is computed once: noisy
                clip k * B' + b is copy k of clean clip b.
            frames: increasing positions of the noisy frames in the clip, those of whole blocks; None: 0 to F - 1. Clean
                frames after the last of them are not computed.
            clean_theta: (B', S') radians, the context noise: one angle for each of the S' blocks of `clean`, to which
                the caller has rotated it; None: 0.

        Returns:
            the prediction (B, F, C, H, W) of `config.target`: velocity or epsilon.

        Raises:
            InputError: the shapes do not fit the architecture or each other, or the latents are on another device than
                the weights.
        """
        check_device(self.device, "the model", noisy=noisy, clean=clean)
        check_forward(self.config, noisy, theta, clean, condition, draws, frames, clean_theta)
        frames = range(noisy.shape[1]) if frames is None else frames
        clip = ClipBlocks.of(self.config, frames, *noisy.shape[-2:])
        blocks, layout = PassBlocks.of_clip(clip, clean is not None and len(clean) > 0, draws), clip.layout
        # A clip of one block has no clean stream.
        clean = clean[:, : layout.frames_before(clip.blocks[-1], clip.frames)] if clean is not None else None
        if not blocks.clean:
            clean = clean_theta = None
        elif clean_theta is not None:
            clean_theta = clean_theta[:, : len(blocks.clean)]
        x, streams = self.embed(blocks, clean, noisy, theta, condition, clean_theta)
        x = self._run_blocks(x, streams)
        patches = layout.unpack(self.head(x, streams), clip.blocks, clip.frames)
        return unpatchify(patches, self.config.patch_size, layout.rows, layout.columns).to(noisy.dtype)

    def embed(
        self,
        blocks: PassBlocks,
        clean: Tensor | None = None,
        noisy: Tensor | None = None,
        theta: Tensor | None = None,
        condition: Tensor | None = None,
        clean_theta: Tensor | None = None,
    ) -> tuple[Tensor, Streams]:
        """Embed the prefix, all clean blocks and all noisy blocks as packed tokens, and describe their streams.

        Args:
            blocks: the blocks of the pass.
            clean, noisy: (B, F, C, H, W), whole frames that begin with those of the blocks, or (B, f, C, h, w), one
                block.
            theta, condition, clean_theta: as in :meth:`forward`, for the blocks of the pass.

        Returns:
            tokens (packed tokens, D), and the streams of the pass.
        """
        given = [
            blocks.layout.pack(patchify(latents, self.config.patch_size), numbers, blocks.frames).flatten(0, 1)
            for latents, numbers in ((clean, blocks.clean), (noisy, blocks.noisy))
            if latents is not None
        ]
        dtype, products = stream_dtype(self.patch_embedding.weight), product_dtype(self.patch_embedding.weight)
        x = self.patch_embedding(torch.cat(given).to(products)).to(dtype)
        prefix = None
        if noisy is not None and self.prefix is not None:
            prefix = self.prefix(condition, len(noisy))
            x = torch.cat((prefix.flatten(0, 1).to(dtype), x))
        clips, rows = (len(latents) if latents is not None else 0 for latents in (clean, noisy))
        sizes = blocks.sizes(self.config.causal_in_block)
        time: TimeConditioning
        of_streams = ((clean_theta, sizes.clean), (theta, sizes.noisy))
        angles = [(of_stream, of_blocks) for of_stream, of_blocks in of_streams if of_stream is not None]
        if not angles:
            time = Unconditioned()
        elif self.time_embedding is None:
            time = TimeRotation.of_blocks(x, self.config.time_site, *angles)
        else:
            assert theta is not None  # only the rotation has context noise
            embedding = self.time_embedding(theta.to(x.device, x.dtype), condition)
            time = conditioning_by_embedding(self.config, embedding, sizes.noisy)
        streams = describe_streams(self.config, blocks, x, products, prefix, clips, rows, time)
        return time.at_input(x), streams

    def _run_blocks(
        self,
        x: Tensor,
        streams: Streams,
        layers: Iterable[int] | None = None,
        cache: KVCache | None = None,
        run: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """Run blocks on the packed residual stream; the last block of the network drops all tokens but the noisy ones.

        Args:
            x: (packed tokens, D).
            streams: the description of the pass.
            layers: numbers of the blocks, from 0; None: all blocks.
            cache: previous clean blocks, to which those of the pass are appended.
            run: function that runs one block; None: the one for training if gradients are enabled.
        """
        if run is None:
            run = self._training_run() if torch.is_grad_enabled() else run_block
        last = self.config.layers - 1
        for layer in range(self.config.layers) if layers is None else layers:
            num_kv_only = streams.noisy_start if layer == last and streams.rows else 0
            layer_cache = cache.layer_cache(layer) if cache is not None else None
            x = run(self.blocks[layer], x, streams, num_kv_only, layer_cache)
        return x

    def _training_run(self) -> Callable[..., Tensor]:
        """Return the function that runs one block in training, with compilation and checkpointing as configured."""
        run = run_compiled_block if self.config.compile else run_block
        return partial(checkpoint, run, use_reentrant=False) if self.config.activation_checkpointing else run

    def head(self, x: Tensor, streams: Streams) -> Tensor:
        """Compute the predicted patches (B, tokens, C * patch * patch) from the noisy tokens (B * tokens, D)."""
        (time,) = streams.time.branches(self.output_modulation, 0)
        return self.output(streams.product_input(self.output_norm(x), time)).unflatten(0, (streams.rows, -1))

    def features(
        self,
        clean: Tensor,
        layers: Iterable[int],
        condition: Tensor | None = None,
        branch_scales: Tensor | None = None,
    ) -> dict[int, Tensor]:
        """Return features: the residual stream of clean frames, without time conditioning (GPDiT, section 5.3).

        Args:
            clean: (B, F, C, H, W).
            layers: numbers of the blocks after which the stream is returned, from 1; 0 is the patch embedding.
            condition: as in :meth:`forward`, for each of the B clips. It is checked, but has no effect, since clean
                frames do not attend to it; all methods have this argument.
            branch_scales: (blocks, branches, B), multiplies the output of each branch (attention, MLP) of a block for
                each clip, such as 0 for the branches that stochastic depth drops; None: 1.

        Returns:
            for each layer (B, F, N, D), not normalized; blocks after the highest layer are not run.

        Raises:
            InputError: a layer does not exist, the shapes or the condition do not fit the architecture, or the latents
                are on another device than the weights.
        """
        check_device(self.device, "the model", clean=clean)
        layers = sorted(set(layers))
        check_features(self.config, clean, layers, condition)
        layout, frames = self.layout(*clean.shape[-2:]), clean.shape[1]
        blocks = range(layout.count(frames))
        x, streams = self.embed(PassBlocks(layout, frames, clean=blocks), clean)
        features = {}
        for previous, layer in pairwise((0, *layers)):
            if branch_scales is None:
                x = self._run_blocks(x, streams, range(previous, layer))
            else:
                for number in range(previous, layer):
                    x = self._run_blocks(x, replace(streams, time=StochasticDepth(branch_scales[number])), [number])
            features[layer] = layout.unpack(x.unflatten(0, (len(clean), -1)), blocks, frames)
        return features

    def new_cache(self, batch_size: int, max_frames: int, height: int, width: int, sinks: int | None = None) -> KVCache:
        """Return an empty cache for `batch_size` clips.

        Args:
            batch_size: B.
            max_frames: capacity in latent frames.
            height, width: size of a latent frame, in latent pixels.
            sinks: number of first frames that a full cache keeps, with the latest frames; None: a full cache accepts no
                more frames.

        Raises:
            InputError: a size is not positive or not divisible into patches and blocks, or a rolling cache has no
                capacity for a window, or one that does not consist of blocks.
        """
        check_cache_size(self.config, batch_size, max_frames, height, width)
        dtype = product_dtype(self.patch_embedding.weight)
        return KVCache(self.config, batch_size, max_frames, height, width, self.device, dtype, sinks)

    @torch.no_grad()
    def extend(
        self, cache: KVCache, clean: Tensor, condition: Tensor | None = None, clean_theta: Tensor | None = None
    ) -> None:
        """Append clean blocks to the cache.

        Args:
            cache: from :meth:`new_cache`.
            clean: (B, k, C, H, W), the frames that follow those in the cache, of whole blocks; or (B, f, C, h, w), the
                next block, where a block is a part of frames.
            condition: as in :meth:`features`: checked, but without effect.
            clean_theta: (B, S) radians, the context noise of each block of `clean`, as in :meth:`forward`.

        Raises:
            InputError: the shapes or the condition do not fit, a cache that does not roll is full, or the latents or
                the cache are on another device than the weights.
        """
        check_device(self.device, "the model", clean=clean)
        if clean.ndim == 5 and clean.shape[1] == 0:
            return
        check_extend(self.config, cache, clean, condition, clean_theta)
        last, last_block = self.config.layers - 1, self.blocks[-1]
        assert isinstance(last_block, Block)
        while clean.shape[1]:
            most = clean.shape[1] if cache.sinks is None else cache.max_new_tokens // cache.tokens
            new, clean = clean[:, :most], clean[:, most:]
            blocks, length = cache.layout.following(cache.blocks, new.shape[1], *new.shape[-2:])
            new_tokens = sum(cache.layout.sizes(blocks, length))
            cache.begin_pass(len(blocks), new_tokens)
            of_pass = PassBlocks(cache.layout, length, blocks, cached=cache.tokens_before(new_tokens))
            new_theta = None
            if clean_theta is not None:
                new_theta, clean_theta = clean_theta[:, : len(blocks)], clean_theta[:, len(blocks) :]
            x, streams = self.embed(of_pass, new, clean_theta=new_theta)
            x = self._run_blocks(x, streams, range(last), cache)
            last_block.write_cache(x, streams, cache.layer_cache(last))
            cache.end_pass()

    def denoise(
        self,
        noisy: Tensor,
        theta: Tensor,
        cache: KVCache | None = None,
        condition: Tensor | None = None,
        clean: Tensor | None = None,
        draws: int = 1,
        compiled: bool = False,
        clean_theta: Tensor | None = None,
    ) -> Tensor:
        """Predict the target of the next block given the blocks in the cache and then those in `clean`.

        Args:
            noisy: (R, C, H, W) where a block is a frame, else (R, f, C, h, w), the size of the block; with R a multiple
                of B and at least K * B. Rows after the first K * B have no context.
            theta: (R,) radians.
            cache: the previous clean blocks of B clips, changed only by `clean`; None or empty: no context.
            condition: as in :meth:`forward`, for each of the R rows.
            clean: (B, k, C, H, W), the clean frames immediately before this block, or a block as in :meth:`extend`.
                With a cache they are appended to it in the same pass, as by `extend`; without a cache they are the
                whole context (GPDiT, section 4.1.2), and must be whole frames.
            draws: K, number of rows that share the context of a clip: row k * B + b has that of clip b.
            compiled: use blocks compiled by torch.compile, whatever `config.compile`, which concerns training; with a
                rolling cache, four graphs are used for all frames.
            clean_theta: (B, S) radians, the context noise of each block of `clean`, as in :meth:`forward`.

        Returns:
            the prediction of `config.target`, of the shape of `noisy`, equal to that of this block in :meth:`forward`.

        Raises:
            InputError: the shapes do not fit, a cache that does not roll is full, or the latents or the cache are on
                another device than the weights.
        """
        check_device(self.device, "the model", noisy=noisy, clean=clean)
        one_frame = noisy.ndim == 4
        noisy = noisy[:, None] if one_frame else noisy
        check_denoise(self.config, noisy, theta, cache, condition, clean, draws)
        layout = cache.layout if cache is not None else self.layout(*(clean if clean is not None else noisy).shape[-2:])
        block, new_tokens = cache.blocks if cache is not None else 0, 0
        new = range(block, block)
        if clean is not None and clean.shape[1]:
            new, length = layout.following(block, clean.shape[1], *clean.shape[-2:])
            new_tokens = sum(layout.sizes(new, length))
        check_clean_theta(self.config, clean_theta, 0 if clean is None else len(clean), len(new))
        (block, *others), length = layout.following(new.stop, noisy.shape[1], *noisy.shape[-2:])
        if others:
            raise InputError(
                f"noisy has {noisy.shape[1]} frames, those of {1 + len(others)} blocks of block_shape "
                f"{self.config.block_shape}: give one block."
            )
        cached = (0, 0)
        if cache is not None:
            cached = cache.tokens_before(new_tokens)
            cache.begin_pass(len(new), new_tokens)
        of_pass = PassBlocks(layout, length, new, (block,), (cached[1] + new_tokens,), draws, cached)
        if not new_tokens:
            clean = clean_theta = None
        x, streams = self.embed(of_pass, clean, noisy, theta[:, None], condition, clean_theta)
        x = self._run_blocks(x, streams, cache=cache, run=run_compiled_block if compiled else run_block)
        if cache is not None:
            cache.end_pass()
        patches = self.head(x, streams).unflatten(1, (noisy.shape[1], -1))
        prediction = unpatchify(patches, self.config.patch_size, layout.block_rows, layout.block_columns)
        return (prediction[:, 0] if one_frame else prediction).to(noisy.dtype)

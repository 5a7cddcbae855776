"""GPDiT: a transformer that denoises each latent frame given the clean frames before it (GPDiT, section 4).

Shapes: B clips, F latent frames, C channels, H x W latent pixels, N tokens per frame, D hidden width.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gpdit_lightning.devices import check_device
from gpdit_lightning.model.attention import find_backend
from gpdit_lightning.model.block import Block, run_block, run_compiled_block
from gpdit_lightning.model.checks import (
    check_cache_size,
    check_denoise,
    check_extend,
    check_features,
    check_forward,
)
from gpdit_lightning.model.config import GPDiTConfig
from gpdit_lightning.model.kv_cache import KVCache
from gpdit_lightning.model.patches import patchify, unpatchify
from gpdit_lightning.model.precision import RMSNorm, product_dtype, stream_dtype
from gpdit_lightning.model.prefix import Prefix
from gpdit_lightning.model.streams import FrameLayout, Streams, describe_streams


class GPDiT(nn.Module):
    """The backbone: patch embedding, blocks, output layer (GPDiT, figure 2).

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
        self.patch_embedding = nn.Linear(patch_values, config.width)
        self.prefix = Prefix(config) if config.classes or config.text_width else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.output_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.output = nn.Linear(config.width, patch_values)
        self.reset_parameters()

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.patch_embedding.weight.device

    def reset_parameters(self) -> None:
        """Xavier weights, zero biases, a zero output layer (as DiT), and branches scaled by 1 / sqrt(2 layers)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)  # as DiT's labels
        nn.init.zeros_(self.output.weight)
        with torch.no_grad():
            for block in self.blocks:
                assert isinstance(block, Block)
                block.attention_output.weight.mul_((2 * self.config.layers) ** -0.5)
                block.mlp.down.weight.mul_((2 * self.config.layers) ** -0.5)

    def forward(
        self,
        noisy: Tensor,
        theta: Tensor,
        clean: Tensor | None = None,
        condition: Tensor | None = None,
        draws: int = 1,
        frames: Sequence[int] | None = None,
    ) -> Tensor:
        """Predict the velocity of every noisy frame given the clean frames before it.

        Args:
            noisy: (B, F, C, H, W).
            theta: (B, F) radians, one angle per noisy frame.
            clean: (B', F, C, H, W), with `frames` the whole clip. The first K * B' <= B noisy clips have context, the
                others have none; None: no clip has context. No frame attends to the last clean frame, so it is not
                computed.
            condition: condition of each noisy clip, with or without context, for a model with `classes` or
                `text_width`: (B,) class numbers, -1 for none (None: none for all clips), or (B, L, text width)
                embeddings of any text encoder, those of the empty text for none. Only noisy frames attend to it.
            draws: K, number of noisy clips that share one clean clip as context, whose stream is computed once: noisy
                clip k * B' + b is copy k of clean clip b.
            frames: increasing positions of the noisy frames in the clip; None: 0 to F - 1. Clean frames after the last
                of them are not computed.

        Returns:
            velocity (B, F, C, H, W).

        Raises:
            InputError: the shapes do not fit the architecture or each other, or the latents are on another device than
                the weights.
        """
        check_device(self.device, "the model", noisy=noisy, clean=clean)
        check_forward(self.config, noisy, theta, clean, condition, draws, frames)
        frames = tuple(range(noisy.shape[1]) if frames is None else frames)
        # Frame i attends to the i clean frames before it.
        clean = clean[:, : frames[-1]] if clean is not None and len(clean) and frames[-1] else None
        layout = FrameLayout(noisy_frames=frames, context_lengths=frames, draws=draws)
        x, streams = self.embed(layout, clean, noisy, theta, condition)
        x = self._run_blocks(x, streams)
        return self.head(x, streams).to(noisy.dtype)

    def embed(
        self,
        layout: FrameLayout,
        clean: Tensor | None = None,
        noisy: Tensor | None = None,
        theta: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> tuple[Tensor, Streams]:
        """Embed the prefix, all clean frames and all noisy frames as packed tokens, and describe their streams.

        Args:
            layout: the positions of the frames.
            clean, noisy, theta, condition: as in :meth:`forward`.

        Returns:
            tokens (packed tokens, D), and the streams of the pass.
        """
        given = [latents for latents in (clean, noisy) if latents is not None]
        patches = torch.cat([patchify(latents, self.config.patch_size).flatten(0, 2) for latents in given])
        dtype, products = stream_dtype(self.patch_embedding.weight), product_dtype(self.patch_embedding.weight)
        x = self.patch_embedding(patches.to(products)).to(dtype)
        prefix = None
        if noisy is not None and self.prefix is not None:
            prefix = self.prefix(condition, len(noisy))
            x = torch.cat((prefix.flatten(0, 1).to(dtype), x))
        streams = describe_streams(self.config, layout, x, products, prefix, clean, noisy, theta)
        return streams.rotation.at_input(x), streams

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
            cache: previous clean frames, to which the blocks append those of the pass.
            run: function that runs one block; None: the one for training if gradients are enabled.
        """
        if run is None:
            run = self._training_run() if torch.is_grad_enabled() else run_block
        last = self.config.layers - 1
        for layer in range(self.config.layers) if layers is None else layers:
            num_kv_only = streams.noisy_start if layer == last and streams.noisy_shape[0] else 0
            layer_cache = cache.layer_cache(layer) if cache is not None else None
            x = run(self.blocks[layer], x, streams, num_kv_only, layer_cache)
        return x

    def _training_run(self) -> Callable[..., Tensor]:
        """Return the function that runs one block in training, with compilation and checkpointing as configured."""
        run = run_compiled_block if self.config.compile else run_block
        return partial(checkpoint, run, use_reentrant=False) if self.config.activation_checkpointing else run

    def head(self, x: Tensor, streams: Streams) -> Tensor:
        """Compute the velocity (B, F, C, H, W) from the noisy tokens (B * F * N, D)."""
        h = streams.product_input(self.output_norm(x))
        patches = self.output(h).view(*streams.noisy_shape, streams.tokens, -1)
        return unpatchify(patches, self.config.patch_size, streams.rows, streams.columns)

    def features(self, clean: Tensor, layers: Iterable[int], condition: Tensor | None = None) -> dict[int, Tensor]:
        """Return features: the residual stream of clean frames, without time rotation (GPDiT, section 5.3).

        Args:
            clean: (B, F, C, H, W).
            layers: numbers of the blocks after which the stream is returned, from 1; 0 is the patch embedding.
            condition: as in :meth:`forward`, for each of the B clips. It is checked, but has no effect, since clean
                frames do not attend to it; all methods have this argument.

        Returns:
            for each layer (B, F, N, D), not normalized; blocks after the highest layer are not run.

        Raises:
            InputError: a layer does not exist, the shapes or the condition do not fit the architecture, or the latents
                are on another device than the weights.
        """
        check_device(self.device, "the model", clean=clean)
        layers = sorted(set(layers))
        check_features(self.config, clean, layers, condition)
        x, streams = self.embed(FrameLayout(), clean)
        features = {}
        for previous, layer in pairwise((0, *layers)):
            x = self._run_blocks(x, streams, range(previous, layer))
            features[layer] = x.view(*clean.shape[:2], streams.tokens, self.config.width)
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
            InputError: a size is not positive or not divisible into patches, or a rolling cache has no capacity for a
                window.
        """
        check_cache_size(self.config, batch_size, max_frames, height, width)
        dtype = product_dtype(self.patch_embedding.weight)
        return KVCache(self.config, batch_size, max_frames, height, width, self.device, dtype, sinks)

    @torch.no_grad()
    def extend(self, cache: KVCache, clean: Tensor, condition: Tensor | None = None) -> None:
        """Append clean frames to the cache.

        Args:
            cache: from :meth:`new_cache`.
            clean: (B, k, C, H, W), the frames that follow those in the cache.
            condition: as in :meth:`features`: checked, but without effect.

        Raises:
            InputError: the shapes or the condition do not fit, a cache that does not roll is full, or the latents or
                the cache are on another device than the weights.
        """
        check_device(self.device, "the model", clean=clean)
        if clean.ndim == 5 and clean.shape[1] == 0:
            return
        check_extend(self.config, cache, clean, condition)
        last, last_block = self.config.layers - 1, self.blocks[-1]
        assert isinstance(last_block, Block)
        while clean.shape[1]:
            new, clean = clean[:, : cache.max_new_frames], clean[:, cache.max_new_frames :]
            cache.begin_pass(new.shape[1])
            x, streams = self.embed(FrameLayout(cache.frames), new)
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
    ) -> Tensor:
        """Predict the velocity of the next frame given the frames in the cache and then those in `clean`.

        Args:
            noisy: (R, C, H, W), with R a multiple of B and at least K * B. Rows after the first K * B have no context.
            theta: (R,) radians.
            cache: the previous clean frames of B clips, changed only by `clean`; None or empty: no context.
            condition: as in :meth:`forward`, for each of the R rows.
            clean: (B, k, C, H, W), the clean frames immediately before this frame. With a cache they are appended to it
                in the same pass, as by `extend`; without a cache they are the whole context (GPDiT, section 4.1.2).
            draws: K, number of rows that share the context of a clip: row k * B + b has that of clip b.
            compiled: use blocks compiled by torch.compile, whatever `config.compile`, which concerns training; with a
                rolling cache, four graphs are used for all frames.

        Returns:
            velocity (R, C, H, W), equal to that of this frame in :meth:`forward`.

        Raises:
            InputError: the shapes do not fit, a cache that does not roll is full, or the latents or the cache are on
                another device than the weights.
        """
        check_device(self.device, "the model", noisy=noisy, clean=clean)
        noisy = noisy[:, None]
        check_denoise(self.config, noisy, theta, cache, condition, clean, draws)
        new_frames = clean.shape[1] if clean is not None else 0
        first, context_length = 0, new_frames
        if cache is not None:
            first, context_length = cache.frames, cache.stored_frames(new_frames)
            cache.begin_pass(new_frames)
        layout = FrameLayout(first, (first + new_frames,), (context_length,), draws)
        x, streams = self.embed(layout, clean, noisy, theta[:, None], condition)
        x = self._run_blocks(x, streams, cache=cache, run=run_compiled_block if compiled else run_block)
        if cache is not None:
            cache.end_pass()
        return self.head(x, streams).to(noisy.dtype)[:, 0]

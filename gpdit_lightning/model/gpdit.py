"""GPDiT: a transformer that denoises each latent frame given the clean frames before it (GPDiT, section 4).

Shapes: B clips, F latent frames, C channels, H x W latent pixels, N tokens per frame, D hidden width.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gpdit_lightning.errors import InputError
from gpdit_lightning.model.attention import precision_of, select_backend
from gpdit_lightning.model.block import Block
from gpdit_lightning.model.config import GPDiTConfig
from gpdit_lightning.model.kv_cache import KVCache, Memory
from gpdit_lightning.model.patches import patchify, unpatchify
from gpdit_lightning.model.positions import rope_table
from gpdit_lightning.model.prefix import Prefix
from gpdit_lightning.model.streams import Streams
from gpdit_lightning.model.time_conditioning import TimeRotation


@cache
def compiled_call() -> Callable[..., Tensor]:
    """The call of a block, compiled: once for each shape of a pass, whatever the number of blocks and models."""
    # Buckets, lengths, numbers of contexts, inner blocks and the last: by default torch stays eager from the ninth on.
    torch.compiler.config.recompile_limit = torch.compiler.config.accumulated_recompile_limit = 1024
    torch._dynamo.config.optimize_ddp = False  # cuts graphs for DDP's buckets; blocks, one by one, are cut fine enough

    def call(block: nn.Module, x: Tensor, streams: Streams, skip: int, memory: Memory | None) -> Tensor:
        return block(x, streams, skip, memory)

    return torch.compile(call, dynamic=False)


class GPDiT(nn.Module):
    """The backbone.

    No parameter sits directly on this module: DeepSpeed ZeRO-3 gathers those of submodules in any method, but the
    root's only in `forward`.

    Args:
        config: the architecture.
    """

    def __init__(self, config: GPDiTConfig) -> None:
        super().__init__()
        self.config = config
        patch_values = config.latent_channels * config.patch_size**2
        self.patch_embedding = nn.Linear(patch_values, config.width)
        self.prefix = Prefix(config) if config.classes or config.text_width else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.output_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.output = nn.Linear(config.width, patch_values)
        self.reset_parameters()

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
            clean: (B', F, C, H, W), the whole clip where `frames` names some, with K * B' <= B: the first K * B' noisy
                clips have context, the rest have none; None: no clip has. The last clean frame is seen by nobody and is
                not computed.
            condition: what a model with `classes` or `text_width` is told of each noisy clip, whatever its context:
                (B,) class numbers, -1 for none (as is None), or (B, L, text width) embeddings of any text encoder,
                those of an empty text for none. Seen by the noisy frames alone.
            draws: K, how many noisy clips share the context of one clean clip, whose stream is computed once: noisy
                clip k * B' + b is the k-th copy of clean clip b.
            frames: the positions of the noisy frames in the clip, rising, where only some of them are wanted; None: all
                from the first on. Clean frames behind the last are not computed.

        Returns:
            velocity (B, F, C, H, W).

        Raises:
            InputError: shapes that do not fit the architecture or each other.
        """
        self._check(noisy, condition)
        some, frames = frames is not None, tuple(range(noisy.shape[1]) if frames is None else frames)
        if theta.shape != noisy.shape[:2]:
            raise InputError(f"theta has shape {tuple(theta.shape)}; it must be (B, F) = {tuple(noisy.shape[:2])}.")
        if len(frames) != noisy.shape[1] or any(b <= a for a, b in pairwise((-1, *frames))):
            raise InputError(
                f"frames are {frames} for {noisy.shape[1]} noisy ones: give the position of each, rising from 0."
            )
        if draws < 1:
            raise InputError(f"draws is {draws}; it must be at least 1.")
        if clean is not None:
            length = clean.shape[1] if clean.ndim == 5 else 0
            enough = length >= frames[-1] if some else length == noisy.shape[1]
            if not enough or clean.shape[2:] != noisy.shape[2:] or draws * len(clean) > len(noisy):
                raise InputError(
                    f"clean has shape {tuple(clean.shape)}; it must be (B', F, C, H, W) like noisy "
                    f"{tuple(noisy.shape)}, with draws * B' <= B where draws is {draws}."
                )
            clean = clean[:, : frames[-1]] if len(clean) and frames[-1] else None
        x, streams = self._start(clean, noisy, theta, condition, frames, frames, draws=draws)
        for block in self.blocks[:-1]:
            x = self._run(block, x, streams)
        x = self._run(self.blocks[-1], x, streams, skip=streams.noisy_start)
        return self._finish(x, streams, noisy)

    def features(self, clean: Tensor, layers: Iterable[int], condition: Tensor | None = None) -> dict[int, Tensor]:
        """The clean stream's residual stream, without time rotation (GPDiT, section 5.3).

        Args:
            clean: (B, F, C, H, W).
            layers: after which blocks to look, 1-based; 0 is the patch embedding.
            condition: as in :meth:`forward`, without effect: clean frames see none.

        Returns:
            for each layer (B, F, N, D), unnormalised; blocks above the highest layer are not run.

        Raises:
            InputError: a layer that does not exist, or shapes that do not fit.
        """
        self._check(clean, condition)
        wanted = set(layers)
        for layer in wanted:
            if not 0 <= layer <= self.config.layers:
                raise InputError(
                    f"layer {layer} does not exist: choose from 0 (patch embedding) to {self.config.layers}."
                )
        x, streams = self._start(clean)
        shape = (*clean.shape[:2], streams.tokens, self.config.width)
        found = {0: x.view(shape)} if 0 in wanted else {}
        for number, block in enumerate(self.blocks[: max(wanted, default=0)], start=1):
            x = self._run(block, x, streams)
            if number in wanted:
                found[number] = x.view(shape)
        return found

    def new_cache(self, batch_size: int, max_frames: int, height: int, width: int, sinks: int | None = None) -> KVCache:
        """An empty cache for `batch_size` clips of latent frames of `height` x `width` pixels.

        Args:
            batch_size: B.
            max_frames: its room, in latent frames.
            height, width: of a latent frame.
            sinks: with a number, the cache rolls when it is full: it keeps so many first frames and the latest others.

        Raises:
            InputError: a rolling cache without room for a window.
        """
        weight = self.patch_embedding.weight
        dtype = weight.dtype
        if torch.is_autocast_enabled(weight.device.type):
            dtype = torch.get_autocast_dtype(weight.device.type)
        return KVCache(self.config, batch_size, max_frames, height, width, weight.device, dtype, sinks)

    @torch.no_grad()
    def extend(self, cache: KVCache, clean: Tensor, condition: Tensor | None = None) -> None:
        """Append clean frames to the cache.

        Args:
            cache: from :meth:`new_cache`.
            clean: (B, k, C, H, W), the frames that follow those in the cache.
            condition: as in :meth:`forward`, without effect: clean frames see none.

        Raises:
            InputError: shapes that do not fit, or no room left in a cache that does not roll.
        """
        if clean.ndim == 5 and clean.shape[1] == 0:
            return
        self._check(clean, condition)
        cache.check(clean, len(clean), new_frames=clean.shape[1] if cache.sinks is None else 0)
        while clean.shape[1]:
            taken, clean = clean[:, : cache.fits], clean[:, cache.fits :]
            x, streams = self._start(taken, first_frame=cache.frames)
            *memories, memory = cache.memories(taken.shape[1])
            for block, own in zip(self.blocks, memories, strict=False):
                x = block(x, streams, memory=own)
            last = self.blocks[-1]
            assert isinstance(last, Block)
            last.remember(x, streams, memory)
            cache.frames += taken.shape[1]

    def denoise(
        self,
        noisy: Tensor,
        theta: Tensor,
        cache: KVCache | None = None,
        condition: Tensor | None = None,
        clean: Tensor | None = None,
        draws: int = 1,
        without_context: int = 0,
        compiled: bool = False,
    ) -> Tensor:
        """Predict the velocity of the next frame given the frames in the cache, and those in `clean` behind them.

        Args:
            noisy: (R, C, H, W).
            theta: (R,) radians.
            cache: the clean frames before. It is changed by `clean` only; None or empty: no context.
            condition: as in :meth:`forward`, for each of the R rows.
            clean: (B, k, C, H, W), the clean frames right before this one. With a cache they are appended to it in the
                same pass, which saves `extend`; without one they are the whole context, as in GPDiT 4.1.2.
            draws: K, how many rows share the context of a clip: row k * B + b has that of clip b.
            without_context: how many further rows have none, the last ones: R = K * B + without_context.
            compiled: run blocks that torch.compile has fused; where the cache rolls, four graphs serve all frames.

        Returns:
            velocity (R, C, H, W), equal to this frame's of :meth:`forward`.

        Raises:
            InputError: shapes that do not fit, or no room left in a cache that does not roll.
        """
        noisy = noisy[:, None]
        self._check(noisy, condition)
        if theta.shape != noisy.shape[:1]:
            raise InputError(f"theta has shape {tuple(theta.shape)}; it must be (B,) = ({noisy.shape[0]},).")
        new_frames = clean.shape[1] if clean is not None else 0
        clips, spare = divmod(len(noisy) - without_context, draws)
        if clean is not None:
            self._check(clean)
            if (len(clean), spare, *clean.shape[-2:]) != (clips, 0, *noisy.shape[-2:]):
                raise InputError(
                    f"clean has shape {tuple(clean.shape)} and noisy {tuple(noisy[:, 0].shape)}; clean must be "
                    f"(B, k, C, H, W) and noisy (draws * B + without_context, C, H, W) with draws = {draws} and "
                    f"without_context = {without_context}."
                )
        if cache is not None:
            cache.check(noisy, clips, new_frames)
        first, held = (cache.frames, cache.held(new_frames)) if cache is not None else (0, new_frames)
        x, streams = self._start(clean, noisy, theta[:, None], condition, (first + new_frames,), (held,), draws, first)
        memories = cache.memories(new_frames) if cache is not None else [None] * self.config.layers
        for layer, (block, memory) in enumerate(zip(self.blocks, memories, strict=True), start=1):
            skip = streams.noisy_start if layer == self.config.layers else 0
            x = compiled_call()(block, x, streams, skip, memory) if compiled else block(x, streams, skip, memory)
        if cache is not None:
            cache.frames += new_frames
        return self._finish(x, streams, noisy)[:, 0]

    def _start(
        self,
        clean: Tensor | None,
        noisy: Tensor | None = None,
        theta: Tensor | None = None,
        condition: Tensor | None = None,
        noisy_frames: tuple[int, ...] = (),
        noisy_sees: tuple[int, ...] = (),
        draws: int = 1,
        first_frame: int = 0,
    ) -> tuple[Tensor, Streams]:
        """Embed all streams, packed (prefix, clean and noisy tokens), and describe the pass.

        Args:
            clean, noisy, theta, condition, draws: as in :meth:`forward` and its sisters.
            noisy_frames: the positions of the noisy frames.
            noisy_sees: how many frames of the context each of them sees.
            first_frame: the position of the first clean frame.
        """
        config = self.config
        given = [latents for latents in (clean, noisy) if latents is not None]
        rows, columns = (side // config.patch_size for side in given[0].shape[-2:])
        weight = self.patch_embedding.weight
        precise = torch.float64 if given[0].dtype == torch.float64 else torch.float32
        patches = torch.cat([patchify(latents, config.patch_size).flatten(0, 2) for latents in given])
        # In the precision of the weights: under autocast the residual stream stays in float32.
        x = self.patch_embedding(patches.to(weight.dtype)).to(weight.dtype)
        prefix_shape = 0, 0
        if noisy is not None and self.prefix is not None:
            prefix = self.prefix(condition, len(noisy))
            prefix_shape = prefix.shape[0], prefix.shape[1]
            x = torch.cat((prefix.flatten(0, 1).to(weight.dtype), x))
        angles = torch.zeros(len(x), device=x.device, dtype=precise)
        if theta is not None:
            per_token = theta.to(precise).flatten().repeat_interleave(rows * columns)
            angles[len(x) - len(per_token) :] = per_token
        clean_frames = range(first_frame, first_frame + (clean.shape[1] if clean is not None else 0))
        table = partial(rope_table, config, rows=rows, columns=columns, device=x.device, dtype=precise)
        streams = Streams(
            variant=config.attention,
            operator=select_backend(config.attention_backend, x.device.type, precision_of(x), config.head_width),
            tokens=rows * columns,
            prefix_shape=prefix_shape,
            clean_shape=(clean.shape[0], clean.shape[1]) if clean is not None else (0, 0),
            noisy_shape=(noisy.shape[0], noisy.shape[1]) if noisy is not None else (0, 0),
            noisy_sees=noisy_sees,
            clean_rope=table(frames=clean_frames),
            noisy_rope=table(frames=noisy_frames),
            rotation=TimeRotation(angles, config.time_site, precise),
            draws=draws,
        )
        return streams.rotation.at_input(x), streams

    def _run(self, block: nn.Module, x: Tensor, streams: Streams, skip: int = 0) -> Tensor:
        if not torch.is_grad_enabled():
            return block(x, streams, skip)
        run = partial(compiled_call(), block) if self.config.compile else block
        if self.config.activation_checkpointing:
            return checkpoint(run, x, streams, skip, None, use_reentrant=False)
        return run(x, streams, skip, None)

    def _finish(self, x: Tensor, streams: Streams, noisy: Tensor) -> Tensor:
        """Read the velocity out of the noisy tokens, which are all that is left."""
        height, width = noisy.shape[-2:]
        h = streams.rotation.at_branch_input(self.output_norm(x))
        patches = self.output(h).view(*noisy.shape[:2], streams.tokens, -1)
        return unpatchify(patches, self.config.patch_size, height, width).to(noisy.dtype)

    def _check(self, latents: Tensor, condition: Tensor | None = None) -> None:
        if condition is not None and self.prefix is None:
            raise InputError("this GPDiT was built without a condition: leave `condition` at None.")
        if latents.ndim != 5 or latents.shape[2] != self.config.latent_channels:
            raise InputError(
                f"latents have shape {tuple(latents.shape)}; this model takes (B, F, C, H, W) with "
                f"C = {self.config.latent_channels}."
            )
        if 0 in latents.shape:
            raise InputError(f"latents have shape {tuple(latents.shape)}: there is nothing in them.")
        patch = self.config.patch_size
        if latents.shape[-2] % patch or latents.shape[-1] % patch:
            raise InputError(
                f"latent frames of {latents.shape[-2]}x{latents.shape[-1]} do not divide into {patch}x{patch} patches: "
                f"choose frame sizes that are multiples of {8 * patch} pixels."
            )

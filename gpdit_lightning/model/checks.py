"""Checks of the arguments of GPDiT's methods.

Shapes: B clips, F latent frames, C channels, H x W latent pixels.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise

from torch import Tensor

from gpdit_lightning.errors import InputError
from gpdit_lightning.model.config import GPDiTConfig
from gpdit_lightning.model.kv_cache import KVCache
from gpdit_lightning.model.layout import BlockLayout
from gpdit_lightning.model.prefix import NO_LABEL


def check_latents(config: GPDiTConfig, latents: Tensor, may_have_no_frames: bool = False) -> None:
    """Raise InputError unless latents are floating-point (B, F, C, H, W), not empty, and divisible into patches."""
    shape, patch = tuple(latents.shape), config.patch_size
    if len(shape) != 5 or shape[2] != config.latent_channels:
        raise InputError(
            f"latents have shape {shape}; this model takes (B, F, C, H, W) with C = {config.latent_channels}."
        )
    if 0 in (shape[:1] + shape[2:] if may_have_no_frames else shape):
        raise InputError(f"latents have shape {shape}: they are empty.")
    if not latents.is_floating_point():
        raise InputError(f"latents have dtype {latents.dtype}; this model takes whitened floating-point latents.")
    if shape[3] % patch or shape[4] % patch:
        raise InputError(
            f"latent frames of {shape[3]}x{shape[4]} do not divide into {patch}x{patch} patches: choose a height and a "
            f"width that are multiples of {patch} latent pixels."
        )


def check_condition(config: GPDiTConfig, condition: Tensor | None, rows: int) -> None:
    """Raise InputError unless a condition has the form that the model takes, for each of `rows` noisy clips."""
    if condition is not None and not (config.classes or config.text_width):
        raise InputError("this GPDiT has neither classes nor text_width: leave `condition` at None.")
    if config.text_width:
        if condition is None or condition.shape[::2] != (rows, config.text_width) or condition.ndim != 3:
            raise InputError(
                f"the condition is {None if condition is None else tuple(condition.shape)}; this model takes text "
                f"embeddings (B, L, {config.text_width}) with B = {rows}, those of an empty text for none."
            )
    elif condition is not None:
        wrong = condition.shape != (rows,) or condition.is_floating_point()
        # On a GPU the range is not checked: reading the values would synchronize with it.
        if wrong or (condition.device.type == "cpu" and not -1 <= condition.min() <= condition.max() < config.classes):
            raise InputError(
                f"the condition is {condition.tolist()}; this model takes a class from 0 to {config.classes - 1}, or "
                f"{NO_LABEL} for none, for each of {rows} clips."
            )


def check_draws(draws: int) -> None:
    """Raise InputError unless the number of noisy rows for each clip is a positive integer."""
    if not isinstance(draws, int) or draws < 1:
        raise InputError(f"draws is {draws}; it must be an integer of at least 1.")


def check_forward(
    config: GPDiTConfig,
    noisy: Tensor,
    theta: Tensor,
    clean: Tensor | None,
    condition: Tensor | None,
    draws: int,
    frames: Sequence[int] | None,
    clean_theta: Tensor | None = None,
) -> None:
    """Raise InputError unless these are valid arguments of `GPDiT.forward`."""
    check_latents(config, noisy)
    check_condition(config, condition, len(noisy))
    if frames is not None and (
        len(frames) != noisy.shape[1]
        or not all(isinstance(frame, int) for frame in frames)
        or any(b <= a for a, b in pairwise((-1, *frames)))
    ):
        raise InputError(
            f"frames are {tuple(frames)} for {noisy.shape[1]} noisy ones: give as many increasing integer positions."
        )
    of_frames = range(noisy.shape[1]) if frames is None else frames
    layout = BlockLayout.of(config, *noisy.shape[-2:])
    blocks = layout.blocks_of(of_frames)
    if theta.shape != (len(noisy), len(blocks)):
        shape = f"(B, {'F' if config.block_shape == (1, 0, 0) else 'blocks'}) = ({len(noisy)}, {len(blocks)})"
        raise InputError(f"theta has shape {tuple(theta.shape)}; it must be {shape}.")
    check_draws(draws)
    if clean is None:
        return
    fits = clean.ndim == 5 and clean.shape[2:] == noisy.shape[2:] and draws * len(clean) <= len(noisy)
    if not fits or (frames is None and clean.shape[1] != noisy.shape[1]):
        raise InputError(
            f"clean has shape {tuple(clean.shape)}; it must be (B', F, C, H, W) like noisy {tuple(noisy.shape)}, with "
            f"draws * B' <= B where draws is {draws}."
        )
    least = layout.frames_before(blocks[-1], of_frames[-1] + 1)
    if clean.shape[1] < least:
        raise InputError(
            f"clean has {clean.shape[1]} frames, but the blocks before the last noisy one have {least}: give at least "
            "these."
        )
    if clean_theta is not None and clean.shape[1]:
        check_clean_theta(config, clean_theta, len(clean), layout.count(clean.shape[1]))


def check_clean_theta(config: GPDiTConfig, clean_theta: Tensor | None, clips: int, blocks: int) -> None:
    """Raise InputError unless the context noise has an angle for each of the clean blocks of `clips` clips."""
    if clean_theta is None:
        return
    check_receives_angles(config, "clean_theta is given")
    if clean_theta.shape != (clips, blocks):
        raise InputError(
            f"clean_theta has shape {tuple(clean_theta.shape)}; it must be (clips, blocks of clean) = ({clips}, "
            f"{blocks})."
        )


def check_receives_angles(config: GPDiTConfig, given: str) -> None:
    """Raise InputError if clean tokens do not receive the angle of the context noise, which is `given`, in words."""
    if config.time_conditioning != "rotation":
        raise InputError(
            f"{given}, but with time_conditioning {config.time_conditioning} clean tokens receive no angle: leave it "
            "out, or use a model with the rotation."
        )


def check_features(config: GPDiTConfig, clean: Tensor, layers: Iterable[int], condition: Tensor | None) -> None:
    """Raise InputError unless these are valid arguments of `GPDiT.features`."""
    check_latents(config, clean)
    if condition is not None:
        check_condition(config, condition, len(clean))
    for layer in layers:
        if not 0 <= layer <= config.layers:
            raise InputError(f"layer {layer} does not exist: choose from 0 (patch embedding) to {config.layers}.")


def check_extend(
    config: GPDiTConfig, cache: KVCache, clean: Tensor, condition: Tensor | None, clean_theta: Tensor | None
) -> None:
    """Raise InputError unless these are valid arguments of `GPDiT.extend`, where `clean` has frames."""
    check_latents(config, clean)
    if condition is not None:
        check_condition(config, condition, len(clean))
    check_cache(config, cache, len(clean), clean, new_frames=clean.shape[1] if cache.sinks is None else 0)
    blocks, _ = cache.layout.following(cache.blocks, *clean.shape[1:2], *clean.shape[-2:])
    check_clean_theta(config, clean_theta, len(clean), len(blocks))


def check_denoise(
    config: GPDiTConfig,
    noisy: Tensor,
    theta: Tensor,
    cache: KVCache | None,
    condition: Tensor | None,
    clean: Tensor | None,
    draws: int,
) -> None:
    """Raise InputError unless these are valid arguments of `GPDiT.denoise`, where `noisy` is (R, f, C, h, w)."""
    check_latents(config, noisy)
    check_condition(config, condition, len(noisy))
    if theta.shape != noisy.shape[:1]:
        raise InputError(f"theta has shape {tuple(theta.shape)}; it must be (B,) = ({noisy.shape[0]},).")
    check_draws(draws)
    clips, new_frames = 0, 0
    if clean is not None:
        check_latents(config, clean)
        clips, new_frames = clean.shape[:2]
        if config.whole_frames and clean.shape[2:] != noisy.shape[2:]:
            raise InputError(
                f"clean has shape {tuple(clean.shape)} and noisy {tuple(noisy[:, 0].shape)}; clean must be "
                "(B, k, C, H, W) and noisy (R, C, H, W), with equal C, H and W."
            )
    if cache is not None:
        clips = cache.batch_size if clean is None else clips
        check_cache(config, cache, clips, noisy, new_frames)
    if clips and (len(noisy) < draws * clips or len(noisy) % clips):
        raise InputError(
            f"noisy has {len(noisy)} rows for draws * B = {draws} * {clips} rows with context: give `draws` rows for "
            "each of the B clips and, for guidance, after them a multiple of B rows without context."
        )


def check_rollout(config: GPDiTConfig, context: Tensor, frames: int | None) -> None:
    """Raise InputError unless a context (B, k, C, H, W), k = 0 included, and a number of frames fit a rollout."""
    check_latents(config, context, may_have_no_frames=True)
    if frames is not None and (not isinstance(frames, int) or frames < 0):
        raise InputError(f"frames is {frames}; it must be an integer of at least 0, or None for an endless rollout.")


def check_cache_size(config: GPDiTConfig, batch_size: int, max_frames: int, height: int, width: int) -> None:
    """Raise InputError unless a cache has a positive size, with frames that are divisible into patches."""
    sizes, patch = (
        {"batch_size": batch_size, "max_frames": max_frames, "height": height, "width": width},
        config.patch_size,
    )
    for name, value in sizes.items():
        least = patch if name in ("height", "width") else 1
        if not isinstance(value, int) or value < 1 or value % least:
            raise InputError(f"{name} of the cache is {value}; it must be a positive multiple of {least}.")


def check_cache(config: GPDiTConfig, cache: KVCache, clips: int, latents: Tensor, new_frames: int) -> None:
    """Raise InputError unless a cache fits model, `clips` and `latents`, and has room for `new_frames` of them."""
    height, width = latents.shape[-2:]
    if cache.config.architecture() != config.architecture():
        raise InputError(
            "the cache is that of a model with another architecture: create one with new_cache of this model."
        )
    if cache.device != latents.device:
        raise InputError(
            f"the cache is on {cache.device}, but the latents are on {latents.device}: create one with model.new_cache "
            "after the model was moved."
        )
    sizes = (cache.height, cache.width), cache.layout.block_pixels
    if clips != cache.batch_size or (height, width) not in sizes:
        raise InputError(
            f"the cache is for {cache.batch_size} clips of {cache.height}x{cache.width} latent pixels, but {clips} of "
            f"{height}x{width} were given: create one with model.new_cache for these sizes."
        )
    new_tokens = new_frames * (height // config.patch_size) * (width // config.patch_size)
    if new_tokens > cache.max_new_tokens:
        raise InputError(
            f"the cache has a capacity of {cache.max_frames} frames and contains {cache.frames}: {new_frames} "
            "more do not fit; create it with a larger max_frames, or append fewer at a time."
        )

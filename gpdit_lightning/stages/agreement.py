"""Checks before a stage trains: sources, data, backbone, initial weights, checkpoint and ranks must agree."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpdit_lightning.data.batches import LatentBatch
from gpdit_lightning.data.datamodule import LatentDataModule
from gpdit_lightning.data.source import SourceConfig
from gpdit_lightning.diffusion import DenoisingLoss, NoiseSchedule
from gpdit_lightning.errors import InputError
from gpdit_lightning.model import GPDiTConfig
from gpdit_lightning.model.checks import check_receives_angles
from gpdit_lightning.model.layout import BlockLayout
from gpdit_lightning.schema import OBJECT, check
from gpdit_lightning.training.optimizer import OptimizerConfig


def check_annotated(stage: str, **arguments: Any) -> None:
    """Raise `InputError` if a recipe's options arrive as a dict: the stage's constructor does not annotate them."""
    kinds = {"backbone": GPDiTConfig, "schedule": NoiseSchedule, "optimizer": OptimizerConfig}
    for name, value in arguments.items():
        if not isinstance(value, kinds[name]):
            raise InputError(
                f"model.init_args.{name} is of type {type(value).__name__}: in the constructor of {stage} annotate the "
                f"parameter as `{name}: {kinds[name].__name__}`, or pass it on with **options."
            )


def check_sources(stage: str, expected: Sequence[str], used: Sequence[str]) -> None:
    """Raise `InputError` if data have sources on which a stage does not train; an empty `expected` allows any."""
    if expected and not set(used) <= set(expected):
        of_stage, given = (" and ".join(f"data.{name}" for name in names) for names in (expected, used))
        raise InputError(
            f"{stage} trains on {of_stage}, but the data are {given}: set data.sources to those of the stage, or use "
            "GPDiTStage, which takes any."
        )


def check_no_texts(text_width: int) -> None:
    """Raise `InputError` if a backbone is conditioned on texts, for which batches have no embeddings."""
    if text_width:
        raise InputError(
            f"model.init_args.backbone.text_width is {text_width}, but training on texts is not implemented: set it to "
            "0."
        )


def check_latent_channels(of_backbone: int, of_data: int) -> None:
    """Raise `InputError` unless a backbone has the channels of the latents of the data."""
    if of_backbone != of_data:
        raise InputError(
            f"the backbone takes latents of {of_backbone} channels, but the data have {of_data}: give "
            f"--model.init_args.backbone.latent_channels {of_data}, or data of another codec."
        )


def check_context_noise(angle: float, config: GPDiTConfig) -> None:
    """Raise `InputError` if clean blocks have context noise, but a backbone does not condition them on its angle."""
    if angle:
        check_receives_angles(config, f"data.context_noise is {angle}")


def check_patches(patch_size: int, data: LatentDataModule) -> None:
    """Raise `InputError` unless the latent frames of the data divide into the patches of a backbone."""
    pixels = patch_size * data.codec.spatial_factor
    for name, buckets in data.buckets["train"].items():
        for bucket in buckets:
            if bucket.height % patch_size or bucket.width % patch_size:
                raise InputError(
                    f"the latent frames of data.{name} have {bucket.height}x{bucket.width} pixels, which do not divide "
                    f"into patches of {patch_size}x{patch_size}: give --model.init_args.backbone.patch_size 1, or "
                    f"prepare the data again at a height and width that are multiples of {pixels}."
                )


def check_blocks(config: GPDiTConfig, data: LatentDataModule) -> None:
    """Raise `InputError` unless the clips of the data, and their frames with loss, divide into blocks of a backbone."""
    for buckets_of_source in data.buckets.values():
        for name, buckets in buckets_of_source.items():
            for bucket in buckets:
                try:
                    layout = BlockLayout.of(config, bucket.height, bucket.width)
                except InputError as error:
                    raise InputError(f"data.{name}: {error}") from None
                for length in bucket.lengths:
                    _check_clip(name, data.configs[name], layout, length)


def _check_clip(name: str, source: SourceConfig, layout: BlockLayout, length: int) -> None:
    """Raise `InputError` unless clips of `length` latent frames, and their frames with loss, consist of blocks.

    Args:
        name: name of the source.
        source: its settings.
        layout: the blocks of the backbone.
        length: latent frames of the clips.
    """
    sizes = f"the first block has {layout.first_frames or 'all'} latent frames, a later one {layout.frames or 'all'}"
    if not _has_whole_blocks(layout, range(length)):
        if name == "images":
            raise InputError(
                f"data.images has single frames, which are no whole block of the backbone ({sizes}): train on videos "
                "alone (data.sources [videos]), or set backbone.first_block_frames to 1."
            )
        shorter = layout.context_length(length)
        cut = f"cut longer clips by data.{name}.frames {shorter}, or " if shorter else ""
        raise InputError(
            f"data.{name} has clips of {length} latent frames, which do not divide into blocks of the backbone "
            f"({sizes}): {cut}prepare clips of other lengths (--clip_frames and --least_clip_frames), or change "
            "backbone.block_shape or backbone.first_block_frames."
        )
    if name == "sequences" and len(layout.last_group(length)) > 1:
        raise InputError(
            f"the last image of data.sequences, of {length} images, is in one block of the backbone with others, so "
            f"that it cannot be generated from them ({sizes}): use blocks of one frame, or block_shape (0, 0, 0) with "
            f"first_block_frames {length - 1}."
        )
    noisy = source.noisy_frames(length)
    if noisy is None or _has_whole_blocks(layout, noisy):
        return
    if source.loss_frames == "targets":
        raise InputError(
            f"data.{name}.loss_frames is targets, but in sequences of {length} images a block of the backbone has "
            f"more images than a target ({sizes}): set it to all, or use blocks of one frame."
        )
    least = layout.contexts_near(source.frames_without_loss)
    raise InputError(
        f"data.{name}.frames_without_loss is {source.frames_without_loss}, which cuts a block of the backbone "
        f"({sizes}): give {' or '.join(map(str, least)) or 'another number'}, or 0 for a loss of all frames."
    )


def _has_whole_blocks(layout: BlockLayout, frames: Sequence[int]) -> bool:
    try:
        layout.blocks_of(frames)
    except InputError:
        return False
    return True


def check_number_of_classes(of_backbone: int, of_data: int) -> None:
    """Raise `InputError` unless a backbone has an embedding for each class of the data; it may have more."""
    if of_backbone >= of_data and (of_data or not of_backbone):
        return
    cure = f"set model.init_args.backbone.classes to {of_data}"
    if of_backbone == 0:
        cure += ", or data.labels to false"
    elif of_data == 0:
        cure += ", or data.labels to true"
    raise InputError(f"the backbone takes {of_backbone} classes, but the data has {of_data}: {cure}.")


def check_classifier(data: LatentDataModule) -> None:
    """Raise `InputError` unless the data have several classes, and every clip has its label, without noisy copies."""
    if not data.labels:
        raise InputError("data.labels is false, but ClassificationStage learns labels: set it to true.")
    if len(data.classes) < 2:
        raise InputError(
            f"the data has the class {data.classes[0]!r} only, but a classifier needs two: prepare samples of others."
        )
    for name, needed in (("label_dropout", 0), ("noise_draws", 1), ("context_noise", 0)):
        if (value := getattr(data, name)) != needed:
            raise InputError(f"data.{name} is {value}, but ClassificationStage needs {needed}: set it to {needed}.")
    for name, config in data.configs.items():
        if config.frames_without_loss:
            raise InputError(
                f"data.{name}.frames_without_loss is {config.frames_without_loss}, but ClassificationStage uses all "
                "frames: set it to 0."
            )


def check_labels_of_all(batch: LatentBatch) -> None:
    """Raise `InputError`, with a sample without a label, unless every clip of a batch in host memory has one."""
    assert batch.labels is not None
    if int(batch.labels.min()) < 0:
        key = batch.keys[int(batch.labels.argmin())]
        raise InputError(
            f"the sample {key} of data.{batch.source} has no label, but ClassificationStage learns labels: prepare the "
            "data again with labels for all samples, or leave it out."
        )


def check_algorithm(config: OptimizerConfig, sharded: bool) -> None:
    """Raise `InputError` if the strategy shards matrices, but the optimizer needs whole ones."""
    if sharded and config.algorithm == "muon":
        raise InputError(
            "optimizer.algorithm is muon, which needs whole matrices, but the strategy shards them: set "
            "trainer.strategy to ddp, or model.init_args.optimizer.algorithm to adamw."
        )


def check_optimizer_state(saved: Any, config: OptimizerConfig) -> None:
    """Raise `InputError` if a checkpoint has no optimizer state, or that of another optimizer."""
    cure = "use another checkpoint of the run, or begin another run with its weights"
    check(saved, [{"state": OBJECT, "param_groups": [OBJECT]}], "optimizer_states", "the checkpoint", cure)
    groups = saved[0]["param_groups"]
    # Newton-Schulz steps are Muon's alone; other optimizers have a momentum too.
    saved_algorithm = "muon" if any("ns_steps" in group for group in groups) else "adamw"
    if saved_algorithm != config.algorithm:
        raise InputError(
            f"the checkpoint has the optimizer state of {saved_algorithm}, but optimizer.algorithm is "
            f"{config.algorithm}: use the recipe of its training, or begin another run with its weights "
            "(--model.init_args.initial_weights)."
        )
    if ("layers_above" in groups[0]) != config.has_groups:
        raise InputError(
            f"optimizer.layer_decay is {config.layer_decay} and decay_vectors is {config.decay_vectors}, but the "
            "checkpoint has other groups of parameters: use the recipe of its training, or begin another run with its "
            "weights (--model.init_args.initial_weights)."
        )


def check_architecture(saved: dict[str, Any], config: GPDiTConfig, where: str | Path) -> None:
    """Raise `InputError`, with the first field that differs, unless saved weights have this architecture."""
    ours, theirs = config.architecture(), GPDiTConfig.from_dict(saved).architecture()
    for name, value in ours.items():
        if theirs[name] != value:
            raise InputError(
                f"{where} is of a model with {name} = {theirs[name]}, but this one has {value}: use the recipe of its "
                "training, or another checkpoint."
            )


def check_classes(saved: Sequence[str], ours: Sequence[str], where: str | Path) -> None:
    """Raise `InputError`, with the first class that differs, unless weights were trained on the classes of the data.

    The data may have fewer classes, or more, for which a backbone may have further embeddings.
    """
    for number, (theirs, name) in enumerate(zip(saved, ours, strict=False)):
        if theirs != name:
            raise InputError(
                f"{where} was trained with {theirs!r} as class {number}, but the data has {name!r}: give manifests "
                "with the same labels in the same order, or start from other weights."
            )


def check_checkpoint(saved: dict[str, Any], config: GPDiTConfig, schedule: NoiseSchedule) -> None:
    """Raise `InputError` unless a run's last checkpoint has the recipe's architecture and noise schedule.

    Args:
        saved: the record of `GPDiTStage.on_save_checkpoint`.
        config: the architecture in the recipe.
        schedule: the noise schedule in the recipe.
    """
    check_architecture(saved["backbone"], config, "the run's last checkpoint")
    if saved["schedule"] != asdict(schedule):
        raise InputError(
            f"the checkpoint was trained with the noise schedule {saved['schedule']} and the recipe has "
            f"{asdict(schedule)}: restore the old one, or start a new run folder from its weights (--run_dir NEW "
            "--model.init_args.initial_weights OLD)."
        )


def check_stage(saved: str, stage: str, run_dir: str | Path) -> None:
    """Raise `InputError` if a run would resume with another stage, whose objective may be another one.

    Args:
        saved: name of the stage that wrote the checkpoint.
        stage: name of the stage in the recipe.
        run_dir: the run folder.
    """
    if saved != stage:
        raise InputError(
            f"{run_dir} was trained with {saved}, but `model` of the recipe is {stage}: restore the old one, or start "
            f"a new run folder from its weights (--run_dir NEW --model.init_args.initial_weights {run_dir})."
        )


def check_loss(loss: Any, stage: str, batch: LatentBatch) -> DenoisingLoss:
    """Return the result of `objective`.

    Args:
        loss: the result.
        stage: name of the stage, for messages.
        batch: the argument of `objective`.

    Raises:
        InputError: it is no DenoisingLoss, a part of it has another shape, or `mean` has no gradient in training.
    """
    if not isinstance(loss, DenoisingLoss):
        raise InputError(f"{stage}.objective returned {type(loss).__name__}; it must return a DenoisingLoss.")
    rows = len(batch.noise)
    parts = {
        "mean": (loss.mean, ()),
        "quartiles.sums": (getattr(loss.quartiles, "sums", None), (4,)),
        "quartiles.counts": (getattr(loss.quartiles, "counts", None), (4,)),
        "per_clip": (loss.per_clip, (rows,)),
    }
    for name, (value, shape) in parts.items():
        if not isinstance(value, Tensor) or value.shape != shape:
            form = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(
                f"{stage}.objective returned a DenoisingLoss whose {name} is {form}; it must be a tensor of shape "
                f"{shape}: DenoisingLoss.from_blocks(per_block, batch.t) makes one from the loss of each block."
            )
    if torch.is_grad_enabled() and not loss.mean.requires_grad:
        raise InputError(
            f"{stage}.objective returned a DenoisingLoss whose mean has no gradient: compute it from the result of "
            "predict(batch) without detach(), item() or no_grad()."
        )
    return loss

"""The text of a planned recipe: YAML, with the reason of each choice as a comment."""

import json
import re
import shlex
import textwrap
from collections.abc import Iterator
from typing import Any

from gpdit_lightning.estimation.units import GIB, duration, flops, in_unit
from gpdit_lightning.model.config import SIZE_FIELDS, SIZES
from gpdit_lightning.names import counted
from gpdit_lightning.planning.rules import (
    ASSUMED,
    LADDER,
    LEARNING_RATE,
    LEARNING_RATES,
    MAX_EPOCHS,
    MAX_STEPS,
    SHORT_RUN_SECONDS,
    TRAINING_FRACTION,
    Choice,
    count_text,
    known_peak,
    loader_workers,
    samples_of,
)

WIDTH = 128  # characters of a line, as in the shipped recipes
GPUS_PER_NODE = 8
SLOW_ON_CPU = ("wan", "sd")  # codecs that take minutes to decode a preview on a CPU
FEW_RECORDINGS, FEW_STEPS = 100, 1000  # below which the head of a recipe warns
SHORT_STEP = 0.1  # seconds, below which a GPU does not reach the assumed FLOP/s
PLAIN = re.compile(r"[\w][\w./+-]*")  # text that needs no quotes in YAML


def recipe_text(choice: Choice, run_dir: str, path: str) -> str:
    """Return a recipe.

    Args:
        choice: of the rules.
        run_dir: the run folder.
        path: of the recipe, for the commands in its head.
    """
    sections = (
        head(choice, path),
        [entry(0, "run_dir", run_dir), entry(0, "seed_everything", 0), entry(0, "data_dir", data_dir(choice))],
        model_lines(choice),
        data_lines(choice),
        trainer_lines(choice),
        interval_lines(choice),
    )
    return "\n".join(line for section in sections for line in section) + "\n"


def entry(level: int, key: str, value: Any = None, reason: str = "") -> str:
    """Return a line of YAML with a comment, which is above the line if it does not fit beside it.

    Args:
        level: depth of the key.
        key: the key.
        value: its value; None for a section.
        reason: the comment.
    """
    indent = "  " * level
    line = f"{indent}{key}:" + (f" {yaml_value(value)}" if value is not None else "")
    if not reason:
        return line
    if len(line) + len(reason) + 3 <= WIDTH:
        return f"{line} # {reason}"
    return f"{comment(reason, indent)}\n{line}"


def comment(text: str, indent: str = "") -> str:
    """Return a text as lines of comments."""
    return textwrap.fill(text, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")


def yaml_value(value: Any) -> str:
    """Return a value as YAML on one line."""
    if isinstance(value, str) and PLAIN.fullmatch(value):
        return value
    if isinstance(value, float):
        mantissa, exponent, power = f"{value:.4g}".partition("e")
        return mantissa + ".0" * ("." not in mantissa) + exponent + power  # YAML reads 1e-4 as text
    return json.dumps(value, ensure_ascii=False)


def data_dir(choice: Choice) -> str | list[str]:
    """Return the value of the option `data_dir`: a folder, or a list of several."""
    folders = list(choice.data.folders)
    return folders[0] if len(folders) == 1 else folders


def head(choice: Choice, path: str) -> Iterator[str]:
    """Yield the comments at the top: commands, data, machine, expected memory and time."""
    yield "# A recipe planned for these data and this machine (python -m gpdit_lightning plan). Edit it as you like."
    yield "#"
    path = shlex.quote(path)
    yield f"#   python -m gpdit_lightning fit --config {path}"
    yield f"#   python -m gpdit_lightning estimate --config {path} {estimate_options(choice)}    # after an edit"
    yield "#"
    yield from (comment(line) for line in summary(choice))


def estimate_options(choice: Choice) -> str:
    """Return the options of `estimate` that describe the machine of a plan."""
    memory, speed = choice.machine.memory / GIB, choice.speed.cluster.flops_per_s / 1e12
    gpu = f"--gpu {shlex.quote(choice.machine.name)} " if choice.run.gpus > 1 else ""
    return f"--gpus {choice.run.gpus} {gpu}--gpu_memory {memory:.4g} --tflops {speed:.5g}"


def summary(choice: Choice) -> list[str]:
    """Return sentences on data, machine, model, memory and time."""
    run, machine = choice.run, choice.machine
    each = " on each" if run.gpus > 1 else ""
    memory = f"{in_unit(choice.memory['total'])} of {machine.memory / GIB:.0f} GiB{each}"
    if run.strategy.offload:
        memory += f", and {run.gpus * choice.memory['host_memory'] / GIB:.0f} GiB of host memory"
    return [
        f"Data: {'; '.join(source_text(choice, name) for name in choice.data.samples)}; "
        f"{count_text(choice.data.tokens)} tokens; codec {choice.data.codec.name}.",
        f"Machine: {machine_text(choice)}.",
        f"Model: size {choice.size}, {count_text(choice.parameters)} parameters.",
        f"Memory: {memory} (estimated by `estimate`, including 2 GiB of allowance).",
        f"Time: {'at least ' * is_short(choice)}{duration(choice.seconds_per_step)} per step, "
        f"{duration(choice.seconds)} for {run.max_steps:,} steps, "
        f"without validation and previews ({speed_text(choice)}).",
        *warnings(choice),
    ]


def warnings(choice: Choice) -> Iterator[str]:
    """Yield sentences on what a user should know before the training."""
    recordings, steps = choice.data.recordings, choice.run.max_steps
    if choice.speed.trial_failure:
        yield (
            f"No measurement: {choice.speed.trial_failure}, so the time is assumed; run `plan` again when the machine "
            "is idle, or give `estimate` the speed by --tflops."
        )
    if 0 < recordings < FEW_RECORDINGS:
        yield f"Few data: a model memorizes {counted(recordings, 'file')}; prepare more for a model that generalizes."
    if choice.is_bounded_by_time and steps < FEW_STEPS:
        yield f"Few steps: {steps:,} are too few for good results; give more --hours, or prepare smaller frames."
    if choice.data.has_sequences:
        yield "The few-shot sequences are not used: they fine-tune a trained model (recipe stage4_few_shot)."


def source_text(choice: Choice, name: str) -> str:
    """Return the number, lengths and sizes of the training samples of a source."""
    shapes, factor = choice.data.samples[name], choice.data.codec.spatial_factor
    sizes = sorted({(height * factor, width * factor) for _, height, width in shapes})
    shown = ", ".join(f"{height}x{width}" for height, width in sizes[:3]) + ", ..." * (len(sizes) > 3)
    if name == "images":
        return f"{counted(sum(shapes.values()), 'image')} of {shown} pixels"
    lengths = sorted({frames for frames, *_ in shapes})
    latent = f"{lengths[0]}" if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
    return f"{counted(sum(shapes.values()), 'clip')} of {latent} latent frames and {shown} pixels"


def machine_text(choice: Choice) -> str:
    """Return the devices of the machine, and how many of them are used."""
    machine = choice.machine
    if machine.accelerator == "cpu":
        return f"{machine.cores} CPU cores, {machine.memory / GIB:.0f} GiB of memory"
    text = f"{machine.devices} x {machine.name} with {machine.memory / GIB:.0f} GiB, {machine.cores} CPU cores"
    if choice.run.gpus < machine.devices:
        hours = SHORT_RUN_SECONDS // 3600
        text += f"; {choice.run.gpus} of them is used, since it needs less than {hours} hour"
    return text


def speed_text(choice: Choice) -> str:
    """Return the origin of the assumed speed."""
    rate = f"{flops(choice.speed.cluster.flops_per_s)}/s per device"
    if choice.speed.is_measured:
        return f"{rate}, measured in a trial of this recipe"
    peak = known_peak(choice.machine)
    text = f"{rate}, {ASSUMED.mfu:.0%} of {flops(peak)}/s" if peak else f"{rate}, assumed without a measurement"
    return text + ", which steps as short as these do not reach" if is_short(choice) else text


def is_short(choice: Choice) -> bool:
    """Return whether the steps are so short that a GPU does not reach the FLOP/s that the plan assumes."""
    if choice.speed.is_measured or choice.machine.accelerator == "cpu":
        return False
    return choice.seconds_per_step < SHORT_STEP


def model_lines(choice: Choice) -> Iterator[str]:
    """Yield the section `model`."""
    stage, why = stage_of(choice)
    backbone, strategy = choice.run.backbone, choice.run.strategy
    yield entry(0, "model")
    yield entry(1, "class_path", stage, why)
    yield entry(1, "init_args")
    yield entry(2, "backbone")
    yield entry(3, "size", backbone.size, size_reason(choice))
    if choice.size not in SIZES:
        yield from (entry(3, name, LADDER[choice.size][name]) for name in SIZE_FIELDS)
    yield entry(3, "latent_channels", backbone.latent_channels, f"those of the codec {choice.data.codec.name}")
    if backbone.patch_size != 2:
        yield entry(3, "patch_size", backbone.patch_size, "the latent height or width of some samples is odd")
    if backbone.classes:
        yield entry(3, "classes", backbone.classes, "labels of the data; 0 here and false below to ignore them")
    why = (
        f"stored activations do not fit beside {strategy.name}"
        if backbone.activation_checkpointing
        else ("activations fit without recomputing them, which would take a third more time")
    )
    yield entry(3, "activation_checkpointing", backbone.activation_checkpointing, why)
    steps, rate = choice.run.max_steps, LEARNING_RATES.get(choice.size, LEARNING_RATE)
    yield entry(2, "optimizer")
    why = "as in the paper for B and H" if rate == LEARNING_RATE else "smaller models take larger rates"
    yield entry(3, "learning_rate", rate, f"{why} (docs/scaling.md)")
    yield entry(3, "warmup_steps", min(1000, steps // 20), "5 % of the steps, at most 1,000")
    yield entry(3, "decay", "cosine", "to 0 at the last step")


def stage_of(choice: Choice) -> tuple[str, str]:
    """Return the stage, and why."""
    if len(choice.run.sources) > 1:
        return "MixedStage", "the data have images and videos"
    (source,) = choice.run.sources
    if source.name == "images":
        return "ImageWarmupStage", "the data have images only"
    lengths = {length for bucket in source.buckets for length in bucket.lengths}
    if len(lengths) > 1:
        return "LongVideoStage", "the data have videos only; clips of every length are trained"
    return "GPDiTStage", f"the data have videos only, all of {lengths.pop()} latent frames"


def size_reason(choice: Choice) -> str:
    """Return the comment on the size of the backbone."""
    per_parameter = f"{choice.trained_tokens / choice.parameters:.3g} trained tokens per parameter"
    if choice.goal.size:
        return f"{choice.size}, as requested: {count_text(choice.parameters)} parameters, {per_parameter}"
    larger = f"; the larger size {choice.larger_size}" if choice.larger_size else ""
    return f"{choice.size}: {count_text(choice.parameters)} parameters, {per_parameter}{larger}"


def data_lines(choice: Choice) -> Iterator[str]:
    """Yield the section `data`."""
    run = choice.run
    yield entry(0, "data")
    yield entry(1, "max_ranks", run.max_ranks, "the number of devices; a run cannot change it")
    yield entry(1, "context_dropout", run.context_dropout, "clips without context, for guidance")
    if len(run.sources) > 1:
        yield entry(1, "sampling", run.sampling, "each step has images or videos, as in stage 2 of the paper")
    if run.backbone.classes:
        yield entry(1, "labels", True)
    if choice.data.has_posterior:
        yield entry(1, "posterior", "sample", "another sample of the codec's posterior for each use of a clip")
    if choice.data.has_flips:
        yield entry(1, "flips", True, "half of the clips, chosen at random, flipped left to right")
    for source in run.sources:
        yield from source_lines(choice, source.name)
    number = loader_workers(run, choice.machine)
    yield entry(1, "workers", number, f"loader processes per device; {choice.machine.cores} CPU cores in total")


def source_lines(choice: Choice, name: str) -> Iterator[str]:
    """Yield the section of a source."""
    run = choice.run
    source = next(source for source in run.sources if source.name == name)
    config = source.config
    epochs = f"{choice.epochs[name]:.3g} epochs of {counted(samples_of(source), 'sample')}"
    least = min(shape.samples for shape in run.micro_batch_shapes(source)) // run.gpus
    yield entry(1, name)
    yield entry(2, "batch_size", config.batch_size, f"per optimizer step, over all devices; {epochs}")
    why = (
        f"{least} samples at a time on each device, as many as fit"
        if config.micro_batches > 1
        else "the batch fits as a whole"
    )
    yield entry(2, "micro_batches", config.micro_batches, why)
    if name == "videos":
        seconds = choice.data.codec.pixel_frames(config.frames)
        yield entry(2, "frames", config.frames, f"latent frames of the longest clips, {seconds} pixel frames")
        if config.least_frames:
            yield entry(
                2, "least_frames", config.least_frames, "clips of each length from here are trained equally often"
            )
    if len(run.sources) > 1:
        why = "of the number of its steps, relative to the other source"
        if config.weight < 1:
            why += f"; with as many steps it would have more than {MAX_EPOCHS} epochs"
        yield entry(2, "weight", config.weight, why)


def trainer_lines(choice: Choice) -> Iterator[str]:
    """Yield the section `trainer`."""
    run, machine = choice.run, choice.machine
    yield entry(0, "trainer")
    yield entry(1, "accelerator", machine.accelerator)
    nodes = run.gpus // GPUS_PER_NODE if run.gpus > GPUS_PER_NODE and run.gpus % GPUS_PER_NODE == 0 else 1
    yield entry(1, "devices", run.gpus // nodes)
    if nodes > 1:
        yield entry(1, "num_nodes", nodes, "start by torchrun or SLURM, see docs/scaling.md")
    held = sum(
        value for name, value in choice.memory.items() if name in ("weights", "gradients", "optimizer", "average")
    )
    why = f"weights, gradients, optimizer and average take {in_unit(held)} of {machine.memory / GIB:.0f} GiB per device"
    yield entry(1, "strategy", run.strategy.option, why)
    why = "matrix products in bf16" if machine.bf16 else "bf16 saves no time on this device"
    yield entry(1, "precision", run.precision, why)
    yield entry(1, "max_steps", run.max_steps, steps_reason(choice))
    yield entry(1, "gradient_clip_val", 1.0, "the largest gradient norm, as in the shipped recipes")


def steps_reason(choice: Choice) -> str:
    """Return the comment on the number of steps."""
    if choice.is_bounded_by_time:
        return (
            f"{duration(choice.seconds)} at {duration(choice.seconds_per_step)} per step: {TRAINING_FRACTION:.0%} of "
            f"--hours {choice.goal.hours:g}"
        )
    if choice.run.max_steps >= MAX_STEPS:
        return f"{duration(choice.seconds)}; as many as in the longest training of the paper"
    most = max(choice.epochs.values())
    return f"{most:.3g} epochs of the data, after which a model mostly memorizes them; {duration(choice.seconds)}"


def interval_lines(choice: Choice) -> Iterator[str]:
    """Yield the intervals of logs, validation, previews and checkpoints, and the decay of the average."""
    steps = choice.run.max_steps
    held_out = sum(sum(shapes.values()) for shapes in choice.data.held_out.values())
    yield entry(1, "log_every_n_steps", min(50, part(steps, 200)), "about 200 points of each curve, or more")
    if held_out:
        yield entry(
            0, "validate_every_steps", part(steps, 20), f"about 20 times, on {counted(held_out, 'held-out sample')}"
        )
    else:
        yield entry(0, "validate_every_steps", 0, "no samples are held out (prepare --validation_fraction)")
    yield from preview_lines(choice)
    yield entry(0, "ema")
    window = min(10_000, max(20, steps // 50))
    yield entry(
        1,
        "decay",
        round(1 - 1 / window, 4),
        f"the average is over about {window:,} steps, 2 % of the run, at most 10,000",
    )
    yield entry(0, "checkpoint")
    size = f"{in_unit(16 * choice.parameters)} GiB"
    yield entry(1, "every_steps", part(steps, 10), f"{size} each, 16 bytes per parameter; the last two are kept")
    yield entry(1, "every_minutes", 30)
    yield entry(1, "keep_every_steps", part(steps, 5), "about five are kept for good; 0 for none")


def preview_lines(choice: Choice) -> Iterator[str]:
    """Yield the section `preview`."""
    data, codec, steps = choice.data, choice.data.codec, choice.run.max_steps
    yield entry(0, "preview")
    if codec.is_custom:
        yield entry(1, "every_steps", 0, "a custom codec needs preview.codec, the import path of its class")
        return
    if codec.name in SLOW_ON_CPU and choice.machine.accelerator == "cpu":
        yield entry(1, "every_steps", 0, f"the codec {codec.name} takes minutes to decode a preview on a CPU")
        return
    shapes = {*data.held_out.get("videos", ())} or {*data.samples.get("videos", ())}
    longest = max((frames for frames, *_ in shapes), default=0)
    if longest == 1:
        yield entry(1, "every_steps", 0, "clips of one latent frame have nothing to continue")
        return
    yield entry(
        1, "every_steps", part(steps, 10), "about 10 times: samples from fixed noise, in previews/ and TensorBoard"
    )
    if longest == 2:
        yield entry(1, "context_frames", 1, "the held-out clips have two latent frames")


def part(steps: int, divisor: int) -> int:
    """Return an interval of one significant digit with which something happens about `divisor` times in a run."""
    return max(1, int(float(f"{steps / divisor:.0e}")))

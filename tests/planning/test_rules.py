"""The rules of planned recipes, on simulated machines and data."""

import itertools
import math
from dataclasses import replace

import pytest
import yaml

from gpdit_lightning.devices import Machine
from gpdit_lightning.errors import InputError
from gpdit_lightning.estimation.gpus import peak_bf16_flops
from gpdit_lightning.estimation.requirements import memory
from gpdit_lightning.estimation.time import step_time
from gpdit_lightning.planning.recipe_text import recipe_text
from gpdit_lightning.planning.rules import (
    LADDER,
    MAX_EPOCHS,
    Goal,
    choose,
    cluster_of,
    expected_flops_per_s,
    loader_workers,
    memory_limit,
)
from gpdit_lightning.planning.training_data import TrainingData
from gpdit_lightning.specs import CodecSpec

GIB = 2**30
CODEC = CodecSpec("pca", None, 16, 8, 4, mean=(0.0,) * 16, std=(1.0,) * 16, fingerprint="0123456789abcdef")


def gpus(count: int, name: str, gib: int, bf16: bool = True) -> Machine:
    return Machine("cuda", count, name, gib * GIB, 16 * count, 128 * count * GIB, bf16)


MACHINES = {
    "2 cores": Machine("cpu", 1, "cpu", 16 * GIB, 2, 16 * GIB, bf16=False),
    "1 x 24 GiB": gpus(1, "NVIDIA GeForce RTX 4090", 24),
    "1 x 8 GiB without bf16": gpus(1, "NVIDIA GeForce GTX 1080", 8, bf16=False),
    "8 x 80 GiB": gpus(8, "NVIDIA H100 80GB HBM3", 80),
    "64 x 80 GiB": gpus(64, "NVIDIA H100 80GB HBM3", 80),
}


def data(images: int = 0, clips: int = 0, side: int = 24, frames: tuple[int, ...] = (7, 12)) -> TrainingData:
    samples = {"images": {(1, side, 40): images}, "videos": {(length, side, 40): clips for length in frames}}
    used = {name: shapes for name, shapes in samples.items() if any(shapes.values())}
    return TrainingData(("latents/mine",), CODEC, used, {name: {} for name in used}, 0, 0, has_sequences=False)


DATA = {
    "images": data(images=5_000),
    "five videos": data(clips=10),
    "videos": data(clips=50_000),
    "many images, five videos": data(images=1_000_000, clips=10),
    "the paper": data(images=192_000_000, clips=3_200_000),
}


@pytest.mark.parametrize(("machine", "kind"), itertools.product(MACHINES, DATA))
def test_a_choice_respects_memory_time_and_epochs(machine: str, kind: str) -> None:
    goal = Goal(hours=12)
    choice = choose(DATA[kind], MACHINES[machine], goal)
    run, here = choice.run, MACHINES[machine]
    assert memory(run)["total"] <= memory_limit(here) < here.memory
    assert choice.seconds <= 0.9 * 12 * 3600
    assert choice.seconds == run.max_steps * step_time(run, cluster_of(here, expected_flops_per_s(here))).total
    assert max(choice.epochs.values()) <= 1.01 * MAX_EPOCHS
    assert run.gpus in (1, here.devices)
    assert not run.strategy.offload
    for source in run.sources:
        assert source.config.batch_size % (run.gpus * source.config.micro_batches) == 0
    assert loader_workers(run, here) * run.gpus < here.cores


def test_five_videos_get_a_small_model_few_steps_and_one_gpu() -> None:
    choice = choose(DATA["five videos"], MACHINES["64 x 80 GiB"], Goal(24))
    assert choice.size == "tiny"
    assert choice.run.gpus == 1
    assert choice.run.max_steps == 1000  # 400 epochs of 20 clips, 8 per step
    assert not choice.is_bounded_by_time


def test_five_videos_beside_many_images_have_few_of_the_steps() -> None:
    choice = choose(DATA["many images, five videos"], MACHINES["8 x 80 GiB"], Goal(24))
    images, videos = choice.run.plan.step_shares
    assert images > 0.99
    assert float(videos) * choice.run.max_steps * choice.run.sources[1].config.batch_size <= 1.01 * MAX_EPOCHS * 20


def test_the_data_of_the_paper_on_its_machines_give_its_model() -> None:
    choice = choose(DATA["the paper"], MACHINES["64 x 80 GiB"], Goal(24))
    assert (choice.size, choice.run.strategy.name, choice.larger_size) == ("H", "ZeRO-2", "")


def test_more_hours_never_give_a_smaller_model_and_the_reason_is_named() -> None:
    choices = [choose(DATA["the paper"], MACHINES["1 x 24 GiB"], Goal(hours)) for hours in (0.5, 5, 50, 5000)]
    sizes = [list(LADDER).index(choice.size) for choice in choices]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) > 2
    assert "tokens per parameter" not in choices[0].larger_size
    assert choices[0].larger_size.endswith("in 0.5 hours, fewer than 20")
    assert "does not fit into 21.6 GiB" in choices[-1].larger_size


def test_data_with_few_tokens_bound_the_size() -> None:
    choice = choose(DATA["videos"], MACHINES["8 x 80 GiB"], Goal(24))
    tokens = 50_000 * (7 + 12) * 12 * 20
    assert choice.data.tokens == tokens
    assert choice.parameters <= tokens
    assert choice.larger_size == (
        "L (`plan --size L`: layers 24, width 1024, mlp_width 4096, heads 16) has 302M parameters, more than the data "
        "have tokens (228M)"
    )


def test_a_measured_speed_replaces_the_expected_one() -> None:
    machine = MACHINES["2 cores"]
    expected, fast = choose(DATA["videos"], machine, Goal(2)), choose(DATA["videos"], machine, Goal(2), 1e12)
    assert not expected.speed.is_measured
    assert fast.speed.is_measured
    assert fast.seconds <= 0.9 * 7200
    assert fast.trained_tokens > 5 * expected.trained_tokens


def test_a_requested_size_may_be_offloaded_if_the_host_has_the_memory() -> None:
    machine = MACHINES["1 x 24 GiB"]
    choice = choose(DATA["videos"], machine, Goal(24, "H"))
    assert choice.run.strategy.offload
    assert choice.memory["total"] <= memory_limit(machine)
    small_host = Machine("cuda", 1, machine.name, machine.memory, 16, 64 * GIB, bf16=True)
    with pytest.raises(InputError, match=r"size H does not fit into 21\.6 GiB.*choose a smaller --size"):
        choose(DATA["videos"], small_host, Goal(24, "H"))
    with pytest.raises(InputError, match=r"tiny does not fit.*prepare smaller frames"):
        choose(DATA["videos"], Machine("cpu", 1, "cpu", 2 * GIB, 2, 2 * GIB, bf16=False), Goal(2))


def test_odd_latents_have_patches_of_one_latent_pixel() -> None:
    choice = choose(data(clips=100, side=25), MACHINES["2 cores"], Goal(2))
    assert choice.run.backbone.patch_size == 1


@pytest.mark.parametrize("stored", [False, True])
def test_a_stored_posterior_and_stored_flips_are_used(stored: bool) -> None:
    facts = replace(data(images=100), has_posterior=stored, has_flips=stored)
    text = recipe_text(choose(facts, MACHINES["2 cores"], Goal(2)), "runs/mine", "recipe.yaml")
    settings = yaml.safe_load(text)["data"]
    assert (settings.get("posterior"), settings.get("flips")) == (("sample", True) if stored else (None, None))


def test_the_expected_speed_is_that_of_the_device() -> None:
    peak = peak_bf16_flops("H100")
    assert peak is not None
    assert math.isclose(expected_flops_per_s(MACHINES["8 x 80 GiB"]), 0.4 * peak)
    assert expected_flops_per_s(MACHINES["2 cores"]) == 80e9

"""`diagnose`: curves of generated runs beside those of healthy ones."""

import math
import os
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from torch.utils.tensorboard import SummaryWriter

from benchmarks import healthy_runs
from gpdit_lightning.cli import main
from gpdit_lightning.cli.diagnose import reference_of_runs
from gpdit_lightning.diagnosis.comparison import compare
from gpdit_lightning.diagnosis.curves import Curve, RunCurves, read_curves
from gpdit_lightning.diagnosis.facts import facts_of
from gpdit_lightning.diagnosis.references import (
    HealthyRun,
    Reference,
    fitting_reference,
    read_reference,
    shipped_names,
    shipped_reference,
)
from gpdit_lightning.diagnosis.report import report

ROOT = Path(__file__).parents[2]
STEPS = 200
Value = Callable[[float], float]
HEADINGS = {
    re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-")
    for line in (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("#")
}


def fall(first: float, last: float) -> Value:
    """A curve that falls exponentially in the part of the training from 0 to 1."""
    return lambda part: last + (first - last) * math.exp(-4 * part)


HEALTHY: dict[str, Value] = {
    "loss/train": fall(1.2, 0.5),
    "train/loss_q1": fall(1.0, 0.7),
    "train/loss_q2": fall(1.1, 0.4),
    "train/loss_q3": fall(1.2, 0.4),
    "train/loss_q4": fall(1.4, 0.5),
    "train/grad_norm": fall(0.3, 0.1),
    "train/ema_distance": fall(0.0, 0.05),
    "system/data_wait": fall(0.02, 0.02),
}
SPARSE: dict[str, Value] = {
    "loss/val": fall(1.2, 0.6),
    "sample/rollout_error_ratio": fall(3.0, 0.4),
    "scores_vs_decoded/fvd": fall(3000, 800),
}
EVENTS = ("warnings/spikes", "warnings/skipped_steps", "warnings/damaged_samples")


def recipe(data: Path, **changed: Any) -> dict[str, Any]:
    """The settings of a run that its curves depend on, as `config.yaml` has them."""
    source = {"manifests": [], "batch_size": 8, "frames": 3, "frames_without_loss": 0}
    backbone = {"size": "tiny", "latent_channels": 4} | changed.pop("backbone", {})
    return {
        "seed_everything": 0,
        "data_dir": str(data),
        "model": {
            "class_path": "gpdit_lightning.stages.LongVideoStage",
            "init_args": {
                "backbone": backbone,
                "schedule": {"name": "cosine", "shift": 1.0},
                "optimizer": {"algorithm": "adamw", "learning_rate": 0.001, "warmup_steps": 10},
                "initial_weights": None,
            },
        },
        "data": {
            "images": source,
            "videos": source,
            "sequences": source,
            "sources": [],
            "context_dropout": 0.1,
            "validation_batches": 2,
        },
        "trainer": {"max_steps": STEPS, "gradient_clip_val": 1.0},
        "ema": {"decay": 0.99},
        "preview": {"clips": 4, "context_frames": 2, "sampler": "rotation", "sampler_steps": 25},
        "scores": {"clips": 64, "context_frames": 2, "sampler": "rotation", "sampler_steps": 25, "video_network": {}},
        **changed,
    }


def write_run(
    folder: Path,
    settings: Mapping[str, Any],
    curves: Mapping[str, Value] = {},
    first: int = 0,
    last: int = STEPS,
) -> Path:
    """Write the events of steps `first` to `last` as one process does, and the recipe.

    Args:
        folder: of the run.
        settings: the recipe.
        curves: those that differ from healthy ones, by the part of the training.
        first: the step from which the process resumes.
        last: its last step.
    """
    writer = SummaryWriter(str(folder), filename_suffix=f".{first}")
    assert writer.file_writer is not None
    if first:
        restart = Event(step=first + 1, session_log=SessionLog(status=SessionLog.START))
        writer.file_writer.event_writer.add_event(restart)
    chosen = HEALTHY | SPARSE | dict(curves)
    for step in [1] * (first == 0) + [step for step in range(10, last + 1, 10) if step > first]:
        for tag, value in chosen.items():
            if tag not in SPARSE or step % 50 == 0:
                writer.add_scalar(tag, value(step / STEPS), step)
    writer.close()
    # Named by the second and a counter, whose digits do not sort the files of one second.
    (events,) = folder.glob(f"events.*.{first}")
    events.rename(folder / f"events.out.tfevents.{first:010}.{first}")
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(settings)))
    return folder


@pytest.fixture
def references(tmp_path: Path, tiny_shards: Path) -> list[str]:
    """The run folders of two healthy runs."""
    folders = []
    for seed, factor in enumerate((1.0, 1.1)):
        curves = {tag: lambda part, v=value, f=factor: f * v(part) for tag, value in (HEALTHY | SPARSE).items()}
        folders.append(write_run(tmp_path / f"seed-{seed}", recipe(tiny_shards, seed_everything=seed), curves))
    return [str(folder) for folder in folders]


def diagnose(run: Path, *options: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Run the command, check its figure, and return what it prints."""
    out = run.parent / "figure.png"
    assert main(["diagnose", str(run), "--out", str(out), *options]) == 0
    with Image.open(out) as figure:
        assert figure.width > 1000
    return capsys.readouterr().out


def test_a_healthy_run_has_no_findings_also_resumed_and_while_it_trains(
    references: list[str], tmp_path: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", recipe(tiny_shards), {"train/loss_q4": lambda part: 9.0 if part > 0.5 else 1.0})
    write_run(run, recipe(tiny_shards), first=100)  # resumed, after it had logged other values at later steps
    (last,) = run.glob("events*.100")
    last.write_bytes(last.read_bytes()[:-7])  # its last event is not yet written to its end
    q4 = read_curves(run).curves["train/loss_q4"]
    assert q4.values[11:] == pytest.approx([HEALTHY["train/loss_q4"](step / STEPS) for step in q4.steps[11:]])
    text = diagnose(run, "--reference", *references, capsys=capsys)
    assert main(["diagnose", str(run), "--out", str(run.parent / "figure.png")]) == 0
    assert f"the existing {run.parent / 'figure.png'} is replaced" in capsys.readouterr().err
    assert "step 200, 2 event files" in text
    assert "levels can be compared" in text
    assert "findings:\n- none" in text
    rows = re.findall(r"^\| (\S+/\S+) \| (\d+) \| (\S+) \| (\S+) to (\S+) \| (.*) \|$", text, flags=re.MULTILINE)
    assert {row[0] for row in rows} == (HEALTHY.keys() | SPARSE.keys()) - {"system/data_wait"}
    row = next(row for row in rows if row[0] == "train/loss_q4")
    assert float(row[2]) == pytest.approx(HEALTHY["train/loss_q4"](0.95), rel=0.02)
    assert (float(row[3]), float(row[4])) == pytest.approx(
        (HEALTHY["train/loss_q4"](1), 1.1 * HEALTHY["train/loss_q4"](0.9)), rel=0.01
    )


def curves_of(changed: Mapping[str, Value], steps: int = STEPS) -> RunCurves:
    """The curves of a run in memory, as `write_run` writes them."""
    curves = {}
    for tag, value in (HEALTHY | SPARSE | dict(changed)).items():
        logged = [step for step in (1, *range(10, steps + 1, 10)) if tag not in SPARSE or step % 50 == 0]
        if logged:
            curves[tag] = Curve(tuple(logged), tuple(value(step / STEPS) for step in logged))
    return RunCurves(curves, 1, "2026-01-01")


@pytest.fixture
def reference(tiny_shards: Path) -> Reference:
    """A reference of one healthy run."""
    healthy = curves_of({})
    facts = facts_of(recipe(tiny_shards), healthy.curves, "config.yaml")
    return Reference("healthy", "a run", facts, [HealthyRun(0, "", "", "", healthy.curves)])


@pytest.mark.parametrize(
    ("tag", "value", "heading"),
    [
        ("train/loss_q4", lambda part: 1.38, "loss-plateaus-at-1"),
        ("train/loss_q1", fall(1.0, 0.9), "losses-above-the-reference"),
        ("train/loss_q2", fall(1.0, 0.1), "losses-below-the-reference"),
        ("train/loss_q4", lambda part: 17 if part < 0.01 else 0.52, "wrong-latent-statistics"),
        ("train/loss_q3", lambda part: math.nan if part > 0.7 else 0.4, "nan"),
        ("warnings/skipped_steps", lambda part: 3, "nan"),
        ("warnings/spikes", lambda part: 8, "large-gradients"),
        ("train/grad_norm", lambda part: 0.1 + 0.8 * part**3, "large-gradients"),
        ("train/grad_norm", lambda part: 1.7, "large-gradients"),
        ("loss/train", lambda part: 0.3 + 0.2 * abs(2 * part - 1), "large-gradients"),
        ("loss/train", lambda part: 1.2 * 4 * part if part < 0.6 else 0.5, "large-gradients"),
        ("loss/val", lambda part: 0.5 + 0.1 * abs(2 * part - 1), "overfitting"),
        ("warnings/damaged_samples", lambda part: 2, "damaged-samples"),
        ("train/ema_distance", lambda part: 0.2, "averaged-weights-lag-behind"),
        ("system/data_wait", lambda part: 0.4, "slow-data"),
        ("sample/rollout_error_ratio", lambda part: 1.3, "error-ratio-of-previews-above-1"),
        ("scores_vs_decoded/fvd", lambda part: 2500, "error-ratio-of-previews-above-1"),
    ],
)
def test_a_fault_is_found_and_its_section_exists(tag: str, value: Value, heading: str, reference: Reference) -> None:
    run = curves_of({tag: value})
    comparison = compare(run, reference.facts, reference)
    assert comparison.has_levels
    found = [finding for finding in comparison.findings if tag in finding.sentence]
    assert heading in {finding.heading for finding in found}
    assert len(comparison.findings) == len(found)
    assert all(finding.heading in HEADINGS for finding in found)
    early = compare(curves_of({tag: value}, steps=20), reference.facts, reference)
    assert not {"loss-plateaus-at-1", "losses-above-the-reference"} & {finding.heading for finding in early.findings}


@pytest.mark.parametrize("tag", ["train/loss_q1", "train/loss_q4"])
def test_of_a_run_of_another_size_the_falls_are_compared(tag: str, reference: Reference, tiny_shards: Path) -> None:
    settings = recipe(tiny_shards, backbone={"width": 96, "heads": 3}, trainer={"max_steps": 2 * STEPS})
    slower = {name: lambda part, v=value: 2 * v(part / 2) for name, value in HEALTHY.items() if "loss" in name}
    run = curves_of(slower, 2 * STEPS)
    facts = facts_of(settings, run.curves, "config.yaml")
    comparison = compare(run, facts, reference)
    text = report("run", run, comparison)
    assert "Levels cannot be compared: backbone.width is 96 (reference: 192); backbone.heads is 3" in text
    assert "the loss at each noise level falls below its start" in text
    assert not comparison.findings
    q4 = next(row for row in comparison.rows if row.tag == "train/loss_q4")
    assert q4.step == 2 * STEPS
    assert q4.value == pytest.approx(HEALTHY["train/loss_q4"](0.95) / 1.38, rel=0.05)  # relative to its start
    flat = compare(curves_of(slower | {tag: lambda part: 2.0}, 2 * STEPS), facts, reference)
    assert [finding.heading for finding in flat.findings] == ["loss-plateaus-at-1"]


@pytest.mark.parametrize(
    ("group", "name", "tag"),
    [
        ("data", "validation_batches", "loss/val"),
        ("preview", "context_frames", "sample/rollout_error_ratio"),
        ("scores", "sampler_steps", "scores_vs_decoded/fvd"),
        ("scores", "video_network", "scores_vs_decoded/fvd"),
    ],
)
def test_curves_with_settings_of_their_own_are_compared_if_these_are_equal(
    group: str, name: str, tag: str, reference: Reference, tiny_shards: Path
) -> None:
    settings, run = recipe(tiny_shards), curves_of({})
    settings[group][name] = {"kind": "my.Network"} if name == "video_network" else 7
    comparison = compare(run, facts_of(settings, run.curves, "config.yaml"), reference)
    assert comparison.has_levels
    assert set(SPARSE) - {row.tag for row in comparison.rows} == {tag}
    assert f"{tag} cannot be compared: {group}.{name} is " in report("run", run, comparison)


def test_a_tag_whose_points_were_all_purged_is_no_curve(
    tmp_path: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", recipe(tiny_shards), last=50)
    write_run(run, recipe(tiny_shards), first=40, last=40)  # resumed before the first validation was logged again
    assert read_curves(run).curves.keys() == HEALTHY.keys()
    assert "step 40, 2 event files" in diagnose(run, capsys=capsys)


def damaged_tail(content: bytes) -> bytes:
    """Return records with a changed byte in the last one."""
    return content[:-6] + bytes([content[-6] ^ 1]) + content[-5:]


@pytest.mark.parametrize(
    ("damage", "warns"),
    [
        (lambda content: content[:-3], False),  # the last event is being written
        (damaged_tail, True),
        (lambda content: content + b"junk" * 10, True),
        (lambda content: content + record(b"\xff" * 20), True),
        (lambda content: content + record(Event(wall_time=math.inf).SerializeToString()), False),
        (lambda content: content + record(b"", length=2**50), False),
        (lambda content: content + record(bytes(2**17)), False),  # an image
    ],
)
def test_damaged_event_files_are_read_up_to_the_damage(
    damage: Callable[[bytes], bytes],
    warns: bool,
    tmp_path: Path,
    tiny_shards: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = write_run(tmp_path / "run", recipe(tiny_shards))
    (file,) = run.glob("events*")
    intact = read_curves(run)
    file.write_bytes(damage(file.read_bytes()))
    read = read_curves(run)
    assert {tag: curve.steps[:3] for tag, curve in read.curves.items()} == {
        tag: curve.steps[:3] for tag, curve in intact.curves.items()
    }
    assert (f"{file} is damaged after " in caplog.text) == warns


def test_odd_event_files_are_refused_or_have_no_date(
    tmp_path: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", recipe(tiny_shards))
    (file,) = run.glob("events*")
    value = Summary(value=[Summary.Value(tag="loss/train", simple_value=1.0)])
    for seconds in (math.nan, math.inf, -1e300, -1e12):
        file.write_bytes(record(Event(wall_time=seconds, step=1, summary=value).SerializeToString()))
        assert read_curves(run).begun == ""
    os.mkfifo(run / "events.out.tfevents.9.x")
    assert main(["diagnose", str(run), "--out", str(tmp_path / "figure.png")]) == 2
    assert "events.out.tfevents.9.x is not a regular file" in capsys.readouterr().err


def test_curves_of_many_points_are_compared_in_linear_time(
    tmp_path: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, steps = write_run(tmp_path / "run", recipe(tiny_shards)), 30_000
    (file,) = run.glob("events*")
    events = (
        Event(wall_time=1.0, step=step, summary=Summary(value=[Summary.Value(tag="loss/train", simple_value=1 / step)]))
        for step in range(1, steps + 1)
    )
    file.write_bytes(b"".join(record(event.SerializeToString()) for event in events))
    assert f"step {steps}" in diagnose(run, capsys=capsys)
    curve = read_curves(run).curves["loss/train"]
    assert curve.recent(1000) == pytest.approx([1 / step for step in range(900, 1001)])
    assert curve.range_near(1000) == pytest.approx((1 / 1100, 1 / 900))
    assert Curve((1, 5, 9), (1.0, 3.0, 5.0)).range_near(7) == (4.0, 4.0)


def record(content: bytes, length: int | None = None) -> bytes:
    """Return a record of an event file."""
    header = struct.pack("<Q", len(content) if length is None else length)
    checksums = [struct.pack("<I", masked_crc32c(part)) for part in (header, content)]
    return header + checksums[0] + content + checksums[1]


def test_a_file_of_a_reference_holds_all_that_is_compared(
    references: list[str], tmp_path: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.json"
    options = ["--title", "two runs", "--hardware", "one GPU", "--commits", "abc", "def", "--out", str(file)]
    healthy_runs.main([*references, *options])
    of_runs = reference_of_runs([Path(folder) for folder in references])
    read = read_reference(file)
    assert (read.name, read.title, read.facts) == ("mine", "two runs", of_runs.facts)
    assert [(run.seed, run.commit, run.hardware) for run in read.runs] == [(0, "abc", "one GPU"), (1, "def", "one GPU")]
    assert [run.curves for run in read.runs] == [run.curves for run in of_runs.runs]
    file.write_text(file.read_text().replace("two runs", r"two\u001b[2J runs"))
    assert r"two\x1b[2J runs" in diagnose(Path(references[0]), "--reference", str(file), capsys=capsys)
    file.write_text(file.read_text().replace('"values": [', '"values": ["x", ', 1))
    assert main(["diagnose", references[0], "--reference", str(file)]) == 2
    refusal = r"mine.json has runs\[0\].curves\['.*'\].values\[0\] = 'x'; it must be a finite"
    assert re.search(refusal, capsys.readouterr().err)


def test_references_that_ship_fit_their_own_settings() -> None:
    assert len(shipped_names()) >= 5
    for reference in map(shipped_reference, shipped_names()):
        assert {"train/loss_q1", "train/loss_q4", "train/grad_norm"} <= reference.runs[0].curves.keys()
        fitting = fitting_reference(reference.facts)
        assert fitting is not None
        assert fitting.name == reference.name
        others = {**reference.facts, "loss": {**reference.facts["loss"], "backbone.target": "epsilon"}}
        assert fitting_reference(others) is None
        larger = {**reference.facts, "size": {**reference.facts["size"], "backbone.width": 4096}}
        assert fitting_reference(larger) == reference


def test_a_run_that_no_reference_fits_is_checked_by_itself(
    tmp_path: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = recipe(tiny_shards, backbone={"target": "epsilon"})
    run = write_run(tmp_path / "$x_$", settings, {"warnings/spikes": lambda part: 2})
    text = diagnose(run, capsys=capsys)
    assert "reference: none that ships fits this run" in text
    assert text.split("findings:\n")[1].startswith("- 2 steps had a spike of the gradient")


def test_what_cannot_be_read_is_refused_with_one_sentence(
    references: list[str], tmp_path: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    no_recipe = write_run(tmp_path / "no_recipe", {"model": 3})
    other = write_run(tmp_path / "other", recipe(tiny_shards, ema={"decay": 0.5}))
    for words, message in (
        ([str(tmp_path / "none")], "none is no run folder, since it does not exist: give a run folder"),
        ([str(tmp_path / "empty")], "empty has no event files of TensorBoard"),
        ([str(no_recipe)], "config.yaml is not the recipe of a run"),
        ([references[0], "--reference", "digits"], "--reference is digits, which is no folder or file"),
        ([references[0], "--reference", references[0], "digits"], "has digits"),
        ([references[0], "--reference", references[0], str(other)], "have other settings (ema.decay is 0.5"),
    ):
        assert main(["diagnose", *words, "--out", str(tmp_path / "figure.png")]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1

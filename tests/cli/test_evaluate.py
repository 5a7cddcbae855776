"""`evaluate`, end to end on synthetic videos."""

import errno
import json
import multiprocessing
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gpdit_lightning import GPDiT
from gpdit_lightning.checkpoints.reading import load_trained_model
from gpdit_lightning.cli import evaluate as verb
from gpdit_lightning.cli import evaluation_output, main
from gpdit_lightning.cli.parsing import parse
from gpdit_lightning.diffusion import Guidance, RotationSampler
from gpdit_lightning.evaluation import chunk_files
from gpdit_lightning.evaluation.chunks import noise_seed
from gpdit_lightning.evaluation.metrics import psnr
from gpdit_lightning.evaluation.report import Report
from gpdit_lightning.evaluation.videos import read_clip
from gpdit_lightning.files import write_once
from gpdit_lightning.generation import ClipInputs, GenerationConfig, continue_video
from gpdit_lightning.media.video_writer import write_video
from gpdit_lightning.options.evaluate import EvaluateOptions, NetworkOptions
from tests.cli.sampling import CODEC, LABELS, stripes
from tests.evaluation.scripted import ScriptedClassifier, ScriptedI3D, ScriptedInception, ScriptedPlain, saved
from tests.media.videos import read_video

VIDEOS, CHUNKS = 6, 3
FRAMES = 10  # of a clip, the minimum of I3D: 5 of context, 5 generated


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of FRAMES frames."""
    folder = tmp_path_factory.mktemp("videos")
    for number in range(VIDEOS):
        write_video(folder / f"{number}.mp4", stripes(number)[:FRAMES], 24)
    return folder


@pytest.fixture(scope="module")
def network_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, NetworkOptions]:
    folder = tmp_path_factory.mktemp("networks")
    modules = (ScriptedI3D(), ScriptedInception(), ScriptedPlain(), ScriptedClassifier())
    return {type(module).__name__: saved(module, folder) for module in modules}


@pytest.fixture(scope="module")
def command(workspace: Path, folder: Path, network_files: dict[str, NetworkOptions]) -> list[str]:
    """Options of an evaluation in three chunks with all networks and without labels, without --out."""
    options = {
        "checkpoint": workspace / "of2",
        "videos": folder,
        "data": "stripes",
        "count": VIDEOS,
        "generated_frames": FRAMES - 5,
        "stride": 1,
        "steps": 2,
        "guidance": 1.5,
        "chunk": 2,
        "self_check_videos": 3,
        "video_network.path": network_files["ScriptedI3D"].path,
        "image_network.path": network_files["ScriptedInception"].path,
    }
    return [*(f"--{name}={value}" for name, value in options.items()), "--no_labels"]


def without(command: list[str], *names: str) -> list[str]:
    """Return the command without the options whose names begin with these."""
    return [option for option in command if not option.startswith(tuple(f"--{name}" for name in names))]


def evaluate(command: list[str], out: Path, *options: str) -> int:
    return main(["evaluate", *command, f"--out={out}", *options])


def save_with_geometry(workspace: Path, folder: Path, **changes: Any) -> None:
    """Save a model of the workspace that records other training clips."""
    model = GPDiT.from_pretrained(workspace / "of2")
    model.facts = replace(model.facts, geometry=replace(model.facts.geometry, **changes))
    model.save_pretrained(folder)


def report_without_date(out: Path) -> str:
    """Return the text of the report without its date."""
    report = json.loads((out / "results.json").read_text())
    return (out / "results.json").read_text().replace(report["date"], "").replace(report["content_sha256"], "")


@pytest.fixture(scope="module")
def finished(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an evaluation by one uninterrupted process. Do not change it."""
    out = tmp_path_factory.mktemp("finished")
    assert evaluate(command, out) == 0
    return out


@pytest.mark.parametrize(("latent_frames", "lengths"), [(5, (5, 12)), (3, (5, 4)), (2, (1, 4))])
def test_clips_are_those_of_the_model_and_videos_those_that_are_long_enough(
    workspace: Path, tmp_path: Path, latent_frames: int, lengths: tuple[int, int], messages: pytest.LogCaptureFixture
) -> None:
    """Only model, videos and folder are given: at stride 3 the clips of the model need 49, 25 and 13 frames."""
    save_with_geometry(workspace, tmp_path / "model", frames=latent_frames, sizes=((32, 32), (32, 48)))
    (tmp_path / "mine").mkdir()
    for frames in (60, 49, 25, 13, 3):
        write_video(tmp_path / "mine" / f"{frames}.mp4", stripes(1)[:frames], 24)
    given = [f"--checkpoint={tmp_path / 'model'}", f"--videos={tmp_path / 'mine'}", "--steps=1", "--no_labels"]
    assert main(["evaluate", *given, f"--out={tmp_path / 'out'}"]) == 0
    report = Report.load(tmp_path / "out" / "results.json")
    assert (report.protocol.context_frames, report.protocol.generated_frames) == lengths
    assert (report.protocol.data, report.protocol.size, report.protocol.stride) == ("mine", (32, 48), 3)
    assert report.protocol.videos == {(5, 12): 2, (5, 4): 3, (1, 4): 4}[lengths]
    assert list(report.scores) == ["psnr", "ssim"]
    assert "without networks the scores are PSNR and SSIM" in messages.text


def test_scores_are_those_of_continuations_by_the_library(
    command: list[str], workspace: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(command, tmp_path) == 0
    report = Report.load(tmp_path / "results.json")
    assert list(report.scores) == ["fid", "is", "fvd", "precision", "recall", "psnr", "ssim"]
    assert list(report.self_checks) == ["fvd", "fid"]
    assert report.references["the truth"]["fvd"].mean == pytest.approx(0, abs=1e-6)
    trained = load_trained_model(workspace / "of2")
    assert trained.classes  # a class-conditional model, evaluated without labels
    expected = []
    for number in range(VIDEOS):
        ground_truth = read_clip(folder / f"{number}.mp4", FRAMES, 1, (32, 32))
        config = GenerationConfig(RotationSampler(2), Guidance(1.5))
        seeds = [noise_seed(f"{number}.mp4", 0)]
        context = ground_truth[None, :5]
        video = continue_video(trained.backbone, CODEC, context, FRAMES - 5, config, ClipInputs(seeds)).pixels
        expected.append(psnr(video[:, 5:], ground_truth[None, 5:]).item())
    assert report.scores["psnr"].mean == pytest.approx(sum(expected) / VIDEOS, abs=0.02)

    protocol = report.protocol
    assert (protocol.data, protocol.videos, protocol.size, protocol.stride) == ("stripes", VIDEOS, (32, 32), 1)
    assert (protocol.context_frames, protocol.generated_frames, protocol.fvd_frames) == (5, 5, "all")
    assert (protocol.sampler, protocol.steps, protocol.guidance) == ("rotation", 2, Guidance(1.5))
    assert protocol.networks.keys() == {"video", "image"}
    assert (tmp_path / "self_checks.png").is_file()
    markdown, printed = (tmp_path / "results.md").read_text(), capsys.readouterr().out
    assert "## Protocol" in markdown
    assert "## Comparison with the paper" in markdown
    assert printed.startswith(markdown.split("\n## ")[0])
    assert "## " not in printed
    assert str(tmp_path / "results.md") in printed


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos in the folders of their classes."""
    folder = tmp_path_factory.mktemp("labelled")
    for number in range(VIDEOS):
        write_video(folder / LABELS[number % 2] / f"{number}.mp4", stripes(number)[:FRAMES], 24)
    return folder


def expected_videos(workspace: Path, labelled: Path, names: list[str], classes: list[int], context: int) -> Tensor:
    """Return the continuations of videos by calls of the library: (B, T, 3, H, W)."""
    clips = torch.stack([read_clip(labelled / name, FRAMES, 1, (32, 32)) for name in names])
    config = GenerationConfig(RotationSampler(2), Guidance(1.5, 3.0), window=4)
    inputs = ClipInputs([noise_seed(name, 0) for name in names], torch.tensor(classes))
    backbone = load_trained_model(workspace / "of2").backbone
    return continue_video(backbone, CODEC, clips[:, :context], FRAMES - context, config, inputs).pixels


def test_continuations_are_conditioned_on_the_label_of_each_video(
    command: list[str], workspace: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the names of folders and, for one video, by annotations."""
    context = 5
    (tmp_path / "labels.csv").write_text(f"source,label\njump/0.mp4,{LABELS[1]}\n")
    written: dict[str, Tensor] = {}

    def keep(path: Path, video: Tensor, fps: float) -> None:
        if path.parents[1].name == "seed_0":
            written[f"{path.parent.name}/{path.name}"] = video

    monkeypatch.setattr(evaluation_output, "write_video", keep)
    options = [f"--videos={labelled}", f"--context_frames={context}", f"--generated_frames={FRAMES - context}"]
    options += [f"--annotations={tmp_path / 'labels.csv'}", "--label_guidance=3", f"--keep_videos={VIDEOS}"]
    assert evaluate(without(command, "no_labels"), tmp_path / "out", *options) == 0

    names = sorted(written)
    assert names == ["jump/0.mp4", "jump/2.mp4", "jump/4.mp4", "run/1.mp4", "run/3.mp4", "run/5.mp4"]
    videos = torch.stack([written[name] for name in names]).float()
    expected = expected_videos(workspace, labelled, names, [1, 0, 0, 1, 1, 1], context).float()
    assert (videos - expected).abs().mean() < 0.1
    wrong = expected_videos(workspace, labelled, names, [0, 1, 1, 0, 0, 0], context).float()
    assert (wrong - expected)[:, context:].abs().mean() > 1

    report = Report.load(tmp_path / "out" / "results.json")
    assert "from annotations and names of folders; sha256" in report.protocol.labels
    assert report.protocol.guidance.label == 3.0
    markdown = (tmp_path / "out" / "results.md").read_text()
    assert "Labels: of each video" in markdown
    assert "| labels |" in markdown
    assert "guidance 1.5 over the context, 3 over the label" in markdown
    assert set(report.scores) == {"fid", "is", "fvd", "precision", "recall", "psnr", "ssim"}
    assert "the last given frame repeated" in report.references
    assert f"{FRAMES - context} frames from {context}" in markdown.splitlines()[0]
    assert "are computed from context and generated frames" in markdown


def test_a_report_without_the_field_of_labels_is_read(finished: Path) -> None:
    content = json.loads((finished / "results.json").read_text())
    assert content["protocol"].pop("labels") is None
    del content["content_sha256"]  # those reports have none
    assert Report.from_json(json.dumps(content)) == Report.load(finished / "results.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--videos=FLAT"], ".mp4 has the label 'FLAT' by the names of folders, which is no class of"),
        (["--videos=FLAT"], "(jump, run): give its label by --annotations, or --no_labels to score without labels"),
        (["--annotations=LIST"], "has the label 'swim' by the annotations, which is no class of"),
        (["--checkpoint=UNLABELLED", "--annotations=LIST"], "was trained without labels: leave --annotations out"),
        (["--checkpoint=UNLABELLED", "--label_guidance=2"], "was trained without labels: leave --label_guidance out"),
        (["--no_labels", "--label_guidance=2"], "--label_guidance has no effect with --no_labels"),
        (["--context_frames=0", "NO NETWORKS"], "--context_frames is 0, so frames cannot be compared with real ones"),
        (["--context_frames=-1"], "--context_frames is -1: give at least 0"),
    ],
)
def test_labels_that_cannot_be_used_are_refused(
    command: list[str],
    workspace: Path,
    folder: Path,
    labelled: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    (tmp_path / "labels.csv").write_text("source,label\n" + "".join(f"{number}.mp4,swim\n" for number in range(VIDEOS)))
    names = {"FLAT": str(folder), "LIST": str(tmp_path / "labels.csv"), "UNLABELLED": str(workspace / "unlabelled")}
    left_out = ["no_labels"] + ["video_network", "image_network"] * ("NO NETWORKS" in options)
    given = [f"--videos={labelled}", *options]
    for name, value in names.items():
        given, message = [option.replace(name, value) for option in given], message.replace(name, folder.name)
    assert evaluate(without(command, *left_out), tmp_path / "out", *(o for o in given if o != "NO NETWORKS")) == 2
    assert message in error_message(capsys)
    assert not (tmp_path / "out").exists()


def test_chunks_are_distributed_over_processes_and_the_last_one_writes_the_report(
    command: list[str], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):
        assert not (tmp_path / "results.json").exists()
        monkeypatch.setenv("RANK", str(rank))
        assert evaluate(command, tmp_path) == 0
    assert report_without_date(tmp_path) == report_without_date(finished)


def test_two_processes_at_once_give_the_same_report(
    command: list[str], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    context = multiprocessing.get_context("fork")  # a fork needs no second import
    processes = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        processes.append(context.Process(target=lambda: sys.exit(evaluate(command, tmp_path))))
        processes[-1].start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert report_without_date(tmp_path) == report_without_date(finished)


def test_an_interrupted_evaluation_resumes(
    command: list[str], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:

        def write_one_chunk(*chunk: Any) -> None:
            write_chunk(*chunk)
            raise KeyboardInterrupt

        write_chunk = verb.write_chunk
        patch.setattr(verb, "write_chunk", write_one_chunk)
        assert evaluate(command, tmp_path) == 130
    (written,) = (tmp_path / "chunks").glob("*.safetensors")
    before = written.stat()
    assert evaluate(command, tmp_path) == 0
    assert (written.stat().st_ino, written.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert len(list((tmp_path / "chunks").glob("*.safetensors"))) == CHUNKS
    assert report_without_date(tmp_path) == report_without_date(finished)


def test_a_video_that_was_replaced_is_evaluated_again(command: list[str], folder: Path, tmp_path: Path) -> None:
    videos = shutil.copytree(folder, tmp_path / "videos")
    given = [*without(command, "videos"), f"--videos={videos}"]
    assert evaluate(given, tmp_path / "out") == 0
    before = {chunk: chunk.stat().st_ino for chunk in (tmp_path / "out" / "chunks").iterdir()}
    shutil.copy(videos / "1.mp4", videos / "0.mp4")
    assert evaluate(given, tmp_path / "out") == 0
    assert sum(chunk.stat().st_ino != inode for chunk, inode in before.items()) == 1
    assert evaluate(given, tmp_path / "new") == 0
    assert report_without_date(tmp_path / "out") == report_without_date(tmp_path / "new")


def test_a_finished_evaluation_is_printed_without_computing(
    command: list[str], finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("evaluate_chunk", "make_report"):
        monkeypatch.setattr(verb, name, None)
    assert evaluate(command, finished) == 0
    assert capsys.readouterr().out.startswith((finished / "results.md").read_text().split("\n## ")[0])


def test_a_finished_evaluation_is_printed_from_a_read_only_folder(
    command: list[str],
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(finished, tmp_path / "out")

    def read_only(path: Path) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(evaluation_output, "process_lock", read_only)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert evaluate(command, tmp_path / "out") == 0
    assert capsys.readouterr().out.startswith((finished / "results.md").read_text().split("\n## ")[0])
    (tmp_path / "out" / "results.md").unlink()
    assert evaluate(command, tmp_path / "out") == 2
    assert f"{tmp_path}/out/.lock: Read-only file system" in capsys.readouterr().err
    next((tmp_path / "out" / "chunks").glob("*.safetensors")).unlink()
    monkeypatch.setattr(verb, "evaluate_chunk", None)  # nothing is computed
    assert evaluate(command, tmp_path / "out") == 2
    assert f"{tmp_path}/out/chunks cannot be written, since" in capsys.readouterr().err


def test_a_deleted_chunk_and_the_report_are_computed_again(command: list[str], finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "out")
    chunk = sorted((tmp_path / "out" / "chunks").iterdir())[1]
    expected = load_file(chunk)
    chunk.unlink()
    (tmp_path / "out" / "results.json").write_text("old")
    assert evaluate(command, tmp_path / "out") == 0
    assert report_without_date(tmp_path / "out") == report_without_date(finished)
    assert all(torch.equal(values, expected[key]) for key, values in load_file(chunk).items())


@pytest.mark.parametrize("damaged", [("results.json", None), ("results.json", b"{}"), ("results.md", b"")])
def test_a_report_whose_files_do_not_agree_is_computed_again(
    damaged: tuple[str, bytes | None], command: list[str], finished: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(finished, tmp_path / "out")
    name, content = damaged
    (out / name).unlink()
    if content is not None:
        (out / name).write_bytes(content)
    assert evaluate(command, out) == 0
    assert report_without_date(out) == report_without_date(finished)
    assert (out / "results.md").stat().st_size > 0


def test_seeds_give_a_mean_and_a_deviation(command: list[str], finished: Path, tmp_path: Path) -> None:
    assert evaluate(command, tmp_path / "both", "--seeds", "0", "4") == 0
    assert evaluate(command, tmp_path / "second", "--seeds=4") == 0
    outs = (tmp_path / "both", finished, tmp_path / "second")
    both, first, second = (Report.load(out / "results.json").scores for out in outs)
    for name, score in both.items():
        values = (first[name].mean, second[name].mean)
        assert score.per_seed == pytest.approx(values)
        assert score.mean == pytest.approx(sum(values) / 2)
        assert score.deviation == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert both["psnr"].deviation > 0
    assert both["fvd"].deviation > 0


def test_continuations_and_ground_truth_are_kept(command: list[str], folder: Path, tmp_path: Path) -> None:
    assert evaluate(command, tmp_path, "--keep_videos=2", "--seeds", "0", "4") == 0
    folder_of_kept = tmp_path / "videos"
    kept = sorted(path.relative_to(folder_of_kept) for path in folder_of_kept.rglob("*.mp4"))
    assert [path.parent.name for path in kept] == ["seed_0"] * 2 + ["seed_4"] * 2 + ["truth"] * 2
    assert len({path.name for path in kept}) == 2
    for path in kept:
        video = read_video(folder_of_kept / path).float()
        ground_truth = read_clip(folder / path.name, FRAMES, 1, (32, 32)).float()
        assert video.shape == ground_truth.shape
        given = FRAMES if path.parent.name == "truth" else 5
        assert (video[:given] - ground_truth[:given]).abs().mean() < 8
        assert given == FRAMES or (video[5:] - ground_truth[5:]).abs().mean() > 8


def test_scores_without_a_network_are_left_out(
    command: list[str],
    network_files: dict[str, NetworkOptions],
    tmp_path: Path,
    messages: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def scores(*options: str, leave_out: tuple[str, ...]) -> set[str]:
        messages.clear()
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        quick = ("--self_check_videos=0", "--steps=1", *options)
        assert evaluate(without(command, *leave_out), out, *quick) == 0
        return set(Report.load(out / "results.json").scores) - {"psnr", "ssim"}

    assert scores(leave_out=("video_network",)) == {"fid", "is"}
    assert "need --video_network.path" not in capsys.readouterr().out  # the log names it before the generation
    assert "FVD, precision and recall need --video_network.path: give I3D's weights" in messages.text
    assert scores(leave_out=("video_network", "image_network")) == set()
    assert "FID and IS need --image_network.path: give inception-2015-12-05.pt from" in messages.text
    plain = f"--image_network.path={network_files['ScriptedPlain'].path}"
    assert scores(plain, leave_out=("image_network",)) == {"fid", "fvd", "precision", "recall"}
    assert "IS needs class probabilities, which the image network does not return" in messages.text
    classifier = f"--classifier.path={network_files['ScriptedClassifier'].path}"
    assert "is" in scores(plain, classifier, leave_out=("image_network",))
    assert " need" not in messages.text


def test_the_window_is_that_of_training_by_default(
    command: list[str], tmp_path: Path, messages: pytest.LogCaptureFixture
) -> None:
    for number in range(2):
        write_video(tmp_path / f"{number}.mp4", stripes(number)[:18], 24)
    options = [f"--videos={tmp_path}", "--count=2", "--context_frames=13", "--self_check_videos=0"]
    assert evaluate(command, tmp_path / "default", *options) == 0
    assert Report.load(tmp_path / "default" / "results.json").protocol.window == 4
    assert "scores may be worse" not in messages.text
    assert evaluate(command, tmp_path / "larger", *options, "--window=5") == 0
    assert "--window is 5 latent frames, but in training frames attended to at most 4" in messages.text


def test_a_context_without_the_first_frame_with_a_loss_is_named(
    command: list[str], workspace: Path, tmp_path: Path, messages: pytest.LogCaptureFixture
) -> None:
    model = GPDiT.from_pretrained(workspace / "of2")
    model.facts = replace(model.facts, data={**model.facts.data, "data.videos.frames_without_loss": 3})
    model.save_pretrained(tmp_path / "model")
    options = [*without(command, "checkpoint", "video", "image", "self"), f"--checkpoint={tmp_path / 'model'}"]
    videos = next(option for option in command if option.startswith("--videos="))
    assert evaluate(options, tmp_path / "out", videos, "--count=2") == 0
    assert "2 latent frames are given, but the first 3 of each video had no loss in training" in messages.text


def error_message(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the only line with an error."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--guidance=2", "another --guidance (1.5, not 2.0)"),
        ("--seeds=1", "another --seeds ([0], not [1])"),
        ("--count=5", "another number of real videos or images (--count) (6, not 5)"),
        ("--selection_seed=1", "another choice of the real data (--count, --selection_seed): "),
        ("--guidance_levels=[0.2,1]", "another --guidance_levels (0.0, not 0.2)"),
        ("--chunk=4", "another --chunk (2, not 4)"),
    ],
)
def test_a_folder_with_other_settings_is_refused(
    command: list[str], finished: Path, capsys: pytest.CaptureFixture[str], option: str, message: str
) -> None:
    before = report_without_date(finished)
    assert evaluate(command, finished, option) == 2
    error = error_message(capsys)
    assert message in error
    assert error.endswith("give another --out, or remove that folder.")
    assert report_without_date(finished) == before


def test_a_folder_of_another_architecture_with_the_same_weights_is_refused(
    command: list[str], workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, path, out = GPDiT.from_pretrained(workspace / "of2"), tmp_path / "model", tmp_path / "out"
    other = GPDiT(replace(model.config, attention="of"))
    other.load_state_dict(model.state_dict())
    other.facts = model.facts
    options = [f"--checkpoint={path}", "--count=2"]
    model.save_pretrained(path)
    assert evaluate(command, out, *options) == 0
    weights = (path / "model.safetensors").read_bytes()
    shutil.rmtree(path)
    other.save_pretrained(path)
    assert (path / "model.safetensors").read_bytes() == weights
    assert evaluate(command, out, *options) == 2
    assert "belongs to an evaluation with another architecture of --checkpoint" in error_message(capsys)


def test_of_two_evaluations_with_other_settings_that_start_at_once_one_is_refused(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other one records its settings after this one has found none."""
    other, out = tmp_path / "other", tmp_path / "out"
    assert evaluate(command, other, "--guidance=2", "--count=2") == 0

    def write_later(path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(other / "chunks" / path.name, path)
        write_once(path, text)

    monkeypatch.setattr(chunk_files, "write_once", write_later)
    assert evaluate(command, out, "--count=2") == 2
    assert "chunks/settings.json belongs to an evaluation with another --guidance (2.0, not" in error_message(capsys)
    assert [path.name for path in (out / "chunks").iterdir()] == ["settings.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--count=7", "have 6 videos of at least 10 frames"),
        ("--count=1", "--count is 1: give at least 2"),
        ("--stride=3", "have 0 videos of at least 28 frames, and 6"),
        ("--window=0", "--window is 0: give at least 1"),
        ("--context_frames=4", "--context_frames is 4, which is not 1 + 4 k"),
        ("--generated_frames=4", "the videos have 9 frames, but I3D, Kinetics-400, TorchScript"),
        ("--fvd_frames=generated", "the videos have 5 frames, but I3D"),
        ("--seeds=[1,1]", "--seeds are [1, 1]"),
        ("--seeds=[]", "--seeds are []"),
        ("--videos=/nowhere", "/nowhere does not exist"),
        ("--checkpoint=/nowhere", "there is no checkpoint at /nowhere"),
        ("--checkpoint=IMAGES", "images are images, which are compared with --images or --reference"),
        ("--samples=9", "--samples has no effect without --context_frames 0: "),
        ("--image_scaling=adm", "--image_scaling has no effect on videos"),
        (
            "--images=/nowhere",
            "the options --videos and --images are given to compare with: give one of --videos",
        ),
        ("--size=64x64", "--size is 64x64, but the checkpoint was trained on 32x32"),
        ("--video_network.path=/nowhere", "the video network /nowhere is not a file"),
        ("--video_network.sha256=00", "but 00 is expected"),
        ("--guidance_scale=2", "did you mean --guidance"),
        ("--sampler=best", "best"),
        ("--device=gpu", "torch has no device 'gpu': give auto, cpu or cuda"),
    ],
)
def test_an_error_is_one_sentence_and_nothing_is_written(
    command: list[str], workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    if "IMAGES" in options:
        save_with_geometry(workspace, tmp_path / "images", frames=1)
        command = without(command, "generated_frames")
    assert evaluate(command, tmp_path / "out", options.replace("IMAGES", str(tmp_path / "images"))) == 2
    assert message in error_message(capsys)
    assert not (tmp_path / "out").exists()


def test_a_classifier_needs_an_image_network(
    command: list[str], network_files: dict[str, NetworkOptions], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classifier = f"--classifier.path={network_files['ScriptedClassifier'].path}"
    assert evaluate(without(command, "image_network"), tmp_path, classifier) == 2
    assert "a classifier is given without an image_network: give both" in error_message(capsys)


def test_chunks_with_a_changed_value_or_a_missing_end_are_computed_again(
    command: list[str], finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, tmp_path / "out")
    first, second = sorted((tmp_path / "out" / "chunks").iterdir())[:2]
    content = bytearray(first.read_bytes())
    content[-3] ^= 1
    first.write_bytes(content)
    second.write_bytes(second.read_bytes()[:-1])
    assert evaluate(command, tmp_path / "out") == 0
    printed = capsys.readouterr().err
    assert (
        f"{first} is damaged, or of another place (its content is not that of its checksum): it is computed again."
        in printed
    )
    assert f"{second} is not a complete safetensors file" in printed
    scores = [json.loads((folder / "results.json").read_text())["scores"] for folder in (finished, tmp_path / "out")]
    assert scores[0] == scores[1]


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("ucf101", {"data": "UCF-101", "count": 10_000, "context_frames": 5, "generated_frames": 12, "stride": None}),
        ("msrvtt", {"data": "MSR-VTT", "count": 7_000, "context_frames": 5, "generated_frames": 12, "stride": None}),
        ("long", {"data": "MovieGenBench", "context_frames": 13, "generated_frames": 16, "stride": 4}),
    ],
)
def test_recipes_have_the_settings_of_the_paper(recipe: str, expected: dict[str, Any]) -> None:
    options = parse("evaluate", "", EvaluateOptions, ["--config", f"gpdit:eval_{recipe}"])
    expected |= {
        "guidance": 1.2,
        "size": None,
        "fvd_frames": "all",
        "weights": "ema",
        "out": Path(f"evaluations/{recipe}"),
    }
    assert {name: getattr(options, name) for name in expected} == expected
    assert options.video_network.path == "weights/i3d_torchscript.pt"
    assert options.image_network.path == "weights/inception-2015-12-05.pt"

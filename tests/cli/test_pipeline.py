"""`GPDiTPipeline`: bit-equal to `sample`, with every form of context and of output."""

import gc
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from gpdit_lightning import GPDiTPipeline
from gpdit_lightning.cli import main
from gpdit_lightning.errors import InputError
from gpdit_lightning.generation.arguments import GenerationArguments
from gpdit_lightning.generation.results import PipelineOutput
from gpdit_lightning.media.video import video_info
from gpdit_lightning.options.sample import GenerationOptions
from tests.cli.sampling import LABELS, VIDEO, latents, looks_like, sample, stripe_context, stripes
from tests.media.videos import read_video

OPTIONS: Any = {"frames": 6, "steps": 2, "context_frames": 5}


@pytest.fixture(scope="module")
def pipeline(workspace: Path) -> GPDiTPipeline:
    return GPDiTPipeline.from_pretrained(workspace / "of2")


def pixels_of(output: PipelineOutput) -> list[Tensor]:
    return [video.pixels for video in output.videos]


def assert_near(first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    """Check that pixels differ by at most one level, since sums over a batch are ordered differently."""
    for frames, others in zip(first, second, strict=True):
        assert (frames.int() - others.int()).abs().max() <= 1


def test_the_arguments_of_a_call_are_the_options_of_sample() -> None:
    defaults = {field.name: field.default for field in fields(GenerationOptions)}
    assert defaults.keys() == GenerationArguments.__annotations__.keys()


def test_a_call_is_bit_equal_to_sample(workspace: Path, tmp_path: Path, pipeline: GPDiTPipeline) -> None:
    options = ["--frames=6", "--context_frames=5", "--samples=2", "--seed=3", "--sampler=stochastic"]
    more = ["--guidance=1.5", "--label=run", "--label_guidance=2", "--window=3", "--sinks=1"]
    assert sample(workspace, tmp_path / "verb", *options, *more, "--formats", "mp4", "png", "safetensors") == 0
    output = pipeline(
        str(workspace / VIDEO), **OPTIONS, samples=2, seed=3, sampler="stochastic", guidance=1.5, label=1,
        label_guidance=2.0, window=3, sinks=1, output_type="latent",
    )  # fmt: skip
    assert output.frame_rates == [8.0, 8.0]
    clips = ", ".join(f"<6 frames of 32x32 after 5 given ones, seed {seed}>" for seed in (3, 4))
    assert repr(output) == f"PipelineOutput({clips})"
    assert repr(pipeline).endswith(f" parameters, step {pipeline.trained.step}, videos of 32x32, on cpu)")
    files = output.save(tmp_path / "pipeline")
    assert [path.name for path in files] == ["1-seed3.mp4", "1-seed3.png", "1-seed4.mp4", "1-seed4.png"]
    for path in files:
        assert path.read_bytes() == (tmp_path / "verb" / path.name).read_bytes()
    for seed, new in zip((3, 4), output.frames, strict=True):
        assert torch.equal(new, latents(tmp_path / "verb" / f"1-seed{seed}.safetensors")[2:])


def test_samples_of_classes_are_bit_equal_to_those_of_sample(
    workspace: Path, tmp_path: Path, pipeline: GPDiTPipeline
) -> None:
    options = ["--label", "run", "0", "--count=3", "--frames=5", "--seed=2", "--label_guidance=2", "--batch_size=4"]
    assert sample(workspace, tmp_path / "verb", *options, context=None) == 0
    output = pipeline(label=["run", 0], count=3, frames=5, seed=2, steps=2, label_guidance=2.0, batch_size=4)
    files = output.save(tmp_path / "pipeline")
    names = [path.relative_to(tmp_path / "pipeline") for path in files]
    assert len(names) == 7
    assert names[0] == Path("run/run-00000.mp4")
    assert names[-1] == Path("sheet.png")
    for name in names:
        assert (tmp_path / "pipeline" / name).read_bytes() == (tmp_path / "verb" / name).read_bytes()


def test_an_exported_run_is_loaded_by_its_folder_or_its_name_on_the_hub(workspace: Path, tmp_path: Path) -> None:
    model, cache = tmp_path / "model", tmp_path / "hub" / "models--someone--gpdit"
    assert main(["export", "--checkpoint", str(workspace / "run"), "--out", str(model)]) == 0
    from_run = GPDiTPipeline.from_pretrained(workspace / "run")(**OPTIONS, label="jump", output_type="np")
    from_folder = GPDiTPipeline.from_pretrained(str(model))(**OPTIONS, label="jump", output_type="np")
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    (cache / "snapshots").mkdir()
    model.rename(cache / "snapshots" / ("0" * 40))
    hub: dict[str, Any] = {"cache_dir": tmp_path / "hub", "local_files_only": True}
    from_hub = GPDiTPipeline.from_pretrained("someone/gpdit", **hub)(**OPTIONS, label="jump", output_type="np")
    for output in (from_folder, from_hub):
        assert np.array_equal(output.frames[0], from_run.frames[0])
    with pytest.raises(InputError, match="someone/other is neither a folder nor a model that the hub provides"):
        GPDiTPipeline.from_pretrained("someone/other", **hub)
    with pytest.raises(InputError, match="there is no checkpoint at"):
        GPDiTPipeline.from_pretrained(tmp_path / "missing")


@pytest.mark.parametrize(("document", "out"), [("README.md", "continued.mp4"), ("docs/generation.md", "out.mp4")])
def test_examples_of_the_documents_run(
    document: str, out: str, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (Path(__file__).parents[2] / document).read_text(encoding="utf-8")
    blocks = [block for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if "GPDiTPipeline" in block]
    assert blocks
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        code = block.replace("MY_VIDEO.mp4", str(workspace / VIDEO)).replace("seconds=60", "seconds=1")
        exec(re.sub(r'from_pretrained\(".*?"\)', f"from_pretrained({str(workspace / 'of2')!r})", code), {})
    assert looks_like(read_video(tmp_path / out)[:13], stripe_context(1, 23, 13))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"weights": "best"}, r"--weights is 'best'; it must be of type Literal\['ema', 'raw'\]"),
        ({"precision": "64"}, r"--precision is '64'; it must be of type"),
        ({"weight": "raw"}, r"from_pretrained has no argument 'weight': for the hub, give revision, token"),
    ],
)
def test_arguments_of_loading_that_would_be_ignored_or_fail_later_are_refused(
    workspace: Path, argument: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        GPDiTPipeline.from_pretrained(workspace / "of2", **argument)


def test_properties(pipeline: GPDiTPipeline) -> None:
    assert pipeline.frame_rate == 8.0
    assert pipeline.sizes == ((32, 32),)
    assert pipeline(size=pipeline.sizes[0], frames=1, steps=1).videos[0].pixels.shape == (1, 3, 32, 32)
    assert pipeline.labels == LABELS
    assert pipeline.codec.name == "pca"
    assert pipeline.to("cpu") is pipeline
    assert pipeline.model.device == pipeline.codec.device == torch.device("cpu")


def test_frames_are_streamed_as_they_are_generated(workspace: Path, pipeline: GPDiTPipeline) -> None:
    contexts = [workspace / VIDEO, workspace / "still.png", workspace / "videos" / "jump" / "0.mp4"]
    whole = pipeline(contexts, **OPTIONS, output_type="np").frames
    streamed: dict[int, list[np.ndarray]] = {number: [] for number in range(3)}
    for step in pipeline.stream(contexts, **OPTIONS, output_type="np"):
        assert step.clips in ([0, 2], [1])  # batches of one shape
        for number, frames in zip(step.clips, step.frames, strict=True):
            streamed[number].append(frames)
    for number, frames in enumerate(whole):
        assert [len(piece) for piece in streamed[number]] == [4, 2]
        assert np.array_equal(np.concatenate(streamed[number]), frames)


def test_closing_a_stream_stops_it(pipeline: GPDiTPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    decode = type(pipeline.codec).decode_frame
    monkeypatch.setattr(
        type(pipeline.codec), "decode_frame", lambda self, *args: calls.append(1) or decode(self, *args)
    )
    stream = pipeline.stream(frames=10**6, steps=1)
    assert len(next(stream).frames[0]) == 1
    assert len(next(stream).frames[0]) == 4
    stream.close()
    with pytest.raises(StopIteration):
        next(stream)
    assert len(calls) == 2
    del stream
    gc.collect()


def test_videos_are_independent_of_batch_composition(workspace: Path, pipeline: GPDiTPipeline) -> None:
    contexts = [workspace / VIDEO, stripes(2), workspace / "still.png"]
    together = pixels_of(pipeline(contexts, **OPTIONS, samples=2, seed=5))
    alone = [pixels_of(pipeline(context, **OPTIONS, seed=seed))[0] for context in contexts for seed in (5, 6)]
    assert_near(together, alone)
    assert_near(pixels_of(pipeline(contexts, **OPTIONS, samples=2, seed=5, batch_size=1)), alone)
    assert (alone[0].float() - alone[1].float()).abs().mean() > 5
    seeds = [6, *[5] * (len(contexts) - 1)]
    each = pixels_of(pipeline(contexts, **OPTIONS, seed=seeds))
    assert_near(each, [alone[2 * number + (seed == 6)] for number, seed in enumerate(seeds)])
    for wrong, message in (
        ([1], f"seed is a list of 1, but there are {len(contexts)} contexts"),
        ([-1, 0], "--seed is -1"),
    ):
        with pytest.raises(InputError, match=message):
            pipeline(contexts, **OPTIONS, seed=wrong)
    again = pixels_of(pipeline(contexts, **OPTIONS, samples=2, seed=5))
    assert all(torch.equal(first, second) for first, second in zip(together, again, strict=True))


def test_every_form_of_a_clip_in_memory_gives_the_same_video(workspace: Path, pipeline: GPDiTPipeline) -> None:
    """As a folder of images, of which every third is used."""
    clip = stripes(2)
    array = clip.permute(0, 2, 3, 1).contiguous().numpy()
    images = [Image.fromarray(frame) for frame in array]
    reversed_channels = np.ascontiguousarray(array[..., ::-1])[..., ::-1]  # as of OpenCV's images
    forms: list[Any] = [images, array, array / np.float32(255), clip, clip.double() / 255, [clip], clip[None]]
    forms += [reversed_channels, np.broadcast_to(array, array.shape), (array / 255).astype(">f8")]
    (expected,) = pixels_of(pipeline(str(workspace / "frames"), **OPTIONS))
    for form in forms:
        output = pipeline(form, **OPTIONS)
        assert torch.equal(output.videos[0].clip.context.pixels, stripe_context(2, 47, 5))
        assert torch.equal(pixels_of(output)[0], expected)
    batch = pixels_of(pipeline([images, array, workspace / "frames"], **OPTIONS))
    assert_near(batch, [expected] * 3)
    still = pixels_of(pipeline(str(workspace / "still.png"), **OPTIONS))
    for form in (images[57], clip[57], array[57], [images[57]], clip[57:58]):
        assert torch.equal(pixels_of(pipeline(form, **OPTIONS))[0], still[0])
    transparent = Image.new("RGBA", (48, 32), (255, 0, 0, 0))
    assert (pipeline(transparent, **OPTIONS).videos[0].clip.context.pixels == 255).all()


def test_generated_frames_are_continued_at_their_stride(tmp_path: Path, pipeline: GPDiTPipeline) -> None:
    first = pipeline(stripes(1), **OPTIONS)
    first.save(tmp_path / "first.mp4")
    for context in (first.frames[0], str(tmp_path / "first.mp4")):
        again = pipeline(context, **OPTIONS, stride=1)
        assert again.frame_rates == first.frame_rates == [8.0]
        assert looks_like(again.videos[0].clip.context.pixels, pixels_of(first)[0][-5:])


def test_output_types_hold_the_same_frames(pipeline: GPDiTPipeline) -> None:
    (array,) = pipeline(stripes(1), **OPTIONS, output_type="np").frames
    assert (array.shape, array.dtype) == ((6, 32, 32, 3), np.uint8)
    (images,) = pipeline(stripes(1), **OPTIONS).frames
    assert all(isinstance(image, Image.Image) for image in images)
    assert np.array_equal(np.stack(images), array)
    (tensor,) = pipeline(stripes(1), **OPTIONS, output_type="pt").frames
    assert torch.equal(tensor, torch.from_numpy(array).permute(0, 3, 1, 2) / 255)
    (raw,) = pipeline(stripes(1), **OPTIONS, output_type="latent").frames
    assert raw.shape == (2, 16, 4, 4)


def test_seconds_are_those_of_each_video(workspace: Path, tmp_path: Path, pipeline: GPDiTPipeline) -> None:
    contexts = [workspace / VIDEO, workspace / "movie.gif"]  # of 24 and 10 frames per second
    output = pipeline(contexts, seconds=1.5, steps=1)
    assert [len(frames) for frames in output.frames] == [12, 5]
    assert output.frame_rates == pytest.approx([8, 10 / 3])
    (path,) = pipeline(workspace / VIDEO, seconds=1.5, steps=1).save(tmp_path / "out.mp4")
    assert (len(read_video(path)), float(video_info(path).fps)) == (13 + 12, 8)
    assert looks_like(read_video(path)[:13], stripe_context(1, 23, 13))


@pytest.mark.parametrize(
    ("context", "options", "message"),
    [
        (3, {}, r"a clip is an object of type int: give a path"),
        ([], {}, r"the list of contexts is empty"),
        (np.zeros((4, 32, 32), np.uint8), {}, r"an array of frames has shape \(4, 32, 32\): give \(T, H, W, 3\)"),
        (torch.zeros(4, 32, 32, 3), {}, r"a tensor of frames has shape \(4, 32, 32, 3\): give \(T, 3, H, W\)"),
        (torch.zeros(4, 3, 32, 32, dtype=torch.int64), {}, r"are torch.int64: give uint8, or floats in \[0, 1\]"),
        (np.zeros((4, 32, 32, 3), object), {}, r"the frames of a clip are object: give uint8, or floats in"),
        (Image.new("RGB", (8, 8)).convert("La"), {}, r"image 0 of a clip cannot be read .*: give another one"),
        (torch.full((4, 3, 32, 32), 2.0), {}, r"values from 2 to 2: give uint8, or floats"),
        (torch.full((1, 3, 8, 8), torch.nan), {}, r"values from nan to nan"),
        (torch.zeros(0, 3, 32, 32), {}, r"shape \(0, 3, 32, 32\), without frames"),
        ([Image.new("RGB", (8, 8)), Image.new("RGB", (8, 9))], {}, r"8x8 and 9x8 pixels: give all of them one size"),
        (stripes(0)[:5], {"context_frames": 5}, r"the given clip has 2 frames at stride 3, but the context needs 5"),
        ([stripes(0), "nowhere.mp4"], {}, r"nowhere.mp4 does not exist"),
        ([stripes(0), stripes(0)[:9]], {"context_frames": 5}, r"the given clip has 3 frames"),
        ("nowhere.mp4", {}, r"nowhere.mp4 does not exist"),
        (None, {"label": "walk"}, r"'walk', which is no class of the checkpoint: give one of jump, run"),
        (None, {"size": "40x40"}, r"trained on 32x32"),
        (None, {"output_type": "pillow"}, r"output_type is 'pillow': give 'pil', 'np', 'pt' or 'latent'"),
        (None, {"frames": 3, "seconds": 1.0}, r"both frames and seconds are given \(3 and 1.0\): give one"),
        (None, {"seconds": -1.0}, r"seconds is -1.0: give a duration above 0"),
        (None, {"step": 3}, r"a pipeline has no option 'step'"),
        (None, {"frames": 0}, r"--frames is 0"),
        (None, {"frames": 2.5}, r"--frames is 2.5; it must be of type int"),
    ],
)
def test_invalid_input_is_refused_before_anything_is_generated(
    context: Any, options: Any, message: str, pipeline: GPDiTPipeline
) -> None:
    for method in (pipeline, pipeline.stream):
        with pytest.raises(InputError, match=message):
            method(context, **options)

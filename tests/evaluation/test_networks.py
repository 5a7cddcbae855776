"""Networks of metrics: interfaces, records and errors."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gpdit_lightning.errors import InputError
from gpdit_lightning.evaluation import network_files
from gpdit_lightning.evaluation.inception import resize_as_tensorflow
from gpdit_lightning.evaluation.networks import load_image_classifier, load_image_network, load_video_network
from gpdit_lightning.options.evaluate import NetworkOptions
from gpdit_lightning.regular_files import sha256_of
from tests.evaluation.scripted import ScriptedClassifier, ScriptedI3D, ScriptedInception, ScriptedPlain, saved


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class ReadsAFile(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float().mean((2, 3)) + torch.from_file("/dev/zero", False, 3, dtype=torch.float32)


class Saves(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        torch.save(x, "copy.pt")
        return x.float().mean((2, 3))


class RunsWhileItIsLoaded(nn.Module):
    @torch.jit.export
    def __getstate__(self) -> tuple[int, bool]:
        return 1, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[int, bool]) -> None:
        self.training = state[1]

    def forward(self, x: Tensor) -> Tensor:
        return x.float().mean((2, 3))


class Flat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((1, 2, 3))


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) / 0 * 0


@pytest.fixture
def save(tmp_path: Path) -> Callable[[nn.Module], NetworkOptions]:
    return lambda module: saved(module, tmp_path)


def random_pixels(*shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(4).integers(0, 256, shape, dtype=np.uint8))


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def test_a_video_script_returns_features_with_its_preprocessing(save) -> None:
    file = save(ScriptedI3D())
    network = load_video_network(file)
    videos = random_pixels(2, 11, 3, 8, 6)
    exact = videos.double().numpy()
    expected = np.concatenate([exact.mean((1, 3, 4)), exact[:, 0].mean((2, 3))], 1)
    np.testing.assert_allclose(network(videos).numpy(), expected, rtol=1e-5)
    assert (network.num_features, network.min_frames, network.record.sha256) == (6, 10, file.sha256)


def test_features_and_probabilities_of_one_file_take_one_pass(save) -> None:
    module = ScriptedInception()
    network = load_image_network(save(module))
    pixels = random_pixels(5, 3, 7, 9)
    values = pixels.double().numpy() / 255
    expected = np.concatenate([values.mean((2, 3)), values[:, :, 0, 0]], 1)
    before = network.network.script.passes
    features, probabilities = network.features_and_probabilities(pixels)
    assert network.network.script.passes == before + 1
    np.testing.assert_allclose(features.numpy(), expected, rtol=1e-5)
    weight = module.output.weight.detach().double().numpy()
    np.testing.assert_allclose(probabilities.numpy(), softmax(expected @ weight.T), rtol=1e-5)
    assert torch.equal(network(pixels), features)
    assert (network.num_features, network.has_classes) == (6, True)


def test_probabilities_that_do_not_follow_from_the_features_take_a_second_pass(save) -> None:
    module = ScriptedInception(temperature=0.1)
    network = load_image_network(save(module))
    pixels = random_pixels(5, 3, 7, 9)
    features, probabilities = network.features_and_probabilities(pixels)
    expected = softmax(10 * features.double().numpy() @ module.output.weight.detach().double().numpy().T)
    np.testing.assert_allclose(probabilities.numpy(), expected, rtol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(20, 33), (320, 512)])
def test_images_are_resized_as_in_tensorflow_1(height: int, width: int) -> None:
    pixels = random_pixels(1, 1, height, width)
    exact = pixels[0, 0].double().numpy()
    expected = np.empty((299, 299))
    for row in range(299):
        y = row * height / 299
        top, bottom = int(y), min(int(y) + 1, height - 1)
        line = exact[top] * (top + 1 - y) + exact[bottom] * (y - top)
        x = np.arange(299) * width / 299
        left = x.astype(int)
        expected[row] = line[left] * (left + 1 - x) + line[np.minimum(left + 1, width - 1)] * (x - left)
    resized = resize_as_tensorflow(pixels, 299)[0, 0]
    np.testing.assert_allclose(resized.numpy(), expected, atol=1e-3)


def test_a_plain_network_receives_normalised_images_of_299_pixels_and_has_no_classes(save) -> None:
    network = load_image_network(save(ScriptedPlain()))
    pixels = random_pixels(2, 3, 40, 30)
    features, probabilities = network.features_and_probabilities(pixels)
    expected = (resize_as_tensorflow(pixels, 299)[:, :, ::50, ::70] - 128) / 128
    torch.testing.assert_close(features[:, :-1], expected.flatten(1))
    assert features[:, -1].tolist() == [299 * 299] * 2
    assert probabilities is None
    assert not network.has_classes


@pytest.mark.parametrize("image", [ScriptedPlain, ScriptedInception])
def test_a_classifier_replaces_the_probabilities_of_the_network(image: type[nn.Module], save) -> None:
    network = load_image_network(save(image()), classifier=save(ScriptedClassifier()))
    pixels = random_pixels(4, 3, 16, 16)
    features, probabilities = network.features_and_probabilities(pixels)
    assert torch.equal(features, network(pixels))
    assert probabilities.dtype == torch.float32
    np.testing.assert_allclose(probabilities.numpy(), softmax(pixels.double().numpy().mean((2, 3))), rtol=1e-4)
    assert network.has_classes
    assert network.classifier.num_classes == 3


def test_a_file_with_features_and_classes_can_be_the_classifier(save) -> None:
    file = save(ScriptedInception())
    pixels = random_pixels(4, 3, 16, 16)
    _, expected = load_image_network(file).features_and_probabilities(pixels)
    torch.testing.assert_close(load_image_classifier(file)(pixels), expected)


def test_the_record_of_a_network_identifies_its_file(save) -> None:
    file, classifier = save(ScriptedPlain()), save(ScriptedClassifier())
    network = load_image_network(file, classifier=classifier)
    assert (network.record.file, network.record.sha256, network.record.name) == (
        "ScriptedPlain.pt",
        file.sha256,
        "Inception-v3",
    )
    assert "299x299" in network.record.preprocessing
    assert network.classifier is not None
    assert network.classifier.record.sha256 == classifier.sha256


def test_the_record_marks_a_script_with_another_sha256(save) -> None:
    for network in (load_video_network(save(ScriptedI3D())), load_image_network(save(ScriptedInception()))):
        assert network.record.name.endswith(", not the published file")


def test_the_error_for_a_missing_file_gives_its_url(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere.pt is not a file on this machine: .*https://"):
        load_image_network(NetworkOptions(path=str(tmp_path / "nowhere.pt")))


def test_the_sha256_is_verified_before_the_file_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "network.pt").write_bytes(b"no network")
    with pytest.raises(InputError, match=f"sha256 {sha256_of(tmp_path / 'network.pt')}, but {'0' * 64} is expected"):
        load_video_network(NetworkOptions(path=str(tmp_path / "network.pt"), sha256="0" * 64))


def test_a_sha256_without_a_file_is_refused() -> None:
    with pytest.raises(InputError, match="the video network has a sha256 but no path"):
        load_video_network(NetworkOptions(kind="torch.nn.Identity", sha256="0" * 64))


class FolderOnUnpickling:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_is_refused_without_unpickling(tmp_path: Path) -> None:
    torch.save(FolderOnUnpickling(tmp_path / "executed"), tmp_path / "network.pt")
    for load in (load_video_network, load_image_network, load_image_classifier):
        with pytest.raises(InputError, match=r"network.pt is not a TorchScript"):
            load(NetworkOptions(path=str(tmp_path / "network.pt")))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("load", "module", "message"),
    [
        (load_video_network, ScriptedInception, r"another network, since its forward takes \(img, return_fea"),
        (load_video_network, ScriptedPlain, r"another network, since its forward takes \(x\)"),
        (load_image_network, ScriptedI3D, r"another network, since its forward takes \(x, rescale"),
        (load_image_classifier, ScriptedI3D, "is another network"),
        (load_image_network, Pair, r"returns tuple for pixels \(1, 3, 32, 32\), but float32 \(1, n\) is expected"),
        (load_image_network, Flat, r"returns torch.float32 \(1,\) on cpu for"),
        (load_image_network, Broken, "not finite"),
        (load_image_classifier, Pair, "could not compute on an example"),
        (load_image_classifier, Broken, "could not compute on an example"),
    ],
)
def test_a_network_with_another_interface_is_refused(load, module: type[nn.Module], message: str, save) -> None:
    with pytest.raises(InputError, match=f"{module.__name__}.pt.*{message}"):
        load(save(module()))


def test_pixels_of_another_type_or_shape_are_refused(save) -> None:
    video, image = load_video_network(save(ScriptedI3D())), load_image_network(save(ScriptedInception()))
    with pytest.raises(InputError, match=r"9 frames, but I3D.* takes at least 10"):
        video(random_pixels(1, 9, 3, 8, 8))
    with pytest.raises(InputError, match=r"\(10, 3, 8, 8\), but the video network takes torch.uint8 \(B, T, 3, H, W\)"):
        video(random_pixels(10, 3, 8, 8))
    with pytest.raises(InputError, match=r"torch.float32 \(1, 3, 8, 8\), but"):
        image(random_pixels(1, 3, 8, 8).float())
    with pytest.raises(InputError, match=r"\(1, 8, 8, 3\), but the image network takes torch.uint8 \(N, 3, H, W\)"):
        image.features_and_probabilities(random_pixels(1, 8, 8, 3))


class MeanColours(nn.Module):
    """A custom network that serves in every role."""

    name, min_frames = "mean colours", 3

    def __init__(self, scale: float = 1.0, path: Path | None = None) -> None:
        super().__init__()
        self.scale, self.path = nn.Parameter(torch.tensor(scale)), path

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.float().mean((-1, -2)).flatten(1)[:, :3] * self.scale

    def probabilities(self, pixels: Tensor) -> Tensor:
        return self(pixels).softmax(1)

    def features_and_probabilities(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return self(pixels), self.probabilities(pixels)


class WithoutWeights(nn.Module):
    """A custom network without weights; with `integers` its output has a wrong type."""

    def __init__(self, integers: bool = False) -> None:
        super().__init__()
        self.integers = integers

    def forward(self, pixels: Tensor) -> Tensor:
        features = pixels.flatten(1)[:, :2]
        return features if self.integers else features.float()


class NotAModule:
    """A class that is no `nn.Module`."""


class WithoutSuper(nn.Module):
    def __init__(self) -> None:
        self.layer = nn.Linear(2, 2)


class WithNumberedName(WithoutWeights):
    name = 3


class OneRow(WithoutWeights):
    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(pixels).mean(0, keepdim=True)


class ReturnsNothing(nn.Module):
    def forward(self, pixels: Tensor) -> None:
        pass


class LogitsAsProbabilities(MeanColours):
    def probabilities(self, pixels: Tensor) -> Tensor:
        return self(pixels)

    def features_and_probabilities(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return self(pixels), self.probabilities(pixels)


class OneOutput(MeanColours):
    def features_and_probabilities(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return self(pixels)  # type: ignore[return-value]


class TakesVideos(WithoutWeights):
    def forward(self, pixels: Tensor) -> Tensor:
        clips, frames, *_, width = pixels.unflatten(4, (-1, 1)).shape
        return torch.zeros(clips, frames * width)


class BatchOfThree(WithoutWeights):
    """Merges the last two rows of larger batches than the example."""

    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(pixels)[:2]


def custom(network: type[nn.Module], **options: Any) -> NetworkOptions:
    return NetworkOptions(kind=f"{network.__module__}.{network.__qualname__}", **options)


def test_a_custom_class_serves_in_every_role() -> None:
    options, pixels = custom(MeanColours, arguments={"scale": 2.0}), random_pixels(4, 3, 8, 8)
    image, classifier = load_image_network(options), load_image_classifier(options)
    expected = 2 * pixels.double().mean((2, 3))
    features, probabilities = image.features_and_probabilities(pixels)
    assert probabilities is not None
    torch.testing.assert_close(features.double(), expected)
    torch.testing.assert_close(probabilities, classifier(pixels))
    video = load_video_network(options)
    torch.testing.assert_close(video(pixels[None, :3]).double(), expected[:1])
    with pytest.raises(InputError, match=r"2 frames, but mean colours.* takes at least 3"):
        video(pixels[None, :2])


def test_the_record_of_a_custom_network_identifies_its_weights(tmp_path: Path) -> None:
    first, same, other = (
        load_video_network(custom(MeanColours, arguments={"scale": scale})).record for scale in (1.0, 1.0, 2.0)
    )
    assert first == same
    assert first.sha256 != other.sha256
    assert other.name == "mean colours (scale=2.0)"
    assert other.file.endswith("test_networks.MeanColours")
    assert load_video_network(custom(WithoutWeights)).record.sha256 == ""
    (tmp_path / "weights.bin").write_bytes(b"weights")
    of_file = load_video_network(custom(MeanColours, path=str(tmp_path / "weights.bin")))
    assert of_file.network.path == tmp_path / "weights.bin"
    assert (of_file.record.file, of_file.record.sha256) == ("weights.bin", sha256_of(tmp_path / "weights.bin"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (NetworkOptions(), "the video network has no path: give I3D's weights"),
        (NetworkOptions(kind="i3"), r"video network 'i3' is not known \(did you mean 'i3d'\?\)"),
        (NetworkOptions(kind="nowhere.Network"), "'nowhere.Network' cannot be imported"),
        (custom(WithoutWeights, arguments={"integers": True}), r"WithoutWeights returns torch.uint8 \(2, 2\) on cpu"),
        (NetworkOptions(path="x", kind="i3d", arguments={"a": 1}), "x is not a file .*: give I3D's weights"),
        (custom(MeanColours, path="x"), "x is not a file on this machine: give its file of weights"),
        (custom(MeanColours, arguments={"scales": 1}), "MeanColours' failed .*'scales'.*`arguments` must be those"),
        (custom(NotAModule), r"NotAModule' is not a subclass of torch\.nn\.modules\.module\.Module"),
        (custom(random_pixels), "random_pixels' is not a subclass of"),  # type: ignore[arg-type]
        (custom(WithoutSuper), r"WithoutSuper' failed \(AttributeError"),
        (custom(WithNumberedName), "WithNumberedName' has name = 3: it must be text"),
        (
            custom(OneRow),
            r"OneRow returns torch.float32 \(1, 2\) on cpu for pixels \(2, 1, 3, 32, 32\), but float32 \(2, n",
        ),
        (custom(ReturnsNothing), r"returns NoneType for .*: it must map uint8 \(B, T, 3, H, W\) to finite float32"),
    ],
)
def test_unusable_options_are_refused(options: NetworkOptions, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_video_network(options)


@pytest.mark.parametrize(
    ("load", "network", "message"),
    [
        (
            load_image_classifier,
            WithoutWeights,
            "WithoutWeights has no method probabilities: its",
        ),
        (load_image_classifier, LogitsAsProbabilities, "do not sum to one: its method probabilities must map"),
        (load_image_network, LogitsAsProbabilities, "do not sum to one"),
        (load_image_network, OneOutput, "returns torch.float32 .*, but a tuple of 2 tensors is expected"),
        (
            load_image_network,
            TakesVideos,
            r"TakesVideos' failed \(.*test_networks.py, line \d+\): it must map uint8",
        ),
    ],
)
def test_faults_of_custom_image_networks_are_reported(load: Any, network: type[nn.Module], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(custom(network))


def test_the_number_of_rows_is_checked_at_each_call() -> None:
    network = load_image_network(custom(BatchOfThree))
    with pytest.raises(InputError, match=r"returns torch.float32 \(2, 2\) .*, but float32 \(3, n\) is expected"):
        network(random_pixels(3, 3, 8, 8))


@pytest.mark.parametrize(
    ("network", "operation"),
    [(ReadsAFile(), "from_file"), (Saves(), "save"), (RunsWhileItIsLoaded(), "__setstate__")],
    ids=lambda value: type(value).__name__,
)
def test_a_script_that_uses_files_or_runs_while_it_is_loaded_is_refused(
    network: nn.Module, operation: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=rf"contains the operation \S*{operation}, which no network needs"):
        load_image_network(saved(network, tmp_path))


def test_a_pass_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ended: list[int] = []
    monkeypatch.setattr(network_files, "MAX_SECONDS", 0.01)
    monkeypatch.setattr(os, "_exit", ended.append)
    with network_files.time_limit("image", "a.pt"):
        for _ in range(500):
            if not ended:
                time.sleep(0.01)
    assert ended == [2]
    assert "error: the image network a.pt has computed one batch" in capsys.readouterr().err
    with network_files.time_limit("image", "a.pt"):
        pass
    time.sleep(0.03)
    assert ended == [2]

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gpdit_lightning.errors import InputError
from gpdit_lightning.evaluation.networks import (
    open_classifier,
    open_image_network,
    open_video_network,
    resize_as_tensorflow,
)
from gpdit_lightning.files import sha256_of
from gpdit_lightning.options.evaluate import NetworkFile
from tests.evaluation.scripted import ScriptedClassifier, ScriptedI3D, ScriptedInception, ScriptedPlain, saved


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Flat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((1, 2, 3))


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) / 0 * 0


@pytest.fixture
def save(tmp_path: Path) -> Callable[[nn.Module], NetworkFile]:
    return lambda module: saved(module, tmp_path)


def random_pixels(*shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(4).integers(0, 256, shape, dtype=np.uint8))


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def test_a_scripted_video_network_is_asked_for_features_of_its_own_preprocessing(save) -> None:
    file = save(ScriptedI3D())
    network = open_video_network(file)
    videos = random_pixels(2, 11, 3, 8, 6)
    exact = videos.double().numpy()
    expected = np.concatenate([exact.mean((1, 3, 4)), exact[:, 0].mean((2, 3))], 1)
    np.testing.assert_allclose(network(videos).numpy(), expected, rtol=1e-5)
    assert (network.num_features, network.min_frames, network.sha256) == (6, 10, file.sha256)


def test_features_and_classes_of_one_file_cost_one_pass(save) -> None:
    module = ScriptedInception()
    network = open_image_network(save(module))
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


def test_classes_that_do_not_follow_from_the_features_are_asked_for(save) -> None:
    module = ScriptedInception(temperature=0.1)
    network = open_image_network(save(module))
    pixels = random_pixels(5, 3, 7, 9)
    features, probabilities = network.features_and_probabilities(pixels)
    expected = softmax(10 * features.double().numpy() @ module.output.weight.detach().double().numpy().T)
    np.testing.assert_allclose(probabilities.numpy(), expected, rtol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (20, 33), (299, 299), (320, 512)])
def test_pictures_are_resized_as_tensorflow_1_did(height: int, width: int) -> None:
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
    found = resize_as_tensorflow(pixels, 299)[0, 0]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-3)


def test_a_plain_network_sees_299_pixels_around_zero_and_has_no_classes(save) -> None:
    network = open_image_network(save(ScriptedPlain()))
    pixels = random_pixels(2, 3, 40, 30)
    features, probabilities = network.features_and_probabilities(pixels)
    expected = (resize_as_tensorflow(pixels, 299)[:, :, ::50, ::70] - 128) / 128
    torch.testing.assert_close(features[:, :-1], expected.flatten(1))
    assert features[:, -1].tolist() == [299 * 299] * 2
    assert probabilities is None
    assert not network.has_classes


@pytest.mark.parametrize("image", [ScriptedPlain, ScriptedInception])
def test_a_classifier_takes_the_place_of_the_networks_classes(image: type[nn.Module], save) -> None:
    network = open_image_network(save(image()), classifier=save(ScriptedClassifier()))
    pixels = random_pixels(4, 3, 16, 16)
    features, probabilities = network.features_and_probabilities(pixels)
    assert torch.equal(features, network(pixels))
    assert probabilities.dtype == torch.float32
    np.testing.assert_allclose(probabilities.numpy(), softmax(pixels.double().numpy().mean((2, 3))), rtol=1e-4)
    assert network.has_classes
    assert network.classifier.num_classes == 3


def test_a_file_with_features_and_classes_serves_as_classifier(save) -> None:
    file = save(ScriptedInception())
    pixels = random_pixels(4, 3, 16, 16)
    _, expected = open_image_network(file).features_and_probabilities(pixels)
    torch.testing.assert_close(open_classifier(file)(pixels), expected)


def test_networks_tell_reports_what_they_are(save) -> None:
    file, classifier = save(ScriptedPlain()), save(ScriptedClassifier())
    network = open_image_network(file, classifier=classifier)
    assert (network.path.name, network.sha256, network.name) == ("ScriptedPlain.pt", file.sha256, "Inception-v3")
    assert "299x299" in network.preprocessing
    assert network.classifier is not None
    assert network.classifier.sha256 == classifier.sha256


def test_a_script_that_only_has_the_usual_arguments_is_not_called_the_usual_file(save) -> None:
    for network in (open_video_network(save(ScriptedI3D())), open_image_network(save(ScriptedInception()))):
        assert network.name.endswith(", not the file of the usual sha256")


def test_a_missing_file_is_told_with_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere.pt is not a file on this machine: .*https://"):
        open_image_network(NetworkFile(path=str(tmp_path / "nowhere.pt")))


def test_another_sha256_is_refused_before_the_file_is_opened(tmp_path: Path) -> None:
    (tmp_path / "network.pt").write_bytes(b"no network")
    with pytest.raises(InputError, match=f"sha256 {sha256_of(tmp_path / 'network.pt')} where {'0' * 64} was asked for"):
        open_video_network(NetworkFile(path=str(tmp_path / "network.pt"), sha256="0" * 64))


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_is_refused_and_never_run(tmp_path: Path) -> None:
    torch.save(Trap(tmp_path / "sprung"), tmp_path / "network.pt")
    for opener in (open_video_network, open_image_network, open_classifier):
        with pytest.raises(InputError, match=r"network.pt is no TorchScript"):
            opener(NetworkFile(path=str(tmp_path / "network.pt")))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("opener", "module", "told"),
    [
        (open_video_network, ScriptedInception, r"another kind of network, as its forward takes \(img, return_fea"),
        (open_video_network, ScriptedPlain, r"another kind of network, as its forward takes \(x\)"),
        (open_image_network, ScriptedI3D, r"another kind of network, as its forward takes \(x, rescale"),
        (open_classifier, ScriptedI3D, "another kind of network"),
        (open_image_network, Pair, r"returns a tuple where float32 \(1, n\) belongs"),
        (open_image_network, Flat, r"returns torch.float32 \(1,\) where"),
        (open_image_network, Broken, "not finite"),
        (open_classifier, Pair, "could not compute on an example"),
        (open_classifier, Broken, "could not compute on an example"),
    ],
)
def test_networks_of_another_kind_are_refused(opener, module: type[nn.Module], told: str, save) -> None:
    with pytest.raises(InputError, match=f"{module.__name__}.pt.*{told}"):
        opener(save(module()))


def test_pixels_of_another_type_or_shape_are_refused(save) -> None:
    video, image = open_video_network(save(ScriptedI3D())), open_image_network(save(ScriptedInception()))
    with pytest.raises(InputError, match="9 frames where I3D takes at least 10"):
        video(random_pixels(1, 9, 3, 8, 8))
    with pytest.raises(InputError, match=r"torch.uint8 \(10, 3, 8, 8\) where .* takes torch.uint8 \(B, T, 3, H, W\)"):
        video(random_pixels(10, 3, 8, 8))
    with pytest.raises(InputError, match=r"torch.float32 \(1, 3, 8, 8\) where"):
        image(random_pixels(1, 3, 8, 8).float())
    with pytest.raises(InputError, match=r"\(1, 8, 8, 3\) where .* takes torch.uint8 \(N, 3, H, W\)"):
        image.features_and_probabilities(random_pixels(1, 8, 8, 3))

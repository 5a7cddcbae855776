"""The built-in image tasks, compared with Pillow, float64 convolutions and images with known edges."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from gpdit_lightning.errors import InputError
from gpdit_lightning.media.image_tasks import SKETCH_BLUR, TASKS, edges, grayscale, make_pair, sketch


def noise(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def step(height: int, rows: int = 12) -> Tensor:
    """Gray level 100, and 100 + `height` from column 8 on: (1, 3, rows, 16)."""
    return (100 + height * (torch.arange(16) >= 8)).to(torch.uint8).expand(1, 3, rows, 16).contiguous()


def test_grayscale_is_bit_equal_to_pillow() -> None:
    pixels = noise(2, 3, 64, 96)
    for frame, result in zip(pixels, grayscale(pixels), strict=True):
        expected = np.array(Image.fromarray(frame.permute(1, 2, 0).numpy()).convert("L"))
        assert (result.numpy() == expected).all()
    assert torch.equal(grayscale(grayscale(pixels)), grayscale(pixels))


def test_edge_of_a_step_is_one_white_line() -> None:
    for height in (51, 150):
        result = edges(step(height))
        assert result.dtype == torch.uint8
        assert result.shape == (1, 3, 12, 16)
        assert torch.equal(result, result[:, :1].expand(1, 3, 12, 16))
        (columns,) = result[0, 0, 5].nonzero(as_tuple=True)
        assert columns.tolist() in ([7], [8])
        assert (result[0, 0, :, columns] == 255).all()
        assert (result == 255).sum() == 3 * 12


def test_weak_steps_are_edges_only_if_they_continue_strong_ones() -> None:
    """A weak step has at least 26 levels, since the gradient is four times the step and the lower threshold is 100."""
    assert not edges(step(50)).any()
    assert not edges(step(0)).any()
    for height, rows in ((50, 24), (20, 12)):
        result = edges(torch.cat((step(150), step(height)), dim=2))[0, 0, :, 7:9]
        assert result.any(dim=1)[:rows].sum() >= rows - 2
        assert not result[rows + 2 :].any()


def test_sketch_is_luma_divided_by_its_blur() -> None:
    """Compared with a float64 convolution; uniform areas become white, and black stays black."""
    image = torch.cat((noise(1, 3, 40, 8).repeat_interleave(8, dim=3), noise(1, 3, 40, 64)), dim=3)
    luma = grayscale(image)[0, 0].double()
    deviation = SKETCH_BLUR * 40
    reach = round(3 * deviation)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1).double() / deviation) ** 2)
    kernel /= kernel.sum()
    padded = functional.pad(luma[None, None], [reach] * 4, mode="reflect")
    blurred = functional.conv2d(functional.conv2d(padded, kernel[None, None, :, None]), kernel[None, None, None])[0, 0]
    drawn = sketch(image)
    assert drawn.dtype == torch.uint8
    assert drawn.shape == image.shape
    assert torch.equal(drawn, drawn[:, :1].expand_as(drawn))
    # OpenCV rounds the blur to whole levels, which changes the quotient more where the blur is dark.
    tolerance = 1 + 255 * luma / blurred**2
    assert ((drawn[0, 0] - (255 * luma / blurred).clamp(max=255)).abs() <= tolerance).all()
    assert drawn.float().std() > 30
    assert (sketch(step(0)) == 255).all()
    assert not sketch(torch.zeros_like(step(0))).any()


def test_inverse_task_swaps_source_and_target() -> None:
    image = noise(1, 3, 16, 24)
    for task, inverse, function in (("grayscale", "colourisation", grayscale), ("edges", "edges_to_image", edges)):
        source, target = make_pair(TASKS[task], image)
        assert torch.equal(source, image)
        assert torch.equal(target, function(image))
        assert all(map(torch.equal, make_pair(TASKS[inverse], image), (target, source)))
    assert all(name == task.name for name, task in TASKS.items())


def test_missing_opencv_is_reported_with_its_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    for task in (edges, sketch):
        with pytest.raises(
            InputError, match=r"OpenCV.* cannot be imported .*: pip install 'gpdit_lightning\[edges\]'\.$"
        ):
            task(step(100))
    grayscale(step(100))

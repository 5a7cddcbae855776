"""Records of codecs and clips, and their JSON."""

import json
from dataclasses import replace

import pytest

from gpdit_lightning.errors import InputError
from gpdit_lightning.specs import ClipGeometry, CodecSpec
from tests.conftest import TINY_CODEC

GEOMETRY = ClipGeometry(stride=3, sizes=((64, 64), (64, 96)), frames=5)


def test_records_survive_a_round_trip_through_json() -> None:
    assert CodecSpec.from_dict(json.loads(json.dumps(TINY_CODEC.to_dict())), "file", "cure") == TINY_CODEC
    assert ClipGeometry.from_dict(json.loads(json.dumps(GEOMETRY.to_dict())), "file", "cure") == GEOMETRY


def test_the_json_format_is_unchanged() -> None:
    assert list(TINY_CODEC.to_dict()) == [
        *("name", "source", "latent_channels", "spatial_factor", "temporal_factor", "mean", "std", "fingerprint")
    ]
    assert GEOMETRY.to_dict() == {"stride": 3, "sizes": [[64, 64], [64, 96]], "frames": 5}


def test_unknown_fields_are_ignored() -> None:
    assert CodecSpec.from_dict(TINY_CODEC.to_dict() | {"license": "MIT"}, "file", "cure") == TINY_CODEC


def test_invalid_records_are_reported() -> None:
    with pytest.raises(InputError, match=r"^file has codec\.std = \[1\.0\], which is not one number for each of the 4"):
        CodecSpec.from_dict(TINY_CODEC.to_dict() | {"std": [1.0]}, "file", "cure")
    with pytest.raises(InputError, match=r"^file has \[64\] in geometry\.sizes, which is not \[height, width\]: cure"):
        ClipGeometry.from_dict(GEOMETRY.to_dict() | {"sizes": [[64]]}, "file", "cure")


def test_the_same_codec_may_have_another_source() -> None:
    TINY_CODEC.check_same(replace(TINY_CODEC, source="elsewhere"), "a", "b")
    with pytest.raises(
        InputError, match=r"^a and b are of different codecs \(std .*\): use latents and weights of one"
    ):
        TINY_CODEC.check_same(replace(TINY_CODEC, std=(1.0,) * 4), "a", "b")


def test_shapes_of_pixels_and_latents() -> None:
    assert TINY_CODEC.latent_shape((9, 3, 32, 48)) == (3, 4, 4, 6)
    assert TINY_CODEC.pixel_frames(3) == 9
    with pytest.raises(InputError, match="the number of pixel frames is 8, which is not 1 \\+ 4 k: give 5 or 9"):
        TINY_CODEC.latent_frames(8)
    with pytest.raises(
        InputError, match="48x50 pixels are not multiples of 8 in height and width: crop or resize to 48x48"
    ):
        TINY_CODEC.check_frame_size(48, 50)

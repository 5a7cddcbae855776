"""Custom codecs: each mistake is reported when the codec is loaded, in one sentence."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from gpdit_lightning.codecs import CODECS, Codec, PcaCodec, fingerprint_of, load_codec
from gpdit_lightning.errors import InputError


class Correct(Codec):
    """The mean color of blocks of 4 x 4 pixels of every second frame, decoded as a moving average over time."""

    latent_channels, spatial_factor, temporal_factor = 3, 4, 2

    def __init__(self, source: str | None) -> None:
        self.source = source
        self.mean, self.std = torch.zeros(3), torch.ones(3)
        self.fingerprint = fingerprint_of({"mean": self.mean, "std": self.std})

    @classmethod
    def load(cls, source: str | None = None) -> Any:
        return cls(source)

    def to(self, device: str | torch.device) -> Any:
        self.device = torch.device(device)
        return self

    def encode_values(self, values: Tensor) -> Any:
        frames = values[:, ::2]
        return avg_pool2d(frames.flatten(0, 1), 4).unflatten(0, frames.shape[:2])

    def decode_frame(self, latent: Tensor, first: bool, state: list[Tensor]) -> Any:
        state[:] = [latent if first else (state[0] + latent) / 2]
        frame = state[0].repeat_interleave(4, dim=-2).repeat_interleave(4, dim=-1)
        return frame[:, None].repeat(1, 1 if first else 2, 1, 1, 1)


class Incomplete(Codec):
    latent_channels = 3

    @classmethod
    def load(cls, source: str | None = None) -> Any:
        return cls()  # type: ignore[abstract]


class StateInCodec(Correct):
    def decode_frame(self, latent: Tensor, first: bool, state: list[Tensor]) -> Any:
        self.last = [] if first else self.last
        return super().decode_frame(latent, first, self.last)


def load(codec_class: type[Codec], monkeypatch: pytest.MonkeyPatch, source: str | None = None) -> Codec:
    monkeypatch.setitem(CODECS, "mine", codec_class)
    return load_codec("mine", source)


def subclass(members: dict[str, Any]) -> type[Codec]:
    """Return a subclass of `Correct` in this module."""
    return type("Changed", (Correct,), {"__module__": __name__, **members})


def changed(method: str, change: Callable[[Any], Any]) -> type[Codec]:
    """Return the class `Correct` with another result of a method."""

    def replacement(self: Any, *arguments: Any) -> Any:
        return change(getattr(Correct, method)(self, *arguments))

    return subclass({method: replacement})


def with_attribute(name: str, value: Any) -> type[Codec]:
    """Return the class `Correct` with another value of an attribute after `load`."""

    def load(cls: Any, source: str | None = None) -> Any:
        codec = cls(source)
        setattr(codec, name, value)
        return codec

    return subclass({"load": classmethod(load)})


def without_attribute(name: str) -> type[Codec]:
    """Return the class `Correct` that does not set an attribute."""

    def load(cls: Any, source: str | None = None) -> Any:
        codec = cls(source)
        delattr(codec, name)
        return codec

    return subclass({"load": classmethod(load)})


def with_method(name: str, method: Any) -> type[Codec]:
    """Return the class `Correct` with another method."""
    return subclass({name: method})


def fail(*_: Any) -> None:
    raise RuntimeError("the weights\nare of another size")


ENCODED = "encode_values returned {}; it must return a torch.float32 tensor (B, F, C, h, w) of shape (2, 3, 3, 4, 6) on"
DECODED = "decode_frame returned {}; it must return a torch.float32 tensor (B, t, 3, H, W) of shape (2, {}, 3, 16, 24)"
COUNT = "it must be a whole number of at least 1."
CONSTANT = "it must be a finite torch.float32 tensor of shape (latent_channels,)"
FAULTS = [
    (Codec, "gpdit_lightning.codecs.base.Codec does not define decode_frame and encode_values and load and to"),
    (Incomplete, "test_custom.Incomplete does not define decode_frame and encode_values and to: a codec must define"),
    (
        with_method("load", classmethod(lambda cls, source: cls())),
        "`load` of codec 'tests.codecs.test_custom.Changed' fai",
    ),
    (with_method("load", classmethod(lambda cls: cls(None))), "it must load the codec from the source None."),
    (
        with_method("load", classmethod(fail)),
        "test_custom.Changed' failed (RuntimeError: the weights are of another size in",
    ),
    (with_method("load", lambda self, source: self), "it must load the codec from the source None."),
    (
        with_method("load", classmethod(lambda cls, source: None)),
        "Changed.load(None) returned None; it must return an instance of the class",
    ),
    (
        with_method("load", classmethod(lambda cls, source: load_codec("pca"))),
        "returned an object of type PcaCodec; it must",
    ),
    (changed("to", lambda codec: None), "Changed.to('cpu') returned None; it must return the codec itself."),
    (with_method("to", fail), "it must move the codec to cpu."),
    (
        with_method("to", lambda self, device: setattr(self, "device", device) or self),
        ".device is 'cpu'; it must be torch.",
    ),
    (with_attribute("latent_channels", 0), f"Changed.latent_channels is 0; {COUNT}"),
    (with_attribute("spatial_factor", 8.0), f"Changed.spatial_factor is 8.0; {COUNT}"),
    (with_attribute("temporal_factor", None), f"Changed.temporal_factor is None; {COUNT}"),
    (without_attribute("fingerprint"), "Changed does not set the attribute `fingerprint`; it must be the result of"),
    (with_attribute("fingerprint", 5), "Changed.fingerprint is 5; it must be the result of `fingerprint_of`."),
    (
        without_attribute("source"),
        "does not set the attribute `source`; it must be a string that `load` accepts or None.",
    ),
    (without_attribute("mean"), f"Changed does not set the attribute `mean`; {CONSTANT}"),
    (with_attribute("mean", [0.0] * 3), f"Changed.mean is an object of type list; {CONSTANT}"),
    (with_attribute("mean", torch.zeros(4)), f"Changed.mean is a torch.float32 tensor of shape (4,); {CONSTANT}"),
    (
        with_attribute("mean", torch.zeros(3).double()),
        f"Changed.mean is a torch.float64 tensor of shape (3,); {CONSTANT}",
    ),
    (with_attribute("mean", torch.full((3,), torch.nan)), CONSTANT),
    (with_attribute("std", torch.zeros(3)), f"{CONSTANT}, above 0."),
    (
        with_attribute("trial_size", (16, 18)),
        "it must be None or a height and width in pixels, multiples of spatial_factor.",
    ),
    (changed("encode_values", lambda latents: None), ENCODED.format("None")),
    (changed("encode_values", lambda latents: latents.numpy()), ENCODED.format("an object of type ndarray")),
    (
        changed("encode_values", lambda latents: latents.double()),
        "returned a torch.float64 tensor of shape (2, 3, 3, 4, 6)",
    ),
    (changed("encode_values", lambda latents: latents.mT), "shape (2, 3, 3, 6, 4) on cpu; it must return"),
    (changed("encode_values", lambda latents: latents[:, 1:]), "shape (2, 2, 3, 4, 6) on cpu; it must return"),
    (changed("encode_values", lambda latents: latents[:, :, :2]), "shape (2, 3, 2, 4, 6) on cpu; it must return"),
    (changed("encode_values", lambda latents: latents / 0), "encode_values returned latents that are not finite"),
    (changed("encode_values", fail), "it must encode values of shape (2, 5, 3, 16, 24)."),
    (
        changed("encode_values", lambda latents: latents + latents.mean(1, True)),
        "for a clip of 5 frames than for the clip cut to length 1;",
    ),
    (
        changed("encode_values", lambda latents: latents + latents.roll(-1, 1)),
        "must depend neither on later pixel frames",
    ),
    (changed("encode_values", lambda latents: latents + latents.roll(1, 0)), "nor on other clips."),
    (changed("encode_values", lambda latents: latents + torch.randn_like(latents)), "it must be deterministic"),
    (changed("encode_values", torch.Tensor.squeeze), "of shape (3, 4, 6) on cpu; it must return"),
    (changed("decode_frame", lambda frames: None), DECODED.format("None", 1)),
    (changed("decode_frame", lambda frames: frames[:, :1]), "shape (2, 1, 3, 16, 24) on cpu; it must return"),
    (changed("decode_frame", lambda frames: frames[:, 0]), "shape (2, 3, 16, 24) on cpu; it must return"),
    (changed("decode_frame", lambda frames: frames.squeeze(0)), "shape (1, 3, 16, 24) on cpu; it must return"),
    (changed("decode_frame", lambda frames: frames[..., :8]), "shape (2, 1, 3, 16, 8) on cpu; it must return"),
    (changed("decode_frame", lambda frames: frames.half()), "returned a torch.float16 tensor"),
    (changed("decode_frame", lambda frames: frames * torch.inf), "decode_frame returned values that are not finite"),
    (changed("decode_frame", fail), "it must decode latents of shape (2, 3, 4, 6)."),
    (
        with_method("decode_frame", lambda self, latent: latent),
        "`decode_frame` of codec 'tests.codecs.test_custom.Changed'",
    ),
    (StateInCodec, "in its argument `state`, not in the codec"),
]


@pytest.mark.parametrize(("codec_class", "message"), FAULTS)
def test_a_mistake_is_reported_in_one_sentence(
    codec_class: type[Codec], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as error:
        load(codec_class, monkeypatch)
    assert "\n" not in str(error.value)


def test_a_correct_codec_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = load(Correct, monkeypatch, "gain=2")
    assert codec.source == "gain=2"
    clips = torch.randint(0, 256, (2, 5, 3, 8, 12), dtype=torch.uint8)
    assert codec.decode(codec.encode(clips)).shape == clips.shape
    with pytest.raises(InputError, match=r"Changed\.source is None; it must be a string that `load` accepts\."):
        load(with_attribute("source", None), monkeypatch, "gain=2")


def test_the_size_of_the_trial_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def encode_values(self: Correct, values: Tensor) -> Tensor:
        assert values.shape[-2:] == (32, 32)
        return Correct.encode_values(self, values)

    load(subclass({"encode_values": encode_values, "trial_size": (32, 32)}), monkeypatch)
    with pytest.raises(InputError, match=r"If it needs frames of another size, set its `trial_size`\.$"):
        load(subclass({"encode_values": encode_values}), monkeypatch)


def test_a_codec_can_be_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    class ModuleCodec(nn.Module, Correct):  # type: ignore[misc]
        def __init__(self, source: str | None) -> None:
            nn.Module.__init__(self)
            Correct.__init__(self, source)
            self.scale = nn.Parameter(torch.ones(()))

        def to(self, device: Any) -> Any:
            self.device = torch.device(device)
            return nn.Module.to(self, device)

        def encode_values(self, values: Tensor) -> Tensor:
            return self.scale * super().encode_values(values)

    latents = load(ModuleCodec, monkeypatch).encode(torch.zeros(1, 1, 3, 4, 4, dtype=torch.uint8))
    assert not latents.requires_grad


def test_a_fault_at_another_size_is_reported_when_it_occurs(monkeypatch: pytest.MonkeyPatch) -> None:
    def encode_values(self: Correct, values: Tensor) -> Tensor:
        return Correct.encode_values(self, values)[..., :6]

    codec = load(with_method("encode_values", encode_values), monkeypatch)
    with pytest.raises(InputError, match=r"shape \(1, 1, 3, 4, 6\) on cpu; it must .* of shape \(1, 1, 3, 4, 8\)"):
        codec.encode(torch.zeros(1, 1, 3, 16, 32, dtype=torch.uint8))
    monkeypatch.setattr(type(codec), "decode_frame", fail)
    with pytest.raises(
        InputError, match=r"RuntimeError.*of another size .*: it must decode latents of shape \(1, 3, 4, 4\)"
    ):
        codec.decode(torch.zeros(1, 1, 3, 4, 4))


def test_built_in_codecs_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PcaCodec, "encode_values", fail)
    load_codec("pca")

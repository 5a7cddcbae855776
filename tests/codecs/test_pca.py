from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gpdit_lightning.cli.demo_videos import draw_video
from gpdit_lightning.codecs import PcaCodec, load_codec, load_codec_from_spec
from gpdit_lightning.codecs.fit_pca import align, fit, psnr
from gpdit_lightning.codecs.fitting_clips import shipped_clips
from gpdit_lightning.codecs.loading import CodecNotAllowedError
from gpdit_lightning.codecs.pca import WEIGHT_SHAPES, blocks_of, pixels_of
from gpdit_lightning.errors import InputError
from gpdit_lightning.media.images import resize_and_crop
from tests.media.videos import read_video

UCF = Path(__file__).parents[3] / "shared" / "assets" / "videos" / "ucf101_6class"


@pytest.fixture(scope="module")
def codec() -> PcaCodec:
    return PcaCodec.load()


def moving_clip(frames: int, height: int = 32, width: int = 48, seed: int = 0) -> torch.Tensor:
    """Return smooth random waves that move, uint8 (1, T, 3, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    phases, speeds = torch.rand(2, 3, generator=generator) * 6
    times = torch.arange(frames).view(-1, 1, 1, 1)
    waves = torch.sin(rows / 9 + columns / 7 + phases.view(3, 1, 1) + times * speeds.view(3, 1, 1) / 20)
    return ((waves + 1) * 127.5).to(torch.uint8)[None]


def test_blocks_are_invertible() -> None:
    values = torch.randn(2, 8, 3, 16, 24)
    assert blocks_of(values, 4).shape == (2, 2, 2, 3, 768)
    assert torch.equal(pixels_of(blocks_of(values, 4), 4), values)
    # The first block is the upper left corner of the first four frames.
    assert torch.equal(blocks_of(values, 4)[0, 0, 0, 0], values[0, :4, :, :8, :8].flatten())


@pytest.mark.parametrize(("frames", "latent_frames"), [(1, 1), (5, 2), (17, 5), (45, 12)])
def test_the_geometry_is_that_of_the_wanvae(codec: PcaCodec, frames: int, latent_frames: int) -> None:
    latents = codec.encode(moving_clip(frames).expand(2, -1, -1, -1, -1))
    assert latents.shape == (2, latent_frames, 16, 4, 6)
    assert latents.dtype == torch.float32
    assert codec.decode(latents).shape == (2, frames, 3, 32, 48)
    assert codec.latent_frames(frames) == latent_frames
    assert codec.pixel_frames(latent_frames) == frames


def test_the_shipped_components_are_orthonormal(codec: PcaCodec) -> None:
    for name in ("first_components", "later_components"):
        components = codec.weights[name].double()
        torch.testing.assert_close(components @ components.T, torch.eye(16).double(), atol=1e-5, rtol=0)


def test_encoding_is_causal(codec: PcaCodec) -> None:
    clip = moving_clip(45)
    torch.testing.assert_close(codec.encode(clip)[:, :5], codec.encode(clip[:, :17]), atol=1e-4, rtol=0)
    torch.testing.assert_close(codec.encode(clip)[:, :1], codec.encode(clip[:, :1]), atol=1e-4, rtol=0)


def test_decoding_is_causal(codec: PcaCodec) -> None:
    latents = codec.encode(moving_clip(17))
    changed = latents.clone()
    changed[:, 3:] += 1
    same = (codec.decode(latents) == codec.decode(changed)).flatten(2).all(dim=2)[0]
    assert same.tolist() == [True] * 9 + [False] * 8


@pytest.mark.parametrize("pieces", [(5,), (1, 1, 1, 1, 1), (2, 0, 3), (0, 4, 1)])
def test_streaming_decoding_equals_decoding_at_once(codec: PcaCodec, pieces: tuple[int, ...]) -> None:
    latents = codec.encode(torch.cat([moving_clip(17), moving_clip(17, seed=1)]))
    decoder = codec.decoder()
    assert torch.equal(torch.cat([decoder(piece) for piece in latents.split(pieces, 1)], dim=1), codec.decode(latents))
    assert decoder(latents).shape[1] == 20  # later latent frames have four pixel frames each


def test_encoding_inverts_decoding(codec: PcaCodec) -> None:
    clip = (moving_clip(9).float() * 0.4 + 70).to(
        torch.uint8
    )  # far from black and white, so that decoding does not clip
    latents = codec.encode(clip)
    torch.testing.assert_close(codec.encode(codec.decode(latents)), latents, atol=0.1, rtol=0)  # 8-bit rounding


def test_latents_of_a_still_video_are_constant(codec: PcaCodec) -> None:
    latents = codec.encode(moving_clip(1).expand(-1, 9, -1, -1, -1))
    torch.testing.assert_close(latents[:, 1], latents[:, 2])
    # The leading components are aligned between the first and later frames.
    difference = (latents[:, 1, :5] - latents[:, 0, :5]).norm() / latents[:, 1, :5].norm()
    assert difference < 0.03


def test_a_fit_is_the_best_linear_code_of_its_clips() -> None:
    clips = [
        moving_clip(9, 32, 32, seed)[0] + torch.randint(0, 40, (9, 3, 32, 32)).to(torch.uint8) for seed in range(8)
    ]
    codec = fit(clips)
    values = torch.stack(clips).double() / 127.5 - 1
    centre = values.mean(dim=(0, 1, 3, 4))
    torch.testing.assert_close(codec.weights["centre"].double(), centre, atol=1e-5, rtol=0)
    for name, frames, group in (("first_components", slice(0, None, 4), 1), ("later_components", slice(1, None), 4)):
        blocks = blocks_of(values[:, frames] - centre.view(3, 1, 1), group).flatten(0, 3)
        least = torch.linalg.svdvals(blocks)[16:].square().sum()  # the least error of rank 16 (Eckart and Young)
        components = codec.weights[name].double()
        error = (blocks - blocks @ components.T @ components).square().sum()
        assert error.item() == pytest.approx(least.item(), rel=1e-3)


def test_aligning_rotates_components_within_their_span() -> None:
    first = torch.linalg.qr(torch.randn(192, 16, dtype=torch.float64)).Q.T
    later = torch.linalg.qr(torch.randn(768, 16, dtype=torch.float64)).Q.T
    rotated = align(first, later)
    torch.testing.assert_close(rotated.T @ rotated, first.T @ first)
    # The best rotation is the one after which the overlap is symmetric and positive.
    overlap = rotated @ later.reshape(16, 4, 192).sum(dim=1).T
    torch.testing.assert_close(overlap, overlap.T)
    assert torch.linalg.eigvalsh(overlap).min() > 0


def test_the_constants_whiten_the_fitted_clips() -> None:
    clips = shipped_clips(6)
    codec = fit(clips)
    latents = codec.encode(torch.stack(clips))
    white = (latents - codec.mean.view(-1, 1, 1)) / codec.std.view(-1, 1, 1)
    torch.testing.assert_close(white.mean(dim=(0, 1, 3, 4)), torch.zeros(16), atol=1e-3, rtol=0)
    torch.testing.assert_close(white.std(dim=(0, 1, 3, 4)), torch.ones(16), atol=1e-3, rtol=0)


def test_the_shipped_weights_reproduce_their_training_images(codec: PcaCodec) -> None:
    assert psnr(codec, shipped_clips(20)) > 25


def test_the_shipped_weights_reproduce_real_videos(codec: PcaCodec) -> None:
    if not UCF.is_dir():
        pytest.skip(f"needs the test videos in {UCF}")
    paths = sorted(path for path in UCF.rglob("*") if path.suffix in (".avi", ".mp4"))[::18]
    clips = [resize_and_crop(read_video(path, max_frames=17), (128, 128)) for path in paths]
    assert psnr(codec, clips) > 26


def test_the_codec_of_the_demo_reproduces_held_out_videos_of_the_demo(codec: PcaCodec) -> None:
    clips = [draw_video(number, held_out=True, seed=0)[0][::3] for number in range(4)]
    of_demo = load_codec("pca_digits")
    assert isinstance(of_demo, PcaCodec)
    assert psnr(of_demo, clips) > max(34, psnr(codec, clips) + 1)


@pytest.mark.slow
def test_the_default_fit_reproduces_the_shipped_weights(codec: PcaCodec) -> None:
    fitted = fit(shipped_clips())
    for name in WEIGHT_SHAPES:
        torch.testing.assert_close(fitted.weights[name], codec.weights[name], atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (
            torch.zeros(1, 4, 3, 16, 16, dtype=torch.uint8),
            r"the number of pixel frames is 4, which is not 1 \+ 4 k: give 1 or 5",
        ),
        (torch.zeros(1, 0, 3, 16, 16, dtype=torch.uint8), "the number of pixel frames is 0"),
        (torch.zeros(1, 5, 3, 20, 16, dtype=torch.uint8), "20x16 pixels are not multiples of 8 in height and width"),
        (torch.zeros(1, 5, 3, 16, 12, dtype=torch.uint8), "16x12 pixels are not multiples of 8"),
        (torch.zeros(1, 5, 3, 16, 16), "torch.float32"),
        (torch.zeros(5, 3, 16, 16, dtype=torch.uint8), r"\(5, 3, 16, 16\)"),
    ],
)
def test_invalid_pixels_are_rejected(codec: PcaCodec, pixels: torch.Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        codec.encode(pixels)


def test_invalid_latents_are_rejected(codec: PcaCodec) -> None:
    with pytest.raises(InputError, match=r"\(1, 2, 8, 4, 4\)"):
        codec.decode(torch.zeros(1, 2, 8, 4, 4))


@pytest.mark.parametrize("shape", [(1, 1, 16, 4, 6), (2, 1, 16, 6, 4), (2, 1, 16, 4, 4)])
def test_other_clips_in_a_later_call_are_rejected(codec: PcaCodec, shape: tuple[int, ...]) -> None:
    latents = codec.encode(moving_clip(5).expand(2, -1, -1, -1, -1))
    decoder = codec.decoder()
    first = decoder(latents[:, :1])
    with pytest.raises(InputError, match=rf"= \({shape[0]}, {shape[3]}, {shape[4]}\) where .* first had \(2, 4, 6\)"):
        decoder(torch.zeros(shape))
    assert torch.equal(torch.cat([first, decoder(latents[:, 1:])], dim=1), codec.decode(latents))


def test_a_codec_loads_only_from_its_own_spec(codec: PcaCodec, tmp_path: Path) -> None:
    assert load_codec_from_spec(codec.spec()).spec() == codec.spec()

    other = codec.weights | {"std": codec.weights["std"] * 2}
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(
        InputError, match=r"run\.ckpt and the codec loaded from .*other\.safetensors are of different codecs"
    ):
        load_codec_from_spec(codec.spec(), source=str(tmp_path / "other.safetensors"), owner="run.ckpt")
    moved = load_codec("pca", str(tmp_path / "other.safetensors"))
    with pytest.raises(CodecNotAllowedError, match=r"run\.ckpt records .*other\.safetensors.*give --codec_source"):
        load_codec_from_spec(moved.spec(), owner="run.ckpt")
    assert moved.fingerprint != codec.fingerprint


def test_files_without_weights_of_the_codec_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("no weights")
    for name in ("absent.safetensors", "text.safetensors"):
        with pytest.raises(InputError, match=f"{name} is not a readable weights file"):
            load_codec("pca", str(tmp_path / name))
    save_file({"mean": torch.zeros(16)}, tmp_path / "half.safetensors")
    with pytest.raises(InputError, match="does not contain the tensors"):
        load_codec("pca", str(tmp_path / "half.safetensors"))

"""Results of `GPDiTPipeline`: generated videos in memory, and the frames of a stream.

Shapes: T pixel frames, F latent frames, k of them of the context, C channels, h x w latent pixels.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from gpdit_lightning.generation.outputs import VideoOutput, output_formats, output_path
from gpdit_lightning.generation.plans import Clip
from gpdit_lightning.generation.sheets import sheets_of


@dataclass(frozen=True)
class StreamedFrames:
    """The newest frames of the clips of one batch.

    Attributes:
        clips: numbers of the clips among those of the whole call, counted as in `PipelineOutput.frames`.
        frames: the new frames of each of these clips, in the form of the output type.
    """

    clips: Sequence[int]
    frames: list[Any]


@dataclass(frozen=True, repr=False)
class GeneratedClip:
    """A generated video.

    Attributes:
        clip: its context, seed and label.
        pixels: uint8 (T, 3, H, W), the generated frames without the context.
        latents: (F, C, h, w) raw, those of `pixels`.
        context_latents: (k, C, h, w) raw.
    """

    clip: Clip
    pixels: Tensor
    latents: Tensor
    context_latents: Tensor

    def __repr__(self) -> str:
        frames, _, height, width = self.pixels.shape
        given = len(self.clip.context.pixels)
        return f"<{frames} frames of {height}x{width} after {given} given ones, seed {self.clip.seed}>"


@dataclass(frozen=True, repr=False)
class PipelineOutput:
    """The result of a call of :class:`GPDiTPipeline`.

    Attributes:
        frames: the generated frames of each video, without its context, in the form of the output type. The videos
            are in the order of the contexts; the `samples` of one context follow each other.
        videos: the same videos as tensors, with their contexts.
        temporal_factor: pixel frames of each latent frame after the first.
    """

    frames: list[Any]
    videos: Sequence[GeneratedClip]
    temporal_factor: int

    def __repr__(self) -> str:
        return f"PipelineOutput({', '.join(map(repr, self.videos))})"

    @property
    def frame_rates(self) -> list[float]:
        """Frames per second of each video."""
        return [float(video.clip.context.fps) for video in self.videos]

    def save(self, path: str | Path, *, mark: bool = False) -> list[Path]:
        """Write the videos with their contexts, as `sample` does.

        Args:
            path: a file (.mp4, .gif, .png for a strip of frames, or .safetensors for the latents); or a folder, in
                which each video becomes an mp4 and a strip, and samples of classes become CLASS/CLASS-NUMBER.png or
                .mp4 with sheets of all.
            mark: draw a border in the mp4, gray around context frames and orange around generated ones.

        Returns:
            The paths of the files.

        Raises:
            InputError: a file cannot be written, or is one file for several videos.
        """
        path = Path(path)
        clips = [video.clip for video in self.videos]
        formats = output_formats(path, None if path.suffix != ".mp4" else ["mp4"], clips)
        several, files = any(clip.sample for clip in clips), []
        with sheets_of(path, clips) or nullcontext() as sheets:
            for video, clip in zip(self.videos, clips, strict=True):
                name = output_path(path, clip, several=several)
                with VideoOutput(name, formats, clip, temporal_factor=self.temporal_factor, mark=mark) as output:
                    if clip.context.latents is None:
                        output.write(video.pixels[:0], video.context_latents)
                    output.write(video.pixels, video.latents)
                files += output.files
                if sheets:
                    sheets.add(clip, video.pixels)
        return files + (sheets.files if sheets else [])

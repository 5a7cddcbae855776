"""A trained model with its codec, which continues videos from files or memory: `gpdit_lightning.GPDiTPipeline`.

Shapes: B clips, T pixel frames, k context frames, C channels, h x w latent pixels.
"""

import logging
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, Self, Unpack

import torch
from torch import Tensor

from gpdit_lightning.checkpoints.facts import WeightsKind
from gpdit_lightning.checkpoints.reading import TrainedModel, load_trained_model
from gpdit_lightning.codecs import Codec
from gpdit_lightning.devices import available_device
from gpdit_lightning.diffusion import Guidance, make_sampler
from gpdit_lightning.errors import InputError
from gpdit_lightning.generation.arguments import GenerationArguments, options_of_call
from gpdit_lightning.generation.config import ClipInputs, GenerationConfig
from gpdit_lightning.generation.context_loss import relative_loss, warn_of_unlike
from gpdit_lightning.generation.contexts import VideoContext
from gpdit_lightning.generation.frames import OutputType, check_output_type, converted, sources_of
from gpdit_lightning.generation.plans import Clip, GenerationPlan, context_settings, plan_clips, rollout_window
from gpdit_lightning.generation.precision import cast_linear_weights
from gpdit_lightning.generation.results import GeneratedClip, PipelineOutput, StreamedFrames
from gpdit_lightning.generation.settings import AUTOCAST_DTYPES, batches_by_shape, load_codec_of, selected_precision
from gpdit_lightning.generation.video import GeneratedFrames, encode_context, stream_video
from gpdit_lightning.media.images import Size
from gpdit_lightning.model import GPDiT
from gpdit_lightning.model.checks import check_receives_angles
from gpdit_lightning.options.sample import GenerationOptions
from gpdit_lightning.options.shared import ModelOptions, Precision, SamplerOptions
from gpdit_lightning.progress import progress_bar

log = logging.getLogger(__name__)


class GPDiTPipeline:
    """Generates videos with a trained model: in one call, or as a stream of frames.

        pipeline = GPDiTPipeline.from_pretrained("model")
        video = pipeline("my_video.mp4", frames=16, seed=0)
        video.save("out.mp4")

    Args:
        trained: the model with the record of its training.
        codec: the codec of its latents, on the same device.
        precision: precision of matrix products; `auto` is bf16 on GPUs of CUDA that have it, else 32.
        compile: fuse blocks with torch.compile, for long videos on GPUs.

    Attributes:
        trained: the model with the record of its training.
        codec: the codec.

    Raises:
        InputError: the precision is not supported by the device.
    """

    def __init__(
        self, trained: TrainedModel, codec: Codec, *, precision: Precision = "auto", compile: bool = False
    ) -> None:
        self.trained, self.codec = trained, codec
        self._precision, self._compile = precision, compile
        self._autocast_dtype: torch.dtype | None = None
        self._set_precision()

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | Path,
        *,
        weights: WeightsKind = "ema",
        device: str | torch.device = "auto",
        precision: Precision = "auto",
        codec: str | None = None,
        codec_source: str | None = None,
        compile: bool = False,
        **hub: Any,
    ) -> Self:
        """Load a model and its codec.

        Args:
            checkpoint: a folder written by `export` or `save_pretrained`, a name on the hub like `user/model`, a run
                folder (for its last checkpoint), or a checkpoint.
            weights: averaged (`ema`) or last trained (`raw`) weights.
            device: `auto` is this process's GPU if there is one, else the CPU.
            precision: precision of matrix products; `auto` is bf16 on GPUs of CUDA that have it, else 32.
            codec: import path of a custom codec's class, which must be given although the model records it.
            codec_source: folder, file or hub name of the codec's weights, if they were moved.
            compile: fuse blocks with torch.compile, for long videos on GPUs.
            hub: `revision`, `token`, `cache_dir`, `force_download` and `local_files_only`, as in huggingface_hub's
                `snapshot_download`.

        Raises:
            InputError: model or codec are not found, damaged or incomplete, or an argument cannot be used.
        """
        # The record checks the types of its options.
        ModelOptions(checkpoint=str(checkpoint), weights=weights, precision=precision, codec=codec)
        trained = load_trained_model(checkpoint, available_device(str(device)), weights, **hub)
        loaded = load_codec_of(trained, codec, codec_source)
        return cls(trained, loaded, precision=precision, compile=compile)

    def to(self, device: str | torch.device) -> Self:
        """Move model and codec to a device, and return the pipeline.

        Weights that were rounded to bf16 for an earlier device stay rounded.

        Raises:
            InputError: the device cannot be used, or does not support the precision.
        """
        place = available_device(str(device))
        self.trained.backbone.to(place)
        self.codec.to(place)
        self._set_precision()
        return self

    def __repr__(self) -> str:
        sizes = ", ".join(f"{height}x{width}" for height, width in self.sizes)
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return (
            f"GPDiTPipeline({parameters:,} parameters, step {self.trained.step}, videos of {sizes}, on {self.device})"
        )

    def _set_precision(self) -> None:
        """Choose the data type of matrix products on the present device, and round the weights to it once."""
        if self._autocast_dtype is None:
            self._autocast_dtype = AUTOCAST_DTYPES[selected_precision(self._precision, self.device)]
            if self._autocast_dtype is not None:
                cast_linear_weights(self.trained.backbone, self._autocast_dtype)

    @property
    def model(self) -> GPDiT:
        """The network."""
        return self.trained.backbone

    @property
    def device(self) -> torch.device:
        """The device of model and codec."""
        return self.trained.backbone.device

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Height and width in pixels of the training clips; a context takes the size that is closest in aspect."""
        return self.trained.geometry.sizes

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes on which the model can be conditioned; may be empty."""
        return self.trained.classes

    @property
    def frame_rate(self) -> float:
        """Frames per second of videos without a context, or whose context has no frame rate."""
        return float(context_settings(GenerationOptions(), self.trained, self.codec).frame_rate())

    def __call__(
        self,
        context: Any = None,
        *,
        seconds: float | None = None,
        output_type: OutputType = "pil",
        progress: bool = False,
        **options: Unpack[GenerationArguments],
    ) -> PipelineOutput:
        """Generate the frames after a context, or after each of several contexts.

        The videos are generated in batches; the result for a context and a seed is independent of batch composition.
        With one seed all contexts get the same noise, so that equal contexts give equal videos.

        Args:
            context: None to generate from noise alone; a path of a video, an image, a folder or a shard, as for
                `sample`; or a clip in memory: an image of Pillow or a list of them, a numpy array (T, H, W, 3), or a
                tensor (T, 3, H, W), uint8 or floats in [0, 1]; or a list of any of these. Frames are scaled and
                cropped to the training size that is closest in aspect. A clip in memory is read as a folder of images
                is: at `fps` (24 by default), of which frames at the stride of the training clips are used; `stride=1`
                continues generated frames.
            seconds: duration to generate, instead of `frames`.
            output_type: form of the frames of a video: `pil` for a list of images of Pillow, `np` for a uint8 array
                (T, H, W, 3), `pt` for a float32 tensor (T, 3, H, W) in [0, 1], `latent` for raw latents.
            progress: show a progress bar over frames.
            options: `frames` (16 by default), `samples` per context with consecutive seeds, `seed` (one for all
                contexts, or a list with one for each), `count` of each `label` from noise alone (a class, a list of
                them, or "all"), `sampler`, `steps`, `guidance`, `label_guidance`, `window`, `sinks`, `context_frames`,
                `start`, `fps`, `stride`, `size`, `batch_size`: as for `sample`, with the same defaults (see its
                `--help`).

        Raises:
            InputError: a context or an option cannot be used.
        """
        check_output_type(output_type)
        videos = self.run(self._plan_call(context, seconds, options), progress=progress)
        frames = [converted(video.pixels, video.latents, output_type) for video in videos]
        return PipelineOutput(frames, videos, self.codec.temporal_factor)

    def run(self, plan: GenerationPlan, *, progress: bool = False) -> list[GeneratedClip]:
        """Generate the videos of a plan, and return them in its order.

        Args:
            plan: the videos.
            progress: show a progress bar over frames.

        Raises:
            InputError: generated latents are not finite.
        """
        generated: dict[Clip, GeneratedClip] = {}
        with progress_bar(
            total=sum(clip.frames for clip in plan.clips), unit=" frames", desc="generating", disable=not progress
        ) as bar:
            for batch in plan.batches:
                latents, pieces = self.encode(batch), []
                for piece in self.generate(batch, latents, plan.config):
                    pieces.append(piece)
                    bar.update(piece.pixels.shape[0] * piece.pixels.shape[1])
                pixels, new = (torch.cat(parts, dim=1) for parts in zip(*pieces, strict=True))
                for clip, *tensors in zip(batch, pixels, new, latents.cpu(), strict=True):
                    generated[clip] = GeneratedClip(clip, *tensors)
        return [generated[clip] for clip in plan.clips]

    def stream(
        self,
        context: Any = None,
        *,
        seconds: float | None = None,
        output_type: OutputType = "pil",
        **options: Unpack[GenerationArguments],
    ) -> Generator[StreamedFrames]:
        """Generate videos as a call does, and yield their new frames as soon as they are decoded.

        Earlier frames are not kept, so that memory does not grow with the length of the videos. Closing the iterator
        stops the generation. The videos of a batch advance together, one batch after another.

        Args:
            context, seconds, output_type, options: as for a call.

        Returns:
            An iterator over steps; in a step each video of a batch gets the pixel frames of one latent frame.

        Raises:
            InputError: a context or an option cannot be used.
        """
        check_output_type(output_type)
        plan = self._plan_call(context, seconds, options)
        return self._stream(plan, output_type)

    def _stream(self, plan: GenerationPlan, output_type: OutputType) -> Generator[StreamedFrames]:
        numbers = {clip: number for number, clip in enumerate(plan.clips)}
        for batch in plan.batches:
            clips = [numbers[clip] for clip in batch]
            for piece in self.generate(batch, self.encode(batch), plan.config):
                pairs = zip(piece.pixels, piece.latents, strict=True)
                yield StreamedFrames(clips, [converted(pixels, latents, output_type) for pixels, latents in pairs])

    def _plan_call(self, context: Any, seconds: float | None, arguments: GenerationArguments) -> GenerationPlan:
        """Return the plan of a call from Python.

        Raises:
            InputError: as for a call.
        """
        call, seeds = options_of_call(arguments, seconds)
        return self.plan(sources_of(context), call, seconds=seconds, seeds=seeds)

    def plan(
        self,
        sources: Sequence[str | Tensor | VideoContext],
        options: GenerationOptions,
        ground_truth_frames: int = 0,
        seconds: float | None = None,
        *,
        seeds: Sequence[int] | None = None,
        skip_unusable: bool = False,
    ) -> GenerationPlan:
        """Read contexts and return the videos to generate: for each context one per sample.

        Args:
            sources: as for :func:`read_contexts`; without any, videos are generated from noise alone.
            options: which part of the sources is read, and how videos are generated.
            ground_truth_frames: maximum number of frames after a context to read.
            seconds: duration of the generated frames instead of their number.
            seeds: a seed for each context, instead of that of the options.
            skip_unusable: as for :func:`read_contexts`.

        Raises:
            InputError: an option, a context or the list of seeds cannot be used, or the model is conditioned on texts.
        """
        if self.model.config.text_width:
            raise InputError(
                f"{self.trained.path} is conditioned on text embeddings, which cannot be computed here: call "
                "gpdit_lightning.generation.rollout with them."
            )
        clips = plan_clips(
            sources, options, self.trained, self.codec, ground_truth_frames, seconds, seeds, skip_unusable=skip_unusable
        )
        longest = max(len(clip.context.pixels) + clip.frames for clip in clips)
        window, sinks = rollout_window(options, self.trained, self.codec, longest)
        config = self.generation_config(
            options,
            options.label_guidance,
            window=window,
            sinks=sinks,
            use_cache=options.cache,
            context_noise=options.context_noise,
        )
        return GenerationPlan(clips, config, batches_by_shape(clips, options.batch_size, lambda clip: clip.shape))

    def generation_config(self, options: SamplerOptions, label_guidance: float = 1.0, **rest: Any) -> GenerationConfig:
        """Return the generation settings of options, with the noise schedule of the model.

        Args:
            options: sampler and guidance over the context.
            label_guidance: guidance scale over the label.
            rest: further fields of the result.

        Raises:
            InputError: the model does not condition clean frames on the angle of a context noise.
        """
        if options.guidance != 1 and self.trained.context_dropout == 0:
            log.warning(
                "warning: --guidance %s compares with frames without context, but the model was trained with "
                "data.context_dropout 0, so the result may be worse than with --guidance 1",
                options.guidance,
            )
        angle = rest.get("context_noise", 0)
        if angle:
            check_receives_angles(self.model.config, f"--context_noise is {angle}")
        if angle > self.trained.context_noise:
            log.warning(
                "warning: --context_noise is %s, but the model was trained with data.context_noise %s, so the result "
                "may be worse",
                angle,
                self.trained.context_noise,
            )
        return GenerationConfig(
            sampler=make_sampler(options.sampler, options.steps, self.trained.schedule),
            guidance=Guidance(options.guidance, label_guidance, *options.guidance_levels),
            autocast_dtype=self._autocast_dtype,
            compile=self._compile,
            **rest,
        )

    def encode(self, clips: Sequence[Clip]) -> Tensor:
        """Return the raw latents of the contexts of a batch, (B, k, C, h, w), on the device of the codec."""
        return torch.cat([_context_latents(clip.context, self.codec) for clip in clips])

    def generate(self, clips: Sequence[Clip], latents: Tensor, config: GenerationConfig) -> Iterator[GeneratedFrames]:
        """Generate the videos of a batch, one latent frame after another; a warning names unusual contexts.

        Args:
            clips: a batch of a plan.
            latents: raw latents of their contexts, as returned by `encode`.
            config: that of the plan.

        Raises:
            InputError: as :func:`stream_video`.
        """
        labels = torch.tensor([clip.label for clip in clips]) if self.labels else None
        contexts = zip(clips, self.codec.whitened(latents).to(self.device), strict=True)
        first_samples = [(clip, context) for clip, context in contexts if clip.sample == 0]
        warn_of_unlike((clip.context.name, self.context_loss(clip, context, config)) for clip, context in first_samples)
        inputs = ClipInputs([clip.seed for clip in clips], labels)
        yield from stream_video(self.model, self.codec, latents, clips[0].frames, config, inputs)

    def context_loss(self, clip: Clip, latents: Tensor, config: GenerationConfig) -> float | None:
        """Return the loss of a context relative to that of held-out data, as :func:`relative_loss`.

        Args:
            clip: the video to generate.
            latents: whitened latents of its context, (k, C, h, w), on the device of the model.
            config: gives the precision.
        """
        label = clip.label if self.labels else None
        return relative_loss(self.trained, latents, label, config.autocast_dtype)


def load_pipeline(options: ModelOptions, *, compile: bool = False) -> GPDiTPipeline:
    """Return the pipeline of the model that the options of a command name; errors as in `from_pretrained`."""
    return GPDiTPipeline.from_pretrained(
        options.checkpoint,
        weights=options.weights,
        device=options.device,
        precision=options.precision,
        codec=options.codec,
        codec_source=options.codec_source,
        compile=compile,
    )


def _context_latents(context: VideoContext, codec: Codec) -> Tensor:
    """Return the raw latents of a context, (1, k, C, h, w)."""
    if context.latents is not None:
        return context.latents[None].to(codec.device)
    return encode_context(codec, context.pixels[None])

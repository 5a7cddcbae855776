"""Scores while the model trains: FVD, FID, PSNR and SSIM of continuations of held-out clips, at intervals."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.seed import isolate_rng

from gpdit_lightning.codecs import Codec
from gpdit_lightning.data.datamodule import LatentDataModule
from gpdit_lightning.diffusion import NoiseSchedule, make_sampler
from gpdit_lightning.diffusion.samplers import check_sampler_name
from gpdit_lightning.errors import InputError
from gpdit_lightning.evaluation.chunks import MetricNetworks
from gpdit_lightning.evaluation.clip_scores import compute_clip_scores
from gpdit_lightning.evaluation.metrics import bias_warning
from gpdit_lightning.evaluation.network_files import REMEDIES
from gpdit_lightning.evaluation.networks import load_image_network, load_video_network
from gpdit_lightning.model import GPDiTConfig
from gpdit_lightning.options.evaluate import NetworkOptions
from gpdit_lightning.training.callbacks.held_out import HeldOutClips, StepInterval, open_codec, select_clips
from gpdit_lightning.training.callbacks.metrics import log_scalars
from gpdit_lightning.training.callbacks.score_chunks import ScoreChunks
from gpdit_lightning.training.loggers import SCORES

log = logging.getLogger(__name__)

NO_NETWORK = NetworkOptions()


class Scores(Callback):
    """Scores continuations of held-out clips by the averaged weights, at intervals, always from the same noise.

    The clips are continued as for previews. Real frames are decoded from latents by the codec, as are generated ones,
    so the error of the codec is excluded; `evaluate` compares with the frames of the files instead. FVD is computed
    from whole clips with their context, and FID for each position of a generated frame and averaged, as by `evaluate`.

    Tags, all in the group `scores_vs_decoded`; `_repeated` is the same score of the last context frame, repeated:

    - videos: `fvd`, `fid`, `psnr`, `ssim`, each also with `_repeated`, and `rollout_error_ratio`;
    - sequences, without videos: the same for their last frame, except `fvd`;
    - only images: `fid`, of images generated from noise alone;
    - videos that are one block of the model, which have no context: `fvd` and `fid`.

    FVD and FID need files of networks, as for `evaluate`; without them only the other scores are computed. The ranks
    share the clips, in chunks that do not depend on the number of ranks. Scores do not change the training. After a
    signal, scoring is given up; if the last checkpoint is of a step that was not scored, the resumed run scores it.

    Args:
        every_steps: optimizer steps between scores, which are also computed at the last step; 0 for none.
        clips: maximum number of clips, evenly spaced among the longest held-out clips. FVD and FID of different
            numbers of clips are not comparable.
        chunk: clips that are continued as one batch. The last digits of the scores depend on this number.
        context_frames: latent frames of context, rounded up to whole blocks of the model, fewer in shorter videos; 2
            are 5 pixel frames of a video.
        sampler: rotation, tangent, adams, dpm2m, stochastic, a registered name, or the import path of a class.
        sampler_steps: sampler steps per latent frame.
        video_network: network for FVD; its `path` is a file on this machine.
        image_network: network for FID; its `path` is a file on this machine.
        codec_source: folder, file or hub name of the codec's weights; recipes set it to that of previews.
        codec: import path of the codec's class, if it is a custom one; recipes set it to that of previews.
    """

    def __init__(
        self,
        every_steps: int = 0,
        clips: int = 256,
        chunk: int = 8,
        context_frames: int = 2,
        sampler: str = "rotation",
        sampler_steps: int = 25,
        video_network: NetworkOptions = NO_NETWORK,
        image_network: NetworkOptions = NO_NETWORK,
        codec_source: str | None = None,
        codec: str | None = None,
    ) -> None:
        if every_steps < 0:
            raise InputError(f"scores.every_steps is {every_steps}; it must be 0 (no scores) or more.")
        for name, value, least in (
            ("clips", clips, 2),
            ("chunk", chunk, 1),
            ("context_frames", context_frames, 1),
            ("sampler_steps", sampler_steps, 1),
        ):
            if value < least:
                raise InputError(f"scores.{name} is {value}; it must be at least {least}.")
        check_sampler_name(sampler, "scores.sampler")
        self.every_steps, self.clips, self.chunk, self.context_frames = every_steps, clips, chunk, context_frames
        self.sampler, self.sampler_steps, self.codec_source, self.codec = sampler, sampler_steps, codec_source, codec
        self.video_network, self.image_network = video_network, image_network
        self._interval = StepInterval(0)
        self._scored_step = -1
        self._record: dict[str, Any] = {}  # of the last scores, as `asdict(TrainingScores)`; on the first rank only
        self._chunks: ScoreChunks

    # --- start of the run

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the clips, load codec and networks, and try them on one clip, on every rank.

        Raises:
            InputError: the clips are too short for the video network, the codec or a network cannot be
                loaded or used, or the sampler fails.
        """
        if self.every_steps == 0:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, LatentDataModule)
        config, schedule = pl_module.config, pl_module.schedule
        assert isinstance(config, GPDiTConfig)
        assert isinstance(schedule, NoiseSchedule)
        clips = select_clips(data, self.clips, self.context_frames, config)
        obstacle = self._obstacle(clips)
        if obstacle:
            if trainer.is_global_zero:
                log.warning("no scores are computed: %s", obstacle)
            return
        with isolate_rng():  # networks may be initialized at random before their weights are loaded
            codec = open_codec(data.codec, self.codec_source, self.codec, "scores", "scores")
            networks = self._load_networks(clips, codec)
            sampler = make_sampler(self.sampler, self.sampler_steps, schedule)
            self._chunks = ScoreChunks(trainer, clips, self.chunk, codec, networks, sampler)
            with _name_option("scores"):
                self._chunks.try_networks(trainer)
        self._interval = StepInterval(self.every_steps)
        if trainer.is_global_zero:
            self._announce(clips, networks)

    def _obstacle(self, clips: HeldOutClips) -> str:
        """Return why the selected clips cannot be scored; empty if they can."""
        source = f"data.{clips.source}"
        if clips.split == "train":
            return f"no samples of {source} are held out (see `prepare --help`)."
        if len(clips.numbers) < 2:
            return f"one sample of {source} is held out, but scores need 2."
        if clips.context == 0 and self.image_network == NO_NETWORK:
            if clips.independent_frames:
                return f"images have no score but FID, which needs scores.image_network.path: {REMEDIES['image']}."
            if self.video_network == NO_NETWORK:
                return (
                    "videos that are generated as one block, without context, have no scores but FVD and FID, which "
                    f"need scores.video_network.path or scores.image_network.path: {REMEDIES['video']}."
                )
        return ""

    def _load_networks(self, clips: HeldOutClips, codec: Codec) -> MetricNetworks:
        """Load the networks of the scores that the clips have, on the CPU."""
        video = image = None
        if self.video_network != NO_NETWORK and not clips.independent_frames:
            with _name_option("scores.video_network"):
                video = load_video_network(self.video_network)
                frames = codec.pixel_frames(clips.bucket.frames)
                if frames < video.min_frames:
                    raise InputError(
                        f"the clips of data.videos have {frames} pixel frames, but {video.record.name} takes at least "
                        f"{video.min_frames}: train on longer clips, or leave the network out."
                    )
        if self.image_network != NO_NETWORK:
            with _name_option("scores.image_network"):
                image = load_image_network(self.image_network)
        return MetricNetworks(video, image)

    def _announce(self, clips: HeldOutClips, networks: MetricNetworks) -> None:
        """Log what is scored, which scores lack a network, and which have a bias."""
        video, image = networks
        names = ["FVD"] * (video is not None) + ["FID"] * (image is not None)
        names += ["PSNR", "SSIM", "the error ratio"] * (clips.context > 0)
        log.info(
            "scores: %s of %d held-out clips of data.%s, every %d steps",
            ", ".join(names),
            len(clips.numbers),
            clips.source,
            self.every_steps,
        )
        if video is None and not clips.independent_frames:
            log.info("no FVD without scores.video_network.path: %s", REMEDIES["video"])
        if image is None:
            log.info("no FID without scores.image_network.path: %s", REMEDIES["image"])
        for name, network in (("FVD", video), ("FID", image)):
            if network is not None:
                warning = bias_warning(name, len(clips.numbers), network.num_features)
                if warning:
                    log.info("%s", warning)

    # --- at intervals

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute the scores of the step of a resumed run, if its checkpoint was saved before they were complete."""
        self._interval.start(trainer)
        if self._interval.is_end(trainer.global_step, trainer) and self._scored_step != trainer.global_step:
            self._score(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Compute scores at the end of an interval."""
        if self._interval.is_over(trainer):
            self._score(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, object]) -> None:
        """Save the last step with scores, and the scores for the model card."""
        if self._scored_step >= 0:
            checkpoint["scored_step"] = self._scored_step
        if self._record:
            checkpoint["scores"] = self._record

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: Mapping[str, Any]) -> None:
        """Restore the last step with scores, and the scores."""
        self._scored_step = checkpoint.get("scored_step", -1)
        self._record = checkpoint.get("scores", {})

    def _score(self, trainer: Trainer, module: LightningModule) -> None:
        """Compute and log the scores of the current weights, unless a signal is received; all ranks call it."""
        generated = self._chunks.measure(trainer, module)
        if generated is None:
            return
        self._scored_step = trainer.global_step
        if trainer.is_global_zero:
            try:
                scores = compute_clip_scores(generated, self._chunks.reference)
            except InputError as error:
                log.warning("step %d has no scores: %s", trainer.global_step, error)
                return
            self._record = asdict(self._chunks.record(trainer.global_step, self.sampler, scores))
            log_scalars(trainer, module, {f"{SCORES}/{name}": value for name, value in scores.items()})


@contextmanager
def _name_option(option: str) -> Iterator[None]:
    """Put the name of an option before the message of an InputError."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{option}: {error}") from None

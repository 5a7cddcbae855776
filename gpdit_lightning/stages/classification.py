"""Fine-tuning for classification on the clean stream (ACDiT, section 5.2, Table 4)."""

import dataclasses
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gpdit_lightning.data.batches import LatentBatch
from gpdit_lightning.diffusion import DenoisingLoss, NoiseSchedule, QuartileLoss
from gpdit_lightning.errors import InputError
from gpdit_lightning.model import GPDiT, GPDiTConfig
from gpdit_lightning.model.classifier import Classifier, clean_stream_config
from gpdit_lightning.randomness import MIXING, generator
from gpdit_lightning.stages.agreement import check_classifier, check_labels_of_all
from gpdit_lightning.stages.base import DEFAULT_OPTIMIZER, DEFAULT_SCHEDULE, GPDiTStage
from gpdit_lightning.stages.initial_weights import InitialWeights
from gpdit_lightning.stages.mixing import Mixing
from gpdit_lightning.training.callbacks.metrics import log_scalars
from gpdit_lightning.training.callbacks.previews import Preview
from gpdit_lightning.training.callbacks.scores import Scores
from gpdit_lightning.training.float8 import convert_to_float8
from gpdit_lightning.training.optimizer import OptimizerConfig
from gpdit_lightning.training.reduction import of_all_ranks


@dataclass(frozen=True)
class ClassificationConfig:
    """The classifier and its regularization. By default nothing is regularized; recipes state MAE's values."""

    layer: int = 0
    """Number of the block whose tokens are averaged, from 1; blocks after it are not used. 0: the last."""
    label_smoothing: float = 0.0
    """Probability that the target divides evenly among all classes (0.1 in MAE)."""
    mixup: float = 0.0
    """Parameter of the Beta distribution with which two clips and their labels are mixed (0.8 in MAE); 0: no mixup."""
    cutmix: float = 0.0
    """The same for a rectangle of the other clip in all frames (1.0 in MAE); 0: no CutMix. With both, each has half of
    the micro-batches."""
    drop_path: float = 0.0
    """Probability that the last block's attention or MLP is left out for a clip in training; it rises linearly from 0
    in the first block (stochastic depth: 0.1 to 0.3 in MAE, by size)."""

    def __post_init__(self) -> None:
        for name in ("label_smoothing", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"classification.{name} is {getattr(self, name)}; it must lie in [0, 1).")
        for name in ("layer", "mixup", "cutmix"):
            if not getattr(self, name) >= 0:
                raise InputError(f"classification.{name} is {getattr(self, name)}; it must not be negative.")


DEFAULT_CLASSIFICATION = ClassificationConfig()
TOP = 5  # classes of a clip that are recorded


@dataclass(frozen=True)
class Predictions:
    """The predicted classes of n held-out clips, in an order that depends on the number of ranks.

    Attributes:
        step: optimizer steps of the process's training; 0 in `validate` and `test`.
        sources: names of the input files of the clips.
        labels: (n,) true classes.
        top: (n, at most 5) classes of the highest scores, in decreasing order.
    """

    step: int
    sources: list[str]
    labels: Tensor
    top: Tensor

    def is_correct(self, k: int) -> Tensor:
        """Return (n,) whether the true class of a clip is among its k first."""
        return (self.top[:, :k] == self.labels[:, None]).any(dim=1)


@dataclass
class PredictionsOfRank:
    """The predicted classes of the clips that a rank has classified, on its device; as `Predictions`."""

    sources: list[str] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)
    top: list[Tensor] = field(default_factory=list)

    def gathered(self, step: int) -> Predictions:
        """Return the predictions of all ranks."""
        empty = torch.empty(0, dtype=torch.long)
        mine = (
            self.sources,
            torch.cat(self.labels).cpu() if self.labels else empty,
            torch.cat(self.top).cpu() if self.top else empty[:, None],
        )
        sources, labels, top = zip(*(rank for rank in of_all_ranks(mine) if rank[0]), strict=True)
        return Predictions(step, [name for names in sources for name in names], torch.cat(labels), torch.cat(top))


class ClassificationStage(GPDiTStage):
    """Fine-tunes the clean stream of a GPDiT to predict the labels of the data, with the cross-entropy as the loss.

    The clips pass through the clean stream alone, without noise and angles. The mean over all tokens of a layer, a norm
    and a linear layer give the scores of the classes (`model/classifier.py`). All weights are trained, those of the
    noisy stream (output layer, adaLN, label embeddings) are left out. The classes are those of the data, in the order
    of their manifests; they need not be those of the initial weights.

    Validation logs `val/top1_accuracy` and `val/top5_accuracy`, fractions of the held-out clips, each of which is used
    once, and `loss/val`, the cross-entropy without mixing and label smoothing. `data.validation_batches` limits their
    number.

    Attributes:
        predictions: those of the last validation; None before the first.

    Args:
        backbone: the architecture of the initial weights.
        schedule: not used, but recorded: a recipe of the initial weights can be the base of this one.
        optimizer: the optimizer and its schedule.
        initial_weights: checkpoint, run folder or exported folder with the (averaged) weights from which training
            starts; None: random weights. A run that resumes uses its last checkpoint instead.
        classification: the layer and the regularization.
    """

    CLEAN_STREAM_ONLY = True

    def __init__(
        self,
        backbone: GPDiTConfig,
        schedule: NoiseSchedule = DEFAULT_SCHEDULE,
        optimizer: OptimizerConfig = DEFAULT_OPTIMIZER,
        initial_weights: str | None = None,
        classification: ClassificationConfig = DEFAULT_CLASSIFICATION,
    ) -> None:
        super().__init__(clean_stream_config(backbone, classification.layer), schedule, optimizer, initial_weights)
        self.pretrained, self.classification = backbone, classification
        self.backbone: Classifier
        self.predictions: Predictions | None = None
        self._of_rank = PredictionsOfRank()

    def configure_model(self) -> None:
        """Build the classifier, with the clean stream of the initial weights."""
        if "backbone" in self._modules:
            return
        self.backbone = Classifier(self.config, len(self.data.classes))
        if self.initial_weights:
            generative = GPDiT(self.pretrained)
            loaded = InitialWeights.load(self.initial_weights, generative)
            self.backbone.load_clean_stream(generative.state_dict())
            self.loaded_weights, self.origin = dataclasses.replace(loaded, classes=()), loaded.origin
        convert_to_float8(self.backbone)

    # --- the objective

    def on_before_batch_transfer(self, batch: LatentBatch, dataloader_idx: int) -> LatentBatch:
        """Mark all clips as clean ones, without noisy frames.

        Raises:
            InputError: a clip has no label.
        """
        check_labels_of_all(batch)
        return dataclasses.replace(batch, context=len(batch.latents), frames=())

    def objective(self, batch: LatentBatch) -> DenoisingLoss:
        """Compute the cross-entropy of a batch without regularization, as in validation."""
        return self._loss(self.backbone(batch.latents), batch)

    def _loss(
        self, scores: Tensor, batch: LatentBatch, mixing: Mixing | None = None, smoothing: float = 0
    ) -> DenoisingLoss:
        """Return the cross-entropy of the scores (B, classes), with one part in place of the quartiles."""
        assert batch.labels is not None
        per_clip = functional.cross_entropy(scores, batch.labels, reduction="none", label_smoothing=smoothing)
        if mixing is not None:
            others = functional.cross_entropy(scores, batch.labels.flip(0), reduction="none", label_smoothing=smoothing)
            per_clip = mixing.share * per_clip + (1 - mixing.share) * others
        found = per_clip.detach()
        parts = QuartileLoss(found.sum()[None], torch.ones_like(found).sum()[None])
        return DenoisingLoss(per_clip.mean(), parts, found)

    def training_step(self, batch: LatentBatch, batch_idx: int) -> dict[str, Any]:
        """Compute the loss of a micro-batch with regularization, weighted by its share of the step."""
        options, per_step = self.classification, self.trainer.accumulate_grad_batches
        numbers = generator(self.data.seed, MIXING, self.trainer.global_step, batch_idx % per_step)
        mixing = Mixing.draw(numbers, options.mixup, options.cutmix, *batch.latents.shape[-2:])
        latents = batch.latents if mixing is None else mixing.mixed(batch.latents)
        scores = self.backbone(latents, self._branch_scales(batch))
        loss = self._loss(scores, batch, mixing, options.label_smoothing)
        return {"loss": loss.mean * batch.weight * per_step, "quartiles": loss.quartiles, "per_clip": loss.per_clip}

    def _branch_scales(self, batch: LatentBatch) -> Tensor | None:
        """Return the scales (blocks, branches, B) of stochastic depth: 0, or the reciprocal of the probability to stay.

        The random numbers are the noise of the batch, which classification does not use otherwise: it is on the device,
        and a function of the seed, the step and the position of a clip, for any number of ranks.
        """
        if not self.classification.drop_path:
            return None
        blocks, branches = self.config.layers, self.config.num_branches
        noise = batch.noise.flatten(1)[:, : blocks * branches]
        if noise.shape[1] < blocks * branches:
            raise InputError(
                f"classification.drop_path needs clips of at least {blocks * branches} latent values, but these have "
                f"{noise.shape[1]}: set it to 0."
            )
        stay = 1 - torch.linspace(0, self.classification.drop_path, blocks, device=noise.device)[:, None, None]
        return (noise.T.unflatten(0, (blocks, branches)) < torch.special.ndtri(stay)) / stay

    def validation_step(self, batch: LatentBatch, batch_idx: int) -> dict[str, Any]:
        """Compute the cross-entropy of held-out clips, and their classes of the highest scores."""
        with torch.no_grad():
            scores = self.backbone(batch.latents)
            loss = self._loss(scores, batch)
        quartiles = loss.quartiles
        if batch.counts:
            assert batch.labels is not None
            self._of_rank.sources += batch.sources
            self._of_rank.labels.append(batch.labels)
            self._of_rank.top.append(scores.topk(min(TOP, scores.shape[1])).indices)
        else:
            quartiles = QuartileLoss(*map(torch.zeros_like, quartiles))
        return {"loss": loss.mean, "quartiles": quartiles, "per_clip": loss.per_clip}

    def on_validation_epoch_end(self) -> None:
        """Log the accuracies, but not those of the sanity check before training."""
        self._log_accuracy("val")

    def on_test_epoch_end(self) -> None:
        """Log the accuracies."""
        self._log_accuracy("test")

    def _log_accuracy(self, part: str) -> None:
        of_rank, self._of_rank = self._of_rank, PredictionsOfRank()
        if self.trainer.sanity_checking:
            return
        self.predictions = of_rank.gathered(self.trainer.global_step)
        correct = {k: self.predictions.is_correct(k).double().mean() for k in (1, TOP)}
        scalars = {f"{part}/top{k}_accuracy": float(fraction) for k, fraction in correct.items()}
        log_scalars(self.trainer, self, scalars, f"{part}/top1_accuracy")

    # --- checks and checkpoints

    def setup(self, stage: str) -> None:
        """Raise `InputError` if data, device or callbacks do not fit the stage."""
        super().setup(stage)
        self.data.validates_each_once = True
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Preview | Scores) and callback.every_steps:
                option = f"{type(callback).__name__.lower()}.every_steps"
                raise InputError(
                    f"{option} is {callback.every_steps}, but a classifier generates nothing: set it to 0."
                )

    def check_labels(self) -> None:
        """Raise `InputError` unless the data have at least two classes, and every clip has its label once."""
        check_classifier(self.data)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also record the classes, and how they are predicted."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["gpdit"] |= {"classes": list(self.data.classes), "classification": asdict(self.classification)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also raise `InputError` if the checkpoint has other classes than the data."""
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint["gpdit"].get("classes", [])
        if saved != list(self.data.classes):
            raise InputError(
                f"the checkpoint has {len(saved)} classes ({', '.join(saved[:3])} ...), but the data has "
                f"{len(self.data.classes)} ({', '.join(self.data.classes[:3])} ...): give the data of its training."
            )

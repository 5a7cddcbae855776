"""The result file of a fine-tuned classifier, in the form of that of a linear probe (ACDiT, Table 4)."""

import hashlib
import re
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from lightning import Trainer

from gpdit_lightning.checkpoints.files import open_checkpoint
from gpdit_lightning.checkpoints.reading import sha256_of_weights
from gpdit_lightning.data.datamodule import LatentDataModule
from gpdit_lightning.evaluation.report import library_versions
from gpdit_lightning.files import atomic_write
from gpdit_lightning.names import as_text
from gpdit_lightning.preparation.splits import recording_of
from gpdit_lightning.probing.probe import RESAMPLES, LayerScore, confidence_interval
from gpdit_lightning.probing.report import ProbeProtocol, ProbeResult, markdown, write_json
from gpdit_lightning.probing.splits import UCF_NAME
from gpdit_lightning.stages.classification import ClassificationStage, Predictions
from gpdit_lightning.training.callbacks.ema import EMA

RESULT = "classification.json"
HELD_OUT = "held out in the preparation"


def write_classification(trainer: Trainer, checkpoint: Path | None) -> None:
    """Write classification.json and classification.md to the run folder, and print the table.

    Nothing is written for other stages, and if there was no validation at the last step.

    Args:
        trainer: has trained or validated a stage.
        checkpoint: of the last step; None if there is none.
    """
    stage = trainer.lightning_module
    if not isinstance(stage, ClassificationStage) or stage.predictions is None or checkpoint is None:
        return
    if stage.predictions.step != trainer.global_step:
        return
    result = classification_result(trainer, stage, stage.predictions, checkpoint)
    path = Path(trainer.default_root_dir) / RESULT
    write_json([result], path)
    text = markdown([result])
    with atomic_write(path.with_suffix(".md")) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"{text}\n{path}, classification.md")


def classification_result(
    trainer: Trainer, stage: ClassificationStage, predictions: Predictions, checkpoint: Path
) -> ProbeResult:
    """Return the result of a validation.

    Args:
        trainer: has validated the stage.
        stage: the classifier.
        predictions: those of the validation.
        checkpoint: of the validated weights.
    """
    averages = [callback for callback in trainer.callbacks if isinstance(callback, EMA)]  # type: ignore[attr-defined]
    is_averaged = any(average.validate and average.decay > 0 for average in averages)
    codec, groups = stage.data.codec, groups_of(predictions.sources, stage.data)
    correct = predictions.is_correct(1).numpy()
    score = LayerScore(
        layer=stage.classification.layer or stage.pretrained.layers,
        accuracy=float(correct.mean()),
        interval=confidence_interval(correct, groups),
        C=None,
        validation=None,
        top5=float(predictions.is_correct(5).double().mean()),
    )
    return ProbeResult(
        checkpoint=as_text(checkpoint),
        identity=sha256_of_weights(checkpoint),
        step=open_checkpoint(checkpoint).step,
        weights="ema" if is_averaged else "raw",
        codec=f"{codec.name} {codec.fingerprint}",
        layers=(score,),
        protocol=_protocol(stage, predictions, len(set(groups))),
        classifier="fine-tuned",
    )


def groups_of(sources: list[str], data: LatentDataModule) -> list[str]:
    """Return the group of the input file of each clip: dependent files, which the preparation held out together.

    Args:
        sources: names of the input files.
        data: whose preparation may have a pattern of groups; without one, the names of UCF-101 have groups.
    """
    recorded = {m.preparation.get("source_pattern") for manifests in data.manifests.values() for m in manifests}
    pattern = recorded.pop() if len(recorded) == 1 else None
    ucf = re.compile(UCF_NAME)
    if pattern is None and all(ucf.search(name) for name in sources):
        return [match[1] for match in map(ucf.search, sources) if match]
    return [recording_of(name, pattern) for name in sources]


def _protocol(stage: ClassificationStage, predictions: Predictions, groups: int) -> ProbeProtocol:
    data, options, optimizer = stage.data, stage.classification, stage.optimizer_config
    manifests = list({str(m.path): m for of_source in data.manifests.values() for m in of_source}.values())
    fingerprints = "".join(manifest.fingerprint() for manifest in manifests)
    geometry = data.geometry
    settings = {
        "label smoothing": options.label_smoothing,
        "mixup": options.mixup,
        "CutMix": options.cutmix,
        "drop path": options.drop_path,
        "weight decay": optimizer.weight_decay,
        "layer-wise decay of the learning rate": optimizer.layer_decay,
    }
    return ProbeProtocol(
        data=as_text(", ".join(str(manifest.directory) for manifest in manifests)),
        data_sha256=hashlib.sha256(fingerprints.encode()).hexdigest(),
        split=HELD_OUT,
        classes=len(data.classes),
        train_videos=sum(manifest.validation.get("train_sources", 0) for manifest in manifests),
        test_videos=len(set(predictions.sources)),
        test_groups=groups,
        chance=max(Counter(predictions.labels.tolist()).values()) / len(predictions.labels),
        left_out=sum(manifest.skipped for manifest in manifests),
        squeezed=0,
        frames=data.codec.pixel_frames(geometry.frames),
        stride=geometry.stride,
        size=geometry.sizes[0],
        regularisation=", ".join(f"{name} {value:g}" for name, value in settings.items()),
        interval=f"95 %, bootstrap over test groups, {RESAMPLES} draws",
        versions=library_versions() | {"lightning": version("lightning")},
        fps=geometry.fps,
        medium="images" if list(data.manifests) == ["images"] else "videos",
        test_clips=len(predictions.labels),
    )

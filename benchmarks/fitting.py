"""Arguments of `fit` for benchmarks, which train recipes of the paper on random videos."""

from pathlib import Path
from typing import Any

NO_CHECKPOINTS = 10**6  # steps between checkpoints; that at the end of a training remains


def video_arguments(manifests: Path, recipe: str, **settings: Any) -> list[str]:
    """Return the arguments of `fit` for a recipe on videos alone, without validation, previews, logs and checkpoints.

    Args:
        manifests: folder of the prepared videos.
        recipe: name of a shipped recipe.
        settings: options by name, with `__` in place of dots; they replace those of this function.
    """
    all_settings = {
        "config": f"gpdit:{recipe}",
        "data__videos__manifests": f"[{manifests}]",
        "data__images__manifests": "[]",
        "data__sampling": "joint",
        "trainer__logger": "false",
        "trainer__enable_progress_bar": "false",
        "validate_every_steps": 0,
        "preview__every_steps": 0,
        "checkpoint__every_steps": NO_CHECKPOINTS,
        "checkpoint__keep_every_steps": 0,
    } | settings
    return [f"--{name.replace('__', '.')}={value}" for name, value in all_settings.items()]

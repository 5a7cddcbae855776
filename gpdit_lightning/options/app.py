"""Options of `app`."""

from dataclasses import dataclass

from gpdit_lightning.options.sample import CompileOptions
from gpdit_lightning.options.shared import (
    LabelGuidanceOptions,
    ModelOptions,
    OptionRecord,
    SamplerOptions,
    check_at_least,
    check_between,
)

# Limits of what users of the page can set.
MAX_STEPS = 200
MAX_GUIDANCE = 20.0
MIN_SECONDS, MAX_SECONDS = 0.01, 86_400.0

MAX_PORT = 2**16 - 1


@dataclass(frozen=True, kw_only=True)
class ServerOptions(OptionRecord):
    """Server."""

    host: str = "127.0.0.1"
    """Address to listen on. By default only this machine can open the page; with 0.0.0.0 every machine that reaches
    this one can, without a password."""
    port: int = 7860
    """Port to listen on; 0 for any free one."""


@dataclass(frozen=True, kw_only=True)
class LimitOptions(OptionRecord):
    """Limits for the users of the page."""

    max_seconds: float = 20.0
    """Longest video to generate, in seconds, without its context."""
    max_upload: int = 100
    """Largest file to upload, in MB."""
    max_upload_seconds: float = 60.0
    """Longest video to upload, in seconds."""
    max_waiting: int = 16
    """Largest number of videos that wait until others are generated."""


@dataclass(frozen=True, kw_only=True)
class AppOptions(ModelOptions, SamplerOptions, LabelGuidanceOptions, CompileOptions, ServerOptions, LimitOptions):
    """App."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, max_upload=1, max_waiting=1)
        check_between(self, steps=(1, MAX_STEPS), port=(0, MAX_PORT), max_seconds=(MIN_SECONDS, MAX_SECONDS))
        check_between(self, max_upload_seconds=(MIN_SECONDS, MAX_SECONDS))
        check_between(self, guidance=(0, MAX_GUIDANCE), label_guidance=(0, MAX_GUIDANCE))

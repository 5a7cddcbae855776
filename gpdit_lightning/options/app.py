"""Options of `app`."""

from dataclasses import dataclass

from gpdit_lightning.options.sample import CompileOptions
from gpdit_lightning.options.shared import (
    LabelGuidanceOptions,
    ModelOptions,
    OptionRecord,
    SamplerOptions,
    check_at_least,
)


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
        check_at_least(self, steps=1, port=0, max_upload=1, max_waiting=1)

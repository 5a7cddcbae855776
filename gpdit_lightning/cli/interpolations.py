"""Interpolations such as `${runs}/mine`: their errors in one sentence, and bounds on what they stand for.

Without bounds a chain of 30 short lines, `b: ${a}${a}` and so on, stands for gigabytes.
"""

from typing import Any

from jsonargparse import ArgumentParser, Namespace

from gpdit_lightning.errors import InputError, message_line

MARK = "${"
MAX_SIZE = 2**18  # characters and values that all interpolations of a command stand for
MAX_RESOLVED = 10_000  # interpolations that are resolved, each as often as it is used


class InterpolatingParser(ArgumentParser):
    """A parser whose interpolations are bounded, with errors in one sentence."""

    def _parse_common(self, cfg: Namespace, *arguments: Any, **options: Any) -> Namespace:
        """Resolve interpolations, then check the values.

        Raises:
            InputError: an interpolation cannot be resolved, or all of them stand for too much.
        """
        if MARK not in str(cfg):
            return super()._parse_common(cfg, *arguments, **options)
        import omegaconf

        from gpdit_lightning.cli.bounded_visitor import bounded_interpolations

        try:
            with bounded_interpolations(MAX_SIZE, MAX_RESOLVED):
                return super()._parse_common(cfg, *arguments, **options)
        except omegaconf.errors.OmegaConfBaseException as error:
            reason = message_line(error)
            raise InputError(f"an interpolation cannot be resolved: {reason}") from None

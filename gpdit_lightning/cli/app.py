"""`app`: a web page on which a trained model continues videos and images."""

import logging
from pathlib import Path

from gpdit_lightning.app.server import ServerThread, is_loopback
from gpdit_lightning.diffusion import Guidance, make_sampler
from gpdit_lightning.diffusion.samplers import check_sampler_name
from gpdit_lightning.generation.pipeline import load_pipeline
from gpdit_lightning.options.app import AppOptions

log = logging.getLogger(__name__)


def app(options: AppOptions) -> None:
    """Load the model and serve the page until Ctrl-C or SIGTERM.

    Raises:
        InputError: the sampler, the guidance or the model cannot be used, or the server cannot listen at the address.
        KeyboardInterrupt: on Ctrl-C and SIGTERM, after the generation was stopped and all files were deleted.
    """
    check_sampler_name(options.sampler, "--sampler")
    Guidance(options.guidance, options.label_guidance, *options.guidance_levels)  # checks them before the first request
    pipeline = load_pipeline(options, compile=options.compile)
    make_sampler(options.sampler, options.steps, pipeline.trained.schedule)
    with ServerThread(pipeline, options, Path(options.checkpoint).name or "model") as server:
        log.info("the page is at %s; Ctrl-C ends the server", server.url)
        if not is_loopback(options.host):
            log.warning("warning: every machine that reaches this one can use the page, without a password")
        server.wait()

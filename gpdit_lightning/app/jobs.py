"""Videos that users request: a queue, one thread that generates them in turn, and the events that report on them."""

import asyncio
import base64
import io
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from gpdit_lightning.errors import InputError
from gpdit_lightning.generation.context_loss import UNLIKE_TRAINING
from gpdit_lightning.generation.contexts import VideoContext
from gpdit_lightning.generation.pipeline import GPDiTPipeline
from gpdit_lightning.media.video_writer import VideoWriter
from gpdit_lightning.options.sample import GenerationOptions
from gpdit_lightning.retries import memory_error

log = logging.getLogger(__name__)

WEBP: dict[str, Any] = {"format": "WEBP", "quality": 90, "method": 2}  # of the frames on the page


class Event(NamedTuple):
    """A report on a job, with the content that the page shows.

    The kinds are `queued`, `started`, `remark`, `frames`, `done` and `failed`; the last two end the events of a job.
    """

    kind: str
    content: dict[str, Any]


@dataclass(frozen=True)
class VideoRequest:
    """A video to generate: its context, None for a video from noise alone, its duration in seconds, and how."""

    context: VideoContext | None
    seconds: float
    options: GenerationOptions


class Job:
    """A requested video and the events about it.

    All methods are called in the thread of the event loop, except `should_stop`.

    Args:
        request: what to generate.
        folder: the folder of the mp4 file.

    Attributes:
        id: name that cannot be guessed, so that users do not see each other's videos.
        video: path of the mp4 file, which exists after a `done` event that states so.
        listeners: number of open streams of events.
        last_used: time (`time.monotonic`) at which a stream or a download ended.
    """

    def __init__(self, request: VideoRequest, folder: Path) -> None:
        self.request = request
        self.id = secrets.token_urlsafe(16)
        self.video = folder / f"{self.id}.mp4"
        self.listeners = 0
        self.last_used = time.monotonic()
        self._events: list[Event] = []
        self._changed = asyncio.Event()
        self._stopped = False

    @property
    def is_over(self) -> bool:
        """Whether no event will follow."""
        return bool(self._events) and self._events[-1].kind in ("done", "failed")

    @property
    def has_video(self) -> bool:
        """Whether the mp4 file exists."""
        return self.is_over and bool(self._events[-1].content.get("video"))

    @property
    def should_stop(self) -> bool:
        """Whether the generation should end after the present frames."""
        return self._stopped

    def stop(self) -> None:
        """Request the end of the generation; the frames so far are kept."""
        self._stopped = True

    def publish(self, kind: str, **content: Any) -> None:
        """Append an event; ignored after the last one."""
        if not self.is_over:
            self._events.append(Event(kind, content))
            self._changed.set()
            self._changed = asyncio.Event()

    async def events(self, first: int = 0) -> AsyncIterator[tuple[int, Event]]:
        """Yield the events and their numbers from number `first` on, as they occur, to the last one."""
        self.listeners += 1
        try:
            while True:
                for number in range(first, len(self._events)):
                    yield number, self._events[number]
                first = len(self._events)
                if self.is_over:
                    return
                await self._changed.wait()
        finally:
            self.listeners -= 1
            self.last_used = time.monotonic()


class JobQueue:
    """Generates the videos of jobs, one after another.

    Args:
        pipeline: the model.
        folder: folder of the mp4 files.
        max_waiting: maximum number of jobs that wait.
    """

    def __init__(self, pipeline: GPDiTPipeline, folder: Path, max_waiting: int) -> None:
        self._pipeline, self._folder, self._max_waiting = pipeline, folder, max_waiting
        self._waiting: list[Job] = []
        self._running: Job | None = None
        self._is_closed = False
        self._changed = asyncio.Event()

    def submit(self, request: VideoRequest) -> Job:
        """Append a job to the queue.

        Raises:
            InputError: the queue is full.
        """
        if len(self._waiting) >= self._max_waiting:
            raise InputError(f"{len(self._waiting)} videos are waiting already: try again in a few minutes.")
        job = Job(request, self._folder)
        self._waiting.append(job)
        self._report_positions()
        self._changed.set()
        return job

    def stop(self, job: Job) -> None:
        """Stop a job: at once if it waits, after the present frames if it is running."""
        job.stop()
        if job in self._waiting:
            self._waiting.remove(job)
            job.publish("done", frames=0, seconds=0.0, stopped=True, video=False)
            self._report_positions()

    def close(self) -> None:
        """Stop all jobs; `run` returns after the present frames of the running one."""
        self._is_closed = True
        for job in (self._running, *self._waiting):
            if job is not None:
                job.stop()
                job.publish("failed", message="The server has ended.")
        self._waiting.clear()
        self._changed.set()

    async def run(self) -> None:
        """Generate the videos of all jobs until the queue is closed."""
        loop = asyncio.get_running_loop()
        while not self._is_closed:
            if not self._waiting:
                self._changed.clear()
                await self._changed.wait()
                continue
            job = self._running = self._waiting.pop(0)
            self._report_positions()
            await asyncio.to_thread(generate, self._pipeline, job, partial(_publish_from_thread, loop, job))
            self._running = None

    def _report_positions(self) -> None:
        for number, job in enumerate(self._waiting):
            job.publish("queued", before=number + (self._running is not None))


def _publish_from_thread(loop: asyncio.AbstractEventLoop, job: Job, kind: str, **content: Any) -> None:
    loop.call_soon_threadsafe(partial(job.publish, kind, **content))


def generate(pipeline: GPDiTPipeline, job: Job, publish: Callable[..., None]) -> None:
    """Generate the video of a job, and publish its frames as they are decoded; every error becomes an event.

    Args:
        pipeline: the model.
        job: gives the request, the path of the mp4 and, between frames, whether to stop.
        publish: publishes an event; called with the arguments of `Job.publish`.
    """
    try:
        _generate(pipeline, job, publish)
    except InputError as error:
        publish("failed", message=sentence(error))
    except Exception as error:
        log.exception("a video could not be generated")
        reason = memory_error(error) or f"the model failed ({type(error).__name__}): the log of the server has details"
        publish("failed", message=sentence(reason))


def _generate(pipeline: GPDiTPipeline, job: Job, publish: Callable[..., None]) -> None:
    request, started = job.request, time.monotonic()
    contexts = [] if request.context is None else [request.context]
    plan = pipeline.plan(contexts, request.options, seconds=request.seconds)
    (clip,) = plan.clips
    fps, total, done = clip.context.fps, clip.frames, 0
    height, width = clip.context.pixels.shape[2:]
    publish("started", frames=total, fps=float(fps), height=height, width=width, given=len(clip.context.pixels))
    latents = pipeline.encode(plan.clips)
    loss = pipeline.context_loss(clip, pipeline.codec.whitened(latents)[0], plan.config)
    if loss is not None and loss > UNLIKE_TRAINING:
        text = f"This is unlike the videos that the model was trained on (its loss is {loss:.1f} times theirs)"
        publish("remark", message=f"{text}, so the result may be poor.")
    with VideoWriter(job.video, fps) as video:
        video.write(clip.context.pixels)
        for piece in pipeline.generate(plan.clips, latents, plan.config):
            pixels = piece.pixels[0]
            video.write(pixels)
            done += len(pixels)
            seconds_left = (time.monotonic() - started) / done * (total - done)
            publish("frames", images=as_images(pixels), frames=done, seconds_left=seconds_left)
            if job.should_stop:
                break
    publish("done", frames=done, seconds=time.monotonic() - started, stopped=done < total, video=True)


def sentence(message: object) -> str:
    """Return a message as a sentence: with a full stop, and a capital letter unless it begins with a file name."""
    text = str(message).strip().rstrip(".")
    return f"{text[:1].upper()}{text[1:]}." if text.partition(" ")[0].isalpha() else f"{text}."


def as_images(pixels: Tensor) -> list[str]:
    """Return frames, uint8 (T, 3, H, W), as data URLs of WebP images."""
    urls = []
    for frame in pixels.permute(0, 2, 3, 1).cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(frame).save(file, **WEBP)
        urls.append(f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}")
    return urls

"""The HTTP server of the page: uploads, requests, streams of events, and downloads (docs/reference/http.md)."""

import asyncio
import contextlib
import ipaddress
import json
import logging
import os
import secrets
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from importlib import resources
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from gpdit_lightning.app.jobs import Job, JobQueue, as_images, sentence
from gpdit_lightning.app.requests import describe_model, parse_request, parse_start
from gpdit_lightning.app.uploads import UploadLimits, read_upload
from gpdit_lightning.errors import InputError
from gpdit_lightning.generation.contexts import VideoContext
from gpdit_lightning.generation.pipeline import GPDiTPipeline
from gpdit_lightning.names import number_in, printable
from gpdit_lightning.options.app import AppOptions
from gpdit_lightning.schema import parse_json

log = logging.getLogger(__name__)

PAGE_FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    **{f"/{name}": (name, "text/javascript") for name in ("page.js", "player.js", "elements.js")},
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
HEADERS = {
    # The page loads nothing from elsewhere; its frames are data URLs.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
MAX_SETTINGS_BYTES = 10_000
MAX_NAME = 80  # characters of the name of an upload in messages
READ_AT_ONCE = 2  # complete uploads; incomplete ones do not wait for each other, since a client may be slow
STALLED_AFTER = 30.0  # seconds without a byte of an upload
LONGEST_UPLOAD = 900.0  # seconds
ABANDONED_AFTER = 60.0  # seconds without a listener, after which a video is not generated further
KEPT_FOR = 3600.0  # seconds since the last use of a video
MAX_KEPT = 32  # uploads, and videos; also of uploads that are not complete
CLEANING_INTERVAL = 5.0  # seconds


class _WithoutMalformedRequests(logging.Filter):
    """Filter that removes what aiohttp logs, with a traceback, for each request that is not HTTP."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record is of something other than such a request."""
        return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


WITHOUT_MALFORMED_REQUESTS = _WithoutMalformedRequests()
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class ServerThread:
    """Context manager that serves the page from a thread, while the main thread waits for signals.

    At the end of the block the generation is stopped after the present frames, and all files are deleted.

    Args:
        pipeline: the model.
        options: address, limits, and initial settings of the page.
        name: name of the model on the page.

    Raises:
        InputError: at the beginning of the block, if the server cannot listen at the address of the options.
    """

    def __init__(self, pipeline: GPDiTPipeline, options: AppOptions, name: str) -> None:
        self._pipeline, self._options, self._name = pipeline, options, name
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._url: Future[str] = Future()
        self._ended = threading.Event()  # Python 3.11 takes a thread for ended if a signal interrupts `Thread.join`
        self._thread = threading.Thread(target=self._run, name="server")

    @property
    def url(self) -> str:
        """The address of the page."""
        return self._url.result()

    def wait(self) -> None:
        """Wait until the server has ended, which it only does after an error."""
        self._ended.wait()

    def __enter__(self) -> Self:
        self._thread.start()
        self._url.result()
        return self

    def __exit__(self, *_: object) -> None:
        if self._loop is not None and self._task is not None and not self._ended.is_set():
            self._loop.call_soon_threadsafe(self._task.cancel)
        self._ended.wait()

    def _run(self) -> None:
        try:
            with contextlib.suppress(asyncio.CancelledError):
                asyncio.run(self._serve())
        except Exception as error:
            if self._url.done():
                log.exception("the server failed")
            else:
                self._url.set_exception(error)
        finally:
            self._ended.set()

    async def _serve(self) -> None:
        logging.getLogger("aiohttp.server").addFilter(WITHOUT_MALFORMED_REQUESTS)
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        with tempfile.TemporaryDirectory(prefix="gpdit_app_") as folder:  # which other users cannot read
            server = Server(self._pipeline, self._options, self._name, Path(folder))
            runner = web.AppRunner(server.app(), access_log=None, handler_cancellation=True, shutdown_timeout=2.0)
            await runner.setup()
            queue, cleaning = asyncio.create_task(server.queue.run()), asyncio.create_task(server.clean())
            try:
                await _listen(runner, self._options)
                host, port = runner.addresses[0][:2]
                self._url.set_result(f"http://{f'[{host}]' if ':' in host else host}:{port}")
                await asyncio.shield(queue)
            finally:
                cleaning.cancel()
                server.queue.close()
                await runner.cleanup()
                await queue


async def _listen(runner: web.AppRunner, options: AppOptions) -> None:
    try:
        await web.TCPSite(runner, options.host, options.port).start()
    except (OSError, OverflowError, UnicodeError) as error:  # the last of a name that no host can have
        number = getattr(error, "errno", None) or 0
        reason = os.strerror(number) if number > 0 else str(error)  # the numbers of unknown names are negative
        raise InputError(
            f"the page cannot be served at --host {options.host} --port {options.port} ({reason}): give another host "
            "or port; 0 is any free port."
        ) from None


class Server:
    """The handlers of requests, and the uploads and jobs that they share.

    Args:
        pipeline: the model.
        options: limits, and initial settings of the page.
        name: name of the model on the page.
        folder: a private folder for uploads and videos.

    Attributes:
        queue: generates the requested videos.
    """

    def __init__(self, pipeline: GPDiTPipeline, options: AppOptions, name: str, folder: Path) -> None:
        self.queue = JobQueue(pipeline, folder, options.max_waiting)
        self._pipeline, self._options, self._name, self._folder = pipeline, options, name, folder
        self._limits = UploadLimits(options.max_upload, options.max_upload_seconds)
        self._jobs: dict[str, Job] = {}
        self._contexts: dict[str, VideoContext] = {}
        self._receiving = 0  # uploads that are not complete
        self._reading = asyncio.Semaphore(READ_AT_ONCE)

    def app(self) -> web.Application:
        """Return the application of aiohttp."""
        app = web.Application(middlewares=[self._answer_errors], client_max_size=MAX_SETTINGS_BYTES)
        for path in PAGE_FILES:
            app.router.add_get(path, self._page)
        app.router.add_get("/api/model", self._model)
        app.router.add_post("/api/uploads", self._upload)
        app.router.add_post("/api/videos", self._request_video)
        app.router.add_get("/api/videos/{id}/events", self._events)
        app.router.add_post("/api/videos/{id}/stop", self._stop)
        app.router.add_get("/api/videos/{id}.mp4", self._download)
        app.on_response_prepare.append(_add_headers)
        return app

    async def clean(self) -> None:
        """Stop videos without a listener, and delete those that were not used for long."""
        while True:
            await asyncio.sleep(CLEANING_INTERVAL)
            now = time.monotonic()
            for job in [job for job in self._jobs.values() if not job.listeners]:
                if not job.is_over and now - job.last_used > ABANDONED_AFTER:
                    self.queue.stop(job)
                elif job.is_over and (now - job.last_used > KEPT_FOR or len(self._jobs) > MAX_KEPT):
                    del self._jobs[job.id]
                    job.video.unlink(missing_ok=True)

    @web.middleware
    async def _answer_errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuse requests of other pages, and answer each error by one sentence."""
        try:
            _check_origin(request, self._options.host)
            return await handler(request)
        except InputError as error:
            return _error(400, error)
        except web.HTTPException as error:
            return _error(error.status, f"{request.path} was refused ({error.reason})")
        except TimeoutError:
            return _error(408, "the upload stalled: try it again")
        except (web.RequestPayloadError, ConnectionError):
            return _error(400, "the request ended early or has another encoding than it states: send it again")
        except Exception as error:
            log.exception("%s %s failed", request.method, request.path)
            return _error(500, f"the server failed ({type(error).__name__}): its log has details")

    async def _page(self, request: web.Request) -> web.Response:
        name, content_type = PAGE_FILES[request.path]
        content = resources.files(__package__).joinpath("page", name).read_bytes()
        return web.Response(body=content, content_type=content_type, charset="utf-8")

    async def _model(self, request: web.Request) -> web.Response:
        return web.json_response(describe_model(self._pipeline, self._options, self._name))

    async def _upload(self, request: web.Request) -> web.Response:
        """Store the file for as long as it is read, and keep the context."""
        name = printable(request.query.get("name", ""))[:MAX_NAME] or "the file"
        start = parse_start(request.query.get("start", ""))
        self._limits.check_bytes(name, request.content_length or 0)
        if self._receiving >= MAX_KEPT:
            raise InputError("too many files are uploaded at the same time: try again in a minute.")
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            path = Path(folder, "upload")
            self._receiving += 1
            try:
                async with asyncio.timeout(LONGEST_UPLOAD):
                    await self._receive(request, path, name)
            finally:
                self._receiving -= 1
            async with self._reading:
                upload = await asyncio.to_thread(read_upload, path, name, self._pipeline, self._limits, start)
        key = secrets.token_urlsafe(16)
        self._contexts[key] = context = upload.context
        for oldest in list(self._contexts)[:-MAX_KEPT]:
            del self._contexts[oldest]
        images = await asyncio.to_thread(as_images, context.pixels)
        answer = {"id": key, "fps": float(context.fps), "duration": upload.duration, "images": images}
        return web.json_response(answer)

    async def _receive(self, request: web.Request, path: Path, name: str) -> None:
        """Write the body of a request to a file.

        Raises:
            InputError: it is too large.
            TimeoutError: no byte came for `STALLED_AFTER`.
        """
        size = 0
        with path.open("wb") as file:
            while chunk := await asyncio.wait_for(request.content.readany(), STALLED_AFTER):
                size += len(chunk)
                self._limits.check_bytes(name, size)
                file.write(chunk)

    async def _request_video(self, request: web.Request) -> web.Response:
        content = parse_json(await request.read(), "the request", "send the settings as a JSON object")
        job = self.queue.submit(parse_request(content, self._pipeline, self._options, self._contexts))
        self._jobs[job.id] = job
        return web.json_response({"id": job.id})

    async def _events(self, request: web.Request) -> web.StreamResponse:
        """Stream the events of a job; a browser that connects again sends the number of the last one."""
        job = self._job(request)
        last = number_in(request.headers.get("Last-Event-ID", ""))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "X-Accel-Buffering": "no"})
        await response.prepare(request)
        async for number, event in job.events(0 if last is None else last + 1):
            text = f"id: {number}\nevent: {event.kind}\ndata: {json.dumps(event.content)}\n\n"
            await response.write(text.encode())
        return response

    async def _stop(self, request: web.Request) -> web.Response:
        self.queue.stop(self._job(request))
        return web.json_response({})

    async def _download(self, request: web.Request) -> web.StreamResponse:
        job = self._job(request)
        if not job.has_video:
            raise InputError("the video is not complete yet: wait for it, or stop it.")
        job.last_used = time.monotonic()
        return web.FileResponse(job.video, headers={"Content-Disposition": 'attachment; filename="video.mp4"'})

    def _job(self, request: web.Request) -> Job:
        if (job := self._jobs.get(request.match_info["id"])) is None:
            raise InputError("the video is no longer kept: generate it again.")
        return job


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(HEADERS)


def _error(status: int, message: object) -> web.Response:
    return web.json_response({"error": sentence(message)}, status=status)


def _check_origin(request: web.Request, host: str) -> None:
    """Refuse requests that another site makes with the browser of a user.

    A site cannot change the header `Origin`. But it can let its name refer to this machine (DNS rebinding), so that a
    server on loopback only accepts names of loopback.

    Args:
        request: the request.
        host: the address at which the server listens.

    Raises:
        HTTPForbidden: the request comes from another site.
    """
    origin = request.headers.get("Origin")
    if origin is not None and origin.partition("://")[2] != request.host:
        raise web.HTTPForbidden(reason="it comes from another site")
    try:
        name = urlsplit(f"//{request.host}").hostname or ""
    except ValueError:  # of brackets that do not match
        name = ""
    if is_loopback(host) and not is_loopback(name):
        raise web.HTTPForbidden(reason="the server is for this machine only; start it with --host 0.0.0.0 for others")


def is_loopback(host: str) -> bool:
    """Return whether a name or address refers to this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

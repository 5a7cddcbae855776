"""The server of the page, by an HTTP client: uploads, streams, downloads, limits, several users, errors and its end."""

import base64
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from gpdit_lightning.app import jobs, server
from gpdit_lightning.app.requests import Number, parse_request, settings_of
from gpdit_lightning.app.uploads import UploadLimits, read_upload
from gpdit_lightning.cli import main
from gpdit_lightning.errors import InputError
from gpdit_lightning.generation.pipeline import GPDiTPipeline
from gpdit_lightning.media.video import iterate_frames, video_info
from gpdit_lightning.media.video_writer import write_video
from gpdit_lightning.options.app import AppOptions
from gpdit_lightning.options.sample import GenerationOptions
from tests.app.conftest import Client

ROOT = Path(__file__).parents[2]
GIVEN = 9  # frames of a context: the clips of the model have 4 latent frames
LONG: dict[str, Any] = {"seconds": 30, "steps": 200}  # minutes, unless it is stopped


def wave(frames: int, height: int = 32, width: int = 48) -> Tensor:
    """A video (frames, 3, height, width) of a wave that moves by one pixel per frame."""
    times, columns = torch.arange(frames)[:, None], torch.arange(width)
    row = (torch.sin((columns + times) / 5) * 100 + 128).byte()
    return row[:, None, None].expand(-1, 3, height, -1).contiguous()


def video_bytes(folder: Path, frames: int = 60, fps: float = 24, **size: int) -> bytes:
    write_video(folder / "made.mp4", wave(frames, **size), fps)
    return (folder / "made.mp4").read_bytes()


def large_frame(folder: Path) -> bytes:
    """An avi of one black frame of 4096x2400."""
    with av.open(str(folder / "made.avi"), "w") as container:
        stream = container.add_stream("mjpeg", 24)
        stream.width, stream.height, stream.pix_fmt = 4096, 2400, "yuvj420p"
        black = av.VideoFrame.from_ndarray(np.zeros((3600, 4096), np.uint8), format="yuvj420p")
        container.mux([*stream.encode(black), *stream.encode()])
    return (folder / "made.avi").read_bytes()


def png(height: int, width: int) -> bytes:
    """A gray PNG of few bytes, whatever its size."""
    rows = zlib.compress((b"\0" + bytes(-(-width // 8))) * height, 9)
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", rows), (b"IEND", b""))
    body = (struct.pack(">I", len(c)) + kind + c + struct.pack(">I", zlib.crc32(kind + c)) for kind, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def frame(url: str) -> Tensor:
    """The frame (3, H, W) of a data URL, float."""
    image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def decoded(client: Client, video: str, folder: Path) -> Tensor:
    """The frames (T, 3, H, W) of the downloaded mp4, float."""
    status, content = client.request("GET", f"/api/videos/{video}.mp4")
    assert status == 200
    (folder / "downloaded.mp4").write_bytes(content)
    return torch.stack([shown.pixels for shown in iterate_frames(folder / "downloaded.mp4")]).float()


def is_sentence(text: str) -> bool:
    return (
        bool(re.fullmatch(r"([A-Z]|holiday\.mov).*[^.]\.", text))
        and "Traceback" not in text
        and "gpdit_app_" not in text
    )


def test_the_page_needs_nothing_from_elsewhere(client: Client) -> None:
    for path in server.PAGE_FILES:
        status, content = client.request("GET", path)
        assert status == 200
        addresses = re.findall(r"\w+://[\w.]+|//[\w-]+\.\w+", content.decode())
        assert set(addresses) <= {"http://www.w3.org"}, path  # the name of SVG's vocabulary
    connection = client.connect()
    connection.request("GET", "/")
    assert "default-src 'none'" in str(connection.getresponse().getheader("Content-Security-Policy"))
    connection.close()


def test_a_video_is_continued_frame_by_frame_and_downloaded(client: Client, tmp_path: Path) -> None:
    status, given = client.upload(video_bytes(tmp_path))
    assert status == 200, given
    assert (len(given["images"]), given["fps"]) == (GIVEN, 12)
    expected = wave(60)[60 - 1 - 2 * (GIVEN - 1) :: 2].float()
    assert (torch.stack([frame(url) for url in given["images"]]) - expected).abs().mean() < 4

    video = client.start(context=given["id"], seconds=0.75, seed=3, label="run", sampler="adams", steps=3)
    events = list(client.events(video))
    assert [kind for kind, _ in events] == ["queued", "started", "frames", "frames", "frames", "done"]
    assert events[0][1] == {"before": 0}
    assert events[1][1] == {"frames": 9, "fps": 12.0, "height": 32, "width": 48, "given": GIVEN}
    assert [content["frames"] for kind, content in events if kind == "frames"] == [4, 8, 9]
    assert events[4][1]["seconds_left"] == 0
    assert events[5][1].items() >= {"frames": 9, "stopped": False, "video": True}.items()

    # The same frames as the library generates.
    options = GenerationOptions(seed=3, label="run", sampler="adams", steps=3)
    plan = client.pipeline.plan([str(tmp_path / "made.mp4")], options, seconds=0.75)
    pieces = client.pipeline.generate(plan.clips, client.pipeline.encode(plan.clips), plan.config)
    generated = torch.cat([piece.pixels[0] for piece in pieces]).float()
    shown = torch.stack([frame(url) for kind, content in events if kind == "frames" for url in content["images"]])
    frames = decoded(client, video, tmp_path)
    assert frames.shape == (GIVEN + 9, 3, 32, 48)
    assert float(video_info(tmp_path / "downloaded.mp4").fps) == 12
    variation = generated.std()
    assert (shown - generated).abs().mean() < 0.2 * variation
    assert (frames[GIVEN:] - generated).abs().mean() < 0.2 * variation
    assert (frames[:GIVEN] - expected).abs().mean() < 4
    # A browser that lost the connection gets the rest.
    assert list(client.events(video, after=3)) == events[4:]


def test_the_given_frames_begin_where_the_user_chooses(client: Client, tmp_path: Path) -> None:
    content = video_bytes(tmp_path)
    _, last = client.upload(content)
    assert last["duration"] == pytest.approx(59 / 24, abs=1e-3)
    for start, number, count in (("0", 0, GIVEN), ("0.5", 12, GIVEN), ("2.25", 54, 1)):  # and fewer near the end
        status, given = client.upload(content, start=start)
        assert (status, len(given["images"]), given["duration"]) == (200, count, last["duration"]), given
        expected = wave(60)[number::2][:count].float()
        assert (torch.stack([frame(url) for url in given["images"]]) - expected).abs().mean() < 4
    for start, words in (
        ("2.6", "Start is 2.6, but the last frame of holiday.mov is at 2.46 s: give less."),
        ("-1", "Start is -1"),
        ("nan", "Start is nan"),
        ("soon", "Start is 'soon': give a time in seconds."),
    ):
        status, answer = client.upload(content, start=start)
        assert (status, answer["error"].startswith(words)) == (400, True), answer
    assert client.upload(png(32, 32), start="1")[0] == 400


def test_images_short_videos_and_noise_are_continued(client: Client, tmp_path: Path) -> None:
    still = io.BytesIO()
    Image.new("RGB", (90, 60), "green").save(still, "WEBP")
    for content, frames, size in ((still.getvalue(), 1, (32, 48)), (video_bytes(tmp_path, frames=11), 5, (32, 48))):
        status, given = client.upload(content)
        assert (status, len(given["images"])) == (200, frames), given
        assert frame(given["images"][0]).shape[1:] == size
        video = client.start(context=given["id"], seconds=0.1)
        assert [kind for kind, _ in client.events(video)][-1] == "done"
        assert len(decoded(client, video, tmp_path)) == frames + 1
    video = client.start(seconds=0.5, size="32x32")
    assert dict(client.events(video))["started"].items() >= {"given": 0, "height": 32, "width": 32, "frames": 6}.items()
    assert len(decoded(client, video, tmp_path)) == 6


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: b"", "holiday.mov is neither a video nor an image"),
        (lambda folder: b"a note\n" * 100, "holiday.mov is neither a video nor an image"),
        # FFmpeg would open the addresses of a playlist, and read it again and again.
        (lambda folder: b"#EXTM3U\n#EXTINF:10,\nhttp://127.0.0.1:9/a.ts\n", "holiday.mov is neither a video nor"),
        (lambda folder: b"ffconcat version 1.0\nfile /etc/passwd\n", "holiday.mov is neither a video nor an image"),
        (lambda folder: video_bytes(folder)[:2000], "holiday.mov is neither a video nor an image"),
        (lambda folder: bytes(1_000_001), "holiday.mov is larger than 1 MB"),
        (lambda folder: video_bytes(folder, frames=102, fps=10), "holiday.mov is longer than 10 seconds"),
        (lambda folder: png(8001, 8000), "holiday.mov has 8000x8001 pixels"),
        (large_frame, "holiday.mov has 4096x2400 pixels"),
    ],
    ids=["empty", "text", "playlist", "list", "truncated", "bytes", "seconds", "image", "frame"],
)
def test_an_unusable_file_is_refused_by_a_sentence(
    make: Callable[[Path], bytes], words: str, client: Client, tmp_path: Path
) -> None:
    status, answer = client.upload(make(tmp_path))
    assert status == 400
    assert is_sentence(answer["error"]), answer
    assert answer["error"].startswith(words), answer
    assert [path for path in client.folder.rglob("*") if "upload" in path.name] == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"seconds": 31}, "Seconds is 31: give a number from 0.01 to 30."),
        ({"seconds": float("nan")}, "The request is not readable JSON (NaN"),
        ({"steps": 2.5}, "Steps is 2.5: give a whole number from 1 to 200."),
        ({"steps": True}, "Steps is True"),
        ({"seed": -1}, "Seed is -1"),
        ({"guidance": "2"}, "Guidance is '2'"),
        ({"sampler": "os.system"}, "Sampler is 'os.system', which this model does not have: give one of rotation"),
        ({"label": "swim"}, "Label is 'swim', which this model does not have: give one of jump, run."),
        ({"size": "640x640"}, "Size is '640x640'"),
        ({"context": "../../etc/passwd"}, "The uploaded file is no longer kept: choose it again."),
        ({"window": 1}, "There is no setting 'window'"),
        ({"label_guidance": 2}, "label_guidance is given without a label: give one, or leave label_guidance out."),
        ({"label": "x" * 20_000}, "/api/videos was refused (Request Entity Too Large)."),
    ],
)
def test_an_invalid_setting_is_refused_by_a_sentence(settings: dict[str, Any], words: str, client: Client) -> None:
    status, answer = client.submit(**settings)
    assert status in (400, 413)
    assert answer["error"].startswith(words), answer


def test_a_setting_without_effect_is_refused(client: Client) -> None:
    _, given = client.upload(png(32, 32))
    status, answer = client.submit(context=given["id"], size="32x48")
    assert (status, answer["error"]) == (400, "Size is given with a context, which determines it: leave size out.")


def test_an_empty_request_has_the_defaults_within_the_limits(client: Client) -> None:
    options = AppOptions(checkpoint="MODEL", sampler="adams", steps=3, label_guidance=4, max_seconds=1)
    request = parse_request({}, client.pipeline, options, {})
    assert (request.context, request.seconds) == (None, 1)
    assert request.options == GenerationOptions(sampler="adams", steps=3)


def test_every_request_and_field_is_documented(client: Client) -> None:
    """The tables of settings and of requests are those of the code, and all fields of answers are explained."""
    text = (ROOT / "docs" / "reference" / "http.md").read_text(encoding="utf-8")
    for name, setting in settings_of(AppOptions(checkpoint="MODEL")).items():
        if isinstance(setting, Number):
            values = f"{setting.least:g} to {setting.most:.10g} | {setting.default:g}"
            row = f"| `{name}` | {'integer' if setting.whole else 'number'} | {values} |"
        else:
            values = ", ".join(setting.choices) or f"`{name}s` of the model"
            row = f"| `{name}` | text | {values} | {setting.default or 'null'}"
        assert row in text
    documented = set(re.findall(r"^\| `(GET|POST) (/[^`?]*)", text, flags=re.MULTILINE))
    app = server.Server(client.pipeline, AppOptions(checkpoint="MODEL"), "", client.folder).app()
    routes = {(route.method, route.resource.canonical) for route in app.router.routes() if route.resource}
    pages = {("GET", path) for path in server.PAGE_FILES if path != "/"}
    assert {route for route in routes - pages if route[0] != "HEAD"} == documented
    assert all(f"`{path}`" in text for _, path in pages)
    model = json.loads(client.request("GET", "/api/model")[1])
    _, upload = client.upload(png(32, 32))
    fields = {*model, *model["initial"], *model["limits"], *upload}
    events = list(client.events(client.start(seconds=0.1)))
    assert len(events) == 4
    for kind, content in events:
        fields |= {kind, *content}
    assert [field for field in sorted(fields) if f"`{field}`" not in text] == []


def test_a_stopped_video_keeps_its_frames(client: Client, tmp_path: Path) -> None:
    video = client.start(**LONG)
    events = client.events(video)
    assert [kind for kind, _ in islice(events, 3)] == ["queued", "started", "frames"]
    status, answer = client.request("GET", f"/api/videos/{video}.mp4")
    assert (status, answer) == (400, b'{"error": "The video is not complete yet: wait for it, or stop it."}')
    client.stop(video)
    *_, (kind, content) = events
    assert (kind, content["stopped"]) == ("done", True)
    assert 1 <= content["frames"] < 360
    assert len(decoded(client, video, tmp_path)) == content["frames"]


def test_several_users_wait_for_each_other(client: Client) -> None:
    first = client.start(**LONG)
    assert "frames" in (kind for kind, _ in islice(client.events(first), 3))
    second, third = (client.start(seconds=0.1) for _ in range(2))
    status, answer = client.submit()
    assert (status, answer["error"]) == (400, "2 videos are waiting already: try again in a few minutes.")
    of_third = client.events(third)
    assert next(of_third) == ("queued", {"before": 2})
    client.stop(second)  # which has not begun
    assert list(client.events(second))[-1][1].items() >= {"frames": 0, "video": False}.items()
    assert next(of_third) == ("queued", {"before": 1})
    client.stop(first)
    assert [kind for kind, _ in of_third] == ["started", "frames", "done"]


def test_an_error_of_the_model_is_a_sentence_and_the_next_video_is_generated(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error, message in (
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "Memory ran out (CUDA out of memory"),
        (KeyError("weights"), "The model failed (KeyError): the log of the server has details."),
    ):

        def fail(*arguments: Any, error: Exception = error) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(GPDiTPipeline, "encode", fail)
            *_, (kind, content) = client.events(client.start())
        assert kind == "failed"
        assert content["message"].startswith(message)
        assert is_sentence(content["message"])
    assert [kind for kind, _ in client.events(client.start(seconds=0.1))][-1] == "done"


def test_a_video_that_nobody_watches_is_stopped(client: Client) -> None:
    video = client.start(**LONG)
    events = client.events(video)
    next(events)
    events.close()  # as when a tab is closed
    time.sleep(2)
    *_, (kind, content) = client.events(video)
    assert (kind, content["stopped"]) == ("done", True)


def test_requests_of_other_sites_and_for_other_files_are_refused(client: Client) -> None:
    for headers in ({"Origin": "http://evil.example"}, {"Origin": "null"}, {"Host": "evil.example"}):
        status, answer = client.request("POST", "/api/videos", b"{}", headers)
        assert status == 403, answer
    for path in (
        "/../../etc/passwd",
        "/page/index.html",
        "/%2e%2e/jobs.py",
        "/api/videos/..%2f..%2fetc%2fpasswd.mp4",
        "/api/videos/upload.mp4",
    ):
        status, answer = client.request("GET", path)
        assert status in (400, 404), path
        assert answer.startswith(b'{"error": "'), path


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "words"),
    [
        ("POST", "/api/videos", b"[" * 9_000, {}, 400, "not readable JSON (it is nested too deeply"),
        ("POST", "/api/videos", b'{"seed": 1, "seed": 2}', {}, 400, "not readable JSON"),
        ("POST", "/api/videos", b"{}", {"Content-Type": "application/json; charset=x"}, 200, '"id"'),
        ("POST", "/api/videos", b'{"context": []}', {}, 400, "no longer kept"),
        ("POST", "/api/videos", b"junk", {"Content-Encoding": "gzip"}, 400, "ended early or has another encoding"),
        ("POST", "/api/uploads", b"junk", {"Content-Encoding": "gzip"}, 400, "ended early or has another encoding"),
        ("GET", "/api/model", None, {"Origin": "http://[::1"}, 403, "another site"),
        ("GET", "/api/model", None, {"Host": "[::1"}, 403, "this machine only"),
    ],
)
def test_malformed_requests_are_answered_by_a_sentence(
    method: str, path: str, body: bytes | None, headers: dict[str, str], status: int, words: str, client: Client
) -> None:
    found, answer = client.request(method, path, body, headers)
    assert (found, words in answer.decode()) == (status, True), answer


@pytest.mark.parametrize("content", [b"GET / HTTP/9.9", b"GET /\xe9 HTTP/1.1", b"GET / HTTP/1.1\r\nContent-Length: -1"])
def test_requests_that_are_not_http_leave_no_traceback(
    content: bytes, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    address = urlsplit(client.url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(content + b"\r\n\r\n")
        assert b" 400 Bad Request\r\n" in connection.recv(2**16)
    assert not caplog.records


def test_events_after_any_number_are_streamed(client: Client) -> None:
    video = client.start(seconds=0.1, size="32x32")
    expected = list(client.events(video))
    assert list(client.events(video, after=10**200)) == expected  # of more digits than a number can have


def test_slow_uploads_do_not_delay_others(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_KEPT", 9)
    slow = [client.connect() for _ in range(8)]
    for connection in slow:
        connection.putrequest("POST", "/api/uploads")
        connection.putheader("Content-Length", "1000")
        connection.endheaders(b"x")
    assert client.upload(png(32, 32))[0] == 200
    monkeypatch.setattr(server, "MAX_KEPT", 8)
    status, answer = client.upload(png(32, 32))
    assert (status, answer["error"]) == (
        400,
        "Too many files are uploaded at the same time: try again in a minute.",
    )
    for connection in slow:
        connection.close()


def test_frames_that_the_page_shows_are_close_to_those_of_the_model() -> None:
    frames = wave(2, 64, 64)
    assert (torch.stack([frame(url) for url in jobs.as_images(frames)]) - frames.float()).abs().mean() < 3


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def is_open(client: Client) -> bool:
    try:
        return client.request("GET", "/")[0] == 200
    except ConnectionRefusedError:
        return False


def stop_during_a_generation(url: str, send_signal: Callable[[], None]) -> None:
    """Request a long video, and send a signal when its first frames were received; the page learns of the end."""
    client = Client(url, None, Path())  # type: ignore[arg-type]
    try:
        while not is_open(client):
            time.sleep(0.05)
        events = client.events(client.start(seconds=20, steps=200))
        assert [kind for kind, _ in islice(events, 3)] == ["queued", "started", "frames"]
    finally:
        send_signal()
    assert list(events)[-1] == ("failed", {"message": "The server has ended."})


def test_sigterm_ends_the_server_during_a_generation(tiny_model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gpdit_lightning", "app", "--checkpoint", str(tiny_model), "--port=0"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"TMPDIR": str(tmp_path)}
    ) as process:
        assert process.stderr is not None
        url = re.search(r"http://127\.0\.0\.1:\d+", announced := process.stderr.readline())
        assert url, announced
        stop_during_a_generation(url[0], process.terminate)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 143
    assert errors.splitlines()[-1] == "stopped by SIGTERM."
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_ends_the_server_during_a_generation(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, whose main thread the signal interrupts."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    port = free_port()
    press = partial(os.kill, os.getpid(), signal.SIGINT)
    with ThreadPoolExecutor(1) as thread:
        user = thread.submit(stop_during_a_generation, f"http://127.0.0.1:{port}", press)
        assert main(["app", "--checkpoint", str(tiny_model), "--port", str(port), "--max_seconds=20"]) == 130
        user.result(20)
    assert capsys.readouterr().err.splitlines()[-1] == "stopped."
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--guidance_levels=[1,0]", "guidance at noise levels from 1.0 to 0.0 is not a range"),
        ("--sampler=os.system", "sampler 'os.system' is not a subclass of"),
        ("--device=meta", "the device 'meta' stores no values: give auto, cpu or cuda."),
        ("--device=hpu", "the device 'hpu' cannot be used (No module named 'torch.hpu'): give auto, cpu or cuda."),
        (f"--host={'x' * 300}", "the page cannot be served at --host x"),
        ("--host=caf\udce9", "the page cannot be served at --host caf"),
    ],
)
def test_values_that_no_request_can_use_are_refused_at_the_start(
    option: str, message: str, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["app", "--checkpoint", str(tiny_model), "--port=0", option]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {message}")


def test_an_address_in_use_is_named(client: Client, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    port = client.url.rpartition(":")[2]
    assert main(["app", "--checkpoint", str(tiny_model), "--port", port]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: the page cannot be served at --host 127.0.0.1 --port {port} (")


def test_an_upload_that_vanished_before_it_was_read_is_named(tmp_path: Path) -> None:
    """As where temporary files are removed by age."""
    unused: Any = None
    with pytest.raises(InputError, match=r"^mine\.mp4 cannot be read \(No such file or directory\): give it again\.$"):
        read_upload(tmp_path / "upload", "mine.mp4", unused, UploadLimits(1, 1.0))

"""A running server with a tiny model, and an HTTP client of it."""

import http.client
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gpdit_lightning import GPDiT, GPDiTConfig
from gpdit_lightning.app import server
from gpdit_lightning.checkpoints.facts import TrainingFacts
from gpdit_lightning.codecs import load_codec
from gpdit_lightning.diffusion import NoiseSchedule
from gpdit_lightning.generation.pipeline import GPDiTPipeline
from gpdit_lightning.options.app import AppOptions
from gpdit_lightning.specs import ClipGeometry

LABELS = ("jump", "run")
LIMITS: dict[str, Any] = {"max_seconds": 30.0, "max_upload": 1, "max_upload_seconds": 10.0, "max_waiting": 2}


@dataclass(frozen=True)
class Client:
    """An HTTP client of the page.

    Attributes:
        url: address of the page.
        pipeline: the model of the server.
        folder: where the server keeps its files.
    """

    url: str
    pipeline: GPDiTPipeline
    folder: Path

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=60)

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Return status and body of an answer."""
        with closing(self.connect()) as connection:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, response.read()

    def upload(self, content: bytes, name: str = "holiday.mov", start: str = "") -> tuple[int, dict[str, Any]]:
        """Send a file; return status and answer."""
        status, answer = self.request("POST", f"/api/uploads?name={name}&start={start}", content)
        return status, json.loads(answer)

    def submit(self, **settings: Any) -> tuple[int, dict[str, Any]]:
        """Request a video; return status and answer."""
        status, answer = self.request("POST", "/api/videos", json.dumps(settings).encode())
        return status, json.loads(answer)

    def start(self, **settings: Any) -> str:
        """Request a video and return its id."""
        status, answer = self.submit(**settings)
        assert status == 200, answer
        return str(answer["id"])

    def events(self, video: str, after: int | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield kind and content of each event about a video, as it arrives."""
        with closing(self.connect()) as connection:
            headers = {} if after is None else {"Last-Event-ID": str(after)}
            connection.request("GET", f"/api/videos/{video}/events", headers=headers)
            response = connection.getresponse()
            assert response.getheader("Content-Type") == "text/event-stream"
            kind = ""
            for line in response:
                name, _, value = line.decode().rstrip("\n").partition(": ")
                if name == "event":
                    kind = value
                elif name == "data":
                    yield kind, json.loads(value)

    def stop(self, video: str) -> None:
        assert self.request("POST", f"/api/videos/{video}/stop")[0] == 200


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, randomise: Callable[[GPDiT], GPDiT]) -> Path:
    """An exported model with random weights, two labels and two sizes."""
    config = GPDiTConfig(size="tiny", layers=1, width=24, heads=2, mlp_width=48, latent_channels=16, classes=2)
    model = randomise(GPDiT(config))
    model.facts = TrainingFacts(
        weights="ema",
        step=7,
        schedule=NoiseSchedule(),
        codec=load_codec("pca").spec(),
        geometry=ClipGeometry(stride=2, sizes=((32, 32), (32, 48)), frames=4),
        classes=LABELS,
    )
    folder = tmp_path_factory.mktemp("app") / "tiny_model"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def client(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client of a server that runs in a thread, with small limits."""
    folder = tmp_path_factory.mktemp("served")
    pipeline = GPDiTPipeline.from_pretrained(tiny_model, device="cpu")
    options = AppOptions(checkpoint=str(tiny_model), port=0, steps=2, **LIMITS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder))
        patch.setattr(server, "CLEANING_INTERVAL", 0.1)
        patch.setattr(server, "ABANDONED_AFTER", 1.0)
        with server.ServerThread(pipeline, options, "tiny_model") as thread:
            yield Client(thread.url, pipeline, folder)
    assert not list(folder.iterdir()), "the server left files"

"""Ranks that somebody else launches: torchrun, and SLURM by the variables that srun sets for each of its tasks."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from gpdit_lightning.checkpoints.files import last_checkpoint
from tests.checkpoints.content import read_checkpoint
from tests.cli.test_resume import STEPS, fit, recipe
from tests.cli.test_stopped_runs import CALLBACKS

OURS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def start(tiny_shards: Path, tmp_path: Path) -> Callable[..., list["subprocess.Popen[str]"]]:
    """Starts `fit` on two ranks, one process each; with `sleep` it waits before its fourth step for so many seconds."""

    def begin(launcher: str, sleep: float = 0.0) -> list["subprocess.Popen[str]"]:
        settings = recipe(tiny_shards, tmp_path / "run", max_ranks=2)
        settings["trainer"] |= {"devices": 2, "strategy": "ddp"}
        if sleep:
            at = {"class_path": "events.PauseAt", "init_args": {"step": 3, "sleep": sleep}}
            settings["trainer"]["callbacks"] = [at]
        (tmp_path / "events.py").write_text(CALLBACKS)
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(settings))
        arguments = ["-m", "gpdit_lightning", "fit", f"--config={path}"]
        shared = {name: value for name, value in os.environ.items() if name not in OURS}
        shared |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path), "REACHED": str(tmp_path / "reached")}
        if launcher == "torchrun":
            torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
            return [started([*torchrun, *arguments], shared)]
        job = {"NTASKS": "2", "NTASKS_PER_NODE": "2", "NNODES": "1", "NODEID": "0", "JOB_NAME": "train", "JOB_ID": "7"}
        slurm = {f"SLURM_{name}": value for name, value in (job | {"NODELIST": "127.0.0.1"}).items()}
        slurm["MASTER_PORT"] = str(free_port())
        ranks = [{"SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in ("0", "1")]
        return [started(arguments, shared | slurm | rank) for rank in ranks]

    return begin


def started(arguments: list[str], environment: dict[str, str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
def test_both_launchers_train_the_same(start: Callable[..., list["subprocess.Popen[str]"]], tmp_path: Path) -> None:
    weights = {}
    for launcher in ("torchrun", "slurm"):
        processes = start(launcher)
        printed = [process.communicate(timeout=300)[0] for process in processes]
        assert [process.returncode for process in processes] == [0] * len(processes), printed
        assert "".join(printed).count(f"finished at step {STEPS}") == 1
        assert "".join(printed).count(" parameters\n") == 1
        weights[launcher] = read_checkpoint(tmp_path / "run")["state_dict"]
        (tmp_path / "run").rename(tmp_path / launcher)
    for name, value in weights["torchrun"].items():
        assert torch.equal(value, weights["slurm"][name]), name


@pytest.mark.parametrize(
    ("launcher", "again"),
    [
        pytest.param("slurm", False, marks=pytest.mark.slow),
        pytest.param("slurm", True, marks=pytest.mark.slow),
        pytest.param("torchrun", True, marks=pytest.mark.slow),
    ],
)
def test_a_scheduler_ends_its_job_and_starts_it_again(
    launcher: str, again: bool, start: Callable[..., list["subprocess.Popen[str]"]], tmp_path: Path
) -> None:
    """SIGTERM to every task (torchrun forwards it to its processes): the step is saved, and the job resumes.

    The job starts again on two ranks, or on one, which takes less time.
    """
    processes = start(launcher, sleep=1.5)
    deadline = time.monotonic() + 120
    while not (tmp_path / "reached").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    printed = [process.communicate(timeout=120)[0] for process in processes]
    assert "".join(printed).count("stopped at step 4, which is saved: the same command resumes.") == 1, printed
    if launcher == "slurm":
        assert [process.returncode for process in processes] == [143, 0]
    else:
        assert processes[0].returncode != 0
    assert last_checkpoint(tmp_path / "run", verify=True) == tmp_path / "run" / "checkpoints" / "step-4.ckpt"
    if again:
        processes = start(launcher)
        printed = [process.communicate(timeout=300)[0] for process in processes]
        assert "".join(printed).count(f"finished at step {STEPS}") == 1, printed
        return
    settings = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    del settings["trainer"]["callbacks"]
    assert fit(tmp_path / "one_rank.yaml", settings, "--trainer.devices=1", "--trainer.strategy=auto") == 0
    assert last_checkpoint(tmp_path / "run", verify=True) == tmp_path / "run" / "checkpoints" / f"step-{STEPS}.ckpt"


def test_tasks_of_a_job_that_lightning_refuses_are_named(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable, value in {"NTASKS": "2", "PROCID": "0", "LOCALID": "0", "NODEID": "0", "JOB_NAME": "train"}.items():
        monkeypatch.setenv(f"SLURM_{variable}", value)
    assert fit(tmp_path / "recipe.yaml", recipe(tiny_shards, tmp_path / "run", max_ranks=2)) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: the trainer cannot be set up in this job: ")
    assert "--ntasks-per-node=2" in message

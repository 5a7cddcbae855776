"""Measurement of this machine for `estimate`: speed of training, and of the communication between its devices.

`python -m gpdit_lightning.cli.measured_cluster FOLDER RANK` is one of the measuring processes.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import distributed

from gpdit_lightning.cli.estimated_recipe import read_recipe
from gpdit_lightning.cli.plan_trial import MeasureSpeed, measure_speed
from gpdit_lightning.devices import available_cores
from gpdit_lightning.errors import InputError
from gpdit_lightning.estimation.memory import parameter_count
from gpdit_lightning.estimation.requirements import RunSettings
from gpdit_lightning.estimation.time import NETWORK_LATENCY, UPDATE_BYTES, Cluster, Link

REQUEST = "request.json"
LARGE, LARGE_REPEATS, SMALL_REPEATS = 25 * 2**20, 4, 50  # bytes of an all-reduce, and numbers of them
TRAINING_SECONDS, TRAINING_STEPS = 10.0, 200  # the first that is reached ends the training
LEAST_STEPS = 3  # that are measured where they take longer
TIME_LIMIT = 600  # seconds of all measurements


class Measured(NamedTuple):
    """What a process has measured.

    Attributes:
        flops_per_s: FLOP/s of the forward and backward passes, while the other processes train too.
        update_seconds: seconds of an update of the weights.
        bytes_per_s: bandwidth of a large all-reduce; 0 on one device.
        latency: seconds of a message.
    """

    flops_per_s: float
    update_seconds: float
    bytes_per_s: float
    latency: float


def measured_cluster(
    arguments: Sequence[str], run: RunSettings, node_devices: int, network_bytes_per_s: float
) -> Cluster:
    """Measure this machine: processes train the recipe at the same time, then communicate.

    Args:
        arguments: those of `fit`.
        run: settings of the recipe.
        node_devices: devices of a node.
        network_bytes_per_s: bandwidth between nodes, which is not measured.

    Raises:
        InputError: a process failed, took too long, or trained less than two steps.
    """
    on_gpus = torch.cuda.is_available()
    devices = min(run.gpus, torch.cuda.device_count() if on_gpus else available_cores())
    with TemporaryDirectory() as name:
        folder = Path(name)
        request = {"arguments": list(arguments), "gpus": run.gpus, "devices": devices}
        request |= {"seconds": TRAINING_SECONDS, "steps": TRAINING_STEPS}
        (folder / REQUEST).write_text(json.dumps(request), encoding="utf-8")
        command = [sys.executable, "-m", __name__, name]
        environment = os.environ if on_gpus else os.environ | {"OMP_NUM_THREADS": "1"}
        logs = [(folder / f"{rank}.log").open("w+") for rank in range(devices)]
        processes = [
            subprocess.Popen([*command, str(rank)], env=environment, stdout=log, stderr=log)
            for rank, log in enumerate(logs)
        ]
        try:
            deadline = time.monotonic() + TIME_LIMIT
            statuses = [process.wait(max(0.0, deadline - time.monotonic())) for process in processes]
        except subprocess.TimeoutExpired:
            raise InputError(
                f"the measurement did not end within {TIME_LIMIT} s: lower the batch, or use --tflops."
            ) from None
        finally:
            for process in processes:
                process.kill()
                process.wait()
        for rank, (status, log) in enumerate(zip(statuses, logs, strict=True)):
            log.seek(0)
            lines = log.read().strip().splitlines()
            log.close()
            if status:
                cause = lines[-1] if lines else f"exit status {status}"
                raise InputError(f"the measurement on device {rank} failed: {cause}")
        measured = [Measured(*json.loads((folder / f"{rank}.json").read_text())) for rank in range(devices)]
    slowest = Measured(
        flops_per_s=min(m.flops_per_s for m in measured),
        update_seconds=max(m.update_seconds for m in measured),
        bytes_per_s=min(m.bytes_per_s for m in measured),
        latency=max(m.latency for m in measured),
    )
    if not slowest.flops_per_s:
        raise InputError(
            "the training ended before its second optimizer step: remove trainer.max_time, or use --tflops."
        )
    return Cluster(
        flops_per_s=slowest.flops_per_s,
        memory_bytes_per_s=UPDATE_BYTES * parameter_count(run.backbone) / slowest.update_seconds,
        node=Link(slowest.bytes_per_s, slowest.latency),
        network=Link(network_bytes_per_s, NETWORK_LATENCY),
        node_devices=max(node_devices, devices),
        overlaps=on_gpus,
    )


def main(folder: Path, rank: int) -> None:
    """Measure as one of several processes, and write the result."""
    request = json.loads((folder / REQUEST).read_text(encoding="utf-8"))
    run = read_recipe(request["arguments"], request["gpus"]).run
    on_gpu = torch.cuda.is_available()
    measure = MeasureSpeed(request["seconds"], request["steps"], LEAST_STEPS)
    speed = measure_speed(request["arguments"], run, measure, f"[{rank}]" if on_gpu else "1")
    bytes_per_s = latency = 0.0
    if request["devices"] > 1:
        device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
        bytes_per_s, latency = measured_link(folder, rank, request["devices"], device)
    measured = Measured(speed.pass_flops_per_s, speed.update_seconds, bytes_per_s, latency)
    (folder / f"{rank}.json").write_text(json.dumps(measured))


def measured_link(folder: Path, rank: int, devices: int, device: torch.device) -> tuple[float, float]:
    """Return the bytes per second and the latency of all-reduces, as `Cluster.seconds` relates them to their time."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, init_method=f"file://{folder / 'store'}", rank=rank, world_size=devices)
    small = _all_reduce_seconds(torch.zeros(1, device=device), SMALL_REPEATS)
    large = _all_reduce_seconds(torch.zeros(LARGE // 4, device=device), LARGE_REPEATS)
    distributed.destroy_process_group()
    return 2 * (devices - 1) / devices * LARGE / max(large - small, 1e-9), small / (2 * (devices - 1))


def _all_reduce_seconds(tensor: torch.Tensor, repeats: int) -> float:
    """Return the mean duration of an all-reduce."""
    distributed.all_reduce(tensor)  # connects, and loads kernels
    distributed.barrier()
    tensor.sum().item()  # waits for the device
    began = time.perf_counter()
    for _ in range(repeats):
        distributed.all_reduce(tensor)
    tensor.sum().item()
    return (time.perf_counter() - began) / repeats


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

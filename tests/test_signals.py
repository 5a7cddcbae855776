"""Signals to the worker processes of a loader, and to the main process while it starts them."""

import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.utils.data import DataLoader, Dataset

from gpdit_lightning import cli
from gpdit_lightning.checkpoints.distributed import BackgroundTask
from gpdit_lightning.checkpoints.files import last_checkpoint
from gpdit_lightning.cli import VERBS, main
from gpdit_lightning.signals import SIGNALS, TERMINATING, SignalListener, Termination, ignore_signals, signals_delayed
from tests.cli.test_resume import recipe
from tests.slow_samples import InterruptedStart, SlowSamples, SlowStart

ROOT = Path(__file__).parents[1]
LINES = "dict.fromkeys(signals.SIGNALS, 'stopped.')"
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs signal.sigtimedwait")


@pytest.fixture(autouse=True)
def restored_handlers() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def workers_of(batches: Any) -> list[Any]:
    return batches._workers


def loader_of(samples: Dataset[int], **options: Any) -> DataLoader[int]:
    return DataLoader(samples, batch_size=None, num_workers=2, worker_init_fn=ignore_signals, **options)


def send(number: int, process: Any) -> None:
    """Send a signal to a process from another process than this one."""
    subprocess.run(["kill", f"-{number}", str(process.pid)], check=True)


@linux_only
@pytest.mark.parametrize("number", SIGNALS)
def test_workers_ignore_signals_of_other_processes(number: int) -> None:
    with signals_delayed():
        batches = iter(loader_of(SlowSamples()))
    first = next(batches)  # of one of the workers; the other one may be starting
    for worker in workers_of(batches):
        send(number, worker)
    assert [first, *batches] == list(range(6))


def test_the_main_process_can_terminate_a_worker() -> None:
    batches = iter(loader_of(SlowSamples()))
    next(batches)
    for worker in workers_of(batches):
        worker.terminate()
        worker.join(10)
        assert not worker.is_alive()


def test_a_worker_without_the_initializer_is_killed() -> None:
    batches = iter(DataLoader(SlowSamples(), batch_size=None, num_workers=2))
    next(batches)
    worker = workers_of(batches)[0]
    with pytest.raises(RuntimeError, match="DataLoader worker"):  # noqa: PT012 (raised at SIGCHLD, in either statement)
        send(signal.SIGTERM, worker)
        list(batches)


@linux_only
def test_a_worker_that_is_still_starting_ignores_signals(tmp_path: Path) -> None:
    resource_tracker.ensure_running()  # as `signals_delayed` does where processes are spawned by default
    loader = loader_of(SlowStart(tmp_path / "started"), multiprocessing_context="spawn")
    with signals_delayed():
        batches = iter(loader)
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for worker in workers_of(batches):
        for number in SIGNALS:
            send(number, worker)
    assert list(batches) == list(range(6))


def test_ctrl_c_while_workers_start_is_raised_after_all_of_them_have_started() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    loader, started = loader_of(InterruptedStart(), multiprocessing_context="spawn"), []
    with pytest.raises(KeyboardInterrupt), signals_delayed():  # noqa: PT012
        batches = iter(loader)
        started += workers_of(batches)
    assert len(started) == 2


def test_a_thread_that_could_not_be_started_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under `ulimit -v` or `ulimit -u`; joining it raised another error in place of the cause."""

    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    listener, task = SignalListener((signal.SIGUSR2,), print), BackgroundTask()
    for start, end in ((listener.start, listener.close), (lambda: task.start(print), task.wait)):
        with pytest.raises(RuntimeError, match="can't start new thread"):
            start()
        end()


def test_a_delayed_signal_is_handled_once_and_the_handlers_are_restored() -> None:
    received: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    with signals_delayed():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert received == []
    assert received == [signal.SIGTERM]
    signal.raise_signal(signal.SIGTERM)
    assert received == [signal.SIGTERM] * 2


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(("number", "status", "line"), [(15, 143, "stopped by SIGTERM"), (2, 130, "stopped")])
def test_a_signal_ends_every_verb_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, verb: str, number: int, status: int, line: str
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    monkeypatch.setattr(cli, "run", lambda *_: signal.raise_signal(number))
    assert main([verb]) == status
    kept = VERBS[verb].when_stopped
    assert capsys.readouterr().err == f"{line}{f': {kept}' if kept else ''}.\n"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.set_wakeup_fd(-1) == -1


@linux_only
@pytest.mark.parametrize("verb", ["fit", "sample"])
def test_sigterm_during_imports_ends_a_process_with_one_line(verb: str) -> None:
    command = [sys.executable, "-m", "gpdit_lightning", verb, "--config", "gpdit:demo/stage1_image_warmup"]
    if verb == "sample":
        command = [*command[:4], "--checkpoint", "none", "--out", "none.mp4"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    deadline = time.monotonic() + 60
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None
        assert time.monotonic() < deadline
    process.terminate()
    _, printed = process.communicate(timeout=30)
    assert process.returncode == 143
    assert printed == f"stopped by SIGTERM{': the same command resumes' if verb == 'fit' else ''}.\n"


@pytest.mark.parametrize(
    ("number", "line"), [(signal.SIGTERM, "stopped by SIGTERM"), (signal.SIGINT, "stopped")], ids=["SIGTERM", "SIGINT"]
)
def test_a_signal_during_an_import_is_not_lost(number: signal.Signals, line: str) -> None:
    script = (
        "import signal, sys\nimport gpdit_lightning.cli.parsing\nfrom gpdit_lightning import cli\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def imported(path):\n"  # as an extension module that replaces all exceptions of its initialisation
        f"    try: signal.raise_signal({int(number)})\n    except BaseException: raise ImportError('no module')\n"
        "cli.parsing.parse, cli.record_of, cli._import = (lambda *_: None), (lambda _: None), imported\n"
        "sys.exit(cli.main(['sample']))"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (process.returncode, process.stderr) == (128 + number, f"{line}.\n")


def test_ctrl_c_during_the_first_imports_ends_a_process_with_one_line() -> None:
    script = (
        "import os, runpy, signal, sys\n"
        "class Interrupts:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'gpdit_lightning.names': os.kill(os.getpid(), signal.SIGINT)\n"  # one of the first
        "sys.meta_path.insert(0, Interrupts())\n"
        "runpy.run_module('gpdit_lightning', run_name='__main__')"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (process.returncode, process.stderr) == (130, "stopped.\n")


@linux_only
@pytest.mark.parametrize(
    "blocked",
    [
        "ctypes.CDLL(None).system(b'echo; exec sleep 5 >&- 2>&-')",  # prints a line once it blocks the main thread
        "\n    try: print(flush=True); time.sleep(60)\n    except: time.sleep(60)",  # ignores all exceptions
    ],
)
def test_sigterm_ends_a_process_whose_main_thread_is_blocked(blocked: str) -> None:
    script = (
        "import ctypes, signal, time\nfrom gpdit_lightning import signals\n"
        f"signals.RAISES_WITHIN, signals.ENDS_WITHIN = 0.2, 0.6\nwith signals.Termination({LINES}):\n    {blocked}"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=-1, stderr=-1, text=True, cwd=ROOT)
    assert process.stdout is not None
    process.stdout.readline()
    process.terminate()
    _, printed = process.communicate(timeout=30)
    assert (process.returncode, printed) == (143, "stopped.\n")


def test_a_process_that_has_left_the_block_is_not_ended() -> None:
    script = (
        "import signal, time\nfrom gpdit_lightning import signals\nsignals.RAISES_WITHIN = signals.ENDS_WITHIN = 0.2\n"
        "try:\n    with signals.Termination({15: ''}): signal.raise_signal(signal.SIGTERM); time.sleep(60)\n"
        "except KeyboardInterrupt: time.sleep(1)"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=60).returncode == 0


def test_ctrl_c_while_a_finished_command_exits_prints_no_traceback() -> None:
    """An atexit callback runs, as that which waits for the other ranks of a finished training."""
    code = (
        "import atexit, time; from gpdit_lightning.cli import main; "
        "atexit.register(lambda: (print('exiting', flush=True), time.sleep(60))); main(['--version'])"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        while process.stdout.readline() != b"exiting\n":
            pass
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (-signal.SIGINT, b"")


def test_a_handler_of_sigterm_is_not_replaced() -> None:
    received: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    with Termination(dict.fromkeys(SIGNALS, "stopped.")):
        signal.raise_signal(signal.SIGTERM)
    assert received == [signal.SIGTERM]


@pytest.mark.parametrize("number", TERMINATING)
@pytest.mark.parametrize("is_ignored", [False, True])
def test_every_terminating_signal_interrupts_unless_it_is_ignored(number: int, is_ignored: bool) -> None:
    """As SIGHUP is by nohup; the second SIGHUP, which a shell sends, does not interrupt what follows."""
    signal.signal(number, signal.SIG_IGN if is_ignored else signal.SIG_DFL)
    termination = Termination(dict.fromkeys(SIGNALS, "stopped."))
    try:
        with termination:
            signal.raise_signal(number)
            assert is_ignored
    except KeyboardInterrupt:
        assert not is_ignored
    assert termination.received == (0 if is_ignored else number)


@pytest.mark.slow
def test_a_run_in_a_closed_terminal_is_saved(tiny_shards: Path, tmp_path: Path) -> None:
    """The kernel sends SIGHUP, and every message to the terminal is an error from then on."""
    settings = recipe(tiny_shards, tmp_path / "run") | {"checkpoint": {"every_steps": 10**6}}
    settings["trainer"] |= {"max_steps": 10**6, "log_every_n_steps": 1, "enable_progress_bar": True}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-m", "gpdit_lightning", "fit", f"--config={tmp_path}/recipe.yaml"])
    deadline, printed = time.monotonic() + 120, b""
    while b"it/s" not in printed and b"step" not in printed and time.monotonic() < deadline:
        printed += os.read(terminal, 1000)
    time.sleep(1)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP
    assert last_checkpoint(tmp_path / "run", verify=True) is not None

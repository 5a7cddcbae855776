"""The report: JSON with all figures, and Markdown with a table for each part."""

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check.cases import Part, Row
from gpdit_lightning.estimation.gpus import peak_bf16_flops
from gpdit_lightning.files import atomic_write

PACKAGES = ("xformers", "flash_attn", "flash_attn_3", "triton", "deepspeed", "torchao", "lightning")
ROOT = Path(__file__).parents[2]
Environment = dict[str, str | None]


def command_output(*words: str) -> str:
    """Return the first line that a command prints; '' if it fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().partition("\n")[0] if done.returncode == 0 else ""


def version_of(package: str) -> str:
    """Return the version of a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def environment(device: torch.device) -> Environment:
    """Return the date, the commit, the hardware and the versions of packages."""
    commit = command_output("git", "rev-parse", "HEAD")
    if commit and command_output("git", "status", "--porcelain", "--untracked-files=no"):
        commit += " with changes"
    facts: Environment = {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": commit or "unknown",
        "device": "cpu",
        "processors": str(len(os.sched_getaffinity(0))),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        peak = peak_bf16_flops(properties.name)
        facts |= {
            "device": properties.name,
            "device memory": f"{properties.total_memory / 2**30:.1f} GiB",
            "dense bf16 peak": f"{peak / 1e12:.0f} TFLOP/s" if peak else "unknown",
            "driver": command_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown",
        }
    return facts | {package: version_of(package) for package in PACKAGES}


@dataclass
class Report:
    """What was measured so far.

    Attributes:
        facts: the environment.
        smoke_test: whether the figures are of a smoke test.
        rows: of each part, in the order in which they were measured.
    """

    facts: Environment
    smoke_test: bool
    rows: dict[str, list[Row]] = field(default_factory=dict)

    @property
    def failed(self) -> int:
        """The number of failed measurements."""
        return sum(bool(row["failure"]) for rows in self.rows.values() for row in rows)

    @property
    def not_run(self) -> int:
        """The number of measurements that were not run."""
        return sum(bool(row["skipped"]) for rows in self.rows.values() for row in rows)

    def as_json(self) -> str:
        """Return all figures."""
        of_parts = {name: [row | {"passed": not row["failure"]} for row in rows] for name, rows in self.rows.items()}
        content = {**self.facts, "smoke_test": self.smoke_test, "passed": not self.failed, **of_parts}
        return json.dumps(content, indent=2) + "\n"

    def as_markdown(self, parts: Iterable[Part]) -> str:
        """Return the environment and a table for each part that has begun."""
        lines = ["# GPU check", ""]
        if self.smoke_test:
            lines += ["Smoke test at a tiny size on the CPU: the figures below are meaningless.", ""]
        lines += ["| " + " | ".join(pair) + " |" for pair in (("environment", ""), ("---", "---"))]
        lines += [f"| {name} | {value} |" for name, value in self.facts.items()]
        for part in parts:
            if part.name in self.rows:
                lines += ["", f"## {part.title}", "", *markdown_table(self.rows[part.name], part.columns)]
                lines += ["", part.note] if part.note else []
        return "\n".join([*lines, ""])

    def write(self, path: Path, parts: Iterable[Part]) -> None:
        """Write the JSON file, and the Markdown beside it."""
        for target, text in ((path, self.as_json()), (path.with_suffix(".md"), self.as_markdown(parts))):
            with atomic_write(target) as partial:
                partial.write_text(text)


def verdict(row: Row) -> str:
    """Return the result of a case in words."""
    if row["skipped"]:
        return f"not run: {row['skipped']}"
    return f"FAILED: {row['failure']}" if row["failure"] else "ok"


def markdown_table(rows: Sequence[Row], columns: Mapping[str, tuple[str, str]]) -> list[str]:
    """Return the lines of a table; `columns` maps each figure to its heading and format."""

    def cell(value: Any, spec: str) -> str:
        return "-" if value is None else format(value, spec).replace("|", "\\|")

    lines = [[heading for heading, _ in columns.values()] + ["result"], ["---"] * (len(columns) + 1)]
    for row in rows:
        cells = [cell(row.get(name), spec) for name, (_, spec) in columns.items()]
        lines.append([*cells, verdict(row).replace("|", "\\|")])
    return ["| " + " | ".join(line) + " |" for line in lines]

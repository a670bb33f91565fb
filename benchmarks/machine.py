"""Describes the machine and the versions that a table was measured with; no names of hosts or folders."""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

import peft_composition


def describe(device: torch.device, sources: tuple[str, ...] = ("peft_composition",)) -> dict[str, Any]:
    """What a reader needs to judge the figures of a run.

    Args:
        device: where it ran.
        sources: folders of this working tree that decide the figures: the commit is marked where they have changed.
    """
    described: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": psutil.cpu_count(logical=False),
        "threads": torch.get_num_threads(),
        "ram_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_before": round(psutil.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft")},
        "peft-composition": peft_composition.__version__,
        "commit": _commit(sources),
        "date": datetime.now(UTC).date().isoformat(),
    }
    if device.type == "cuda":
        described["gpu"] = torch.cuda.get_device_name(device)
        described["cuda"] = torch.version.cuda
    return described


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit(sources: tuple[str, ...]) -> str:
    """The commit of this working tree, marked where the sources in it are others."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--", *sources)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}, sources changed" if changed else commit


def _git(*arguments: str) -> str:
    folder = Path(__file__).parents[1]
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

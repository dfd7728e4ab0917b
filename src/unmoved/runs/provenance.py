"""Record where a result comes from: versions, hardware, seed, git state and time."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Collection
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

from unmoved.core.untrusted import Json, readable
from unmoved.models import Loaded

PACKAGES = ("unmoved", "torch", "lightning-fabric", "numpy", "scipy", "scikit-learn", "pandas", "pillow")


def provenance(recipe: Json, weights: Loaded | None = None) -> Json:
    """Make a record of this machine and moment, and of the weights that a model began with."""
    training = recipe.get("training")
    begun: Json = {} if weights is None else {"weights": weights._asdict()}
    return begun | {
        "command": readable(" ".join([Path(sys.argv[0]).name, *sys.argv[1:]])),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": training.get("seed") if isinstance(training, dict) else None,
        "versions": {**versions()},
        "hardware": hardware(),
        "git": _git(),
    }


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of the packages that results depend on; None for one that is not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def code(packages: Collection[str] = ()) -> str:
    """Compute the sha256 of the code of unmoved and these packages, which may change without their versions."""
    tops = {name.partition(".")[0] for name in packages}
    theirs = [module for name, module in list(sys.modules.items()) if name.partition(".")[0] in tops]
    files = {Path(file) for module in theirs if (file := getattr(module, "__file__", None))}
    return hashlib.sha256(b"".join(sorted([*_own_code(), *map(_sha256, files)]))).hexdigest()


@cache
def _own_code() -> tuple[bytes, ...]:
    return tuple(_sha256(path) for path in Path(__file__).parents[1].rglob("*.py"))


def _sha256(path: Path) -> bytes:
    try:
        return hashlib.sha256(path.read_bytes()).digest()
    except OSError:  # imported from an archive, or gone since
        return str(path).encode()


def hardware() -> Json:
    """Describe the processor, its cores and the threads used, memory in GiB, and the GPU if there is one."""
    facts: Json = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        facts["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git() -> Json | None:
    """Return the commit of the current folder's repository and whether it has changes; None outside one."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, timeout=10, check=True)
        status = subprocess.run(["git", "status", "--porcelain"], capture_output=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    # As bytes, since names of files may have any encoding.
    return {"commit": commit.stdout.decode("ascii").strip(), "dirty": bool(status.stdout.strip())}

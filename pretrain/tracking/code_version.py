"""Which code a run runs: the git commit and what differs from it, or a digest of the files; and the versions it stands on."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Optional

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("data", "parallel", "pretrain")
STANDS_ON = ("torch", "deepspeed", "megatron-core", "numpy", "webdataset", "mlflow")
GIT_SECONDS = 10.0


def code_version(root: Path = ROOT) -> dict[str, Any]:
    """{"git": {"commit", "dirty", "diff_sha256"} if `root` is a git checkout, "files": {"sha256", "count"}, "versions": {...}}.

    No file of the project is imported and no remote address is read: those may hold passwords.
    """
    found: dict[str, Any] = {"files": _files(root), "versions": {"python": platform.python_version()}}
    if git := _git_version(root):
        found["git"] = git
    for name in STANDS_ON:
        try:
            found["versions"][name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _files(root: Path) -> dict[str, Any]:
    """One digest over the names and contents of the packages' sources: the same for a copy, whatever made it."""
    digest, count = hashlib.sha256(), 0
    for path in sorted(path for package in PACKAGES for path in (root / package).rglob("*.py")):
        digest.update(
            f"{path.relative_to(root).as_posix()}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode()
        )
        count += 1
    return {"sha256": digest.hexdigest(), "count": count}


def _git_version(root: Path) -> Optional[dict[str, Any]]:
    """None unless `root` itself is the top of a checkout: a copy inside another repository is not that commit."""
    top = _git(root, "rev-parse", "--show-toplevel")
    commit = _git(root, "rev-parse", "HEAD")
    if top is None or commit is None or Path(top.decode().strip()).resolve() != root.resolve():
        return None
    status = _git(root, "status", "--porcelain", "--untracked-files=normal") or b""
    found: dict[str, Any] = {"commit": commit.decode().strip(), "dirty": bool(status.strip())}
    if found["dirty"]:
        found["diff_sha256"] = hashlib.sha256(_git(root, "diff", "HEAD", "--binary") or b"").hexdigest()
    return found


def _git(root: Path, *arguments: str) -> Optional[bytes]:
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(root), *arguments],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=GIT_SECONDS,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None

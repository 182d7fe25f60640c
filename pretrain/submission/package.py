"""What a job runs, kept beside the run: RUN/submitted/TIME-HASH holds its config, the code as it was, and a hash of every file.

A requeue weeks later starts from there, whatever has become of the checkout; a later submission gets a folder of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from data.durable import fsync_folder
from data.errors import InputError
from pretrain.config import Config

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("data", "parallel", "pretrain", "slurm")
SCRIPT = Path("slurm") / "pretrain.sbatch"


def code_files(root: Path = ROOT) -> list[Path]:
    """Every file of the packages, relative to `root`, without what Python makes of them."""
    return sorted(
        path.relative_to(root)
        for package in PACKAGES
        for path in (root / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    )


def hash_list(root: Path, files: list[Path]) -> str:
    """One line a file, as sha256sum writes and checks them."""
    return "".join(f"{hashlib.sha256((root / file).read_bytes()).hexdigest()}  {file}\n" for file in files)


def package(config: Config, folder: Path, environment: str, about: dict[str, Any]) -> Path:
    """Writes one submission of the run at `folder` and returns its folder; all of it is there, or nothing.

    environment: a file that the job's shell sources, "" for none. about: what else to keep in submitted.json, without passwords.
    Nobody but the user may read the config, whose addresses may hold passwords, the environment, and submitted.json.
    InputError if the folder cannot be written.
    """
    files = code_files()
    hashes = hash_list(ROOT, files)
    digest = hashlib.sha256(hashes.encode()).hexdigest()
    submitted = folder / "submitted"
    name = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{digest[:8]}"
    temporary = submitted / f".{name}.{os.getpid()}"
    try:
        temporary.mkdir(parents=True)
        for file in files:
            (temporary / "code" / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / file, temporary / "code" / file)
        (temporary / "code.sha256").write_text(hashes)
        shutil.copyfile(ROOT / SCRIPT, temporary / "job.sbatch")
        if environment:
            _write_private(temporary / "environment.sh", Path(environment).read_bytes())
        settings = yaml.safe_dump(json.loads(json.dumps(asdict(config))), sort_keys=False)
        _write_private(temporary / "config.yaml", settings.encode())
        record = {"time": time.time(), "code_sha256": digest, **about}
        _write_private(temporary / "submitted.json", (json.dumps(record, indent=1) + "\n").encode())
        fsync_folder(temporary)
        final, again = submitted / name, 1
        while final.exists():  # twice in one second
            again += 1
            final = submitted / f"{name}-{again}"
        temporary.rename(final)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise InputError(f"{submitted} cannot be written ({error.strerror}): choose another run.dir") from None
    return final


def _write_private(path: Path, content: bytes) -> None:
    """A new file that nobody but the user may read."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)


def forget(package: Path) -> None:
    """Takes a submission that Slurm refused away, and the folders that it alone made."""
    shutil.rmtree(package, ignore_errors=True)
    for parent in (package.parent, package.parents[1] / "logs", package.parents[1]):
        try:
            parent.rmdir()
        except OSError:  # something else lies there
            continue

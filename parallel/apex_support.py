"""NVIDIA apex, found without running anything that only has its name.

Apex is built from source on a cluster (requirements-cluster.txt). The package called `apex` on the public index is
another project, so a package is taken for NVIDIA's only by the files it has, and foreign code is never imported.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

ConfigKey = Literal["model.norm_impl", "optimizer.impl"]


@dataclass(frozen=True)
class ApexStatus:
    """What is installed under the name `apex`.

    Args:
        found: some package of this name exists.
        is_nvidia: it has the files of NVIDIA's.
        fused_rms_norm: `apex.normalization.FusedRMSNorm` and its compiled extension exist.
        fused_adam: `apex.optimizers.FusedAdam` and its compiled extension exist.
        version: as its metadata says; NVIDIA's says 0.1 whatever the release.
        reason: one sentence for the user.
    """

    found: bool
    is_nvidia: bool
    fused_rms_norm: bool
    fused_adam: bool
    version: str | None
    reason: str


@dataclass(frozen=True)
class _Fused:
    """Where a fused feature lives."""

    module: str  # imported for the class
    file: str  # the source file that defines the class, below the package folder
    class_name: str
    extension: str  # the compiled top-level module that does the work


# By the configuration key that asks for it with the value `apex`.
_FEATURES: dict[str, _Fused] = {
    "model.norm_impl": _Fused(
        module="apex.normalization",
        file="normalization/fused_layer_norm.py",
        class_name="FusedRMSNorm",
        extension="fused_layer_norm_cuda",
    ),
    "optimizer.impl": _Fused(
        module="apex.optimizers",
        file="optimizers/fused_adam.py",
        class_name="FusedAdam",
        extension="amp_C",
    ),
}
_NVIDIA_LAYOUT = ("normalization/fused_layer_norm.py", "multi_tensor_apply/__init__.py")


def detect_apex() -> ApexStatus:
    """What is installed under the name `apex`, read from the file system: nothing is imported, nothing is raised."""
    folder = _package_folder()
    if folder is None:
        return ApexStatus(False, False, False, False, None, "no package named apex is installed")
    version = _version()
    if not all((folder / file).is_file() for file in _NVIDIA_LAYOUT):
        reason = f"the package named apex in {folder} (version {version or 'unknown'}) is another project, not NVIDIA's"
        return ApexStatus(True, False, False, False, version, reason)
    ready = {key: _defines_class(folder, fused) and _exists(fused.extension) for key, fused in _FEATURES.items()}
    lacking = [f"{_FEATURES[key].class_name} ({_FEATURES[key].extension})" for key, ok in ready.items() if not ok]
    reason = f"NVIDIA apex in {folder}"
    if lacking:
        reason += f", built without the compiled extension of {' and '.join(lacking)}"
    return ApexStatus(True, True, ready["model.norm_impl"], ready["optimizer.impl"], version, reason)


def require_apex(key: ConfigKey) -> Any:
    """The class that `key`=apex asks for: apex.normalization.FusedRMSNorm or apex.optimizers.FusedAdam.

    Raises:
        ValueError: it is not there or does not load; one line says who asked, what was found and what to do.
    """
    fused, status = _FEATURES[key], detect_apex()
    problem = status.reason
    if status.fused_rms_norm if key == "model.norm_impl" else status.fused_adam:
        try:
            importlib.import_module("torch")  # the extension links against torch's libraries
            importlib.import_module(fused.extension)
            return getattr(importlib.import_module(fused.module), fused.class_name)
        except Exception as error:  # most often: built for another torch or CUDA (undefined symbol)
            first_line = (str(error).splitlines() or [type(error).__name__])[0]
            problem = f"{status.reason}, but {fused.extension} does not load ({first_line})"
    raise ValueError(
        f"{key}=apex needs {fused.module}.{fused.class_name}; found: {problem}; build NVIDIA apex from "
        f"source as requirements-cluster.txt says, or set {key}=torch"
    )


def _package_folder() -> Path | None:
    """The folder of the package `apex`; for a single-file module that file, which has no NVIDIA layout inside.

    A folder without `__init__.py` is no package: a fresh clone of the sources beside this repository is not an install.
    """
    try:
        spec = importlib.util.find_spec("apex")  # a top-level name: no parent that would be imported
        if spec is None or spec.origin is None:
            return None
        return Path(spec.submodule_search_locations[0] if spec.submodule_search_locations else spec.origin)
    except Exception:  # a broken import hook or a half-removed install counts as absent
        return None


def _version() -> str | None:
    try:
        return importlib.metadata.version("apex")
    except Exception:  # no metadata, or unreadable: the version is only shown
        return None


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except Exception:
        return False


def _defines_class(folder: Path, fused: _Fused) -> bool:
    """Whether the source file defines the class (apex before 2022 has FusedLayerNorm but no FusedRMSNorm)."""
    try:
        return f"class {fused.class_name}(" in (folder / fused.file).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False

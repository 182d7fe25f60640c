"""Apex is recognised by its files: absent, foreign, without extensions, complete, and built for another torch."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch  # noqa: F401  require_apex imports it; the fixture may hide the folder it lies in

from parallel.apex_support import detect_apex, require_apex

NAMES = ("apex", "fused_layer_norm_cuda", "amp_C")


@pytest.fixture
def site(tmp_path, monkeypatch):
    """An importable folder; names of apex that a test imported, or that this machine has, do not leak in or out."""

    def forget():
        for name in [n for n in sys.modules if n.split(".")[0] in NAMES]:
            monkeypatch.delitem(sys.modules, name)

    forget()
    own = [p for p in sys.path if not any((Path(p) / "apex").exists() or (Path(p) / f"{n}.py").exists() for n in NAMES)]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *own])
    yield tmp_path
    forget()


def write(site: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text)
    importlib.invalidate_caches()


def booby_trap(site: Path) -> str:
    return f"open({str(site / 'executed')!r}, 'w').close()\nraise SystemExit('foreign code ran')\n"


def nvidia_layout(init: str = "") -> dict[str, str]:
    return {
        "apex/__init__.py": init,
        "apex/multi_tensor_apply/__init__.py": "",
        "apex/normalization/__init__.py": "from .fused_layer_norm import FusedRMSNorm\n",
        "apex/normalization/fused_layer_norm.py": "class FusedRMSNorm(object):\n    pass\n",
        "apex/optimizers/__init__.py": "from .fused_adam import FusedAdam\n",
        "apex/optimizers/fused_adam.py": "class FusedAdam(object):\n    pass\n",
    }


def one_line(error: pytest.ExceptionInfo, *parts: str) -> None:
    text = str(error.value)
    assert "\n" not in text and all(part in text for part in ("requirements-cluster.txt", "=torch", *parts)), text


def test_absent(site):
    status = detect_apex()
    assert not (status.found or status.is_nvidia or status.fused_rms_norm or status.fused_adam)
    with pytest.raises(ValueError) as error:
        require_apex("model.norm_impl")
    one_line(error, "model.norm_impl=apex", "no package named apex")
    with pytest.raises(ValueError) as error:
        require_apex("optimizer.impl")
    one_line(error, "optimizer.impl=apex", "apex.optimizers.FusedAdam")


@pytest.mark.parametrize(
    "extra",
    [
        (),
        ("apex/normalization/__init__.py",),
        ("apex/normalization/fused_layer_norm.py", "fused_layer_norm_cuda.py"),
        ("apex/multi_tensor_apply/__init__.py", "amp_C.py"),
    ],
)
def test_a_foreign_package_of_the_same_name_is_recognised_and_never_run(site, extra):
    trap = booby_trap(site)
    metadata = "Metadata-Version: 2.1\nName: apex\nVersion: 0.9.10.dev0\n"
    write(
        site,
        {
            "apex/__init__.py": trap,
            "apex/models.py": trap,
            "apex-0.9.10.dev0.dist-info/METADATA": metadata,
            **dict.fromkeys(extra, trap),
        },
    )
    status = detect_apex()
    assert status.found and not status.is_nvidia and not status.fused_rms_norm and not status.fused_adam
    assert status.version == "0.9.10.dev0" and "not NVIDIA's" in status.reason
    for key in ("model.norm_impl", "optimizer.impl"):
        with pytest.raises(ValueError) as error:
            require_apex(key)
        one_line(error, "not NVIDIA's", str(site / "apex"))
    assert not (site / "executed").exists() and "apex" not in sys.modules


def test_a_foreign_single_file_module_is_recognised_and_never_run(site):
    write(site, {"apex.py": booby_trap(site)})
    status = detect_apex()
    assert status.found and not status.is_nvidia and not (site / "executed").exists()


def test_cloned_sources_without_an_install_count_as_absent(site):
    write(site, {f"apex/{name}": text for name, text in nvidia_layout().items()})
    assert not detect_apex().found


def test_detection_runs_nothing_even_of_nvidias(site):
    trap = booby_trap(site)
    write(site, {**nvidia_layout(init=trap), "amp_C.py": trap, "fused_layer_norm_cuda.py": trap})
    assert detect_apex().fused_rms_norm and detect_apex().fused_adam and not (site / "executed").exists()


def test_nvidia_without_compiled_extensions_offers_nothing(site):
    write(site, nvidia_layout(init=booby_trap(site)))
    status = detect_apex()
    assert status.found and status.is_nvidia and not status.fused_rms_norm and not status.fused_adam
    with pytest.raises(ValueError) as error:
        require_apex("optimizer.impl")
    one_line(error, "without the compiled extension", "amp_C")
    assert not (site / "executed").exists()


def test_each_feature_follows_its_own_extension_and_class(site):
    write(site, {**nvidia_layout(), "amp_C.py": ""})
    assert (detect_apex().fused_rms_norm, detect_apex().fused_adam) == (False, True)
    assert require_apex("optimizer.impl").__name__ == "FusedAdam"
    old = "class FusedLayerNorm(object):\n    pass\n"
    write(site, {"fused_layer_norm_cuda.py": "", "apex/normalization/fused_layer_norm.py": old})
    assert not detect_apex().fused_rms_norm, "an old release has no FusedRMSNorm"


def test_complete_nvidia_apex_gives_both_classes(site):
    write(site, {**nvidia_layout(), "amp_C.py": "", "fused_layer_norm_cuda.py": ""})
    status = detect_apex()
    assert status.is_nvidia and status.fused_rms_norm and status.fused_adam and str(site / "apex") in status.reason
    assert require_apex("model.norm_impl").__name__ == "FusedRMSNorm"
    assert require_apex("optimizer.impl").__name__ == "FusedAdam"


def test_an_extension_built_for_another_torch_is_one_clear_line(site):
    broken = "raise ImportError('libc10.so: undefined symbol: _ZN3c10\\nsecond line')"
    write(site, {**nvidia_layout(), "amp_C.py": broken, "fused_layer_norm_cuda.py": broken})
    assert detect_apex().fused_adam, "only loading can tell"
    with pytest.raises(ValueError) as error:
        require_apex("optimizer.impl")
    one_line(error, "does not load", "undefined symbol")


def test_a_broken_import_hook_counts_as_absent(site, monkeypatch):
    class Broken:
        def find_spec(self, *args):
            raise RuntimeError("hook")

    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    assert not detect_apex().found

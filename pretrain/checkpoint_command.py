"""`checkpoint inspect` and `checkpoint verify`: what a checkpoint holds and whether it is whole, without a process group."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Optional

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from data.errors import InputError
from parallel import checkpoint
from parallel.boxes import Boxes, BoxLoadPlanner
from parallel.checkpoint_reader import (
    FileReport,
    Reader,
    check_boxes,
    file_reports,
    read_metadata,
    read_trainer,
    recorded_files,
    sha256_of,
)
from parallel.errors import CheckpointError
from parallel.shape import ModelShape, parameter_table
from pretrain.json_file import write_json
from pretrain.loop.trouble import describe as describe_trouble

KINDS = ("weight", "exp_avg", "exp_avg_sq")


def checkpoints_at(path: str) -> list[Path]:
    """A checkpoint folder alone, or every complete one of a run folder, oldest first; InputError if there is none."""
    folder = Path(path)
    if (folder / "trainer.json").exists() or (folder / ".metadata").exists():
        return [folder]
    found = checkpoint.complete_checkpoints(folder / "checkpoints") or checkpoint.complete_checkpoints(folder)
    if not found:
        raise InputError(f"{path}: no checkpoint there; name a run folder or RUN/checkpoints/step-NNNNNNNN")
    return found


def describe(folder: Path, norms: bool = False) -> dict[str, Any]:
    """What `inspect` prints, as plain values; sizes in bytes. CheckpointError if it cannot be read."""
    trainer, metadata, files = read_trainer(folder), read_metadata(folder), recorded_files(folder)
    config = trainer.get("config") or {}
    samples = trainer.get("samples_consumed")
    length = (config.get("data") or {}).get("sequence_length")
    tensors: list[dict[str, Any]] = [
        {
            "name": name,
            "shape": list(stored.size),
            "dtype": str(stored.properties.dtype).removeprefix("torch."),
            "boxes": len(stored.chunks),
            "bytes": stored.size.numel() * stored.properties.dtype.itemsize,
        }
        for name, stored in _tensors(metadata)
    ]
    if norms:
        for tensor, norm in zip(tensors, _norms(folder, metadata)):
            tensor["norm"] = norm
    return {
        "checkpoint": str(folder),
        "step": trainer.get("step"),
        "applied_steps": trainer.get("applied_steps"),
        "samples": samples,
        "tokens": samples * length if samples is not None and length else None,
        **describe_trouble(trainer),
        "written_by": {"ranks": sum(name.endswith(".distcp") for name in files), **(config.get("parallel") or {})},
        "model": config.get("model"),
        "run": config.get("run"),
        "data_fingerprint": trainer.get("data_fingerprint"),
        "tokenizer_sha256": trainer.get("tokenizer_sha256"),
        "mlflow_run_id": trainer.get("mlflow_run_id"),
        "parameters": sum(math.prod(t["shape"]) for t in tensors if t["name"].startswith("weight/")),
        "bytes_of_values": sum(t["bytes"] for t in tensors),
        "bytes_on_disk": sum(size for size, _ in files.values()),
        "tensors": tensors,
    }


def _tensors(metadata: Metadata) -> Iterator[tuple[str, TensorStorageMetadata]]:
    """In the model's order as far as names tell: numbers count as numbers."""

    def order(name: str) -> list[tuple[bool, int, str]]:
        return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]

    for name in sorted(metadata.state_dict_metadata, key=order):
        stored = metadata.state_dict_metadata[name]
        assert isinstance(stored, TensorStorageMetadata)
        yield name, stored


def _norms(folder: Path, metadata: Metadata) -> Iterator[float]:
    """The Euclidean norm of each tensor, one tensor in memory at a time."""
    reader = Reader(str(folder))
    for name, stored in _tensors(metadata):
        values = torch.zeros(stored.size, dtype=stored.properties.dtype)
        boxes = Boxes(stored.size, [((0,) * values.dim(), values)], values.dtype)
        dcp.load({name: boxes}, storage_reader=reader, planner=BoxLoadPlanner(), no_dist=True)
        yield float(values.norm(dtype=torch.float64))


def inspect(path: str, json_file: Optional[str] = None, norms: bool = False) -> int:
    """Prints the newest checkpoint of `path`; the same as JSON to `json_file`. Returns the exit code."""
    found = describe(checkpoints_at(path)[-1], norms)
    if json_file:
        write_json(json_file, found)
    for key, value in found.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        if key.startswith("bytes"):
            value = f"{value:,}"
        if key != "tensors" and value is not None:
            print(f"{key.replace('_', ' '):<18} {value}")
    width = max((len(t["name"]) for t in found["tensors"]), default=4)
    print(f"\n{'tensor':<{width}}  {'shape':<18} {'dtype':<9} {'boxes':>6} {'bytes':>15}{'  norm' if norms else ''}")
    for t in found["tensors"]:
        norm = f"  {t['norm']:.6g}" if norms else ""
        shape = "x".join(map(str, t["shape"]))
        print(f"{t['name']:<{width}}  {shape:<18} {t['dtype']:<9} {t['boxes']:>6} {t['bytes']:>15,}{norm}")
    return 0


def verify(path: str, json_file: Optional[str] = None) -> int:
    """Reads every byte of the checkpoint, or of all checkpoints of a run folder. Returns the exit code: 2 if one is bad."""
    bad, reports = 0, []
    for folder in checkpoints_at(path):
        found = []
        print(folder)
        for report in findings(folder):
            print(
                f"  {'BAD ' if report.problem else 'ok  '} {report.name}  {report.problem or f'{report.bytes:,} bytes'}"
            )
            found.append(asdict(report))
        bad += any(report["problem"] for report in found)
        reports.append({"checkpoint": str(folder), "findings": found})
    print(f"{len(reports) - bad} of {len(reports)} checkpoints are whole")
    if json_file:
        write_json(json_file, reports)
    return 2 if bad else 0


def findings(folder: Path) -> Iterator[FileReport]:
    """One report for each file, and one for what the files say together; a problem ends nothing but its own line."""
    try:
        trainer = read_trainer(folder)
        files = list(recorded_files(folder))
    except CheckpointError as error:
        yield FileReport("checkpoint", 0, _without(folder, error))
        return
    damaged = False
    for report in file_reports(folder):
        damaged |= report.problem is not None
        yield report
    unknown = {p.name for p in folder.iterdir()} - {*files, "files.json"}
    if unknown:
        yield FileReport("other files", 0, f"not part of the checkpoint: {', '.join(sorted(unknown)[:5])}")
    if damaged:
        return
    try:
        metadata = read_metadata(folder)
        check_boxes(folder, metadata)
        yield FileReport("boxes", 0, _of_another_architecture(trainer, metadata))
    except CheckpointError as error:
        yield FileReport("boxes", 0, _without(folder, error))
    yield from _tokenizer(folder, trainer)


def _without(folder: Path, error: CheckpointError) -> str:
    return str(error).removeprefix(f"checkpoint {folder}: ")


def _of_another_architecture(trainer: dict[str, Any], metadata: Metadata) -> Optional[str]:
    """What the stored tensors lack of, or have beyond, the model of the stored config."""
    sizes = (trainer.get("config") or {}).get("model")
    if not sizes:
        return None
    shape = ModelShape(**{key: sizes[key] for key in ModelShape.__dataclass_fields__ if key in sizes})
    wanted = {f"{kind}/{name}": spec.shape for name, spec in parameter_table(shape).items() for kind in KINDS}
    stored = {name: tuple(found.size) for name, found in _tensors(metadata)}
    for name in [*wanted, *stored]:
        if wanted.get(name) != stored.get(name):
            return f"{name} is {stored.get(name, 'missing')}, the config's model has {wanted.get(name, 'none of that name')}"
    return None


def _tokenizer(folder: Path, trainer: dict[str, Any]) -> Iterator[FileReport]:
    """The copy in the run folder, two folders up, if there is one: is it the one that the run was trained with?"""
    file, expected = folder.absolute().parent.parent / "tokenizer.json", trainer.get("tokenizer_sha256")
    if expected and file.is_file():
        problem = None if sha256_of(file) == expected else f"{file} is not the tokenizer that the run was trained with"
        yield FileReport("tokenizer", file.stat().st_size, problem)

"""What MLflow is told of configs and code versions: params once, every change a tag of its own."""

from __future__ import annotations

import re
import time
from typing import Any, Optional

PARAM_LENGTH = 6000  # characters; MLflow cuts a longer one without a word
TAG_LENGTH = 5000
_NAME_LENGTH = 250


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """{"train.steps": "1000", ...} of sections and keys."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[_key(prefix + str(key))] = str(value)
    return flat


def params_of(event: dict[str, Any], recorded: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """(params to be recorded, tags) of a run's first config. A param that is `recorded` with another value becomes a tag."""
    flat = flatten(event["values"])
    artifact = f"artifact config/config.v{event['version']}.yaml"
    params = {key: cut(value, PARAM_LENGTH, artifact) for key, value in flat.items()}
    tags = {"config.version": str(event["version"])}
    for key in params.keys() & recorded.keys():
        if recorded[key] != params[key]:
            tags |= _change("config", event, key, recorded[key], flat[key])
    return {key: value for key, value in params.items() if key not in recorded}, tags


def config_tags(before: dict[str, Any], event: dict[str, Any]) -> dict[str, str]:
    """Tags of a config that follows another one: config.version, and `config.v2.train.steps = 1000 -> 2000 (...)`."""
    return {"config.version": str(event["version"])} | _changes("config", before, event)


def code_tags(before: Optional[dict[str, Any]], event: dict[str, Any]) -> dict[str, str]:
    """Tags of a code version: what holds now (`code.git.commit`, ...), and what changed since the one before."""
    tags = {f"code.{key}": cut(value, TAG_LENGTH) for key, value in flatten(event["values"]).items()}
    tags["code.version"] = str(event["version"])
    if commit := event["values"].get("git", {}).get("commit"):
        tags["mlflow.source.git.commit"] = commit  # where MLflow's own pages look for it
    return tags | (_changes("code", before, event) if before else {})


def cut(value: str, limit: int, whole: str = "") -> str:
    """`value`, and where it is longer than `limit`, what is left of it and how much it was."""
    if len(value) <= limit:
        return value
    note = f" ...[cut, {len(value)} characters{f'; whole in {whole}' if whole else ''}]"
    return value[: limit - len(note)] + note


def _changes(what: str, before: dict[str, Any], event: dict[str, Any]) -> dict[str, str]:
    old, new = flatten(before["values"]), flatten(event["values"])
    tags: dict[str, str] = {}
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            tags |= _change(what, event, key, old.get(key, "(none)"), new.get(key, "(none)"))
    return tags


def _change(what: str, event: dict[str, Any], key: str, old: str, new: str) -> dict[str, str]:
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(event["time"]))
    half = TAG_LENGTH // 2 - 50
    return {
        _key(
            f"{what}.v{event['version']}.{key}"
        ): f"{cut(old, half)} -> {cut(new, half)} (step {event['step']}, {when})"
    }


def _key(name: str) -> str:
    return re.sub(r"[^\w/.\- :]", "_", name)[:_NAME_LENGTH]

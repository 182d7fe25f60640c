"""A cluster as the planner sees it: GPUs in nodes, and two kinds of links. Read from configs/clusters/NAME.yaml."""

from __future__ import annotations

import math
import typing
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Optional

import yaml

from data.errors import InputError

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "clusters"


@dataclass(frozen=True)
class Cluster:
    """Rates are bytes a second of one GPU in one direction; `efficiency` is the share of them that collectives reach.

    flops: dense bf16 peak, FLOP/s. memory: GiB of a GPU. latency: seconds of one hop. price: of a GPU-hour, in whatever currency.
    """

    name: str
    gpu: str
    flops: float
    memory: float
    gpus_per_node: int
    nvlink: float
    network: float
    latency: float
    efficiency: float = 1.0
    price: Optional[float] = None


@dataclass(frozen=True)
class Link:
    """What a group of ranks shares: how far it reaches, and its bus bandwidth, bytes a second."""

    ranks: int
    name: str  # "nvlink", "network"; "" for a single rank
    rate: float
    latency: float

    def seconds(self, wire_bytes: float, calls: float) -> float:
        """Of `calls` collectives in which a rank sends wire_bytes in all; each also crosses log2(ranks) hops."""
        if self.ranks == 1 or not calls:
            return 0.0
        return wire_bytes / self.rate + calls * self.latency * math.ceil(math.log2(self.ranks))


def link_of(cluster: Cluster, ranks: int, stride: int) -> Link:
    """The link of a group whose members are `stride` ranks apart; ranks fill nodes in order.

    Of a group that leaves its nodes a ring enters each node once, and the members in a node share their adapters for it (each
    GPU has one): members x network, at most NVLink. The other adapters of the node carry the other groups at the same time.
    """
    if ranks == 1:
        return Link(1, "", math.inf, 0.0)
    span = ranks * stride
    if span <= cluster.gpus_per_node and cluster.gpus_per_node % span == 0:  # else some group lies on two nodes
        return Link(ranks, "nvlink", cluster.nvlink * cluster.efficiency, cluster.latency)
    members = max(1, cluster.gpus_per_node // stride)
    rate = min(cluster.nvlink, members * cluster.network)
    return Link(ranks, "network", rate * cluster.efficiency, cluster.latency)


def read_cluster(place: str) -> Cluster:
    """Of a YAML file, or the name of one in configs/clusters. InputError with one line for what is missing or wrong in it."""
    path = Path(place)
    if not path.suffix and not path.exists():
        path = FOLDER / f"{place}.yaml"
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError):
        known = ", ".join(sorted(p.stem for p in FOLDER.glob("*.yaml")))
        raise InputError(f"--cluster {place}: cannot be read; give a YAML file, or one of {known}") from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"--cluster {place}: no YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(values, dict):
        raise InputError(f"--cluster {place}: must hold keys and values: {', '.join(f.name for f in fields(Cluster))}")
    return _cluster(place, values)


def _cluster(place: str, values: dict[Any, Any]) -> Cluster:
    known = {f.name: f for f in fields(Cluster)}
    hints = typing.get_type_hints(Cluster)
    for key in values:
        if key not in known:
            raise InputError(f"--cluster {place}: unknown key {key}; there are {', '.join(known)}")
    found: dict[str, Any] = {}
    for key, field in known.items():
        value = values.get(key)
        if value is None:
            if field.default is MISSING:
                raise InputError(f"--cluster {place}: {key} is missing; needed are {', '.join(_needed())}")
            continue
        found[key] = _text(place, key, value) if hints[key] is str else _number(place, key, value)
    cluster = Cluster(**found)
    if cluster.efficiency > 1:
        raise InputError(f"--cluster {place}: efficiency is {cluster.efficiency:g}, it must be in (0, 1]")
    return cluster


def _needed() -> list[str]:
    return [f.name for f in fields(Cluster) if f.default is MISSING]


def _text(place: str, key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InputError(f"--cluster {place}: {key} is {value!r}, it must be a name")
    return value


def _number(place: str, key: str, value: Any) -> float:
    """Positive; latency and price may be 0. YAML reads 1e9 without a dot as text."""
    least_is_zero = key in ("latency", "price")
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    whole = key == "gpus_per_node"
    if not math.isfinite(number) or number < 0 or (number == 0 and not least_is_zero) or (whole and number % 1):
        kind = (
            "a whole number, at least 1" if whole else "a number, 0 or more" if least_is_zero else "a positive number"
        )
        raise InputError(f"--cluster {place}: {key} is {value!r}, it must be {kind}")
    return int(number) if whole else number

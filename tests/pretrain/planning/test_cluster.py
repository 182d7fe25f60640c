"""Descriptions of clusters: what is wrong in one is one line, and a group of ranks gets the link that it has."""

from __future__ import annotations

import dataclasses

import pytest
import yaml

from data.errors import InputError
from pretrain.flops import PEAK_FLOPS, peak_flops
from pretrain.planning.cluster import FOLDER, Cluster, link_of, read_cluster

GOOD = {
    "name": "X", "gpu": "GPU", "flops": "1e15", "memory": 80, "gpus_per_node": 8, "nvlink": 2e11, "network": 5e10,
    "latency": 1e-5,
}  # fmt: skip
PLAIN = Cluster("X", "GPU", 1e15, 80, 8, nvlink=200e9, network=50e9, latency=1e-5)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_clusters_can_be_read_by_name_and_have_the_peak_that_training_counts_with(path):
    cluster = read_cluster(path.stem)
    assert cluster == read_cluster(str(path))
    assert cluster.flops == peak_flops(cluster.gpu) == PEAK_FLOPS[cluster.name]
    assert cluster.network < cluster.nvlink and cluster.gpus_per_node == 8


def test_h800_has_400_gb_a_second_of_nvlink_both_ways_and_one_400_gbit_adapter_a_gpu():
    cluster = read_cluster("h800")
    assert (cluster.nvlink, cluster.network, cluster.efficiency) == (200e9, 50e9, 0.8)


MISTAKES = {
    "unknown key": (GOOD | {"nvlnk": 1}, ["unknown key nvlnk", "nvlink"]),
    "missing key": ({k: v for k, v in GOOD.items() if k != "memory"}, ["memory is missing", "needed are name"]),
    "zero": (GOOD | {"flops": 0}, ["flops is 0", "positive"]),
    "negative": (GOOD | {"price": -2}, ["price is -2", "0 or more"]),
    "words": (GOOD | {"network": "400 Gb/s"}, ["network is '400 Gb/s'", "positive number"]),
    "half a GPU": (GOOD | {"gpus_per_node": 7.5}, ["gpus_per_node is 7.5", "whole number"]),
    "not finite": (GOOD | {"memory": float("nan")}, ["memory is nan"]),
    "truth": (GOOD | {"memory": True}, ["memory is True"]),
    "efficiency": (GOOD | {"efficiency": 1.5}, ["efficiency is 1.5", "(0, 1]"]),
    "name": (GOOD | {"gpu": 5}, ["gpu is 5", "name"]),
    "a list": ([1, 2], ["must hold keys and values"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_a_cluster_is_one_line(name, tmp_path):
    values, said = MISTAKES[name]
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(InputError) as caught:
        read_cluster(str(path))
    assert all(part in str(caught.value) for part in [*said, str(path)]) and "\n" not in str(caught.value)


def test_a_cluster_that_is_not_there_and_one_that_is_no_yaml(tmp_path):
    with pytest.raises(InputError, match="nowhere: cannot be read; give a YAML file, or one of a100, h100, h200, h800"):
        read_cluster("nowhere")
    (tmp_path / "bad.yaml").write_text("a: [1\nb: }")
    with pytest.raises(InputError, match="no YAML") as caught:
        read_cluster(str(tmp_path / "bad.yaml"))
    assert "\n" not in str(caught.value)


def test_numbers_without_a_dot_which_yaml_reads_as_text_are_numbers(tmp_path):
    (tmp_path / "c.yaml").write_text("{name: X, gpu: Y, flops: 1e15, memory: 80, gpus_per_node: 8, nvlink: 2e11, "
                                     "network: 5e10, latency: 0}")  # fmt: skip
    cluster = read_cluster(str(tmp_path / "c.yaml"))
    assert cluster.flops == 1e15 and cluster.latency == 0 and cluster.price is None


@pytest.mark.parametrize(
    "ranks, stride, name, rate",
    [
        (8, 1, "nvlink", 200e9),  # tensor-parallel ranks
        (2, 4, "nvlink", 200e9),
        (64, 1, "network", 200e9),  # eight in a node share eight adapters: NVLink is the limit
        (32, 2, "network", 200e9),  # four adapters
        (16, 4, "network", 100e9),
        (4, 8, "network", 50e9),  # one GPU of a node
        (2, 16, "network", 50e9),
    ],
)
def test_a_group_has_the_adapters_of_its_members_in_a_node(ranks, stride, name, rate):
    link = link_of(PLAIN, ranks, stride)
    assert (link.name, link.rate) == (name, rate)
    half = link_of(dataclasses.replace(PLAIN, efficiency=0.5), ranks, stride)
    assert half.rate == rate / 2


def test_seconds_are_bytes_by_rate_and_a_hop_of_latency_for_each_doubling_of_the_ranks():
    assert link_of(PLAIN, 8, 1).seconds(200e9, 0) == 0.0  # no collective
    assert link_of(PLAIN, 8, 1).seconds(200e9, 10) == pytest.approx(1 + 10 * 3 * 1e-5)
    assert link_of(PLAIN, 1, 8).seconds(1e12, 10) == 0.0


def test_a_group_that_lies_on_two_nodes_has_no_nvlink_between_all_its_ranks():
    assert link_of(PLAIN, 6, 1).name == link_of(PLAIN, 3, 2).name == "network"  # ranks 6 to 11 of 8 a node
    assert link_of(PLAIN, 4, 2).name == link_of(PLAIN, 2, 1).name == "nvlink"

"""What the spike detector would have said of finished runs: python -m tests.pretrain.spike_alarms RUN_FOLDER [...]."""

from __future__ import annotations

import sys
from pathlib import Path

from pretrain.config import HealthConfig
from pretrain.loop.spikes import SpikeDetector
from pretrain.tracking.metric_log import read_metrics


def main() -> None:
    health = HealthConfig()
    print(f"sigma {health.spike_sigma:g}, window {health.spike_window}")
    for folder in map(Path, sys.argv[1:]):
        found, steps, alarms = SpikeDetector(health.spike_sigma, health.spike_window), 0, []
        for line in read_metrics(folder):
            loss, norm = line.get("train/loss"), line.get("train/grad_norm")
            if isinstance(loss, (int, float)) and isinstance(norm, (int, float)):
                steps += 1
                if found.observe(loss, norm, True):
                    alarms.append(line["step"])
        print(f"{folder.name:<24} {steps:>7} steps, {len(alarms)} alarms {alarms[:10]}")


if __name__ == "__main__":
    main()

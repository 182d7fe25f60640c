"""How fast a run goes: tokens a second, and the share of the hardware's peak that is useful work."""

from __future__ import annotations

import torch

from parallel.mesh import Mesh
from parallel.shape import ModelShape
from pretrain.config import Config
from pretrain.flops import flops_per_token, peak_flops
from pretrain.loop.feed import Step
from pretrain.objective import row_length


class Throughput:
    """Of one run at one layout."""

    def __init__(self, config: Config, shape: ModelShape, mesh: Mesh):
        batch = config.train.global_batch_size
        self.tokens = batch * config.data.sequence_length  # of one step
        self._columns = batch * row_length(config)  # that go through the model for them
        self._shape, self._ranks = shape, mesh.world_size
        name = torch.cuda.get_device_name(mesh.device) if mesh.device.type == "cuda" else ""
        self._peak = peak_flops(name)

    def metrics(self, step: Step, seconds: float) -> dict[str, float]:
        """seconds: of the step, waiting for its data included. perf/mfu only where the device's peak is known."""
        metrics = {"perf/step_time": seconds, "perf/tokens_per_second": self.tokens / seconds}
        if self._peak:
            masked = step.masked / max(step.eligible, 1) * self.tokens / self._columns
            flops = self._columns * flops_per_token(self._shape, step.pairs / self._columns, masked)
            metrics["perf/mfu"] = flops / seconds / self._ranks / self._peak
        return metrics

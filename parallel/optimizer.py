"""AdamW over named parameters: decay groups from the parameter table, state that exists before the first step."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn

from parallel.engine import AdamWOptions

MOMENTS = ("exp_avg", "exp_avg_sq")


def build_optimizer(
    parameters: Mapping[str, nn.Parameter], options: AdamWOptions, decayed: Collection[str]
) -> torch.optim.Optimizer:
    """AdamW over two groups: matrices (the names in `decayed`) with weight decay, norm gains without."""
    groups = [
        {"params": [p for n, p in parameters.items() if n in decayed], "weight_decay": options.weight_decay},
        {"params": [p for n, p in parameters.items() if n not in decayed], "weight_decay": 0.0},
    ]
    if options.impl == "apex":
        from parallel.apex_support import require_apex

        require_apex("optimizer.impl")
        from apex.optimizers import FusedAdam

        return FusedAdam(groups, lr=0.0, betas=options.betas, eps=options.eps, adam_w_mode=True)
    return torch.optim.AdamW(groups, lr=0.0, betas=options.betas, eps=options.eps, fused=torch.cuda.is_available())


def create_moments(optimizer: torch.optim.Optimizer) -> None:
    """Torch's AdamW makes its state in the first step; a load before it needs somewhere to write."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            device = parameter.device if group.get("fused") else "cpu"
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=device),
                **{moment: torch.zeros_like(parameter, requires_grad=False) for moment in MOMENTS},
            }


def set_steps(optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Torch's AdamW goes on as after `steps` steps."""
    for state in optimizer.state.values():
        state["step"].fill_(steps)

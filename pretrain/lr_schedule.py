"""The learning rate as a pure function of the step, so that a resume needs no scheduler state."""

from __future__ import annotations

import math

from data.errors import InputError
from pretrain.config import Config, OptimizerConfig


def learning_rate(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """The rate of the step with 0-based number `step`.

    All schedules start with a linear warm-up that reaches the peak at step `warmup_steps` - 1.
    wsd: constant, then linear to `min_lr` over the last `decay_steps` (Hu et al., MiniCPM, arXiv 2404.06395).
    cosine: half a cosine from the end of the warm-up to `min_lr` at the last step.
    stages: LLaDA's form, e.g. constant 4e-4, constant 1e-4, linear to 1e-5 (arXiv 2502.09992, section 2.2).
    """
    if config.schedule == "stages":
        peak = _staged(step, config)
    elif config.schedule == "wsd":
        peak = _interpolate(
            config.lr, config.min_lr, (step + 1 - (total_steps - config.decay_steps)) / max(config.decay_steps, 1)
        )
    elif config.schedule == "cosine":
        progress = (step + 1 - config.warmup_steps) / max(total_steps - config.warmup_steps, 1)
        peak = _interpolate(config.lr, config.min_lr, (1 - math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2)
    else:
        peak = config.lr
    return peak * min(1.0, (step + 1) / max(config.warmup_steps, 1))


def _interpolate(first: float, last: float, fraction: float) -> float:
    fraction = min(max(fraction, 0.0), 1.0)
    return first + (last - first) * fraction


def _staged(step: int, config: OptimizerConfig) -> float:
    begin, before = 0, config.lr
    for until, rate, kind in config.stages:
        if step < until:
            return rate if kind == "constant" else _interpolate(before, rate, (step + 1 - begin) / (until - begin))
        begin, before = until, rate
    return before


def check_schedule(config: Config) -> None:
    """InputError for a schedule that cannot be what its author meant."""
    options, steps = config.optimizer, config.train.steps
    if options.schedule == "stages":
        ends = [until for until, _, _ in options.stages]
        if not ends or ends != sorted(set(ends)) or ends[0] < 1:
            raise InputError(
                f"optimizer.stages ends at steps {ends}: give at least one [until_step, lr, constant|linear], until_step rising"
            )
    elif options.stages:
        raise InputError(
            f"optimizer.stages is set but optimizer.schedule is {options.schedule}: set optimizer.schedule=stages"
        )
    if options.schedule == "wsd" and options.warmup_steps + options.decay_steps > steps:
        raise InputError(
            f"optimizer.warmup_steps {options.warmup_steps} + optimizer.decay_steps {options.decay_steps} exceed train.steps "
            f"{steps}: lower them"
        )
    if options.warmup_steps > steps:
        raise InputError(f"optimizer.warmup_steps {options.warmup_steps} exceed train.steps {steps}: lower them")

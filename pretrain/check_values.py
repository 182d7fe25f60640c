"""Values of a config that no run can have, whatever the data and the machine."""

from __future__ import annotations

import re

from data.errors import InputError
from pretrain.config import Config
from pretrain.objective import check_objective


def check_values(config: Config) -> None:
    """InputError, naming the key and what is allowed, for a value that no run can have. Looks at no file and no machine."""
    health = config.health
    train, optimizer, model = config.train, config.optimizer, config.model
    positive, not_negative, never = "> 0", ">= 0", ">= 0 (0 = never)"
    rules = [
        ("run.name", config.run.name, re.fullmatch(r"\w[\w.-]*", config.run.name), "a plain folder name"),
        ("run.dir", config.run.dir, config.run.dir != "", "a folder"),
        ("model.rope_theta", model.rope_theta, model.rope_theta > 0, positive),
        ("model.norm_eps", model.norm_eps, model.norm_eps > 0, positive),
        ("model.init_std", model.init_std, model.init_std > 0, positive),
        ("train.steps", train.steps, train.steps >= 1, ">= 1"),
        ("train.stop_at", train.stop_at, train.stop_at >= 0, never),
        ("train.grad_clip", train.grad_clip, train.grad_clip >= 0, ">= 0 (0 = off)"),
        ("train.keep_checkpoints", train.keep_checkpoints, train.keep_checkpoints >= 1, ">= 1"),
        ("train.checkpoint_every", train.checkpoint_every, train.checkpoint_every >= 0, ">= 0 (0 = only at the end)"),
        ("train.validate_every", train.validate_every, train.validate_every >= 0, never),
        ("train.sample_every", train.sample_every, train.sample_every >= 0, never),
        ("train.log_every", train.log_every, train.log_every >= 0, never),
        ("train.val_samples", train.val_samples, train.val_samples >= 0, ">= 0 (0 = all)"),
        ("train.max_skipped", train.max_skipped, train.max_skipped >= 1, ">= 1"),
        ("data.sequence_length", config.data.sequence_length, config.data.sequence_length >= 1, ">= 1"),
        (
            "data.random_length_prob",
            config.data.random_length_prob,
            0 <= config.data.random_length_prob <= 1,
            "in [0, 1]",
        ),
        ("data.cfg_dropout", config.data.cfg_dropout, 0 <= config.data.cfg_dropout < 1, "in [0, 1)"),
        (
            "data.shuffle_window",
            config.data.shuffle_window,
            config.data.shuffle_window >= 0,
            ">= 0 (0 = the whole set)",
        ),
        ("data.max_bad_shards", config.data.max_bad_shards, config.data.max_bad_shards >= 0, not_negative),
        ("data.cache_gib", config.data.cache_gib, 0 < config.data.cache_gib < 1e9, "in (0, 1e9)"),
        ("data.workers", config.data.workers, config.data.workers >= 0, not_negative),
        ("optimizer.lr", optimizer.lr, optimizer.lr > 0, positive),
        ("optimizer.min_lr", optimizer.min_lr, optimizer.min_lr >= 0, not_negative),
        ("optimizer.betas", optimizer.betas, all(0 <= b < 1 for b in optimizer.betas), "two numbers in [0, 1)"),
        ("optimizer.eps", optimizer.eps, optimizer.eps > 0, positive),
        ("optimizer.weight_decay", optimizer.weight_decay, optimizer.weight_decay >= 0, not_negative),
        ("optimizer.warmup_steps", optimizer.warmup_steps, optimizer.warmup_steps >= 0, not_negative),
        ("optimizer.decay_steps", optimizer.decay_steps, optimizer.decay_steps >= 0, not_negative),
        ("optimizer.stages", optimizer.stages, all(rate >= 0 for _, rate, _ in optimizer.stages), "rates >= 0"),
        ("parallel.timeout_seconds", config.parallel.timeout_seconds, config.parallel.timeout_seconds >= 1, ">= 1"),
        ("tracking.system_every", config.tracking.system_every, config.tracking.system_every >= 0, never),
        ("health.beat_seconds", health.beat_seconds, health.beat_seconds > 0, positive),
        (
            "health.stall_seconds",
            health.stall_seconds,
            health.stall_seconds >= 3 * health.beat_seconds,
            f"at least three times health.beat_seconds ({health.beat_seconds:g})",
        ),
        ("health.spike_sigma", health.spike_sigma, health.spike_sigma >= 0, never),
        (
            "health.spike_window",
            health.spike_window,
            health.spike_window >= 20 * health.spike_patience,
            "at least twenty times health.spike_patience",
        ),
        ("health.spike_patience", health.spike_patience, health.spike_patience >= 1, ">= 1"),
        ("health.max_rollbacks", health.max_rollbacks, health.max_rollbacks >= 0, not_negative),
        ("health.check_every", health.check_every, health.check_every >= 0, never),
        ("health.max_restarts", health.max_restarts, health.max_restarts >= 0, not_negative),
        (
            "health.restart_backoff_seconds",
            health.restart_backoff_seconds,
            health.restart_backoff_seconds >= 0,
            not_negative,
        ),
    ]
    for key, value, fine, allowed in rules:
        if not fine:
            raise InputError(f"config: {key} is {value!r}, it must be {allowed}")
    check_objective(config)
    if config.data.cfg_dropout > 0 and config.data.cfg_condition is None:
        raise InputError(
            "config: data.cfg_dropout is set but there is no condition to drop: set data.cfg_condition=prefix, or spans "
            "if the shards hold prompts"
        )

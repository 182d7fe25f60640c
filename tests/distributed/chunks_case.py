"""The problem of the chunk tests: five layers, padded documents, one rank's half without any masked token."""

from __future__ import annotations

from dataclasses import replace

from data.batch import DiffusionBatch
from tests.distributed import training_case

MODEL = replace(training_case.MODEL, num_layers=5)
LENGTH, MICRO_BATCH, GLOBAL_BATCH, SEED = training_case.LENGTH, 1, 8, training_case.SEED


def batches(dp_rank: int = 0, dp_size: int = 1) -> tuple[list[DiffusionBatch], float]:
    """(microbatches of one rank, loss-eligible tokens of the global batch)."""
    whole = training_case.batches(micro_batch=MICRO_BATCH)
    return training_case.batches(dp_rank, dp_size, micro_batch=MICRO_BATCH)[0], training_case.normalizer(whole)[0]

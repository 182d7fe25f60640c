"""What several packages' tests share: a small real corpus, prepared once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# The bounds are those of float32 on a CPU, and ranks of one test are more than most machines have GPUs. Before torch starts.
os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """The first megabyte of the standard library, prepared: train/ and val/ with a vocabulary of 512."""
    from data.prepare import prepare
    from data.prepare_options import PrepareOptions

    out = tmp_path_factory.mktemp("corpus") / "stdlib"
    prepare(
        PrepareOptions(
            out=str(out), source="stdlib", vocab_size=512, limit_bytes=1 << 20, val_fraction=0.1, processes=1
        ),
        progress=False,
    )
    return out

"""The stream of training is the same for any split over ranks, microbatches, workers and resume points."""

from __future__ import annotations

from dataclasses import fields
from functools import partial

import numpy as np
import pytest
import webdataset as wds

from data.batch import expand
from data.compact import CompactBatch, collate
from data.errors import InputError
from data.loader import Slice, StageOptions, stages, training_batches, validation_batches
from data.masking import MaskingOptions
from data.samples import blocks_of_chunks
from data.stream import BlockStream, SequentialBlocks

LENGTH, GLOBAL, PAD, MASK = 16, 24, 1, 0
OPTIONS = StageOptions(MaskingOptions(0, GLOBAL), random_length_prob=0.2, cfg_dropout=0.3, cfg_condition="prefix")


class Store:
    tokens, row_tokens, has_spans = 3000, 0, False

    def __init__(self):
        self._ids = np.random.default_rng(0).integers(2, 60000, self.tokens).astype(np.uint16)

    def read_tokens(self, start: int, count: int) -> np.ndarray:
        return self._ids[start : start + count]


def stream() -> BlockStream:
    return BlockStream(Store(), LENGTH, 0, 128)


def rows(batches: list[CompactBatch]) -> dict[int, tuple]:
    """sample id -> everything that was drawn for it, as bytes."""
    found = {}
    for b in batches:
        for i, sample in enumerate(b.sample_ids.tolist()):
            assert sample not in found, f"sample {sample} was delivered twice"
            values = [(f.name, getattr(b, f.name)) for f in fields(b)]
            found[sample] = tuple((name, None if v is None else np.asarray(v[i]).tobytes()) for name, v in values)
    return found


def read(dp: int, micro: int, steps: int, consumed: int = 0, workers: int = 0) -> dict[int, tuple]:
    everything = []
    for rank in range(dp):
        groups = list(
            training_batches(
                stream(), OPTIONS, Slice(GLOBAL, micro, rank, dp), PAD, consumed=consumed, workers=workers, steps=steps
            )
        )
        assert len(groups) == steps and all(len(g) == GLOBAL // dp // micro for g in groups)
        everything += [b for g in groups for b in g]
    return rows(everything)


@pytest.fixture(scope="module")
def whole() -> dict[int, tuple]:
    return read(1, GLOBAL, 5)


@pytest.mark.parametrize("dp, micro", [(1, 1), (2, 4), (3, 8), (4, 3), (24, 1)])
def test_any_split_over_ranks_and_microbatches_delivers_the_same_samples(whole, dp, micro):
    assert sorted(whole) == list(range(5 * GLOBAL))
    assert read(dp, micro, 5) == whole


def test_a_resume_at_any_step_with_another_layout_goes_on_exactly(whole):
    for step in range(5):
        before = read(2, 6, step) if step else {}
        assert before | read(3, 2, 5 - step, consumed=step * GLOBAL) == whole


def test_worker_processes_change_nothing_and_keep_the_order(whole):
    assert read(1, 4, 5, workers=2) == whole
    groups = list(training_batches(stream(), OPTIONS, Slice(GLOBAL, 4), PAD, workers=2, steps=5))
    order = np.concatenate([b.sample_ids for g in groups for b in g])
    assert order.tolist() == list(range(5 * GLOBAL))


def test_masks_differ_on_every_rank():
    """Ranks that share a seed must not share masks."""
    parts = [next(training_batches(stream(), OPTIONS, Slice(GLOBAL, 8, r, 3), PAD, steps=1))[0] for r in range(3)]
    for a in range(3):
        for b in range(a):
            assert not np.array_equal(parts[a].mask_bits, parts[b].mask_bits)


@pytest.mark.parametrize("dp, micro", [(1, 4), (2, 4), (3, 5), (8, 2), (40, 1)])
def test_validation_delivers_every_block_exactly_once_at_any_layout(dp, micro):
    blocks = SequentialBlocks(Store(), 90)  # 34 blocks, the last of 30 tokens
    options = StageOptions(MaskingOptions(0, len(blocks), masking="fixed_count", stream="validation"))

    def read(ranks: int, size: int) -> dict[int, tuple]:
        parts = [Slice(len(blocks), size, rank, ranks) for rank in range(ranks)]
        return rows([b for part in parts for b in validation_batches(blocks, len(blocks), options, part, PAD)])

    found = read(dp, micro)
    assert sorted(found) == list(range(34))
    assert found == read(1, 34)


def test_the_compact_form_ships_at_most_two_and_a_half_bytes_a_token():
    compact = next(training_batches(BlockStream(Store(), 512, 0), OPTIONS, Slice(GLOBAL, 24), PAD, steps=1))[0]
    parts = [getattr(compact, f.name) for f in fields(compact)]
    size = sum(part.nbytes for part in parts if part is not None)
    assert size / compact.tokens.size < 2.5
    assert expand(compact, MASK).target_ids.shape == (24, 512)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_fault_in_the_data_arrives_as_one_line(workers):
    blocks = BlockStream(Broken(), LENGTH, 0, 128)
    with pytest.raises(InputError, match="^shard-000003.tar: token 70000 outside the vocabulary$"):
        list(training_batches(blocks, OPTIONS, Slice(GLOBAL, 8), PAD, workers=workers, steps=1))


class Broken(Store):
    def read_tokens(self, start: int, count: int) -> np.ndarray:
        raise InputError("shard-000003.tar: token 70000 outside the vocabulary")


def test_the_stages_run_in_a_vanilla_webdataset_pipeline_without_the_trainer(corpus):
    """Chunks of the tars as samples, through `.compose`, with nothing but webdataset around them."""
    tars = [str(p) for p in sorted((corpus / "train").glob("*.tar"))]
    options = StageOptions(
        MaskingOptions(0, 8, t_sampling="iid"), random_length_prob=0.5, cfg_dropout=0.5, cfg_condition="prefix"
    )
    dataset = (
        wds.WebDataset(tars, shardshuffle=False).decode().compose(partial(blocks_of_chunks, sequence_length=LENGTH))
    )
    plain = list(dataset)
    chunks = list(wds.WebDataset(tars, shardshuffle=False).decode())
    flat = np.concatenate([chunk["tok.npy"] for chunk in chunks])
    assert np.array_equal(np.concatenate([s["tokens"][: s["length"]] for s in plain]), flat)
    assert len({s["sample_id"] for s in plain}) == len(plain) > 100
    out = list(dataset.compose(*stages(options)))
    assert len(out) == len(plain)
    for sample in out:
        assert sample["mask"].shape == (LENGTH,) and not (sample["mask"] & sample["prompt"]).any()
        assert not sample["mask"][sample["length"] :].any() and 0 < sample["p_mask"] <= 1
    assert 0.3 < np.mean([s["dropped"] for s in out]) < 0.6
    batch = expand(next(collate(out, 8, PAD)), MASK)
    assert batch.target_ids.shape == (8, LENGTH) and batch.masked.any()

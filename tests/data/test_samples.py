"""From blocks to samples: prompts, padding by policy, documents that are isolated, and chunks of plain tars."""

from __future__ import annotations

import errno

import numpy as np
import pytest

from data.batch import expand
from data.cfg_dropout import no_dropout
from data.compact import collate
from data.errors import InputError, ShardError
from data.masking import MaskingOptions, masking
from data.samples import BlockReader, blocks_of_chunks, sample_of
from data.stream import Block

SIZE, PAD, MASK = 16, 1, 0
# A row: a document of 5 with a prompt of 2, one of 8 with a condition of 3, and 3 of padding.
ROW = Block(
    np.arange(100, 116, dtype=np.uint16), np.array([0, 5, 13]), np.array([[0, 2, 0], [5, 3, 1], [13, 3, 2]], np.int32)
)
PROMPT = np.isin(np.arange(SIZE), [0, 1, 5, 6, 7])


def batch(**policy):
    samples = [sample_of(i, ROW, SIZE, **policy) for i in range(200)]
    return expand(next(collate(no_dropout(masking(samples, MaskingOptions(0, 200))), 200, PAD)), MASK)


def test_excluded_padding_is_neither_seen_nor_counted():
    b = batch(isolate=True)
    assert b.document_ids[0].tolist() == [0] * 5 + [1] * 8 + [-1] * 3
    assert b.position_ids[0, :13].tolist() == [*range(5), *range(8)]
    assert (b.eligible == torch_like(~PROMPT & (np.arange(SIZE) < 13))).all()
    assert not b.masked[:, 13:].any() and b.masked[:, [2, 12]].any(0).all()
    assert (b.target_ids[:, 13:] == PAD).all()


def test_eos_in_loss_makes_padding_the_end_of_the_last_document():
    b = batch(isolate=True, eos_in_loss=True)
    assert b.document_ids[0].tolist() == [0] * 5 + [1] * 11
    assert b.position_ids[0].tolist() == [*range(5), *range(11)]
    assert (b.eligible == torch_like(~PROMPT)).all()
    assert b.masked[:, 13:].any(0).all() and not b.masked[:, PROMPT].any()
    assert b.target_ids[0].tolist() == list(range(100, 116)), "what stands in the shard, not what pads"


def test_without_isolation_a_row_is_one_text():
    b = batch()
    assert b.document_ids[0].tolist() == [0] * 13 + [-1] * 3 and b.position_ids[0].tolist() == list(range(SIZE))


@pytest.mark.parametrize("eos_in_loss", [False, True])
def test_a_row_of_nothing_but_padding_counts_only_where_padding_does(eos_in_loss):
    row = Block(np.full(SIZE, PAD, np.uint16), np.array([0]), np.array([[0, SIZE, 2]], np.int32))
    b = expand(
        next(
            collate(
                no_dropout(
                    masking([sample_of(0, row, SIZE, isolate=True, eos_in_loss=eos_in_loss)], MaskingOptions(0, 1))
                ),
                1,
                PAD,
            )
        ),
        MASK,
    )
    assert bool(b.eligible.all()) == eos_in_loss and bool(b.eligible.any()) == eos_in_loss
    assert set(b.document_ids[0].tolist()) == ({0} if eos_in_loss else {-1})


def test_chunks_of_a_plain_tar_become_the_blocks_they_hold():
    rng = np.random.default_rng(0)
    lengths = [7, 20, 1, 12]
    chunk = {
        "__key__": "000000-000003",
        "tok.npy": rng.integers(2, 99, 40).astype(np.uint16),
        "lens.npy": np.array(lengths, np.int32),
        "spans.npy": np.array([[7, 12, 0], [28, 2, 1]], np.int32),
    }
    samples = list(blocks_of_chunks([chunk, {**chunk, "__key__": "000000-000004"}], SIZE, isolate=True))
    assert len(samples) == 6 and len({s["sample_id"] for s in samples}) == 6
    text = np.concatenate([s["tokens"][: s["length"]] for s in samples[:3]])
    assert np.array_equal(text, chunk["tok.npy"]) and [s["length"] for s in samples[:3]] == [16, 16, 8]
    prompt = np.concatenate([s.get("prompt", np.zeros(SIZE, bool))[: s["length"]] for s in samples[:3]])
    assert np.flatnonzero(prompt).tolist() == [*range(7, 19), 28, 29]
    borders = np.concatenate([s["borders"][: s["length"]] for s in samples[:3]])
    assert np.flatnonzero(borders).tolist() == [0, 7, 27, 28]


def torch_like(mask: np.ndarray):
    import torch

    return torch.from_numpy(mask)[None]


def test_the_digest_of_a_sample_changes_with_everything_it_read_or_drew_and_with_nothing_else():
    def flipped(values: np.ndarray, i: int) -> np.ndarray:
        values = values.copy()
        values[i] ^= 1
        return values

    base = {
        "sample_id": 5, "tokens": np.arange(2, 2 + SIZE, dtype=np.uint16), "length": 12, "mask": np.arange(SIZE) % 3 == 0,
        "t": 0.5, "p_mask": 0.5005, "dropped": False, "prompt": np.arange(SIZE) < 2, "borders": np.arange(SIZE) == 7,
        "weight": 2.0, "noisy": np.arange(SIZE, dtype=np.uint16), "soft_ids": np.ones((SIZE, 2), np.uint16),
        "soft_weights": np.full((SIZE, 2), 0.5, np.float32),
    }  # fmt: skip
    changes = {
        "sample_id": 6, "tokens": flipped(base["tokens"], 11), "length": 11, "mask": flipped(base["mask"], 3), "t": 0.25,
        "p_mask": 0.6, "dropped": True, "prompt": flipped(base["prompt"], 1), "borders": flipped(base["borders"], 7),
        "weight": 2.5, "noisy": flipped(base["noisy"], 3), "soft_ids": flipped(base["soft_ids"], 2),
        "soft_weights": np.full((SIZE, 2), 0.25, np.float32),
    }  # fmt: skip
    assert set(changes) == set(base)
    digests = [int(next(collate([{**base, name: value}], 1, PAD)).digest[0]) for name, value in changes.items()]
    digests.append(int(next(collate([base], 1, PAD)).digest[0]))
    assert len(set(digests)) == len(digests)
    beside = next(collate([{**base, "tokens": flipped(base["tokens"], 12), "source": 3}, base, base], 3, PAD))
    assert set(beside.digest.tolist()) == {digests[-1]}, "not padding, not the batch around it"


def test_padding_in_the_middle_of_a_sample_is_refused():
    block = Block(ROW.tokens, ROW.borders, np.array([[4, 3, 2]], np.int32))
    with pytest.raises(InputError, match="padding in the middle"):
        sample_of(0, block, SIZE)


def test_a_microbatch_of_nothing_but_lost_samples_takes_any_pad_id():
    """Their tokens are zeros of the narrow type, LLaDA's pad id is 126081."""
    lost = {"sample_id": 0, "tokens": np.zeros(SIZE, np.uint16), "length": 0, "bad_shard": 3}
    compact = next(collate(no_dropout(masking([lost, lost], MaskingOptions(0, 2))), 2, 126081))
    b = expand(compact, MASK)
    assert (b.target_ids == 126081).all() and not b.eligible.any() and compact.bad_shard.tolist() == [3, 3]


def test_another_epoch_or_set_of_a_plain_pipeline_draws_anew():
    chunk = {"__key__": "0-0", "tok.npy": np.arange(40, dtype=np.uint16), "lens.npy": np.array([40], np.int32)}
    ids = [
        [s["sample_id"] for s in blocks_of_chunks([chunk], SIZE, epoch=epoch, name=name)]
        for epoch, name in ((0, ""), (1, ""), (0, "code"))
    ]
    assert len({i for some in ids for i in some}) == 9


def test_a_full_disk_of_ours_is_no_fault_of_the_shard():
    class Blocks:
        sequence_length = SIZE

        def __init__(self, cause):
            self.cause = cause

        def source(self, g):
            return 0, g

        def block(self, g):
            raise ShardError("shard 2: cannot be read", 2) from self.cause

    def read(cause):
        return list(BlockReader(Blocks(cause), lambda worker, workers: [0], skip_bad_shards=True)())

    assert read(OSError(errno.EIO, "x"))[0]["bad_shard"] == 2
    with pytest.raises(ShardError):
        read(OSError(errno.ENOSPC, "x"))

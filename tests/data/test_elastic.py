"""Killed at any step and gone on with at any layout, a run reads and draws exactly what an uninterrupted one does.

Random sequences of (layout, steps until a kill, checkpoint interval), over mixtures with prompts, isolated documents, random
lengths and CFG dropout: at every step the samples of all ranks together are those of the reference, byte for byte.
"""

from __future__ import annotations

from dataclasses import fields
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.compact import CompactBatch
from data.flow import FlowOptions
from data.loader import Slice, StageOptions, training_batches
from data.masking import MaskingOptions
from data.mixture import Ingredient, Mixture
from data.stream import BlockStream
from tests.data.test_stream import Documents

LENGTH, GLOBAL, PAD, STEPS = 12, 12, 1, 40
OPTIONS = {
    "masked text": StageOptions(MaskingOptions(0, GLOBAL), random_length_prob=0.3),
    "isolated prompts, dropped": StageOptions(
        MaskingOptions(0, GLOBAL, masking="fixed_count"), cfg_dropout=0.4, cfg_condition="spans", isolate=True
    ),
    "blocks": StageOptions(MaskingOptions(0, GLOBAL, unit="block", block_size=3), kind="block", random_length_prob=0.3),
    "documents of their own noise": StageOptions(MaskingOptions(0, GLOBAL, unit="document"), isolate=True, shift=True),
    "uniform": StageOptions(MaskingOptions(0, GLOBAL), kind="uniform", vocab_size=60000),
    "flow": StageOptions(MaskingOptions(0, GLOBAL), kind="flow", flow=FlowOptions(60000, temperature_steps=10)),
}


class Text(Documents):
    """Documents with prompts at their beginnings, whose ids fit a tar."""

    def __init__(self, seed: int, count: int):
        rng = np.random.default_rng(seed)
        super().__init__(rng.integers(1, 30, count).tolist())
        lengths = np.diff([*self.starts, self.tokens])
        self.has_spans = True
        self.spans = np.array([(s, n // 2, 0) for s, n in zip(self.starts, lengths) if n > 3], np.int32)
        self._ids = rng.integers(2, 60000, self.tokens).astype(np.uint16)

    def read_tokens(self, start: int, count: int) -> np.ndarray:
        return self._ids[start : start + count]


def blocks(window: int = 0) -> Mixture:
    streams = [
        BlockStream(Text(i, 40), LENGTH, f"7/{i}", segment_tokens=50, window=window, borders=True) for i in range(3)
    ]
    weights, caps = (0.5, 0.3, 0.2), (None, 1.3, None)
    return Mixture([Ingredient(str(i), s, w, c) for i, (s, w, c) in enumerate(zip(streams, weights, caps))], 7)


def delivered(kind: str, first: int, steps: int, dp: int, micro: int, workers: int = 0) -> list[dict[int, tuple]]:
    """For each step what all ranks together got: sample id -> everything in the batch that is its own."""
    found: list[dict[int, tuple]] = [{} for _ in range(steps)]
    for rank in range(dp):
        part = Slice(GLOBAL, micro, rank, dp)
        groups = training_batches(
            blocks(90 if kind == "masked text" else 0),
            OPTIONS[kind],
            part,
            PAD,
            consumed=first * GLOBAL,
            workers=workers,
            steps=steps,
        )
        for step, group in enumerate(groups):
            for batch in group:
                for i, sample in enumerate(batch.sample_ids.tolist()):
                    assert sample not in found[step], f"sample {sample} was delivered twice"
                    found[step][sample] = own(batch, i)
    return found


def own(batch: CompactBatch, i: int) -> tuple:
    parts, mine = [], slice(i, i + 1)
    if batch.unit_bits is not None:  # several noise levels a sample
        starts = np.unpackbits(batch.unit_bits, axis=1, count=LENGTH)
        starts[:, 0] = 1
        ends = starts.sum(1).cumsum()
        mine = slice(int(ends[i] - starts[i].sum()), int(ends[i]))
    for field in fields(batch):
        value = getattr(batch, field.name)
        if field.name in ("t", "p_mask", "weight"):
            parts.append(value[mine].tobytes())
            continue
        # Bits may be left out where no sample of a microbatch has any.
        nothing = value is None or (field.name.endswith("_bits") and not value[i].any())
        parts.append(None if nothing else value[i].tobytes())
    return tuple(parts)


@cache
def reference(kind: str) -> list[dict[int, tuple]]:
    found = delivered(kind, 0, STEPS, 1, GLOBAL)
    for step, samples in enumerate(found):
        assert sorted(samples) == list(range(step * GLOBAL, (step + 1) * GLOBAL))
    return found


layouts = st.sampled_from([(1, 12), (1, 4), (2, 6), (2, 1), (3, 2), (4, 3), (6, 2), (12, 1)])


@given(
    kind=st.sampled_from(sorted(OPTIONS)),
    lives=st.lists(st.tuples(layouts, st.integers(1, 9), st.integers(1, 4)), min_size=1, max_size=6),
)
@settings(max_examples=60, deadline=None)
def test_any_sequence_of_kills_and_new_layouts_reads_the_uninterrupted_stream(kind, lives):
    saved = 0
    for (dp, micro), steps, every in lives:
        steps = min(steps, STEPS - saved)
        assert delivered(kind, saved, steps, dp, micro) == reference(kind)[saved : saved + steps]
        saved += steps // every * every  # the newest checkpoint when the kill comes


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["documents of their own noise", "flow", "isolated prompts, dropped"])
def test_workers_change_nothing_either(kind):
    assert delivered(kind, 0, 6, 2, 2, workers=2) == reference(kind)[:6]
    assert delivered(kind, 6, 5, 1, 4, workers=1) == reference(kind)[6:11]


@pytest.mark.parametrize("kind", sorted(OPTIONS))
def test_masks_differ_when_a_block_of_text_comes_again_in_a_later_epoch(kind):
    """The same tokens, another sample: drawn anew."""
    by_text: dict[bytes, list[tuple]] = {}
    names = [f.name for f in fields(CompactBatch)]
    for samples in reference(kind):
        for values in samples.values():
            by_text.setdefault(values[names.index("tokens")], []).append(values)
    again = [v for v in by_text.values() if len(v) > 1]
    assert len(again) > 3
    t, drawn = names.index("t"), [names.index(name) for name in ("mask_bits", "noisy")]
    assert all(len({v[t] for v in values}) == len(values) for values in again)
    assert np.mean([len({tuple(v[i] for i in drawn) for v in values}) == len(values) for values in again]) > 0.7


def test_the_digest_tells_every_difference_apart_and_does_not_depend_on_the_microbatch():
    digest = [f.name for f in fields(CompactBatch)].index("digest")
    for kind in OPTIONS:
        values = [v[digest] for samples in reference(kind) for v in samples.values()]
        assert len(set(values)) == len(values)
        other = delivered(kind, 0, 3, 12, 1)
        assert [[v[digest] for v in s.values()] for s in other] == [
            [v[digest] for v in s.values()] for s in reference(kind)[:3]
        ]

"""Laws that the samplers of all kinds keep: the prompt, forbidden tokens, guidance, the batch, the blocks of a block model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data.errors import InputError
from pretrain.predictor import Objective
from pretrain.sampling.logits import draw
from pretrain.sampling.options import MEANINGFUL, options_for
from pretrain.sampling.sampler import SamplingOptions, generate
from pretrain.sampling.unmasking import reveal_schedule
from tests.pretrain.test_sampler import MASK, TableModel, masked_rows, one_thread  # noqa: F401  the last for every test of this file

KINDS = {
    kind: Objective(kind, 4 if kind == "block" else 0)
    for kind in ("masked", "bert", "block", "uniform", "flow", "autoregressive")
}
EACH_KIND = pytest.mark.parametrize("kind", KINDS)


def run(model, ids, given, kind, forbidden_ids=(), first_row=0, on_step=None, **options):
    return generate(
        model,
        ids,
        given,
        mask_id=MASK,
        options=SamplingOptions(**{"steps": 5, "temperature": 1.0, **options}),
        objective=KINDS[kind],
        vocab_size=10,
        forbidden_ids=forbidden_ids,
        first_row=first_row,
        on_step=on_step,
    )


def forwards(kind: str) -> int:
    """Of 5 steps over the 7 open positions 3, 4, 5, 7, 8, 9, 10."""
    return {"autoregressive": 7, "block": len(reveal_schedule([1, 3, 3], 5))}.get(kind, 5)


@EACH_KIND
def test_every_open_position_is_filled_and_nothing_else_is_touched(kind):
    ids, given = masked_rows(3, 14, 3)
    ids[1, 8] = 2  # known but not prompt
    given[0, 10] = True  # a literal mask token inside the prompt stays
    before, frames = ids.clone(), []
    done = run(TableModel(), ids, given, kind, forbidden_ids=(4,), on_step=lambda step, now: frames.append((step, now)))
    fill = (before == MASK) & ~given
    assert torch.equal(ids, before), "the input is left alone"
    assert torch.equal(done[~fill], before[~fill]) and not torch.isin(done[fill], torch.tensor([MASK, 4])).any()
    assert all(torch.equal(now[~fill], before[~fill]) for _, now in frames)
    assert torch.equal(frames[-1][1], done) and [step for step, _ in frames] == sorted({step for step, _ in frames})
    full = torch.ones(2, 14, dtype=torch.int64)
    model = TableModel()
    assert torch.equal(run(model, full, given[:2], kind), full) and not model.inputs, "nothing to do costs nothing"


@EACH_KIND
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("steps", [1, 3])
def test_mask_and_forbidden_tokens_never_come_out_even_if_the_model_wants_them(kind, steps, temperature):
    def wants_mask(ids):
        logits = torch.zeros(*ids.shape, 10)
        logits[..., MASK], logits[..., 4] = 50.0, 40.0
        return logits

    ids, given = masked_rows(64, 8, 1)
    done = run(wants_mask, ids, given, kind, (4, 7), steps=steps, temperature=temperature)
    expected = {0, 1, 2, 3, 5, 6, 8}
    assert set(done[:, 1:].flatten().tolist()) == ({0} if temperature == 0 else expected)


@EACH_KIND
def test_guidance_zero_is_the_identity_at_half_the_forwards_and_more_hides_exactly_the_prompt(kind):
    ids, given = masked_rows(2, 11, 3)
    ids[:, 6] = 7  # known, not prompt: shown in both inputs
    model = TableModel()
    plain = run(model, ids, given, kind)
    assert len(model.inputs) == forwards(kind)
    assert all(torch.equal(x[:, :3], ids[:, :3]) for x in model.inputs)
    assert torch.equal(plain, run(TableModel(), ids, given, kind, cfg_scale=1e-13)), "the limit is no guidance"
    model = TableModel()
    guided = run(model, ids, given, kind, cfg_scale=6.0)
    assert len(model.inputs) == 2 * forwards(kind) and not torch.equal(guided, plain)
    for shown, hidden in zip(model.inputs[::2], model.inputs[1::2], strict=True):
        assert torch.equal(hidden[:, :3], torch.full((2, 3), MASK)) and torch.equal(hidden[:, 3:], shown[:, 3:])


@EACH_KIND
def test_a_row_is_the_same_alone_in_any_batch_in_any_chunks_whatever_the_global_generators_hold(kind, monkeypatch):
    ids, given = masked_rows(5, 13, 2)
    ids[3, 6:11] = 1  # a shorter row
    torch.manual_seed(1)
    together = run(TableModel(), ids, given, kind, cfg_scale=0.7, seed=4)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    monkeypatch.setattr("pretrain.sampling.logits._CHUNK_VALUES", 25)
    for row in range(5):
        alone = run(TableModel(), ids[row : row + 1], given[row : row + 1], kind, first_row=row, cfg_scale=0.7, seed=4)
        assert torch.equal(alone[0], together[row])
    assert torch.equal(run(TableModel(), ids, given, kind, cfg_scale=0.7, seed=4), together)
    assert torch.equal(state, torch.get_rng_state()), "no global generator is read"
    same = run(TableModel(), ids[:1].expand(5, -1).contiguous(), given[:1].expand(5, -1), kind)
    assert len({tuple(r.tolist()) for r in same}) == 5, "rows of one prompt differ"
    assert not torch.equal(run(TableModel(), ids, given, kind, cfg_scale=0.7, seed=5), together)


@EACH_KIND
def test_broken_logits_stop_the_sampler_instead_of_producing_text(kind):
    ids, given = masked_rows(1, 4, 1)
    for value in (float("nan"), float("inf"), float("-inf")):
        with pytest.raises(ValueError, match="not finite"):
            run(lambda ids, value=value: torch.full((*ids.shape, 10), value), ids, given, kind)
    with pytest.raises(ValueError, match="expected"):
        run(lambda ids: torch.zeros(1, 3, 10), ids, given, kind)


@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
def test_a_block_model_fills_the_blocks_of_positions_it_was_trained_on_one_after_the_other(remasking):
    """Blocks of 4 positions; the prompts end inside of blocks, and a known token shortens one."""
    ids, given = masked_rows(3, 18, 6)
    ids[1, 7:9] = 2  # of blocks 1 and 2
    ids[2, 8:12] = 3  # all of block 2
    frames = [ids]
    model = TableModel()
    run(model, ids, given, "block", steps=9, remasking=remasking, on_step=lambda step, now: frames.append(now))
    for row in range(3):
        fill = (ids[row] == MASK) & ~given[row]
        for before, now in zip(frames, frames[1:]):
            first_open = int((before[row] == MASK).nonzero().min()) if (before[row] == MASK).any() else 99
            changed = (before[row] != now[row]).nonzero().flatten()
            assert all(position // 4 == first_open // 4 for position in changed.tolist())
        assert not (frames[-1][row] == MASK)[fill].any()
    assert len(model.inputs) >= 9, "as many steps as asked for, and each block at least one"


def test_steps_are_shared_among_blocks_of_positions_by_what_is_open_in_them():
    ids, given = masked_rows(1, 12, 3)  # blocks of 1, 4 and 4 open positions
    frames = [ids]
    run(TableModel(), ids, given, "block", steps=5, on_step=lambda step, now: frames.append(now))
    revealed = [(a != b).sum().item() for a, b in zip(frames, frames[1:])]
    assert revealed == [1, 2, 2, 2, 1, 1]


def test_an_option_that_means_nothing_to_a_kind_is_refused_in_one_line_that_says_what_is_allowed():
    values = {"steps": 3, "block_length": 4, "remasking": "random", "temperature": 0.5, "cfg_scale": 1.0, "seed": 2}
    values["top_p"] = 0.9
    for kind, objective in KINDS.items():
        for name, value in values.items():
            if name in MEANINGFUL[kind]:
                assert getattr(options_for(objective, {name: value}), name) == value
                continue
            with pytest.raises(
                InputError, match=rf"`{name}` means nothing to a model of kind {kind}; it takes "
            ) as found:
                options_for(objective, {name: value})
            assert "\n" not in str(found.value) and "temperature" in str(found.value)
    assert options_for(KINDS["masked"], {"steps": None}) == SamplingOptions()
    assert options_for(KINDS["uniform"], {}).temperature == options_for(KINDS["flow"], {}).temperature == 1.0
    for length in (3, 8):
        with pytest.raises(InputError, match="`block_length` is .* blocks of 4 tokens"):
            options_for(KINDS["block"], {"block_length": length})


def test_an_open_first_token_is_refused_where_nothing_predicts_it():
    ids, given = masked_rows(2, 6, 1)
    shifted = Objective(shift=True)
    options = SamplingOptions(steps=2)
    assert not (generate(TableModel(), ids, given, mask_id=MASK, options=options, objective=shifted) == MASK).any()
    ids[1, 0], given[1, 0] = MASK, False
    with pytest.raises(InputError, match="first token of a text is open"):
        generate(TableModel(), ids, given, mask_id=MASK, options=options, objective=shifted)


@pytest.mark.parametrize(
    "wrong, word",
    [
        (dict(kind="masked", block_size=4), "block_size"),
        (dict(kind="block"), "block_size"),
        (dict(kind="uniform", shift=True), "shift"),
        (dict(kind="block", block_size=2, ahead=3), "anneal_attention"),
        (dict(kind="maskd"), "kind"),
    ],
)
def test_objectives_that_make_no_sense_are_refused(wrong, word):
    with pytest.raises(InputError, match=f"objective.{word}"):
        Objective(**wrong)


def test_drawing_by_inversion_never_takes_an_id_of_weight_zero_not_even_at_the_ends_of_its_interval():
    weights = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]], dtype=torch.float64).repeat(4, 1) * 3
    almost = 1 - 2.0**-53
    assert draw(weights, np.array([0.0, 0.5 - 2.0**-54, 0.5, almost])).tolist() == [1, 1, 3, 3]
    awkward = torch.rand(5000, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    awkward[:, 0] = awkward[:, -1] = 0.0
    assert set(draw(awkward, np.zeros(5000)).tolist()) == {1} and set(
        draw(awkward, np.full(5000, almost)).tolist()
    ) == {5}

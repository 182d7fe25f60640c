"""Laws of the sampler: schedule, order, guidance, exact distributions, independence of the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data.batch import expand
from data.compact import collate
from data.errors import InputError
from pretrain.sampling.display import render_progress
from pretrain.sampling.sampler import SamplingOptions, generate
from pretrain.sampling.unmasking import reveal_schedule

MASK = 9


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class TableModel:
    """A deterministic stand-in for a network: logits [B, L, V] depend on every token of the row; records its inputs."""

    def __init__(self, vocabulary: int = 10, seed: int = 0, scale: float = 2.0):
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(64, vocabulary, vocabulary, generator=generator)
        self.mix = torch.randn(64, 64, generator=generator)
        self.scale = scale
        self.inputs: list[torch.Tensor] = []

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        self.inputs.append(ids.clone())
        length = ids.shape[1]
        embedded = self.weight[torch.arange(length), ids]  # [B, L, V]
        return self.scale * torch.sin(torch.einsum("pq,bqv->bpv", self.mix[:length, :length], embedded))


def masked_rows(batch: int, length: int, prompt: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.full((batch, length), MASK)
    ids[:, :prompt] = torch.arange(batch)[:, None] % 5 + torch.arange(prompt) % 3
    given = torch.zeros(batch, length, dtype=torch.bool)
    given[:, :prompt] = True
    return ids, given


def run(model, ids, given, on_step=None, first_row=0, forbidden_ids=(), eos_id=None, **options):
    return generate(
        model,
        ids,
        given,
        mask_id=MASK,
        options=SamplingOptions(**options),
        on_step=on_step,
        first_row=first_row,
        forbidden_ids=forbidden_ids,
        eos_id=eos_id,
    )


def schedule_of(count, steps, block):
    """The schedule of `count` positions cut into blocks of `block` of them (0: one)."""
    size = block or max(count, 1)
    return reveal_schedule([min(size, count - start) for start in range(0, count, size)], steps)


@pytest.mark.parametrize("block", [0, 1, 4, 5, 99])
@pytest.mark.parametrize("steps", [1, 3, 12, 40])
@pytest.mark.parametrize("count", [0, 1, 5, 12, 13])
def test_schedule_fills_every_block_exactly_once_in_order_and_as_evenly_as_possible(count, steps, block):
    schedule = schedule_of(count, steps, block)
    sizes = [min(block or count, count - start) for start in range(0, count, block or max(count, 1))]
    assert [k for k, _ in schedule] == sorted(k for k, _ in schedule)
    for k, size in enumerate(sizes):
        numbers = [n for j, n in schedule if j == k]
        assert sum(numbers) == size and numbers == sorted(numbers, reverse=True) and max(numbers) - min(numbers) <= 1
        assert abs(len(numbers) - steps * size / count) < 1 or len(numbers) == 1
    assert len(schedule) == (max(steps, len(schedule)) if count else 0)


def test_schedule_equals_lladas_published_numbers():
    """generate.py of LLaDA: 128 tokens, 128 steps, blocks of 32 -> one a step; 10 tokens in 4 steps -> 3 3 2 2."""
    assert schedule_of(128, 128, 32) == [(k, 1) for k in range(4) for _ in range(32)]
    assert schedule_of(10, 4, 0) == [(0, 3), (0, 3), (0, 2), (0, 2)]
    assert schedule_of(8, 4, 4) == [(0, 2), (0, 2), (1, 2), (1, 2)]


@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
@pytest.mark.parametrize("steps, block, cfg", [(4, 0, 0.0), (7, 3, 0.0), (40, 5, 1.5), (1, 0, 0.0), (2, 2, 0.5)])
def test_each_step_reveals_the_scheduled_count_and_touches_nothing_else(remasking, steps, block, cfg):
    ids, given = masked_rows(3, 14, 3)
    ids[1, 8] = 2  # known but not prompt: a context on the right
    ids[2, 5:9] = 3
    given[0, 10] = True  # a literal mask token inside the prompt stays
    before, seen = ids.clone(), {}
    done = run(
        TableModel(),
        ids,
        given,
        on_step=lambda step, now: seen.__setitem__(step, now),
        steps=steps,
        block_length=block,
        remasking=remasking,
        temperature=0.8,
        cfg_scale=cfg,
    )
    assert torch.equal(ids, before), "the input is left alone"
    fill = (before == MASK) & ~given
    last = before
    schedules = [schedule_of(int(n), steps, block) for n in fill.sum(1)]
    for step in range(max(map(len, schedules))):
        now = seen.get(step, last)
        changed = now != last
        assert changed.sum(1).tolist() == [s[step][1] if step < len(s) else 0 for s in schedules]
        assert not (changed & (last != MASK)).any(), "a revealed token is final"
        last = now
    assert torch.equal(last, done)
    assert not (done == MASK)[fill].any() and torch.equal(done[~fill], before[~fill])


def test_no_position_of_a_block_is_revealed_before_the_block_before_it_is_full():
    ids, given = masked_rows(2, 16, 2)
    ids[1, 7] = 4  # blocks count fill positions, so the rows' blocks lie at different places
    fill = [np.flatnonzero((row == MASK).numpy()) for row in ids]
    frames = []
    run(TableModel(), ids, given, lambda _, now: frames.append(now), steps=10, block_length=4, remasking="random")
    assert len(frames) == 10
    for now in frames:
        for row, positions in enumerate(fill):
            open_blocks = [bool((now[row, positions[s : s + 4]] == MASK).any()) for s in range(0, len(positions), 4)]
            begun = [bool((now[row, positions[s : s + 4]] != MASK).any()) for s in range(0, len(positions), 4)]
            for k in range(1, len(begun)):
                assert not (begun[k] and open_blocks[k - 1])


def test_steps_beyond_the_count_cost_no_forward():
    ids, given = masked_rows(2, 7, 2)
    model = TableModel()
    run(model, ids, given, steps=50)
    assert len(model.inputs) == 5
    full = torch.ones(2, 7, dtype=torch.int64)
    assert torch.equal(run(model, full, given, steps=50), full) and len(model.inputs) == 5


def reference_greedy(model, ids, given, steps, forbidden=()):
    """Low-confidence remasking at temperature 0, one row, written with plain loops in float64."""
    ids = ids.clone()
    for _, reveal in schedule_of(int(((ids == MASK) & ~given).sum()), steps, 0):
        logits = model(ids)[0].double()
        scored = []
        for p in range(ids.shape[1]):
            if ids[0, p] != MASK or given[0, p]:
                continue
            row = {v: float(logits[p, v]) for v in range(logits.shape[1]) if v != MASK and v not in forbidden}
            token = max(row, key=lambda v: (row[v], -v))
            total = sum(np.exp(x) for x in row.values())
            scored.append((-np.exp(row[token]) / total, p, token))
        for _, p, token in sorted(scored)[:reveal]:
            ids[0, p] = token
    return ids


@pytest.mark.parametrize("seed", range(4))
def test_greedy_low_confidence_equals_a_plain_loop_reference(seed):
    ids, given = masked_rows(1, 12, 2)
    got = run(TableModel(seed=seed), ids, given, steps=5, forbidden_ids=(0, 3))
    assert torch.equal(got, reference_greedy(TableModel(seed=seed), ids, given, 5, (0, 3)))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_mask_and_forbidden_tokens_are_never_produced_even_if_the_model_wants_them(temperature):
    def wants_mask(ids):
        logits = torch.zeros(*ids.shape, 10)
        logits[..., MASK], logits[..., 4] = 50.0, 40.0
        return logits

    ids, given = masked_rows(64, 8, 1)
    done = run(wants_mask, ids, given, steps=3, forbidden_ids=(4, 7), temperature=temperature)
    produced = set(done[:, 1:].flatten().tolist())
    assert produced == ({0} if temperature == 0 else {0, 1, 2, 3, 5, 6, 8})


def test_confidence_is_the_clean_probability_of_the_chosen_token_not_the_noisy_one():
    """Position 0: one token at 0.6, eight at 0.05; position 1: nine at 1/9. Whatever the noise, position 0 comes first
    exactly when it drew its likely token, which is in 0.6 of the rows."""

    def logits_fn(ids):
        logits = torch.zeros(*ids.shape, 10)
        logits[:, 0, 5] = float(np.log(12.0))
        return logits

    rows = 2000
    ids, given = masked_rows(rows, 2, 0)
    frames = []
    run(logits_fn, ids, given, lambda _, now: frames.append(now), steps=2, temperature=1.0)
    first = frames[0]
    zero_first = first[:, 0] != MASK
    assert (first[zero_first, 0] == 5).all()
    assert abs(float(zero_first.double().mean()) - 0.6) < 4 * np.sqrt(0.24 / rows)


def test_a_forbidden_token_lends_no_confidence():
    """Position 0 is the surer one once the forbidden token, which held most of its probability, is out."""

    def logits_fn(ids):
        logits = torch.full((*ids.shape, 10), -20.0)
        logits[:, 0, 4], logits[:, 0, 1], logits[:, 0, 2] = 9.0, 2.0, -1.0
        logits[:, 1, 1], logits[:, 1, 2] = 2.0, 0.0
        return logits

    ids, given = masked_rows(1, 2, 0)
    frames = []
    run(logits_fn, ids, given, on_step=lambda _, now: frames.append(now), steps=2, forbidden_ids=(4,))
    assert frames[0].tolist() == [[1, MASK]]


def test_ties_go_to_the_lowest_position_and_the_lowest_token():
    ids, given = masked_rows(1, 6, 0)
    frames = []
    run(lambda ids: torch.zeros(*ids.shape, 10), ids, given, lambda _, now: frames.append(now[0].tolist()), steps=3)
    assert frames == [[0, 0] + [MASK] * 4, [0] * 4 + [MASK] * 2, [0] * 6]


def test_positions_that_chose_end_of_text_are_revealed_last_where_asked():
    def eos_is_easy(ids):
        logits = torch.zeros(*ids.shape, 10)
        logits[:, ::2, 8] = 9.0  # even positions: end of text, very sure
        logits[:, 1::2, 1] = 3.0
        return logits

    ids, given = masked_rows(1, 8, 0)
    frames = []
    for eos_id in (None, 8):
        run(eos_is_easy, ids, given, on_step=lambda _, now: frames.append(now[0] != MASK), steps=2, eos_id=eos_id)
    assert frames[0].tolist() == [True, False] * 4 and frames[2].tolist() == [False, True] * 4


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_follow_softmax_of_logits_over_temperature_exactly(temperature):
    from scipy.stats import chisquare

    base = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -3.0, 1.5, -2.0, 0.3, 4.0], dtype=torch.float64)
    ids, given = masked_rows(2000, 20, 0)
    done = run(lambda ids: base.expand(*ids.shape, 10), ids, given, steps=1, temperature=temperature, seed=3)
    expected = torch.softmax(base[:9] / temperature, 0).numpy()
    observed = np.bincount(done.flatten().numpy(), minlength=9)
    assert chisquare(observed, expected * observed.sum()).pvalue > 1e-3


def test_choices_are_made_in_float64_and_a_large_common_shift_changes_nothing():
    base = torch.linspace(0, 1, 10, dtype=torch.float64)
    close = torch.zeros(10, dtype=torch.float64)
    close[5] = 1e-11
    ids, given = masked_rows(20, 10, 0)
    assert (run(lambda ids: close.expand(*ids.shape, 10), ids, given, steps=2) == 5).all()
    plain = run(lambda ids: base.expand(*ids.shape, 10), ids, given, steps=2, temperature=1.0)
    shifted = run(lambda ids: (base + 5000.0).expand(*ids.shape, 10), ids, given, steps=2, temperature=1.0)
    assert torch.equal(plain, shifted) and len(plain.unique()) == 9


def conditionals_of(joint: torch.Tensor):
    """logits_fn of the exact conditionals p(x_i | known tokens) of `joint` [V, V, V]; the mask id is V."""
    size = joint.shape[0]

    def logits_fn(ids):
        patterns, inverse = torch.unique(ids, dim=0, return_inverse=True)
        out = torch.full((len(patterns), 3, size + 1), -torch.inf, dtype=torch.float64)
        for n, pattern in enumerate(patterns.tolist()):
            keep = tuple(slice(None) if v == size else slice(v, v + 1) for v in pattern)
            table = joint[keep]
            for i in range(3):
                marginal = table.sum(dim=[j for j in range(3) if j != i])
                out[n, i, :size] = marginal.log() if pattern[i] == size else 0.0
        return out[inverse]

    return logits_fn


@pytest.mark.parametrize("block_length", [0, 1, 2])
def test_one_token_a_step_in_random_order_samples_the_models_joint_exactly(block_length):
    generator = torch.Generator().manual_seed(5)
    joint = torch.rand(3, 3, 3, generator=generator, dtype=torch.float64) ** 4
    joint /= joint.sum()
    rows = 16_000
    ids = torch.full((rows, 3), 3)
    options = SamplingOptions(steps=3, block_length=block_length, remasking="random", temperature=1.0, seed=11)
    done = generate(conditionals_of(joint), ids, torch.zeros_like(ids, dtype=torch.bool), mask_id=3, options=options)
    observed = np.bincount((done[:, 0] * 9 + done[:, 1] * 3 + done[:, 2]).numpy(), minlength=27) / rows
    expected = joint.flatten().numpy()
    distance = 0.5 * np.abs(observed - expected).sum()
    bound = 2.0 * 0.5 * np.sqrt(2 * expected * (1 - expected) / (np.pi * rows)).sum()  # twice the expected noise
    assert distance < bound
    independent = np.einsum("a,b,c->abc", *(joint.sum(dim=d).numpy() for d in ((1, 2), (0, 2), (0, 1)))).flatten()
    assert 0.5 * np.abs(independent - expected).sum() > 5 * bound, "the test can tell the joint from its marginals"


def test_random_remasking_reveals_every_position_equally_often():
    ids, given = masked_rows(4000, 5, 0)
    first = []
    keep_first = lambda step, now: first.append(now) if step == 0 else None  # noqa: E731
    run(lambda ids: torch.zeros(*ids.shape, 10), ids, given, keep_first, steps=5, remasking="random")
    share = (first[0] != MASK).double().mean(0).numpy()
    assert np.abs(share - 0.2).max() < 4 * np.sqrt(0.16 / 4000)


def test_guidance_hides_exactly_the_prompt_and_combines_the_two_logits():
    """An oracle whose logits differ with and without the prompt; the guided argmax is neither of the two."""

    def logits_fn(ids):
        logits = torch.full((*ids.shape, 10), -9.0)
        shown = ids[:, 0] != MASK
        logits[shown, :, 1], logits[shown, :, 2] = 2.0, 1.5
        logits[~shown, :, 1], logits[~shown, :, 2] = 3.0, 0.5
        return logits

    ids, given = masked_rows(1, 4, 2)
    for scale, token in ((0.0, 1), (0.2, 1), (0.4, 2), (2.0, 2)):  # u + (1+w)(c-u): token 2 wins from w = 1/3 on
        assert set(run(logits_fn, ids, given, steps=2, cfg_scale=scale)[0, 2:].tolist()) == {token}


def test_the_unconditional_input_is_the_dropped_training_sample_token_for_token():
    ids, given = masked_rows(2, 9, 4)
    ids[:, 6] = 7  # known, not prompt: shown in both inputs
    model = TableModel()
    run(model, ids, given, steps=3, cfg_scale=1.0)
    assert len(model.inputs) == 6
    for conditional, unconditional in zip(model.inputs[::2], model.inputs[1::2], strict=True):
        assert torch.equal(conditional[:, :4], ids[:, :4])
        trained = [
            {
                "tokens": row.numpy().astype(np.uint16),
                "mask": (row == MASK).numpy(),
                "length": 9,
                "prompt": np.arange(9) < 4,
                "t": 0.5,
                "p_mask": 0.5,
                "weight": 2.0,
                "dropped": True,
                "sample_id": 0,
            }
            for row in conditional
        ]
        assert torch.equal(unconditional, expand(next(collate(trained, 2, 0)), MASK).noisy_ids)


def test_guidance_scale_zero_is_the_identity_at_one_forward_a_step():
    ids, given = masked_rows(2, 10, 3)
    model = TableModel()
    plain = run(model, ids, given, steps=4, temperature=1.0)
    assert len(model.inputs) == 4 and all(torch.equal(x[:, :3], ids[:, :3]) for x in model.inputs)
    tiny = run(TableModel(), ids, given, steps=4, temperature=1.0, cfg_scale=1e-13)
    assert torch.equal(plain, tiny), "the limit of small guidance is no guidance"


def test_tokens_ruled_out_by_the_model_stay_ruled_out_under_guidance():
    def logits_fn(ids):
        logits = torch.zeros(*ids.shape, 10)
        logits[..., 6:] = -torch.inf  # rows added to pad the vocabulary
        return logits

    ids, given = masked_rows(50, 6, 2)
    assert run(logits_fn, ids, given, steps=4, temperature=1.0, cfg_scale=2.0).max() < 6


@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
def test_a_row_is_the_same_alone_in_any_batch_and_whatever_the_global_generators_hold(remasking):
    settings = dict(steps=6, block_length=5, remasking=remasking, temperature=1.0, cfg_scale=0.7, seed=4)
    ids, given = masked_rows(5, 13, 2)
    ids[3, 6:11] = 1  # a shorter row: its schedule must not follow the others
    torch.manual_seed(1)
    together = run(TableModel(), ids, given, **settings)
    torch.manual_seed(2)
    np.random.seed(7)
    state = torch.get_rng_state()
    for row in range(5):
        alone = run(TableModel(), ids[row : row + 1], given[row : row + 1], first_row=row, **settings)
        assert torch.equal(alone[0], together[row])
    assert torch.equal(state, torch.get_rng_state()), "no global generator is read"
    same_prompt = ids[:1].expand(5, -1).contiguous(), given[:1].expand(5, -1)
    rows = run(TableModel(), *same_prompt, **settings)
    assert len({tuple(r.tolist()) for r in rows}) == 5, "rows of one prompt differ"
    assert not torch.equal(run(TableModel(), ids, given, **{**settings, "seed": 5}), together)


def test_working_in_chunks_changes_nothing(monkeypatch):
    ids, given = masked_rows(2, 13, 2)
    settings = dict(steps=4, temperature=1.0, cfg_scale=0.5)
    whole = run(TableModel(), ids, given, **settings)
    monkeypatch.setattr("pretrain.sampling.logits._CHUNK_VALUES", 25)
    assert torch.equal(run(TableModel(), ids, given, **settings), whole)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(steps=0),
        dict(block_length=-1),
        dict(temperature=-0.1),
        dict(cfg_scale=-1.0),
        dict(temperature=float("nan")),
        dict(remasking="greedy"),
        dict(top_p=0.0),
        dict(top_p=1.01),
        dict(top_p=float("nan")),
    ],
)
def test_a_wrong_option_is_named(wrong):
    with pytest.raises(InputError, match=f"`{next(iter(wrong))}`"):
        SamplingOptions(**wrong)


def test_broken_logits_stop_the_sampler_instead_of_producing_text():
    ids, given = masked_rows(1, 4, 1)
    for value in (float("nan"), float("inf"), float("-inf")):
        with pytest.raises(ValueError, match="not finite"):
            run(lambda ids, value=value: torch.full((*ids.shape, 10), value), ids, given)
    with pytest.raises(ValueError, match="expected"):
        run(lambda ids: torch.zeros(1, 3, 10), ids, given)
    with pytest.raises(ValueError, match="leave a token"):
        run(lambda ids: torch.zeros(1, 4, 10), ids, given, forbidden_ids=range(9))
    with pytest.raises(ValueError, match="0..4"):
        run(lambda ids: torch.zeros(1, 4, 5), ids, given)
    with pytest.raises(ValueError, match="prompt_mask"):
        run(TableModel(), ids, given[:, :2])


def test_display_shows_masks_as_dim_blocks_new_tokens_highlighted_and_no_terminal_escapes():
    def decode(ids):
        return "".join("ab\x1bd\u009b\n"[i] for i in ids)

    text = render_progress([0, 1, MASK, MASK, 3, 2, 4, 5], [0, MASK, MASK, MASK, 3, 2, 4, MASK], MASK, decode)
    assert text.plain == "ab░░d\ufffd\ufffd\n"
    styles = [(text.plain[s.start : s.end], str(s.style)) for s in text.spans if str(s.style)]
    assert styles == [("b", "bold green"), ("░░", "dim"), ("\n", "bold green")]
    assert render_progress([0, 1], None, MASK, decode).plain == "ab"


def test_display_decodes_neighbouring_tokens_together_so_that_split_characters_appear_whole():
    pieces = [b"\xc3", b"\xa9", b"x"]
    text = render_progress([0, 1, 2], [0, 1, 2], MASK, lambda ids: b"".join(pieces[i] for i in ids).decode())
    assert text.plain == "éx"

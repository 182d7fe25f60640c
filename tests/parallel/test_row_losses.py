"""Laws of the row losses beside the cross entropy: against their formulas in float64, and in fifty digits where it is delicate."""

from __future__ import annotations

import math
from typing import NamedTuple

import mpmath
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from parallel import row_loss_softmax
from parallel.loss import DiffusionLossOutput, diffusion_loss
from parallel.row_loss import RowLoss
from parallel.row_loss_uniform import UniformBound
from parallel.row_losses import ROW_LOSSES, row_loss
from tests.parallel.row_loss_reference import VALUES, Noisy, dense, exact_symmetric_kl, exact_uniform, made_up
from tests.parallel.test_loss import Allocations, distance

UNIFORM, SYMMETRIC = row_loss("uniform"), row_loss("symmetric_kl", 0.1)
LOSSES = {"uniform": UNIFORM, "symmetric_kl": SYMMETRIC, "sharp": row_loss("symmetric_kl", 1e-4)}
every_loss = pytest.mark.parametrize("name", LOSSES)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Found(NamedTuple):
    output: DiffusionLossOutput
    hidden: Tensor
    weight: Tensor


def run(case: Noisy, kind: RowLoss, chunk_rows: int = 32) -> Found:
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    output = diffusion_loss(
        hidden, weight, case.targets, case.masked, case.loss_weight, case.normalizer, vocab_size=case.vocab_size,
        chunk_rows=chunk_rows, row_loss=kind, current=case.current, alpha=case.alpha,
    )  # fmt: skip
    output.loss.backward()
    return Found(output, hidden.grad, weight.grad)


def assert_dense(case: Noisy, name: str, output: float, gradient: float) -> Found:
    """Against the definition: float64 softmax over the real vocab, the formula, autograd."""
    kind = LOSSES[name]
    got, want = run(case, kind), dense(case, VALUES[type(kind)], kind)
    found = [distance(a, b) for a, b in ((got.output.loss, want.loss), (got.output.value, want.value))]
    assert max(*found, distance(got.output.ce, want.ce)) <= output, found
    assert torch.equal(got.output.correct, want.correct)
    found = [distance(got.hidden, want.hidden), distance(got.weight, want.weight)]
    assert max(found) <= gradient, found
    return got


BOUNDS = {torch.float64: (1e-10, 1e-10), torch.float32: (3e-6, 3e-6), torch.bfloat16: (3e-6, 2**-8)}


@every_loss
@pytest.mark.parametrize("masked_fraction", [0.5, 1.0])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_values_and_gradients_equal_the_formula(dtype, masked_fraction, name):
    case = made_up(dtype, masked_fraction=masked_fraction)
    got = assert_dense(case, name, *BOUNDS[dtype])
    assert 0 < got.output.correct.sum() < case.masked.sum()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert (got.output.loss.dtype, got.output.value.dtype, got.output.ce.dtype) == (wide, wide, wide)
    assert (got.hidden.dtype, got.weight.dtype) == (dtype, dtype)
    assert not got.output.value.requires_grad and not got.output.value[~case.masked].any()


@every_loss
@pytest.mark.parametrize("rows", [1, 7, 64, 10_000])
def test_the_chunk_size_and_the_rows_a_kernel_takes_change_nothing_but_rounding(name, rows, monkeypatch):
    case = made_up(torch.float64)
    assert_dense(case, name, *BOUNDS[torch.float64])
    whole = run(case, LOSSES[name], chunk_rows=rows)
    monkeypatch.setattr(row_loss_softmax, "_BLOCK_NUMBERS", 3 * 256)
    cut = run(case, LOSSES[name], chunk_rows=rows)
    for a, b in zip((*whole.output, *whole[1:]), (*cut.output, *cut[1:]), strict=True):
        assert torch.equal(a, b)
    want = run(case, LOSSES[name])
    assert distance(whole.weight, want.weight) < 1e-13 and distance(whole.output.loss, want.output.loss) < 1e-13


def of_logits(kind: RowLoss, logits: list[float], target: int, current: int, alpha: float, dtype) -> tuple[float, list]:
    """The value of one row and its gradient by the logits: hidden states times the identity are exactly the logits."""
    size = len(logits)
    hidden = torch.tensor([logits], dtype=dtype).requires_grad_()
    output = diffusion_loss(
        hidden, torch.eye(size, dtype=dtype), torch.tensor([target]), torch.ones(1, dtype=torch.bool), torch.ones(1),
        1.0, vocab_size=size, row_loss=kind, current=torch.tensor([current]),
        alpha=torch.tensor([alpha], dtype=torch.float32),
    )  # fmt: skip
    output.loss.backward()
    return output.value.item(), hidden.grad[0].tolist()


HALF_NOISE = [0.3, -1.2, 0.8, 0.1, -0.4, 1.1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("of_target", [-40.0, -12.0, -6.0, -2.0, 0.5, 4.0, 11.0, 18.0])
@pytest.mark.parametrize("alpha", [1e-4, 0.03, 0.5, 0.97, 1 - 1e-4])
@pytest.mark.parametrize("current", [2, 3, 5])
def test_uniform_loses_no_digits_at_any_noise_and_confidence(current, alpha, of_target, dtype):
    """In float32 against fifty digits, the derivative by differences; relative errors although values span thirty decades."""
    logits = [of_target if y == 2 else z for y, z in enumerate(HALF_NOISE)]
    logits = torch.tensor(logits).tolist()  # as float32 has them
    alpha = torch.tensor(alpha).item()
    value, gradient = of_logits(UNIFORM, logits, 2, current, alpha, dtype)
    want, slopes = exact_uniform(tuple(logits), 2, current, alpha)
    close = 2e-6 if dtype == torch.float32 else 1e-14
    assert abs(value / want - 1) < 3 * close * (1 + of_target**2 / 100), (value, want)
    assert math.dist(gradient, slopes) < 10 * close * math.hypot(*slopes), (gradient, slopes)


@pytest.mark.parametrize("alpha", [1e-4, 0.03, 0.5, 0.97, 1 - 1e-4])
def test_uniform_in_float32_equals_float64_row_by_row_on_a_real_vocabulary(alpha):
    """Every row's value and gradient, relative to its own size: 1,201 tokens, targets from hopeless to sure, kept or replaced."""
    generator = torch.Generator().manual_seed(5)
    rows, size = 48, 1201
    logits = torch.randn(rows, size, generator=generator) * 2
    targets = torch.randint(0, size, (rows,), generator=generator)
    logits[torch.arange(rows), targets] += torch.linspace(-40, 40, rows)
    current = torch.where(torch.arange(rows) % 2 == 0, targets, torch.randint(0, size, (rows,), generator=generator))
    case = Noisy(
        logits, torch.eye(size), targets, torch.ones(rows, dtype=torch.bool), torch.ones(rows), 1.0, size, current,
        torch.full((rows,), alpha),
    )  # fmt: skip
    got, want = (run(c, UNIFORM) for c in (case, case._replace(hidden=logits.double(), weight=case.weight.double())))
    values = want.output.value
    assert values.min() > 0 and values.max() / values.min() > 1e4
    assert ((got.output.value / values - 1).abs() < 1e-5).all()
    off = (got.hidden.double() - want.hidden).norm(dim=1) / want.hidden.norm(dim=1)
    assert (off < 2e-5).all(), off


@pytest.mark.parametrize("of_target", [-300.0, -40.0, 0.5, 4.0, 18.0])
@pytest.mark.parametrize("smoothing", [1e-4, 0.1, 0.9])
def test_symmetric_kl_is_finite_and_exact_for_any_probability_of_the_target(smoothing, of_target):
    logits = torch.tensor([of_target if y == 2 else z for y, z in enumerate(HALF_NOISE)]).tolist()
    value, gradient = of_logits(row_loss("symmetric_kl", smoothing), logits, 2, 2, 0.5, torch.float32)
    want, slopes = exact_symmetric_kl(tuple(logits), 2, smoothing)
    assert abs(value / want - 1) < 3e-6, (value, want)
    assert math.dist(gradient, slopes) < 1e-5 * math.hypot(*slopes), (gradient, slopes)


def test_uniform_is_the_generalised_kl_of_the_enumerated_reverse_rates():
    """Reverse rate from z to y: Q(y -> z) q_t(y) / q_t(z), with the forward rate Q = 1 / N between any two tokens."""
    logits = torch.tensor(HALF_NOISE, dtype=torch.float64)
    size, p = len(logits), logits.softmax(0)
    for alpha in (0.1, 0.6):
        for target in range(size):
            for current in range(size):
                clean = torch.eye(size, dtype=torch.float64)[target]
                of_data, of_model = (alpha * x + (1 - alpha) / size for x in (clean, p))
                total = 0.0
                for y in set(range(size)) - {current}:
                    a = float(of_data[y] / of_data[current]) / size
                    b = float(of_model[y] / of_model[current]) / size
                    total += a * math.log(a / b) - a + b
                given = torch.tensor(alpha, dtype=torch.float32).item()
                value, _ = of_logits(UNIFORM, logits.tolist(), target, current, given, torch.float64)
                assert value == pytest.approx(total, rel=1e-6)  # alpha is rounded to float32 on its way


def bound_over_time(data: Tensor, predicted: Tensor, joint: Tensor, alpha: Tensor) -> float:
    """E over t, x, z of beta(t) value with alpha = 1 - t, of predictions [t, x, z] where x are a model's answers to z at t."""
    nodes, size = len(alpha), len(data)
    t, x, z = torch.cartesian_prod(torch.arange(nodes), torch.arange(size), torch.arange(size)).unbind(1)
    output = diffusion_loss(
        predicted[t, :, z].log(), torch.eye(size, dtype=torch.float64), x, torch.ones_like(x, dtype=torch.bool),
        joint[t, x, z] / alpha[t], float(nodes), vocab_size=size, row_loss=UNIFORM, current=z, alpha=alpha[t],
    )  # fmt: skip
    return float(output.loss)


def test_the_time_integral_of_uniform_is_the_entropy_of_the_data_for_the_best_answer_and_more_for_others():
    """The bound is tight where the model's reverse rates are those of the data's marginals q_t(y) / q_t(z), so value, rate and the
    law of z belong together. For a token without context these rates come from the data's own law, whatever z is, and NOT
    from the posterior given z: that counts z twice.
    """
    data = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    size, nodes = len(data), 4000
    alpha = 1 - (torch.arange(nodes, dtype=torch.float64) + 0.5) / nodes  # beta = 1 / (1 - t)
    law = alpha[:, None, None] * torch.eye(size) + (1 - alpha)[:, None, None] / size  # [t, x, z]: q(z | x)
    joint = data[:, None] * law
    entropy = float(-(data * data.log()).sum())
    best = bound_over_time(data, data[None, :, None].expand_as(joint), joint, alpha)
    assert best == pytest.approx(entropy, rel=2e-4)
    posterior = bound_over_time(data, joint / joint.sum(1, keepdim=True), joint, alpha)
    off = torch.tensor([0.05, -0.05, 0.02, -0.02], dtype=torch.float64)
    near = bound_over_time(data, (data + off)[None, :, None].expand_as(joint), joint, alpha)
    assert near > best + 1e-3 and posterior > best + 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_are_never_negative_and_vanish_only_at_the_clean_token(dtype):
    case = made_up(dtype, masked_fraction=1.0)
    for alpha in (1e-6, 0.01, 0.5, 0.99, 1 - 1e-6):
        case = case._replace(alpha=torch.full_like(case.alpha, alpha))
        assert (run(case, UNIFORM).output.value > 0).all()
    assert (run(case, SYMMETRIC).output.value > 0).all()
    for current in (1, 2):
        for alpha in (0.01, 0.5, 0.99):
            sure = [80.0 if y == 2 else 0.0 for y in range(6)]
            assert of_logits(UNIFORM, sure, 2, current, alpha, dtype)[0] < 1e-25
    smooth = torch.full((6,), 0.1 / 6, dtype=torch.float64)
    smooth[2] += 0.9
    assert 0 <= of_logits(SYMMETRIC, smooth.log().tolist(), 2, 2, 0.5, dtype)[0] < 1e-12


def test_the_ends_of_the_noise_have_their_limits():
    value, gradient = of_logits(UNIFORM, HALF_NOISE, 2, 4, 0.0, torch.float32)
    assert value == 0 and not any(gradient)  # nothing of the clean token is left: every answer is as good
    p = torch.tensor(HALF_NOISE, dtype=torch.float64).softmax(0)[2].item()
    value, gradient = of_logits(UNIFORM, HALF_NOISE, 2, 2, 1.0, torch.float32)
    assert value == pytest.approx((1 - p) / p / 6, rel=1e-5)  # what is left is the sum of the model's rates
    assert gradient[2] == pytest.approx(-(1 - p) / p / 6, rel=1e-5) and all(map(math.isfinite, gradient))


@every_loss
def test_padding_has_no_probability_no_gradient_and_does_not_count_in_the_vocab(name):
    case = made_up(torch.float32)
    loud = case.weight.clone()
    loud[case.vocab_size :] = 1e4
    got, quiet = run(case._replace(weight=loud), LOSSES[name]), run(case, LOSSES[name])
    assert not got.weight[case.vocab_size :].any() and got.weight[: case.vocab_size].any()
    assert torch.equal(got.output.value, quiet.output.value) and torch.equal(got.hidden, quiet.hidden)
    bare = run(case._replace(weight=case.weight[: case.vocab_size]), LOSSES[name])
    assert distance(bare.output.value, got.output.value) < 1e-6 and distance(bare.hidden, got.hidden) < 2e-6


@every_loss
def test_a_batch_that_counts_nothing_gives_exactly_zero(name):
    case = made_up(torch.float32, masked_fraction=0.0)._replace(normalizer=0.0)
    got = run(case, LOSSES[name])
    assert got.output.loss == 0 and not got.output.value.any() and not got.output.ce.any()
    assert got.hidden.shape == case.hidden.shape and not got.hidden.any()
    assert got.weight.shape == case.weight.shape and not got.weight.any()


@every_loss
def test_a_row_of_weight_zero_is_measured_and_moves_nothing(name):
    case = made_up(torch.float64)
    silent = case.masked & (torch.arange(len(case.masked)) % 3 == 0)
    case = case._replace(loss_weight=case.loss_weight.masked_fill(silent, 0))
    got = assert_dense(case, name, *BOUNDS[torch.float64])
    assert (got.output.value[silent] > 0).all() and (got.output.ce[silent] > 0).all()
    assert not got.hidden[silent].any()


@every_loss
def test_a_broken_row_makes_loss_and_gradients_non_finite(name):
    case = made_up(torch.float32)
    row = int(case.masked.nonzero()[3])
    broken = []
    for target in (-100, case.vocab_size, 10**9):
        targets = case.targets.clone()
        targets[row] = target
        broken.append(case._replace(targets=targets))
    for value in (torch.nan, torch.inf):
        hidden = case.hidden.clone()
        hidden[row] = value
        broken.append(case._replace(hidden=hidden))
    if LOSSES[name].needs_noise:
        current, alpha = case.current.clone(), case.alpha.clone()
        current[row], alpha[row] = case.vocab_size, torch.nan
        broken += [case._replace(current=current), case._replace(alpha=alpha)]
    for one in broken:
        got = run(one, LOSSES[name])
        assert not got.output.loss.isfinite() and not got.output.value[row].isfinite()
        assert got.hidden[row].isnan().all() and got.weight[: case.vocab_size].isnan().any()
        assert torch.equal(got.output.value.isfinite(), torch.arange(len(case.masked)) != row)


@every_loss
def test_no_tensor_is_larger_than_a_chunk_of_logits_and_kernels_take_a_few_rows_at_a_time(name, monkeypatch):
    tokens, hidden_size, vocab, chunk_rows = 256, 16, 2048, 64
    monkeypatch.setattr(row_loss_softmax, "_BLOCK_NUMBERS", 4 * vocab)
    case = made_up(torch.float32, tokens, hidden_size, vocab, vocab)
    with Allocations() as training:
        run(case, LOSSES[name], chunk_rows)
    chunk, weight_size = chunk_rows * vocab, vocab * hidden_size
    assert max(training.sizes) <= max(chunk, weight_size)
    assert sum(size > max(4 * vocab, 2 * weight_size) for size in training.sizes) == 1  # the logits
    one = 2 * int(case.masked.sum()) * case.weight.numel()
    with FlopCounterMode(display=False) as flops:
        run(case, LOSSES[name], chunk_rows)
    assert flops.get_total_flops() == 3 * one


@every_loss
def test_without_gradients_the_outputs_are_the_same_and_no_gradient_is_made(name):
    case = made_up(torch.float32)
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        output = diffusion_loss(
            case.hidden, case.weight.clone().requires_grad_(), *case[2:6], vocab_size=case.vocab_size, chunk_rows=32,
            row_loss=LOSSES[name], current=case.current, alpha=case.alpha,
        )  # fmt: skip
    assert flops.get_total_flops() == 2 * int(case.masked.sum()) * case.weight.numel()
    assert not output.loss.requires_grad
    for a, b in zip(output, run(case, LOSSES[name]).output, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parity
@every_loss
def test_kernels_compile_to_one_graph_for_all_row_counts(name, monkeypatch):
    graphs, made = [], {}

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def compiled(kernel):
        if kernel not in made:
            made[kernel] = torch.compile(kernel, dynamic=True, fullgraph=True, backend=backend)
        return made[kernel]

    torch._dynamo.reset()
    monkeypatch.setattr(row_loss_softmax, "can_compile", lambda device: True)
    monkeypatch.setattr(row_loss_softmax, "compiled", compiled)
    for tokens in (40, 192, 310):
        assert_dense(made_up(torch.float32, tokens=tokens), name, *BOUNDS[torch.float32])
    assert len(made) == 3 and len(graphs) == 3
    torch._dynamo.reset()


def test_arguments_that_cannot_be_right_are_refused():
    case = made_up(torch.float32)
    with pytest.raises(ValueError, match="needs current and alpha"):
        run(case._replace(current=None), UNIFORM)
    with pytest.raises(ValueError, match="needs current and alpha"):
        run(case._replace(alpha=None), UNIFORM)
    with pytest.raises(ValueError, match=r"alpha .*\[192\].*\[191\]"):
        run(case._replace(alpha=case.alpha[1:]), UNIFORM)
    with pytest.raises(ValueError, match="current must be int64"):
        run(case._replace(current=case.current.int()), UNIFORM)
    with pytest.raises(ValueError, match="'focal'.*" + ".*".join(ROW_LOSSES)):
        row_loss("focal")
    for smoothing in (0.0, 1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="strictly between 0 and 1"):
            row_loss("symmetric_kl", smoothing)


def test_the_references_in_fifty_digits_agree_with_those_in_float64():
    with mpmath.workdps(50):
        case = made_up(torch.float64, tokens=4, vocab=6, padded=6, masked_fraction=1.0)
        logits = case.hidden @ case.weight.t()
        for name, exact in (("uniform", exact_uniform), ("symmetric_kl", exact_symmetric_kl)):
            kind = LOSSES[name]
            want = dense(case, VALUES[type(kind)], kind).value
            for i in range(4):
                more = (0.1,) if name == "symmetric_kl" else (int(case.current[i]), float(case.alpha[i]))
                value, _ = exact(tuple(logits[i].tolist()), int(case.targets[i]), *more)
                assert value == pytest.approx(float(want[i]), rel=1e-10)


def test_a_posterior_is_measured_without_what_its_own_token_told_it():
    """As the plain bound of logits from which log((N alpha + 1 - alpha) / (1 - alpha)) is taken at z by hand; gradients too."""
    case = made_up(torch.float64)
    n, vocab = 40, case.vocab_size
    logits = torch.randn(n, vocab, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    current, targets, alpha = (x[case.masked][:n] for x in (case.current, case.targets, case.alpha.double()))
    counted, weight, eye = (
        torch.ones(n, dtype=torch.bool),
        torch.rand(n).double(),
        torch.eye(vocab, dtype=torch.float64),
    )
    told = ((vocab * alpha + 1 - alpha) / (1 - alpha)).log()
    shifted = logits.scatter_add(1, current[:, None], -told[:, None])
    found = []
    for given, kind in ((logits, UniformBound(posterior=True)), (shifted, UniformBound())):
        given = given.clone().requires_grad_()
        output = diffusion_loss(
            given, eye, targets, counted, weight, 3.0, vocab_size=vocab, row_loss=kind, current=current, alpha=alpha
        )
        output.loss.backward()
        found.append((output.value, given.grad))
    for one, other in zip(*found):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-15)

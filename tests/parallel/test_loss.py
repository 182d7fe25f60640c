"""Laws of the diffusion loss in one process, against dense float64 references."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from parallel import loss as loss_module
from parallel import row_loss_cross_entropy as kernels_module
from parallel.loss import DiffusionLossOutput, check_vocab_shards, diffusion_loss


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Case(NamedTuple):
    """One loss call: what goes in, by the names of `diffusion_loss`."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    masked: Tensor
    loss_weight: Tensor
    normalizer: float
    vocab_size: int


def make_case(dtype=torch.float64, tokens=192, hidden=24, vocab=251, padded=256, masked_fraction=0.5, seed=0) -> Case:
    """Random rows, every second one with its likeliest target so that `correct` has both values."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(padded, hidden, generator=generator, dtype=torch.float64).mul(0.7).to(dtype)
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    best = (states.double() @ weight[:vocab].double().t()).argmax(1)
    targets[::2] = best[::2]
    masked = torch.rand(tokens, generator=generator) < masked_fraction
    targets[~masked] = -100  # never read
    loss_weight = 1 / torch.rand(tokens, generator=generator).clamp_min(0.02)
    return Case(states, weight, targets, masked, loss_weight, 2.0 * tokens, vocab)


class Gradients(NamedTuple):
    output: DiffusionLossOutput
    hidden: Tensor
    weight: Tensor


def run(case: Case, factor: float = 1.0, chunk_rows: int = 32) -> Gradients:
    hidden = case.hidden.detach().clone().requires_grad_()
    weight = case.weight.detach().clone().requires_grad_()
    output = diffusion_loss(
        hidden, weight, case.targets, case.masked, case.loss_weight, case.normalizer,
        vocab_size=case.vocab_size, chunk_rows=chunk_rows,
    )  # fmt: skip
    (output.loss * factor).backward()
    return Gradients(output, hidden.grad, weight.grad)


def dense(case: Case) -> Gradients:
    """The definition: full float64 logits over the real vocab, torch's cross entropy, autograd."""
    hidden = case.hidden.detach().to(torch.float64, copy=True).requires_grad_()
    weight = case.weight.detach().to(torch.float64, copy=True).requires_grad_()
    logits = hidden @ weight[: case.vocab_size].t()
    ce = F.cross_entropy(logits, case.targets.where(case.masked, 0), reduction="none")
    ce = torch.where(case.masked, ce, 0)
    loss = (ce * case.loss_weight.double()).sum() / case.normalizer
    loss.backward()
    correct = (logits.argmax(1) == case.targets) & case.masked
    return Gradients(DiffusionLossOutput(loss.detach(), ce.detach(), ce.detach(), correct), hidden.grad, weight.grad)


def distance(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b| in the 2-norm; |a| where b is 0."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / (b.norm() if b.norm() > 0 else 1))


def assert_close(got: Gradients, want: Gradients, output: float, hidden: float, weight: float) -> None:
    assert distance(got.output.loss, want.output.loss) <= output
    assert distance(got.output.ce, want.output.ce) <= output
    assert torch.equal(got.output.value, got.output.ce)
    assert torch.equal(got.output.correct, want.output.correct)
    assert got.hidden.shape == want.hidden.shape and distance(got.hidden, want.hidden) <= hidden
    assert got.weight.shape == want.weight.shape and distance(got.weight, want.weight) <= weight


BOUNDS = {  # loss and ce, hidden gradient, weight gradient; a bfloat16 gradient is one rounding (2^-8) from the truth
    torch.float64: (1e-12, 1e-12, 1e-12),
    torch.float32: (1e-6, 2e-6, 2e-6),
    torch.bfloat16: (1e-6, 2**-8, 2**-8),
}


@pytest.mark.parametrize("masked_fraction", [0.5, 1.0, 0.05])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_loss_accuracy_and_gradients_equal_the_dense_definition(dtype, masked_fraction):
    case = make_case(dtype, masked_fraction=masked_fraction)
    want = dense(case)
    assert 0 < want.output.correct.sum() < case.masked.sum()
    got = run(case)
    assert_close(got, want, *BOUNDS[dtype])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert (got.output.loss.dtype, got.output.ce.dtype, got.output.loss.shape) == (wide, wide, ())
    assert (got.hidden.dtype, got.weight.dtype) == (dtype, dtype)
    assert not got.output.ce.requires_grad and not got.output.ce[~case.masked].any()


def test_a_single_row_equals_the_dense_definition():
    case = make_case(tokens=1, masked_fraction=1.0)
    assert_close(run(case), dense(case), *BOUNDS[torch.float64])


@pytest.mark.parametrize("normalizer", [100.0, 0.0])
def test_no_masked_row_gives_exactly_zero_loss_and_full_shape_zero_gradients(normalizer):
    case = make_case(torch.float32, masked_fraction=0.0)._replace(normalizer=normalizer)
    got = run(case)
    assert got.output.loss == 0 and not got.output.ce.any() and not got.output.correct.any()
    assert got.hidden.shape == case.hidden.shape and not got.hidden.any()
    assert got.weight.shape == case.weight.shape and not got.weight.any()


def test_a_masked_row_of_weight_zero_adds_no_loss_and_no_gradient_but_is_measured():
    case = make_case()
    silent = case.masked & (torch.arange(len(case.masked)) % 3 == 0)
    case = case._replace(loss_weight=case.loss_weight.masked_fill(silent, 0))
    got, want = run(case), dense(case)
    assert_close(got, want, *BOUNDS[torch.float64])
    assert (got.output.ce[silent] > 0).all() and got.output.correct[silent].any()
    assert not got.hidden[silent].any()


def test_padding_rows_have_probability_and_gradient_exactly_zero_whatever_they_hold():
    case = make_case(torch.float32)
    loud = case.weight.clone()
    loud[case.vocab_size :] = 1e4
    got, quiet = run(case._replace(weight=loud)), run(case)
    assert not got.weight[case.vocab_size :].any()
    assert torch.equal(got.output.loss, quiet.output.loss) and torch.equal(got.hidden, quiet.hidden)


def test_logits_of_ten_thousand_stay_exact_in_float32():
    case = make_case(torch.float32, hidden=8)
    hidden = case.hidden.round() * 256  # integers: the logits are exact in float32 and only the loss can lose digits
    case = case._replace(hidden=hidden, weight=(case.weight * 8).round())
    logits = hidden.double() @ case.weight.double().t()
    assert logits.max() > 1e4 and logits.min() < -1e4
    assert_close(run(case), dense(case), 1e-6, 1e-6, 1e-6)
    shifted = case._replace(hidden=torch.cat([hidden, torch.full((len(hidden), 1), 16384.0)], 1))
    shifted = shifted._replace(weight=torch.cat([case.weight, torch.ones(len(case.weight), 1)], 1))
    assert torch.equal(run(shifted).output.ce, run(case).output.ce)  # a common shift of a row's logits is nothing


def test_on_a_tie_only_the_lowest_token_id_is_correct():
    case = make_case(masked_fraction=1.0)
    best = (case.hidden @ case.weight[: case.vocab_size].t()).argmax(1)
    twin = (best + 97) % case.vocab_size  # some twins lie above, some below
    weight = case.weight.clone()
    for row in range(8):
        weight[twin[row]] = weight[best[row]]
    for targets in (best, twin):
        tied = case._replace(weight=weight, targets=targets)
        want = dense(tied).output.correct
        assert torch.equal(run(tied).output.correct, want) and want.any() and not want.all()
    flat = case._replace(weight=torch.zeros_like(weight), targets=torch.arange(len(best)) % 2)
    assert torch.equal(run(flat).output.correct, flat.targets == 0)


def test_repeated_runs_are_bitwise_equal():
    case = make_case(torch.float32)
    first, second = run(case), run(case)
    for a, b in zip((*first.output, *first[1:]), (*second.output, *second[1:]), strict=True):
        assert torch.equal(a, b)


def test_the_chunk_size_changes_nothing_but_rounding():
    case = make_case()
    for chunk_rows in (1, 7, 64, 10_000):
        assert_close(run(case, chunk_rows=chunk_rows), dense(case), *BOUNDS[torch.float64])


def test_chunks_tile_the_rows_within_the_bound_and_full_chunks_fit_gemm_tiles():
    for rows in (0, 1, 5, 127, 128, 129, 1000, 1024, 1025, 1100, 8192, 8193):
        for chunk_rows in (1, 100, 128, 1024, 2048):
            bounds = loss_module._chunk_bounds(rows, chunk_rows)
            assert [row for start, stop in bounds for row in range(start, stop)] == list(range(rows))
            sizes = [stop - start for start, stop in bounds]
            assert all(size <= chunk_rows for size in sizes)
            assert len(sizes) <= -(-rows // chunk_rows)
            if chunk_rows % 128 == 0:
                assert all(size % 128 == 0 for size in sizes[:-1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_backward_scales_gradients_by_grad_output_without_rounding_it_to_the_input_dtype(dtype):
    case = make_case(dtype)
    factor = (1.5 + 0.9 * 2**-8) / 4  # nearly halfway between two bfloat16 numbers, 2.3e-3 from either
    plain, scaled = run(case), run(case, factor)
    for was, now in ((plain.hidden, scaled.hidden), (plain.weight, scaled.weight)):
        slope = (now.double() * was.double()).sum() / was.double().square().sum()
        assert abs(float(slope) / factor - 1) < (1e-12 if dtype == torch.float64 else 1e-3)


def test_a_second_backward_gives_the_same_gradients_or_an_error_never_nothing():
    case = make_case()
    hidden = case.hidden.clone().requires_grad_()
    arguments = (case.weight, case.targets, case.masked, case.loss_weight, case.normalizer)
    output = diffusion_loss(hidden, *arguments, vocab_size=case.vocab_size)
    (first,) = torch.autograd.grad(output.loss, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(output.loss, hidden)
    assert torch.equal(first, second) and first.any()
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(output.loss, hidden)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_input_costs_no_matmul_and_leaves_the_other_gradient_unchanged(frozen):
    case, kept = make_case(), "weight" if frozen == "hidden" else "hidden"
    inputs = {"hidden": case.hidden.clone(), "weight": case.weight.clone()}
    inputs[kept].requires_grad_()
    with FlopCounterMode(display=False) as flops:
        output = diffusion_loss(*inputs.values(), *case[2:6], vocab_size=case.vocab_size)
        output.loss.backward()
    assert flops.get_total_flops() == 4 * int(case.masked.sum()) * case.weight.numel()
    assert inputs[frozen].grad is None
    assert distance(inputs[kept].grad, getattr(dense(case), kept)) < 1e-12


def test_backward_does_not_need_the_weight_data_that_zero3_has_freed():
    case = make_case()
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    output = diffusion_loss(hidden, weight, *case[2:6], vocab_size=case.vocab_size)
    saved = [*output.loss.grad_fn.saved_tensors, *vars(output.loss.grad_fn).values()]
    addresses = [t.untyped_storage().data_ptr() for t in saved if isinstance(t, Tensor)]
    assert len(addresses) == 2 and weight.untyped_storage().data_ptr() not in addresses  # nothing keeps it alive
    weight.data.fill_(torch.nan)
    weight.data = torch.empty(0, dtype=weight.dtype)
    hidden_grad, weight_grad = torch.autograd.grad(output.loss, (hidden, weight))
    want = dense(case)
    assert weight_grad.shape == case.weight.shape and distance(weight_grad, want.weight) < 1e-12
    assert distance(hidden_grad, want.hidden) < 1e-12


class Allocations(TorchDispatchMode):
    """Elements of every new tensor storage that an operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        new = (t for t in tree_leaves(out) if isinstance(t, Tensor) and t.untyped_storage()._cdata not in known)
        self.sizes += [t.untyped_storage().nbytes() // t.element_size() for t in new]
        return out


@pytest.mark.parametrize("shape", [(64, 16, 4096, 8), (512, 64, 640, 32), (2048, 8, 160, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_is_larger_than_a_chunk_of_logits_or_an_input_and_eval_makes_no_gradient(dtype, shape):
    tokens, hidden_size, vocab, chunk_rows = shape
    case = make_case(dtype, tokens, hidden_size, vocab, vocab)
    chunk, weight_size, hidden_numel = chunk_rows * vocab, vocab * hidden_size, tokens * hidden_size
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()

    def call() -> DiffusionLossOutput:
        return diffusion_loss(hidden, weight, *case[2:6], vocab_size=vocab, chunk_rows=chunk_rows)

    with Allocations() as training:
        call().loss.backward()
    assert max(training.sizes) <= max(chunk, weight_size, hidden_numel) < tokens * vocab
    assert sum(size >= chunk for size in training.sizes if size not in (weight_size, hidden_numel)) == 1
    with Allocations() as evaluation, torch.no_grad():
        output = call()
    assert not output.loss.requires_grad
    upcast = weight_size if dtype == torch.bfloat16 else 0  # a CPU computes half precision in float32
    assert max(evaluation.sizes) <= max(chunk, upcast)
    assert hidden_numel not in evaluation.sizes and evaluation.sizes.count(weight_size) <= (upcast > 0)


def test_flops_are_three_matmuls_of_the_masked_rows_and_one_without_gradients():
    case = make_case(torch.float32, padded=320)
    one = 2 * int(case.masked.sum()) * case.weight.numel()
    with FlopCounterMode(display=False) as flops:
        run(case)
    assert flops.get_total_flops() == 3 * one
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        diffusion_loss(*(t.requires_grad_() for t in case[:2]), *case[2:6], vocab_size=case.vocab_size)
    assert flops.get_total_flops() == one


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_logits_give_a_non_finite_loss_only_where_rows_are_counted(value):
    case = make_case(torch.float32)
    counted, other = case.masked.nonzero()[3].item(), (~case.masked).nonzero()[3].item()
    hidden = case.hidden.clone()
    hidden[other] = value
    got = run(case._replace(hidden=hidden))
    assert torch.equal(got.output.loss, run(case).output.loss) and not got.hidden[other].any()
    hidden[counted] = value
    got = run(case._replace(hidden=hidden))
    assert not got.output.loss.isfinite() and not got.weight.isfinite().all()


@pytest.mark.parametrize("target", [-100, 251, 255, 256, 10**9])
def test_a_counted_target_outside_the_vocab_poisons_loss_and_gradients(target):
    case = make_case(torch.float32)
    row = case.masked.nonzero()[0].item()
    case.targets[row] = target
    got = run(case)
    assert not got.output.loss.isfinite() and not got.output.correct[row]
    assert got.hidden[row].isnan().all() and got.weight[: case.vocab_size].isnan().any()


def test_arguments_that_cannot_be_right_are_refused_with_their_numbers():
    case = make_case(torch.float32)

    def refused(match: str, **changes) -> None:
        changed = case._replace(**changes)
        with pytest.raises(ValueError, match=match):
            diffusion_loss(*changed[:6], vocab_size=changed.vocab_size)

    refused("256 rows .* vocab_size 257", vocab_size=257)
    refused("float32 and torch.float64", weight=case.weight.double())
    refused(r"\(192, 24\), \(256, 23\)", weight=case.weight[:, :23])
    refused(r"targets .*\[192\].*\[191\]", targets=case.targets[:-1])
    refused("masked must be bool", masked=case.masked.long())
    with pytest.raises(ValueError, match="chunk_rows .* 0"):
        diffusion_loss(*case[:6], vocab_size=251, chunk_rows=0)
    with pytest.raises(ValueError, match="250 rows .* vocab_size 251"):
        check_vocab_shards(250, 251)
    check_vocab_shards(256, 251)


IN_PLACE = kernels_module._Kernels(kernels_module._statistics_in_place, kernels_module._gradient_in_place)
FUSED = kernels_module._Kernels(kernels_module._statistics_fused, kernels_module._gradient_fused)


@pytest.mark.parametrize("kernels", [IN_PLACE, FUSED], ids=["in_place", "fused"])
def test_both_kernel_forms_subtract_the_one_hot_before_rounding_to_bfloat16(kernels):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(16, 300, generator=generator)
    column = torch.randint(0, 300, (16,), generator=generator)
    logits[torch.arange(16), column] += 16  # p near 1: p - 1 is far below the spacing of bfloat16 at 1
    scale = torch.rand(16, generator=generator) + 0.5
    probability = logits.double().softmax(1)
    want = (probability - F.one_hot(column, 300)) * scale.double()[:, None]
    work = logits.clone()
    row_max, sum_exp, argmax = kernels.statistics(work)
    got = kernels.gradient(work, row_max, row_max, sum_exp, scale, column, torch.bfloat16)
    assert got.dtype == torch.bfloat16 and torch.equal(argmax, logits.argmax(1))
    at_target = torch.arange(16), column
    torch.testing.assert_close(got.double()[at_target], want[at_target], rtol=2**-8, atol=2e-7)
    torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=2e-7)


def test_the_fused_kernels_obey_the_dense_definition_in_one_graph_for_all_row_counts(monkeypatch):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = [torch.compile(kernel, dynamic=True, fullgraph=True, backend=backend) for kernel in FUSED]
    monkeypatch.setattr(kernels_module, "_kernels", lambda device: kernels_module._Kernels(*compiled))
    for tokens in (40, 192, 310):
        case = make_case(torch.float32, tokens=tokens)
        assert_close(run(case, chunk_rows=128), dense(case), *BOUNDS[torch.float32])
    assert len(graphs) == 2
    torch._dynamo.reset()

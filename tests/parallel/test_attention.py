"""Laws of attention over isolated documents: who sees whom, to the bit, for every way of keeping documents apart.

varlen_attn itself runs on CUDA alone: its tests are skipped elsewhere, where a plain kernel with its documented contract shows
that it would be given the right tokens.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from parallel import attention as product
from parallel.attention import Documents, attention, find_documents, keep_apart, kernel_fault, varlen_works
from parallel.engine import joined_inputs, model_inputs

CPU = torch.device("cpu")
CUDA = pytest.param("varlen", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))
# Uneven documents, documents of one token, padding behind them; a row of padding alone; one document.
ROWS = torch.tensor(
    [[0] * 5 + [1] + [2] * 3 + [3] + [-1] * 2, [-1] * 12, [7] * 12, [4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, -1]],
    dtype=torch.int32,
)
SCATTERED = torch.tensor([[0, 1, 0, 1, -1, 0, 2, -1, 1, 1, 2, 0]] * 4, dtype=torch.int32)
HEADS, HEAD_DIM = 4, 8


def documents_of(ids: Tensor) -> Documents:
    found = find_documents(ids, CPU)
    assert found is not None
    return found


def flash_contract(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, ahead: int | None = None) -> Tensor:
    """softmax written out, sequence by sequence, head by head, as FlashAttention's documentation words it; window (-1, ahead)."""
    outputs = []
    for begin, end in itertools.pairwise(bounds.tolist()):
        assert 0 <= end - begin <= longest
        heads = []
        for head in range(q.shape[1]):
            shared = head * k.shape[1] // q.shape[1]
            scores = q[begin:end, head] @ k[begin:end, shared].T / q.shape[-1] ** 0.5
            if ahead is not None:
                off = torch.arange(end - begin) - torch.arange(end - begin)[:, None]
                scores = scores.masked_fill(off > ahead, float("-inf"))
            heads.append(scores.softmax(-1) @ v[begin:end, shared])
        outputs.append(torch.stack(heads, 1))
    return torch.cat(outputs)


def by_documents(q, k, v, ids):
    return attention(q, k, v, documents_of(ids))


def by_mask(q, k, v, ids):
    return attention(q, k, v, documents_of(ids).mask())


def by_contract(q, k, v, ids):
    return product._attend_within(q, k, v, documents_of(ids), flash_contract)


compiled_attention = torch.compile(attention, backend="aot_eager", fullgraph=True)


def compiled(q, k, v, ids):
    return compiled_attention(q, k, v, keep_apart(documents_of(ids), None, q.dtype, HEAD_DIM, compiled=True))


@pytest.fixture(autouse=True)
def forget_graphs():
    torch._dynamo.reset()


BACKENDS: dict[str, Callable] = {
    "one by one": by_documents, "mask": by_mask, "bounds": by_contract, "compiled": compiled
}  # fmt: skip


def inputs(dtype: torch.dtype, kv_heads: int = 2, seed: int = 0) -> list[Tensor]:
    """q, k, v that need gradients, as a projection makes them: heads behind tokens in memory."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((4, 12, heads, HEAD_DIM) for heads in (HEADS, kv_heads, kv_heads))
    made = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    return [x.to(dtype).transpose(1, 2).requires_grad_() for x in made]


def dense(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """softmax written out over all tokens of the row, in float64."""
    groups = q.shape[1] // k.shape[1]
    outputs = []
    for head in range(q.shape[1]):
        scores = q[:, head].double() @ k[:, head // groups].double().mT / q.shape[-1] ** 0.5
        scores = scores.masked_fill(ids[:, :, None] != ids[:, None, :], float("-inf"))
        outputs.append(scores.softmax(-1) @ v[:, head // groups].double())
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-13), (torch.float32, 2e-6)])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_output_and_gradients_equal_the_dense_softmax_in_float64(backend, kv_heads, dtype, bound):
    upstream = torch.randn(4, HEADS, 12, HEAD_DIM, generator=torch.Generator().manual_seed(5)).to(dtype)
    given = inputs(dtype, kv_heads)
    for ids in (ROWS, SCATTERED) if backend == "mask" else (ROWS,):
        found, truth = BACKENDS[backend](*given, ids), dense(*given, ids)
        assert found.dtype == dtype and found.shape == upstream.shape
        gradients = torch.autograd.grad(found, given, upstream)
        expected = torch.autograd.grad(truth, given, upstream.double())
        for got, want in zip((found, *gradients), (truth, *expected)):
            assert (got - want).norm() < bound * want.norm()  # a NaN fails as well


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_token_of_another_document_or_of_padding_moves_an_output_or_takes_a_gradient_by_a_single_bit(backend, dtype):
    attend = BACKENDS[backend]
    for row, begin, end in [(0, 0, 5), (0, 5, 6), (0, 6, 9), (0, 9, 10), (0, 10, 12), (3, 4, 5), (1, 0, 12)]:
        own = torch.zeros(4, 1, 12, 1, dtype=torch.bool)
        own[row, :, begin:end] = True
        given, other = inputs(dtype), inputs(dtype, seed=1)
        changed = [torch.where(own, x, y).detach().requires_grad_() for x, y in zip(given, other)]
        before, after = attend(*given, ROWS), attend(*changed, ROWS)
        assert torch.equal(before[row, :, begin:end], after[row, :, begin:end])
        for gradient in torch.autograd.grad(after[row, :, begin:end].square().sum(), changed):
            assert not gradient.masked_fill(own, 0).any() and gradient.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_token_of_the_own_document_earlier_or_later_moves_every_output_of_it(backend):
    """Silently causal attention is a bug."""
    for changed_token in (0, 4):
        given = inputs(torch.float64)
        moved = [x.detach().clone() for x in given]
        moved[2][0, :, changed_token] += 1
        off = (BACKENDS[backend](*given, ROWS) - BACKENDS[backend](*moved, ROWS)).abs().amax((1, 3))
        assert (off[0, :5] > 1e-6).all() and not off[0, 5:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_document_of_one_token_gets_its_own_value(backend):
    q, k, v = inputs(torch.float64, kv_heads=HEADS)
    out = BACKENDS[backend](q, k, v, ROWS)
    assert torch.equal(out[3], v[3]) and torch.equal(out[0, :, 5], v[0, :, 5])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_flex_attention_with_a_document_mask_gives_the_same(dtype):
    """Another library's idea of a document mask. (Not compiled: on a CPU flex_attention has no backward otherwise.)"""
    q, k, v = (x.detach() for x in inputs(dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is not compiled
        block_mask = create_block_mask(lambda b, h, i, j: ROWS[b, i] == ROWS[b, j], 4, None, 12, 12, device="cpu")
        truth = flex_attention(q, k, v, block_mask=block_mask, enable_gqa=True)
    for name in ("one by one", "mask"):
        assert torch.allclose(BACKENDS[name](q, k, v, ROWS), truth, rtol=0, atol=20 * torch.finfo(dtype).eps)


# What the host finds.


def test_bounds_are_exactly_the_documents_of_random_rows_by_enumeration():
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(300):
        samples, length = (int(torch.randint(1, high, (), generator=generator)) for high in (4, 9))
        steps = torch.randint(0, 2, (samples, length), generator=generator)
        if torch.rand((), generator=generator) < 0.2:
            steps.zero_()
        ids = steps.cumsum(1).int() - 1  # runs; a row that begins with 0 begins with padding (-1)
        found = find_documents(ids, CPU)
        pairs = [(row, int(ids[row, i])) for row in range(samples) for i in range(length)]
        sizes = [len(list(group)) for _, group in itertools.groupby(pairs)]
        seen.add(found is None)
        if found is None:
            assert len(sizes) == samples
            continue
        assert len(sizes) > samples and found.bounds is not None and found.bounds.dtype == torch.int32
        assert [n for n in found.bounds.diff().tolist() if n] == sizes
        assert found.bounds[0] == 0 and found.bounds[-1] == ids.numel() and (found.bounds.diff() >= 0).all()
        assert found.longest >= max(sizes) and torch.equal(found.ids, ids)
        for number in (found.longest, len(found.bounds) - 1):
            assert number & (number - 1) == 0
    assert seen == {True, False}


def test_a_document_whose_tokens_are_not_together_gets_a_mask_and_stays_one():
    found = documents_of(SCATTERED)
    isolation = keep_apart(found, None, torch.float32, HEAD_DIM)
    assert found.bounds is None
    assert isinstance(isolation, Tensor) and isolation.dtype == torch.float32 and isolation.shape == (4, 1, 12, 12)
    assert torch.equal(isolation[:, 0].exp() == 1, SCATTERED[:, :, None] == SCATTERED[:, None, :])
    assert (isolation.exp() % 1 == 0).all()  # 0 or -inf is added to the scores
    same_ids_in_two_rows = torch.tensor([[0, 0, 1], [0, 1, 1]])
    assert documents_of(same_ids_in_two_rows).bounds is not None


def test_samples_of_one_document_need_no_isolation():
    for ids in (torch.zeros(3, 4), torch.tensor([[5] * 4, [-1] * 4, [0] * 4])):
        assert find_documents(ids.int(), CPU) is None
    assert keep_apart(None, None, torch.bfloat16, 64) is None


def test_nothing_is_read_back_from_the_device():
    """A meta tensor holds no values: whoever read one would raise."""
    found = find_documents(ROWS, torch.device("meta"))
    assert found is not None and found.ids.is_meta and found.bounds.is_meta
    isolation = keep_apart(found, None, torch.bfloat16, HEAD_DIM)
    assert isolation.is_meta and isolation.shape == (4, 1, 12, 12)
    q, k, v = (x.detach().to("meta") for x in inputs(torch.bfloat16))
    assert attention(q, k, v, isolation).shape == q.shape


def test_document_ids_stay_on_the_host_until_a_stage_looks_at_them():
    microbatch = {"noisy_ids": torch.zeros(4, 12).long(), "document_ids": ROWS, "position_ids": ROWS}
    meta = torch.device("meta")
    joined = joined_inputs([microbatch, microbatch], meta)
    assert joined["inputs"].is_meta and joined["position_ids"].is_meta
    assert torch.equal(joined["document_ids"], torch.cat([ROWS, ROWS]))
    given = model_inputs(microbatch, meta, torch.ones(()))["document_ids"]
    assert isinstance(given, Documents) and given.ids.is_meta
    whole = microbatch | {"document_ids": torch.zeros(4, 12, dtype=torch.int32)}
    assert model_inputs(whole, meta, torch.ones(()))["document_ids"] is None


# The kernel that takes bounds.


def test_varlen_attn_is_called_as_this_torch_declares_it_in_one_graph_and_few_graphs_serve_all_microbatches():
    """On meta tensors: shapes, dtypes and gradients, without a GPU."""
    compilations = []

    def count(graph, example_inputs):
        compilations.append(graph)
        return graph.forward

    def run(q, k, v, documents):
        return product._attend_within(q, k, v, documents, product._varlen)

    given = [x.detach().bfloat16().to("meta").requires_grad_() for x in inputs(torch.float32)]
    both = (run, torch.compile(run, backend=count, fullgraph=True))
    generator = torch.Generator().manual_seed(0)
    sizes = set()
    for chance in (0.0, 0.1, 0.2, 0.5, 0.6, 0.9, 1.0) * 3:
        ids = (torch.rand(4, 12, generator=generator) < chance).cumsum(1).int()
        ids[0, -1] = 99
        found = find_documents(ids, torch.device("meta"))
        sizes.add(len(found.bounds))
        for way in both:
            out = way(*given, found)
            gradients = torch.autograd.grad(out.sum(), given)
            assert (out.shape, out.dtype) == (given[0].shape, torch.bfloat16)
            assert [g.shape for g in gradients] == [x.shape for x in given]
    assert len(sizes) >= 4 and len(compilations) <= 2


def test_a_kernel_that_is_right_passes_the_probe():
    for dtype, head_dim in itertools.product((torch.bfloat16, torch.float16), (8, 64)):
        assert kernel_fault(product._one_by_one, CPU, dtype, head_dim) == ""
    with torch.inference_mode():
        assert kernel_fault(flash_contract, CPU, torch.bfloat16, 16) == ""


def whole_row(q, k, v, bounds, longest, ahead):
    return flash_contract(q, k, v, torch.tensor([0, len(q)]), len(q))


def one_late(q, k, v, bounds, longest, ahead):
    return flash_contract(q, k, v, (bounds + 1).clamp(max=len(q)) * (bounds > 0), longest)


def other_groups(q, k, v, bounds, longest, ahead):
    return flash_contract(q, *(x.flip(1) for x in (k, v)), bounds, longest)


def no_gradient_at_keys(q, k, v, bounds, longest, ahead):
    return flash_contract(q, k.detach() + 0 * k, v, bounds, longest)


def not_a_number(q, k, v, bounds, longest, ahead):
    return flash_contract(q, k, v, bounds, longest) * float("nan")


def raises(q, k, v, bounds, longest, ahead):
    raise RuntimeError("FlashAttention only supports\nAmpere GPUs or newer.")


@pytest.mark.parametrize(
    "kernel, words",
    [
        (whole_row, "its output"),
        (one_late, "its output"),
        (other_groups, "its output"),
        (no_gradient_at_keys, "dk"),
        (not_a_number, "nan"),
        (raises, "cannot run here: RuntimeError: FlashAttention only supports Ampere GPUs or newer."),
    ],
)
def test_a_kernel_that_is_wrong_is_named_by_the_probe(kernel, words):
    assert words in kernel_fault(kernel, CPU, torch.bfloat16, 64)


def test_where_varlen_attn_does_not_run_one_line_says_so_and_a_mask_is_used():
    varlen_works.cache_clear()
    with pytest.warns(UserWarning, match="kept apart by a mask, which is slower: varlen_attn cannot run here") as seen:
        assert not varlen_works(CPU, torch.bfloat16, 64)  # its kernel is CUDA's alone
    assert len(seen) == 1 and "\n" not in str(seen[0].message)
    varlen_works.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what it never takes is no surprise
        assert not any(varlen_works(CPU, *given) for given in ((torch.float32, 64), (torch.bfloat16, 12)))


@pytest.mark.parametrize("backend", [CUDA])
@pytest.mark.parametrize("head_dim, kv_heads", [(64, 4), (64, 2), (128, 1)])
def test_on_a_gpu_varlen_attn_is_chosen_and_no_other_document_moves_a_bit(backend, head_dim, kv_heads):
    cuda = torch.device("cuda")
    assert kernel_fault(product._varlen, cuda, torch.bfloat16, head_dim) == ""
    ids = torch.tensor([[0] * 300 + [1] + [2] * 500 + [-1] * 223] * 2, dtype=torch.int32)
    found = keep_apart(find_documents(ids, cuda), None, torch.bfloat16, head_dim)
    assert isinstance(found, Documents)
    q, k, v = (torch.randn(2, n, 1024, head_dim, device=cuda).bfloat16() for n in (4, kv_heads, kv_heads))
    out = attention(q, k, v, found)
    truth = dense(q.cpu(), k.cpu(), v.cpu(), ids)
    assert (out.cpu().double() - truth).norm() < 0.02 * truth.norm()
    changed = [torch.cat((x[:, :, :301], torch.randn_like(x[:, :, 301:])), 2) for x in (q, k, v)]
    assert torch.equal(attention(*changed, found)[:, :, :301], out[:, :, :301])

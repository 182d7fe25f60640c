"""Laws of who sees whom beyond documents: causal, some tokens ahead, blocks; to the bit, for every way of computing it.

The window of varlen_attn runs on CUDA alone: its tests are skipped elsewhere, where a plain kernel with its documented contract
shows what it would be given.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from parallel import attention as product
from parallel.attention import Documents, attention, find_documents, keep_apart, kernel_fault, varlen_works
from parallel.engine import joined_inputs, model_inputs
from parallel.visibility import Ahead, Rules, find_visibility
from tests import visibility_cases as cases
from tests.parallel.test_attention import flash_contract

CPU, META = torch.device("cpu"), torch.device("meta")
SAMPLES, LENGTH, HEADS, HEAD_DIM = 3, 12, 4, 8
CASES: dict[str, Tensor | None] = {
    "all": None,
    "causal": cases.look_ahead(SAMPLES, LENGTH, 0),
    "one ahead": cases.look_ahead(SAMPLES, LENGTH, 1),
    "four ahead": cases.look_ahead(SAMPLES, LENGTH, 4),
    "all ahead": cases.look_ahead(SAMPLES, LENGTH, LENGTH + 3),
    "blocks of 3": cases.one_copy(SAMPLES, LENGTH, 3),
    "blocks of 5": cases.one_copy(SAMPLES, LENGTH, 5),
    "two copies, blocks of 1": cases.two_copies(SAMPLES, LENGTH // 2, 1),
    "two copies, blocks of 2": cases.two_copies(SAMPLES, LENGTH // 2, 2),
    "two copies, blocks of 4": cases.two_copies(SAMPLES, LENGTH // 2, 4),
    "two copies, unlike samples": torch.cat([cases.two_copies(1, LENGTH // 2, size) for size in (1, 2, 3)]),
}
HALF = [[0, 0, 0, 0, 1, 1], [2, 2, 2, 2, 2, -1], [3, 4, 4, 4, 4, 4]]
DOCUMENTS: dict[str, Tensor] = {
    "one": torch.zeros(SAMPLES, LENGTH, dtype=torch.int32),
    "packed": torch.tensor([[0] * 5 + [1] + [2] * 6, [3] * 10 + [-1] * 2, [4] * 12], dtype=torch.int32),
    "in both copies": torch.tensor([row * 2 for row in HALF], dtype=torch.int32),
}


def found(case: str, documents: str, device: torch.device = CPU):
    visibility = CASES[case]
    seen = None if visibility is None else find_visibility(visibility, device)
    return find_documents(DOCUMENTS[documents], device), seen


def eager(q, k, v, case, documents):
    return attention(q, k, v, keep_apart(*found(case, documents), q.dtype, HEAD_DIM))


compiled_attention = torch.compile(attention, backend="aot_eager", fullgraph=True, dynamic=False)


def compiled(q, k, v, case, documents):
    return compiled_attention(q, k, v, keep_apart(*found(case, documents), q.dtype, HEAD_DIM, compiled=True))


def on_a_gpu(q, k, v, case, documents):
    """What would run there, by a plain kernel in place of varlen_attn."""
    there, seen = found(case, documents)
    if isinstance(seen, Ahead):
        there = (there or product._whole_samples(seen))._replace(ahead=seen.tokens)
    if seen is None or isinstance(seen, Rules) or there.bounds is None:
        return eager(q, k, v, case, documents)
    return product._attend_within(q, k, v, there, flash_contract)


BACKENDS = {"eager": eager, "compiled": compiled, "windows": on_a_gpu}


@pytest.fixture(autouse=True)
def forget_graphs():
    torch._dynamo.reset()


def inputs(dtype: torch.dtype, kv_heads: int = 2, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = ((SAMPLES, LENGTH, heads, HEAD_DIM) for heads in (HEADS, kv_heads, kv_heads))
    made = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    return [x.to(dtype).transpose(1, 2).requires_grad_() for x in made]


def dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """softmax written out in float64, over the keys that `seen` [B, L, L] names."""
    outputs = []
    for head in range(q.shape[1]):
        shared = head * k.shape[1] // q.shape[1]
        scores = q[:, head].double() @ k[:, shared].double().mT / q.shape[-1] ** 0.5
        weights = scores.exp() * seen
        outputs.append(weights / weights.sum(-1, keepdim=True) @ v[:, shared].double())
    return torch.stack(outputs, 1)


WAYS = [("eager", torch.float64, 1e-13), ("windows", torch.float64, 1e-13), ("eager", torch.float32, 2e-6)]
COMPILED = [("compiled", torch.float32, 2e-6)]
KINDS = ("all", "causal", "four ahead", "two copies, blocks of 2")


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize(
    "case, backend, dtype, bound",
    [(case, *way) for case in CASES for way in WAYS + COMPILED * (case in KINDS)],
)
def test_output_and_gradients_equal_the_softmax_over_the_enumerated_keys(case, backend, documents, dtype, bound):
    seen = cases.seen(CASES[case], DOCUMENTS[documents])
    upstream = torch.randn(SAMPLES, HEADS, LENGTH, HEAD_DIM, generator=torch.Generator().manual_seed(5)).to(dtype)
    for kv_heads in (1, 4):
        given = inputs(dtype, kv_heads)
        out, truth = BACKENDS[backend](*given, case, documents), dense(*given, seen)
        gradients = torch.autograd.grad(out, given, upstream)
        expected = torch.autograd.grad(truth, given, upstream.double())
        for got, want in zip((out, *gradients), (truth, *expected)):
            assert got.dtype == dtype and (got - want).norm() < bound * want.norm()  # a NaN fails as well


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("case", CASES)
def test_a_token_that_is_not_seen_moves_no_output_by_a_single_bit_and_takes_no_gradient(case, documents, dtype):
    seen = cases.seen(CASES[case], DOCUMENTS[documents])
    before = eager(*inputs(dtype), case, documents)
    for query in (0, 3, 5, 6, 11):
        own = torch.zeros(LENGTH, dtype=torch.bool)
        own[query] = True
        given, other = inputs(dtype), inputs(dtype, seed=1)
        unseen = ~seen[:, query][:, None, :, None]
        changed = [torch.where(own[:, None], given[0], other[0])]
        changed += [torch.where(unseen, y, x) for x, y in zip(given[1:], other[1:])]
        changed = [x.detach().requires_grad_() for x in changed]
        after = eager(*changed, case, documents)
        assert torch.equal(after[:, :, query], before[:, :, query])
        for gradient in torch.autograd.grad(after[:, :, query].square().sum(), changed[1:]):
            assert not gradient.masked_fill(~unseen, 0).any() and gradient.isfinite().all()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
def test_the_ranks_of_two_copies_say_what_the_paper_says(size):
    documents = torch.zeros(1, LENGTH, dtype=torch.int32)
    truth = cases.blocks_of_two_copies(LENGTH // 2, size)
    visibility = cases.two_copies(1, LENGTH // 2, size)
    assert torch.equal(cases.seen(visibility, documents)[0], truth)
    found_rules = find_visibility(visibility, CPU)
    assert isinstance(found_rules, Rules) and torch.equal(found_rules.mask()[0, 0], truth)


# What the host finds.


def as_seen(isolation, samples: int, length: int) -> Tensor:
    """[B, L, L] bool: what an isolation amounts to."""
    if isolation is None:
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    elif isinstance(isolation, Ahead):
        assert isolation.tokens == 0
        mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    else:
        mask = isolation.mask() if isinstance(isolation, Documents) else isolation.exp() == 1
    return mask[:, 0].expand(samples, length, length)


def test_every_visibility_of_two_tokens_and_of_three_without_groups_is_understood_as_enumerated_or_refused():
    two = [torch.tensor(fields) for fields in itertools.product((0, 1), (0, 1), (-1, 0), repeat=2)]
    three = [torch.tensor(fields) for fields in itertools.product((0, 1, 2), (0, 1, 2), (-1,), repeat=3)]
    kinds = set()
    for visibility in (fields.view(1, -1, 3) for fields in two + three):
        length = visibility.shape[1]
        for documents in (torch.zeros(1, length).int(), torch.tensor([[0] * (length - 1) + [1]])):
            truth = cases.seen(visibility, documents)
            if not truth[0].diagonal().all():
                with pytest.raises(ValueError, match="does not see itself"):
                    find_visibility(visibility, CPU)
                kinds.add("refused")
                continue
            seen = find_visibility(visibility, CPU)
            isolation = keep_apart(find_documents(documents, CPU), seen, torch.float32, HEAD_DIM)
            kinds.add(type(seen).__name__)
            assert torch.equal(as_seen(isolation, 1, length), truth), visibility
    assert kinds == {"refused", "NoneType", "Ahead", "Rules"}


def test_random_visibilities_of_several_samples_with_documents_are_understood_as_enumerated():
    generator = torch.Generator().manual_seed(0)
    kinds = set()
    for _ in range(400):
        samples, length = (int(torch.randint(1, high, (), generator=generator)) for high in (4, 6))
        rank, reach, group = (
            torch.randint(low, high, (samples, length), generator=generator) for low, high in ((0, 3), (-1, 3), (-1, 2))
        )
        visibility = torch.stack((rank, torch.where(group < 0, torch.maximum(reach, rank), reach), group), -1)
        if torch.rand((), generator=generator) < 0.3:
            visibility = cases.look_ahead(samples, length, int(torch.randint(0, 5, (), generator=generator)))
        if torch.rand((), generator=generator) < 0.2:
            visibility[0, -1, 1] += 1  # nearly a case that a kernel knows
        documents = torch.randint(0, 2, (samples, length), generator=generator).cumsum(1) % 3
        seen = find_visibility(visibility, CPU)
        for compiled_blocks in (False, True):
            isolation = keep_apart(
                find_documents(documents, CPU), seen, torch.float32, HEAD_DIM, compiled=compiled_blocks
            )
            kinds.add((type(seen).__name__, type(isolation).__name__))
            assert torch.equal(as_seen(isolation, samples, length), cases.seen(visibility, documents))
    assert {first for first, _ in kinds} == {"NoneType", "Ahead", "Rules"} and len(kinds) >= 6


def test_only_what_no_kernel_knows_gets_a_mask_and_samples_that_are_alike_share_one():
    def means(case: str, documents: str = "one", compiled_blocks: bool = False):
        return keep_apart(*found(case, documents), torch.bfloat16, HEAD_DIM, compiled=compiled_blocks)

    for compiled_blocks in (False, True):
        causal = means("causal", compiled_blocks=compiled_blocks)
        assert isinstance(causal, Ahead) and causal.tokens == 0
        assert means("all ahead", compiled_blocks=compiled_blocks) is None
    assert find_visibility(cases.look_ahead(2, LENGTH, LENGTH - 1), CPU) is None
    assert isinstance(find_visibility(cases.look_ahead(2, LENGTH, LENGTH - 2), CPU), Ahead)
    assert find_visibility(cases.one_copy(2, LENGTH, LENGTH), CPU) is None  # one block
    assert isinstance(find_visibility(cases.one_copy(2, LENGTH, 1), CPU), Ahead)  # causal
    packed = means("causal", "packed")
    assert isinstance(packed, Documents) and packed.ahead == 0
    for case, documents, samples in [
        ("one ahead", "one", 1), ("four ahead", "packed", SAMPLES), ("two copies, blocks of 2", "one", 1),
        ("two copies, blocks of 2", "in both copies", SAMPLES), ("two copies, unlike samples", "one", SAMPLES),
        ("causal", "in both copies", SAMPLES),
    ]:  # fmt: skip
        mask = means(case, documents)
        assert isinstance(mask, Tensor) and mask.dtype == torch.bfloat16
        assert mask.shape == (samples, 1, LENGTH, LENGTH), case
    with pytest.raises(ValueError, match="keep_apart"):
        q, k, v = inputs(torch.float32)
        attention(q, k, v, find_visibility(CASES["one ahead"], CPU))


def test_a_token_that_sees_nothing_is_named():
    visibility = cases.two_copies(SAMPLES, LENGTH // 2, 2)
    visibility[1, 4, 2] = -1
    with pytest.raises(ValueError, match=r"sample 1, position 4: rank 1073741824 is above reach 1 .* see itself"):
        find_visibility(visibility, CPU)
    with pytest.raises(ValueError, match=r"\[3, 12\]; it must be \[samples, tokens, 3\]"):
        find_visibility(visibility[..., 0], CPU)


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("case", [case for case in CASES if CASES[case] is not None])
def test_nothing_is_read_back_from_the_device_and_visibility_stays_on_the_host_until_a_stage_looks_at_it(
    case, documents
):
    """A meta tensor holds no values: whoever read one would raise."""
    ids = torch.zeros(SAMPLES, LENGTH).long()
    microbatch = {
        "noisy_ids": ids, "position_ids": ids, "document_ids": DOCUMENTS[documents], "visibility": CASES[case],
    }  # fmt: skip
    joined = joined_inputs([microbatch, microbatch], META)
    assert joined["inputs"].is_meta and torch.equal(joined["visibility"], torch.cat([CASES[case]] * 2))
    given = model_inputs(microbatch, META, torch.ones(()))
    assert type(given["visibility"]) is type(find_visibility(CASES[case], CPU))
    q, k, v = (x.detach().to("meta") for x in inputs(torch.bfloat16))
    isolation = keep_apart(given["document_ids"], given["visibility"], torch.bfloat16, HEAD_DIM)
    parts = (isolation,) if isolation is None or isinstance(isolation, Tensor) else tuple(isolation)
    assert all(x.is_meta for x in parts if isinstance(x, Tensor))
    assert attention(q, k, v, isolation).shape == q.shape


# The kernel that takes a window.


def ignored(q, k, v, bounds, longest, ahead):
    return flash_contract(q, k, v, bounds, longest, None)


def always_causal(q, k, v, bounds, longest, ahead):
    return flash_contract(q, k, v, bounds, longest, 0)


def one_more(q, k, v, bounds, longest, ahead):
    return flash_contract(q, k, v, bounds, longest, ahead + 1)


def behind(q, k, v, bounds, longest, ahead):
    q, k, v = (x.flip(0) for x in (q, k, v))
    return flash_contract(q, k, v, (len(q) - bounds).flip(0), longest, ahead).flip(0)


def over_the_row(q, k, v, bounds, longest, ahead):
    return flash_contract(q, k, v, torch.tensor([0, len(q)]), len(q), ahead)


def no_such_word(q, k, v, bounds, longest, ahead):
    raise TypeError("varlen_attn() got an unexpected keyword argument 'window_size'")


def test_a_kernel_with_the_right_window_is_accepted(monkeypatch):
    assert kernel_fault(product._one_by_one, CPU, torch.bfloat16, 16, 1) == ""
    monkeypatch.setattr(product, "_varlen", flash_contract)
    varlen_works.cache_clear()
    assert varlen_works(CPU, torch.bfloat16, 16, True)
    varlen_works.cache_clear()


@pytest.mark.parametrize("kernel", [ignored, always_causal, one_more, behind, over_the_row, no_such_word])
def test_a_kernel_with_a_wrong_window_is_refused(kernel, monkeypatch):
    wrong = [ahead for ahead in (0, 1, 40) if kernel_fault(kernel, CPU, torch.bfloat16, 16, ahead)]
    assert wrong == [1, 40] if kernel is always_causal else wrong == [0, 1, 40]
    varlen_works.cache_clear()
    monkeypatch.setattr(product, "_varlen", kernel)
    with pytest.warns(
        UserWarning, match=r"tokens that see \d+ ahead are kept apart by a mask, which is slower"
    ) as said:
        assert not varlen_works(CPU, torch.bfloat16, 16, True)
    assert len(said) == 1
    varlen_works.cache_clear()


def test_varlen_attn_takes_the_window_in_one_graph_and_few_graphs_serve_all_windows():
    """On meta tensors: shapes, dtypes and gradients, without a GPU. As attention goes from causal to full, the window grows."""
    compilations = []

    def count(graph, example_inputs):
        compilations.append(graph)
        return graph.forward

    def run(q, k, v, documents):
        return product._attend_within(q, k, v, documents, product._varlen)

    given = [x.detach().bfloat16().to("meta").requires_grad_() for x in inputs(torch.float32)]
    ways = (run, torch.compile(run, backend=count, fullgraph=True))
    for documents in ("one", "packed"):
        for tokens in (0, 1, 2, 3, 5, 7, 9, 10):
            there = find_documents(DOCUMENTS[documents], META)
            seen = find_visibility(cases.look_ahead(SAMPLES, LENGTH, tokens), META)
            there = (there or product._whole_samples(seen))._replace(ahead=seen.tokens)
            for way in ways:
                out = way(*given, there)
                gradients = torch.autograd.grad(out.sum(), given)
                assert (out.shape, out.dtype) == (given[0].shape, torch.bfloat16)
                assert [g.shape for g in gradients] == [x.shape for x in given]
    assert len(compilations) <= 5


def test_varlen_attn_is_told_the_window(monkeypatch):
    told = []

    def kernel(q, *rest, **options):
        told.append(options.get("window_size", (-1, -1)))
        return q

    monkeypatch.setattr(product, "varlen_attn", kernel)
    q, k, v = (x.detach() for x in inputs(torch.bfloat16))
    for ahead in (None, 0, 4):
        there = find_documents(DOCUMENTS["packed"], CPU)._replace(ahead=ahead)
        product._attend_within(q, k, v, there, product._varlen)
    assert told == [(-1, -1), (-1, 0), (-1, 4)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", [case for case in CASES if CASES[case] is not None])
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_on_a_gpu_every_case_equals_the_enumerated_softmax_and_windows_need_no_mask(documents, case):
    cuda = torch.device("cuda")
    there, seen = found(case, documents, cuda)
    isolation = keep_apart(there, seen, torch.bfloat16, HEAD_DIM)
    if isinstance(seen, Ahead) and (there is None or there.bounds is not None):
        assert isinstance(isolation, Ahead if there is None and seen.tokens == 0 else Documents)
    given = [x.detach().to(cuda).requires_grad_() for x in inputs(torch.bfloat16)]
    out = attention(*given, isolation)
    truth_given = [x.detach().cpu().double().requires_grad_() for x in given]
    truth = dense(*truth_given, cases.seen(CASES[case], DOCUMENTS[documents]))
    upstream = torch.randn(truth.shape, generator=torch.Generator().manual_seed(5)).bfloat16()
    gradients = torch.autograd.grad(out, given, upstream.to(cuda))
    expected = torch.autograd.grad(truth, truth_given, upstream.double())
    for got, want in zip((out, *gradients), (truth, *expected)):
        assert (got.cpu().double() - want).norm() < 0.02 * want.norm()

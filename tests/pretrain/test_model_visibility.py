"""Laws of the assembled model under causal, look-ahead and block visibility: who moves whom, and which forwards are equal."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from parallel.initialise import initialise
from parallel.mesh import build_mesh
from parallel.recompute import MODES
from pretrain.config import ParallelConfig
from pretrain.model import DiffusionTransformer, model_shape, parallel_layout
from tests import visibility_cases as cases
from tests.distributed import training_case

LENGTH = 12
HALF = torch.tensor([[0, 0, 0, 0, 1, 1], [2, 2, 2, 2, 2, -1]])
CASES = {
    "causal": cases.look_ahead(2, LENGTH, 0),
    "one ahead": cases.look_ahead(2, LENGTH, 1),
    "three ahead": cases.look_ahead(2, LENGTH, 3),
    "blocks of 4": cases.one_copy(2, LENGTH, 4),
    "two copies, blocks of 1": cases.two_copies(2, LENGTH // 2, 1),
    "two copies, blocks of 2": cases.two_copies(2, LENGTH // 2, 2),
    "two copies, blocks of 4": cases.two_copies(2, LENGTH // 2, 4),
}
DOCUMENTS = {
    "one": torch.zeros(2, LENGTH, dtype=torch.int32),
    "packed": torch.tensor([[0] * 5 + [1] + [2] * 6, [3] * 10 + [-1] * 2], dtype=torch.int32),
    "in both copies": torch.cat((HALF, HALF), 1).int(),
}


def build(**parallel) -> DiffusionTransformer:
    """The small model of the parity case in float64, its weights so large that attention is far from uniform."""
    mesh = build_mesh()
    built = DiffusionTransformer(model_shape(training_case.MODEL), mesh, parallel_layout(ParallelConfig(**parallel)))
    initialise(built, built.shape, mesh, training_case.SEED)
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return built.double()


@pytest.fixture(scope="module")
def model() -> DiffusionTransformer:
    return build()


@pytest.fixture(scope="module", params=["eager", "compiled"])
def either_model(request) -> DiffusionTransformer:
    built = build()
    if request.param == "compiled":
        torch._dynamo.reset()
        built.compiled = True
        for block in built.blocks.values():
            block.compute = torch.compile(block._compute, backend="aot_eager", fullgraph=True)
    return built


def tokens(samples: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(2, 150, (samples, length), generator=torch.Generator().manual_seed(seed))


def positions(length: int, copies: int = 1) -> Tensor:
    return torch.arange(length).repeat(copies)[None]


@torch.no_grad()
def run(
    model, ids: Tensor, visibility: Tensor | None = None, documents: Tensor | None = None, copies: int = 1
) -> Tensor:
    at = positions(ids.shape[1] // copies, copies).expand(ids.shape)
    return model(ids, at, documents, visibility=visibility)


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("case", CASES)
def test_a_token_moves_exactly_the_positions_that_see_it_through_the_layers_and_no_other_by_a_bit(
    either_model, case, documents
):
    """What a layer lets through, the next one passes on: for causal and blocks that adds nobody, for look-ahead it does."""
    visibility, ids = CASES[case], tokens(2, LENGTH)
    one = cases.seen(visibility, DOCUMENTS[documents])
    through = one
    for _ in range(len(either_model.blocks) - 1):
        through = (through.int() @ one.int()) > 0
    assert torch.equal(through, one) == ("ahead" not in case)
    copies = 2 if "two" in case else 1
    before = run(either_model, ids, visibility, DOCUMENTS[documents], copies)
    for token in range(LENGTH):
        changed = ids.clone()
        changed[:, token] = (changed[:, token] + 11) % 150
        moved = (run(either_model, changed, visibility, DOCUMENTS[documents], copies) - before).abs().amax(-1)
        assert not moved[~through[:, :, token]].any(), f"token {token} leaks"
        assert (moved[through[:, :, token]] > 1e-9).all(), f"token {token} is not seen"


def close(found: Tensor, truth: Tensor) -> bool:
    return bool((found - truth).norm() <= 1e-12 * truth.norm())


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
def test_each_noisy_block_of_two_copies_has_the_logits_of_clean_blocks_followed_by_it(model, size):
    half = LENGTH // 2
    noisy, clean = tokens(2, half, 2), tokens(2, half, 3)
    both = run(model, torch.cat((noisy, clean), 1), cases.two_copies(2, half, size), copies=2)
    for begin in range(0, half, size):
        end = min(begin + size, half)
        ids = torch.cat((clean[:, :begin], noisy[:, begin:end]), 1)
        alone = run(model, ids, cases.one_copy(2, end, size))
        assert close(both[:, begin:end], alone[:, begin:]), f"block at {begin}"
    assert close(both[:, half:], run(model, clean, cases.one_copy(2, half, size)))  # the clean copy knows of no noise


def test_one_block_is_full_attention_and_clean_blocks_of_one_token_are_causal(model):
    half = LENGTH // 2
    noisy, clean = tokens(2, half, 2), tokens(2, half, 3)
    whole = run(model, torch.cat((noisy, clean), 1), cases.two_copies(2, half, half), copies=2)
    assert close(whole[:, :half], run(model, noisy)) and close(whole[:, half:], run(model, clean))
    single = run(model, torch.cat((noisy, clean), 1), cases.two_copies(2, half, 1), copies=2)
    assert close(single[:, half:], run(model, clean, cases.look_ahead(2, half, 0)))
    assert not close(single[:, half:], run(model, clean))
    assert torch.equal(run(model, noisy, cases.look_ahead(2, half, half)), run(model, noisy))


def test_causal_and_blocks_of_one_token_give_each_prefix_the_logits_it_has_alone(model):
    ids = tokens(2, LENGTH)
    whole = run(model, ids, cases.look_ahead(2, LENGTH, 0))
    for end in range(1, LENGTH):
        assert close(whole[:, :end], run(model, ids[:, :end], cases.one_copy(2, end, 1)))


@pytest.mark.parametrize("recompute", MODES)
def test_all_layers_share_one_mask_forward_and_backward(recompute):
    """What each layer keeps for its backward pass is that mask itself, not a copy."""
    built = build(activation_checkpointing=recompute)
    squares = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.shape[-2:] == (LENGTH, LENGTH):
            squares.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        at = positions(LENGTH // 2, 2).expand(2, LENGTH)
        visibility = cases.two_copies(2, LENGTH // 2, 2)
        logits = built(tokens(2, LENGTH), at, DOCUMENTS["in both copies"], visibility=visibility)
        logits.square().sum().backward()
    assert len(squares) >= len(built.blocks) and len(set(squares)) == 1
    assert all(parameter.grad.isfinite().all() for parameter in built.parameters())


def test_compiled_blocks_serve_all_visibilities_with_few_graphs():
    built, graphs = build(), []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    built.compiled = True
    block = built.blocks["0"]
    built.blocks["1"].compute = block.compute = torch.compile(block._compute, backend=count, fullgraph=True)
    for ahead in range(LENGTH + 1):
        for documents in DOCUMENTS.values():
            run(built, tokens(2, LENGTH), cases.look_ahead(2, LENGTH, ahead), documents)
    for size in (1, 2, 3, 4, 6):
        for documents in DOCUMENTS.values():
            run(built, tokens(2, LENGTH), cases.two_copies(2, LENGTH // 2, size), documents, copies=2)
    assert len(graphs) == 4  # all tokens, causal, a mask for each sample, one for all samples

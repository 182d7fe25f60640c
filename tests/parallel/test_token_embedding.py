"""Laws of the embedding of mixtures of tokens, in one process (over ranks: tests/distributed/test_row_losses.py)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from parallel.block import TokenEmbedding, vocab_embedding
from parallel.mesh import build_mesh
from parallel.shape import ModelShape
from tests.parallel.test_loss import Allocations

B, L, K, H, VOCAB = 3, 32, 5, 16, 40
SHAPE = ModelShape(
    num_layers=1, hidden_size=H, num_heads=2, num_kv_heads=2, ffn_hidden_size=16, vocab_size=VOCAB
)  # fmt: skip


@pytest.fixture
def embedding() -> TokenEmbedding:
    made = vocab_embedding(SHAPE, build_mesh())
    with torch.no_grad():
        made.weight.copy_(torch.randn(made.weight.shape, generator=torch.Generator().manual_seed(1)))
    return made


def mixture() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(2)
    return torch.randint(0, VOCAB, (B, L, K), generator=draw), torch.rand(B, L, K, generator=draw).softmax(-1)


def test_a_mixture_is_the_weighted_sum_of_rows_and_its_gradient_reaches_every_row(embedding):
    ids, weights = mixture()
    table = embedding.weight.detach().double().requires_grad_()
    want = torch.einsum("blk,blkh->blh", weights.double(), table[ids])
    pull = torch.randn(B, L, H, generator=torch.Generator().manual_seed(3))
    (want * pull.double()).sum().backward()
    got = embedding(ids, weights)
    (got * pull).sum().backward()
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-6)
    torch.testing.assert_close(embedding.weight.grad.double(), table.grad, rtol=0, atol=1e-5)


def test_all_weight_on_one_token_is_that_token(embedding):
    ids, _ = mixture()
    weights = torch.zeros(B, L, K)
    weights[..., 2] = 1
    assert torch.equal(embedding(ids, weights), embedding(ids[..., 2]))


def test_a_bfloat16_mixture_is_rounded_once(embedding):
    ids, weights = mixture()
    embedding.to(torch.bfloat16)
    got = embedding(ids, weights)
    want = torch.einsum("blk,blkh->blh", weights.double(), embedding.weight.detach().double()[ids])
    assert got.dtype == torch.bfloat16
    assert ((got.double() - want).abs() <= 2**-8 * want.abs() + 1e-6).all()


def test_neither_the_forward_nor_what_it_keeps_for_the_backward_grows_with_the_number_of_tokens_mixed(embedding):
    ids, weights = mixture()
    kept: list[int] = []
    with Allocations() as made, torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.numel()) or x, lambda x: x
    ):  # fmt: skip
        embedding(ids, weights)
    assert max(made.sizes) == B * L * H
    assert kept and max(kept) <= B * L  # ids and weights of one k at a time, no embeddings

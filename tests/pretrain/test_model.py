"""Laws of the assembled model: published sizes, non-causality, isolation, layout-free initial weights."""

from __future__ import annotations

import pytest
import torch

from parallel.attention import find_documents, keep_apart, rotary_angles
from parallel.engine import model_inputs
from parallel.initialise import local_share, rows
from parallel.mesh import build_mesh, single_process_mesh
from parallel.recompute import MODES, recomputed
from parallel.shape import ModelShape, parameter_counts, parameter_table
from parallel.visibility import find_visibility
from pretrain.config import ModelConfig
from pretrain.flops import flops_per_token
from pretrain.load_config import load_config
from pretrain.model import DiffusionTransformer, model_shape
from tests import reference_model
from tests.distributed import training_case as case

PUBLISHED = {  # LLaDA (arXiv 2502.09992, table of model sizes): total, non-embedding
    "llada_1b": (1_487_243_264, 969_246_720),
    "llada_8b": (8_015_581_184, 6_979_588_096),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_llada_configs_build_on_the_meta_device_with_exactly_the_published_parameter_counts(name):
    shape = model_shape(load_config(["--config", f"configs/{name}.yaml"]).model)
    with torch.device("meta"):
        model = DiffusionTransformer(shape, single_process_mesh())
    assert all(p.is_meta for p in model.parameters())
    built = sum(p.numel() for p in model.parameters())
    assert built == PUBLISHED[name][0]
    assert parameter_counts(shape) == dict(zip(("total", "non_embedding"), PUBLISHED[name]))
    table = parameter_table(shape)
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == {
        n: spec.local_shape(1, shape.padded_vocab(1)) for n, spec in table.items()
    }


@pytest.mark.parametrize("name", [*PUBLISHED, "quickstart"])
def test_the_schedules_of_the_shipped_configs_make_sense(name):
    from pretrain.lr_schedule import check_schedule

    check_schedule(load_config(["--config", f"configs/{name}.yaml"]))


@pytest.fixture(scope="module")
def model() -> DiffusionTransformer:
    """The small model of the parity case, run in this process's own group, with its initial weights."""
    from parallel.initialise import initialise

    mesh = build_mesh()
    torch.manual_seed(0)  # must not matter
    built = DiffusionTransformer(model_shape(case.MODEL), mesh)
    initialise(built, built.shape, mesh, case.SEED)
    with torch.no_grad():  # larger weights, so that attention is far from uniform
        for parameter in built.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return built


def run(model, ids, documents=None, positions=None) -> torch.Tensor:
    positions = torch.arange(ids.shape[1]).expand(ids.shape) if positions is None else positions
    with torch.no_grad():
        return model(ids, positions, documents)


def test_logits_equal_the_float64_reference_with_and_without_documents(model):
    ids = torch.randint(0, 150, (3, 24), generator=torch.Generator().manual_seed(1))
    documents = torch.tensor([[0] * 9 + [1] * 10 + [-1] * 5] * 3)
    weights = {n: p.detach()[: parameter_table(model.shape)[n].shape[0]].double() for n, p in model.named_parameters()}
    positions = torch.arange(24).expand(3, 24)
    for documents_or_none in (None, documents):
        truth = reference_model.logits(weights, model.shape, ids, positions, documents_or_none)
        found = run(model, ids, documents_or_none)
        assert (found - truth).norm() / truth.norm() < 1e-5


def test_a_later_token_moves_every_earlier_position(model):
    """Silently causal attention is a bug."""
    ids = torch.randint(2, 150, (1, 16), generator=torch.Generator().manual_seed(2))
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 7) % 150
    assert ((run(model, ids) - run(model, changed)).abs().amax(-1)[0] > 1e-6).all()


def test_no_change_in_another_document_or_in_padding_moves_a_logit_by_a_single_bit(model):
    ids = torch.randint(2, 150, (1, 16), generator=torch.Generator().manual_seed(3))
    documents = torch.tensor([[0] * 6 + [1] * 6 + [-1] * 4])
    before = run(model, ids, documents)
    for start, stop in ((6, 12), (12, 16)):
        changed = ids.clone()
        changed[0, start:stop] = (ids[0, start:stop] + 11) % 150
        assert torch.equal(run(model, changed, documents)[0, :6], before[0, :6])
    changed = ids.clone()
    changed[0, 5] = (ids[0, 5] + 11) % 150
    assert not torch.equal(run(model, changed, documents)[0, 0], before[0, 0])


def test_padding_behind_a_sample_leaves_it_as_if_it_were_alone(model):
    ids = torch.randint(2, 150, (1, 16), generator=torch.Generator().manual_seed(4))
    padded = run(model, ids, torch.tensor([[0] * 10 + [-1] * 6]))[:, :10]
    alone = run(model, ids[:, :10])
    assert (padded - alone).abs().max() < 1e-5


# Rows of several documents with positions counted anew in each: uneven ones, one token alone, padding, nothing but padding.
LENGTHS = ((7, 1, 5, 3), (9, 4), (16,), ())


def packed(lengths: tuple[tuple[int, ...], ...], width: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids, document_ids, position_ids [rows, width]: documents of these lengths end to end, padding behind them."""
    documents = torch.full((len(lengths), width), -1, dtype=torch.int32)
    positions = torch.arange(width, dtype=torch.int32).repeat(len(lengths), 1)
    for row, sizes in enumerate(lengths):
        begin = 0
        for number, size in enumerate(sizes):
            documents[row, begin : begin + size] = number
            positions[row, begin : begin + size] = torch.arange(size, dtype=torch.int32)
            begin += size
    ids = torch.randint(2, 150, documents.shape, generator=torch.Generator().manual_seed(6))
    return ids.masked_fill(documents < 0, case.PAD), documents, positions


@pytest.fixture(scope="module", params=["float32", "float64", "float32 compiled"])
def packing_model(request, model) -> DiffusionTransformer:
    dtype, _, compiled = request.param.partition(" ")
    built = DiffusionTransformer(model.shape, build_mesh())
    built.load_state_dict(model.state_dict())
    built.to(getattr(torch, dtype))
    if compiled:
        torch._dynamo.reset()
        built.compiled = True
        for block in built.blocks.values():
            block.compute = torch.compile(block._compute, backend="aot_eager", fullgraph=True)
    return built


def test_no_token_of_any_other_document_moves_a_logit_by_a_bit_and_every_token_of_its_own_does(packing_model):
    ids, documents, positions = packed(LENGTHS)
    before = run(packing_model, ids, documents, positions)
    for row in range(len(LENGTHS)):
        for document in documents[row].unique():
            own = torch.zeros_like(documents, dtype=torch.bool)
            own[row] = documents[row] == document
            elsewhere = run(packing_model, torch.where(own, ids, (ids + 11) % 150), documents, positions)
            assert torch.equal(elsewhere[own], before[own])
            last = own.nonzero()[-1]
            changed = ids.clone()
            changed[tuple(last)] = (changed[tuple(last)] + 11) % 150
            moved = (run(packing_model, changed, documents, positions) - before).abs().amax(-1)
            assert (moved[own] > 1e-6).all() and not moved[~own].any()


def test_a_document_at_any_offset_has_the_logits_it_has_alone_in_a_row(packing_model):
    ids, documents, positions = packed(LENGTHS)
    together = run(packing_model, ids, documents, positions)
    bound = 1e-10 if together.dtype == torch.float64 else 1e-5
    for row, sizes in enumerate(LENGTHS):
        for begin, size in zip(torch.tensor((0, *sizes)).cumsum(0).tolist(), sizes):
            alone = run(packing_model, ids[row : row + 1, begin : begin + size])
            off = (together[row, begin : begin + size] - alone[0]).norm() / alone.norm()
            assert off < bound, f"row {row}, document at {begin}"


def test_logits_loss_and_gradients_of_packed_rows_equal_the_float64_reference(packing_model):
    ids, documents, positions = packed(LENGTHS)
    masked = (torch.rand(ids.shape, generator=torch.Generator().manual_seed(7)) < 0.5) & (documents >= 0)
    batch = {
        "noisy_ids": ids.masked_fill(masked, case.MASK), "target_ids": ids, "masked": masked, "weight": masked * 2.0,
        "position_ids": positions, "document_ids": documents,
    }  # fmt: skip
    table = parameter_table(packing_model.shape)
    weights = {
        n: p.detach()[: table[n].shape[0]].double().requires_grad_() for n, p in packing_model.named_parameters()
    }
    truth = reference_model.loss(weights, packing_model.shape, batch, 50.0)
    expected = reference_model.gradients(weights, truth)
    packing_model.zero_grad()
    output = packing_model(**model_inputs(batch, torch.device("cpu"), torch.tensor(50.0)))
    output.loss.backward()
    assert output.loss.item() == pytest.approx(truth.item(), rel=1e-5)
    for name, parameter in packing_model.named_parameters():
        gradient = parameter.grad[: table[name].shape[0]].double()
        assert (gradient - expected[name]).norm() < 1e-4 * expected[name].norm(), name


def test_a_row_of_padding_alone_and_documents_of_one_token_give_finite_logits_and_gradients(packing_model):
    ids, documents, positions = packed(((), (1,) * 16, (3, 1)))
    packing_model.zero_grad()
    logits = packing_model(ids, positions, documents)
    logits.square().sum().backward()
    assert logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in packing_model.parameters())


def isolations() -> dict[str, object]:
    found = find_documents(torch.tensor([[0, 0, 1, 1, 1, 2, -1, -1]] * 2, dtype=torch.int32), torch.device("cpu"))
    assert found is not None
    causal = find_visibility(
        torch.stack((torch.arange(8), torch.arange(8), -torch.ones(8)), -1).int().expand(2, 8, 3), torch.device("cpu")
    )
    return {
        "one document": None,
        "documents": keep_apart(found, None, torch.float32, 8, compiled=True),
        "causal": keep_apart(None, causal, torch.float32, 8, compiled=True),
        "causal documents": keep_apart(found, causal, torch.float32, 8, compiled=True),
        "a mask": found.mask(),
    }


@pytest.mark.parametrize("recompute", MODES)
@pytest.mark.parametrize("kind", isolations())
def test_a_compiled_block_is_one_graph_without_a_break(model, kind, recompute):
    cos, sin = rotary_angles(torch.arange(8).expand(2, 8), 8, 500000.0)
    torch._dynamo.reset()
    compute = recomputed(model.blocks["0"]._compute, recompute)
    found = torch._dynamo.explain(compute)(torch.randn(2, 8, 32), cos, sin, isolations()[kind])
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


def test_a_compiled_block_serves_microbatches_of_any_documents_with_few_graphs(model):
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    cos, sin = rotary_angles(torch.arange(16).expand(1, 16), 8, 500000.0)
    torch._dynamo.reset()
    compute = torch.compile(model.blocks["0"]._compute, backend=count, fullgraph=True)
    x = torch.randn(1, 16, 32)
    for sizes in ((16,), (8, 8), (1,) * 16, (3, 4), (5, 5, 5), (1, 2, 3, 4), (), (15,), (2,) * 8, (1,) * 5):
        found = find_documents(packed((sizes,))[1], torch.device("cpu"))
        apart = [keep_apart(found, None, torch.float32, 8, compiled=way) for way in (True, False)]
        compiled, eager = compute(x, cos, sin, apart[0]), model.blocks["0"](x, cos, sin, apart[1])
        assert (compiled - eager).norm() < 1e-5 * eager.norm()
    assert len(graphs) == 2  # with and without documents


def test_initial_weights_are_the_same_at_every_layout_and_follow_the_stated_scale():
    shape = ModelShape(4, 64, 8, 4, 96, 300)
    table = parameter_table(shape)
    for name, spec in table.items():
        full = rows(name, spec, 5, 0, spec.shape[0])
        for tp in (1, 2, 4):
            padded = shape.padded_vocab(tp)
            shares = [local_share(name, spec, 5, tp, r, padded) for r in range(tp)]
            assert all(tuple(s.shape) == spec.local_shape(tp, padded) for s in shares)
            joined = torch.cat(shares, spec.tp_dim) if spec.tp_dim is not None else shares[-1]
            assert torch.equal(joined[: spec.shape[0]], full) and not joined[spec.shape[0] :].any()
        if spec.std is None:
            assert torch.equal(full, torch.ones(spec.shape))
        else:
            n = full.numel()
            assert abs(full.mean()) < 5 * spec.std / n**0.5 and abs(full.std() / spec.std - 1) < 5 / (2 * n) ** 0.5
    assert table["blocks.0.o_proj.weight"].std == pytest.approx(0.02 / 8**0.5)
    a, b = (rows("blocks.0.q_proj.weight", table["blocks.0.q_proj.weight"], s, 0, 64) for s in (5, 6))
    assert not torch.equal(a, b)
    c = rows("blocks.1.q_proj.weight", table["blocks.1.q_proj.weight"], 5, 0, 64)
    assert not torch.equal(a, c) and abs(float((a * c).mean())) < 5 * 0.02**2 / 64


def test_flops_equal_what_torch_counts_with_full_attention():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    config = ModelConfig(num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, ffn_hidden_size=48, vocab_size=256)
    mesh = build_mesh()
    model = DiffusionTransformer(model_shape(config), mesh)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    ids = torch.randint(0, 256, (2, 8))
    masked = torch.zeros(2, 8, dtype=torch.bool)
    masked[:, :4] = True
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        output = model(ids, torch.arange(8).expand(2, 8), None, ids, masked, masked.float(), torch.tensor(16.0))
        output.loss.backward()
    assert counter.get_total_flops() == 16 * flops_per_token(model.shape, 8, masked_fraction=0.5)

"""Laws of the predictor: what the network reads is what it read in training, and logits stand where their tokens do."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data.batch import DiffusionBatch, Form, expand
from data.compact import collate
from parallel.initialise import initialise
from parallel.mesh import build_mesh
from pretrain.model import DiffusionTransformer, model_shape
from pretrain.predictor import MASKED, Objective, Predictor
from tests.distributed import training_case as case

EOS, MASK, LENGTH, ROWS, BLOCK = 1, 0, 12, 3, 4
IDS = torch.from_numpy(np.random.default_rng(0).integers(2, case.MODEL.vocab_size, (ROWS, LENGTH)))


@pytest.fixture(scope="module")
def model() -> DiffusionTransformer:
    """The small model of the parity case in float64, its weights made larger so that attention is far from uniform."""
    mesh = build_mesh()
    built = DiffusionTransformer(model_shape(case.MODEL), mesh)
    initialise(built, built.shape, mesh, case.SEED)
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return built.double().eval()


def predict(model, objective: Objective, ids: torch.Tensor, lengths=None) -> torch.Tensor:
    return Predictor.of_model(model, objective, eos_id=EOS)(ids, lengths)


def raw(model, microbatch) -> torch.Tensor:
    with torch.no_grad():
        names = ("position_ids", "document_ids", "visibility")
        return model(microbatch["noisy_ids"], **{n: microbatch[n] for n in names if n in microbatch})


def trained(ids: torch.Tensor, masked: torch.Tensor, form: Form, lookahead=None) -> DiffusionBatch:
    """The batch that training makes of whole samples with these masks."""
    rows = [
        {
            "tokens": tokens.astype(np.uint16),
            "mask": mask,
            "length": len(tokens),
            "t": 0.5,
            "p_mask": 0.5,
            "weight": 2.0,
            "dropped": False,
            "sample_id": 0,
        }
        for tokens, mask in zip(ids.numpy(), masked.numpy())
    ]
    return expand(next(collate(rows, len(rows), EOS)), MASK, form, lookahead)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Logits come out in float32."""
    return torch.allclose(a.float(), b.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "objective, lookahead",
    [
        (MASKED, None),
        (Objective("bert"), None),
        (Objective(ahead=3), 3),
        (Objective("uniform"), None),
        (Objective("flow"), None),
        (Objective("autoregressive"), None),
    ],
)
def test_the_network_reads_token_for_token_what_it_read_in_training(objective, lookahead):
    masked = torch.zeros_like(IDS, dtype=torch.bool)
    if objective.kind in ("masked", "bert"):
        masked[:, 2::3] = True
    batch = trained(IDS, masked, Form(objective.kind, start_id=EOS), lookahead).tensors()
    microbatch = Predictor(lambda m: m["noisy_ids"], 9, objective, eos_id=EOS).microbatch(IDS.where(~masked, MASK))
    for name in ("noisy_ids", "position_ids", "visibility"):
        assert (name in microbatch) == (name in batch), name
        if name in batch:
            assert torch.equal(microbatch[name], batch[name]) and microbatch[name].dtype == batch[name].dtype
    assert "document_ids" not in microbatch and (batch["document_ids"] == 0).all(), "one text a row"


def test_a_left_to_right_network_predicts_each_token_from_those_before_it_alone(model):
    objective = Objective("autoregressive")
    logits = predict(model, objective, IDS)
    assert close(logits, raw(model, trained(IDS, IDS > 0, Form("autoregressive", start_id=EOS)).tensors()))
    for position in range(LENGTH):
        other = IDS.clone()
        other[:, position:] = MASK
        changed = predict(model, objective, other)
        assert torch.equal(changed[:, : position + 1], logits[:, : position + 1])
        if position + 1 < LENGTH:
            assert not close(changed[:, position + 1], logits[:, position + 1])


def test_a_block_is_predicted_as_in_training_beside_the_clean_blocks_before_it(model):
    """One copy of [clean blocks, noisy block b, anything] against training's two copies, at block b."""
    objective = Objective("block", BLOCK)
    masked = torch.zeros_like(IDS, dtype=torch.bool)
    masked[:, 1::2] = True
    logits = raw(model, trained(IDS, masked, Form("block", BLOCK)).tensors())[:, :LENGTH]
    for start in range(0, LENGTH, BLOCK):
        here = slice(start, start + BLOCK)
        ids = IDS.clone()
        ids[:, here] = ids[:, here].where(~masked[:, here], MASK)
        ids[:, start + BLOCK :] = MASK
        assert close(predict(model, objective, ids)[:, here], logits[:, here])
        ids[:, here] = 5
        assert not close(predict(model, objective, ids)[:, here], logits[:, here]), "a block sees itself"
    assert close(predict(model, Objective("block", LENGTH), IDS), predict(model, MASKED, IDS))


def test_shifted_logits_are_those_of_the_place_before_and_the_first_token_has_none(model):
    ids = IDS.clone()
    ids[:, 5] = MASK
    plain, shifted = predict(model, MASKED, ids), predict(model, Objective(shift=True), ids)
    assert torch.equal(shifted[:, 1:], plain[:, :-1]) and shifted[:, 0].isnan().all()
    masked = torch.zeros_like(IDS, dtype=torch.bool)
    masked[:, 5] = True
    batch = trained(IDS, masked, Form(shift=True))
    assert torch.equal(batch.noisy_ids, ids) and batch.masked[:, 4].all() and int(batch.masked.sum()) == ROWS
    assert torch.equal(batch.target_ids[:, 4], IDS[:, 5]), "where training pays for token 5 is what is read for it here"


@pytest.mark.parametrize("kind", ["masked", "block", "autoregressive"])
def test_rows_of_other_lengths_change_nothing(model, kind):
    objective = Objective(kind, BLOCK if kind == "block" else 0)
    lengths = torch.tensor([5, LENGTH, 9])
    together = predict(model, objective, IDS, lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = predict(model, objective, IDS[row : row + 1, :length])[0]
        assert close(together[row, :length], alone)
    full = Predictor.of_model(model, objective, eos_id=EOS).microbatch(IDS, torch.tensor([LENGTH] * ROWS))
    assert "document_ids" not in full, "rows without padding take the fast path"


def test_logits_are_float32_without_gradient_whatever_the_network_computes_in():
    network = torch.nn.Linear(1, 9).bfloat16()
    predictor = Predictor(lambda m: network(m["noisy_ids"][..., None].bfloat16()), 9, eos_id=EOS)
    logits = predictor(IDS)
    assert logits.dtype == torch.float32 and not logits.requires_grad and logits.shape == (ROWS, LENGTH, 9)

"""One rank of the tensor-parallel loss tests: runs every law in 2, 3 and 4 way groups and reports each.

    python loss_tp_worker.py RANK WORLD FOLDER

Ranks meet through a file in FOLDER (no port to lose). RANK writes FOLDER/RANK.json: {law/tpN: "held" or the traceback}.
The first broken law ends a rank, since its peers may wait in a collective that it never entered.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from parallel import row_loss as exchange
from parallel.loss import DiffusionLossOutput, check_vocab_shards, diffusion_loss
from parallel.row_loss import RowLoss
from parallel.row_losses import row_loss
from tests.parallel import row_loss_reference

TP_SIZES = (2, 3, 4)
TOKENS, HIDDEN, CHUNK = 96, 16, 20
CROSS_ENTROPY = row_loss("cross_entropy")
ROW_LOSSES = (CROSS_ENTROPY, row_loss("uniform"), row_loss("symmetric_kl", 0.1))


class Tp(NamedTuple):
    """This rank's place in one tp group."""

    group: dist.ProcessGroup
    rank: int
    ranks: int


class Case(NamedTuple):
    hidden: Tensor
    full_weight: Tensor  # [V_pad, H], all ranks' rows
    targets: Tensor
    masked: Tensor
    loss_weight: Tensor
    vocab_size: int
    current: Tensor
    alpha: Tensor


class Result(NamedTuple):
    output: DiffusionLossOutput
    hidden: Tensor
    weight: Tensor


def make_case(tp: Tp, dtype: torch.dtype, vocab: int = 250, shard_rows: int = 0, masked_fraction: float = 0.5) -> Case:
    generator = torch.Generator().manual_seed(7)
    padded = (shard_rows or -(-vocab // tp.ranks) + 1) * tp.ranks
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(padded, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    masked = torch.rand(TOKENS, generator=generator) < masked_fraction
    targets = torch.randint(0, vocab, (TOKENS,), generator=generator)
    targets[::2] = (hidden.double() @ weight[:vocab].double().t()).argmax(1)[::2]
    loss_weight = 1 / torch.rand(TOKENS, generator=generator).clamp_min(0.02)
    current = torch.randint(0, vocab, (TOKENS,), generator=generator)
    current[::3] = targets[::3]
    alpha = torch.rand(TOKENS, generator=generator).clamp(0.02, 0.98)
    return Case(hidden, weight, targets, masked, loss_weight, vocab, current, alpha)


def run(case: Case, tp: Tp, factor: float = 1.0, kind: RowLoss = CROSS_ENTROPY) -> Result:
    hidden = case.hidden.clone().requires_grad_()
    weight = case.full_weight.chunk(tp.ranks)[tp.rank].clone().requires_grad_()
    output = diffusion_loss(
        hidden, weight, case.targets, case.masked, case.loss_weight, 2.0 * TOKENS,
        tp_group=tp.group, vocab_size=case.vocab_size, chunk_rows=CHUNK,
        row_loss=kind, current=case.current, alpha=case.alpha,
    )  # fmt: skip
    (output.loss * factor).backward()
    return Result(output, hidden.grad, weight.grad)


def dense(case: Case, tp: Tp, kind: RowLoss = CROSS_ENTROPY) -> Result:
    """Float64 softmax over the whole vocab on every rank; the weight gradient cut to this rank's rows."""
    values = row_loss_reference.VALUES[type(kind)]
    noisy = row_loss_reference.Noisy(*case[:5], 2.0 * TOKENS, *case[5:])
    want = row_loss_reference.dense(noisy, values, kind)
    output = DiffusionLossOutput(want.loss, want.value, want.ce, want.correct)
    return Result(output, want.hidden, want.weight.chunk(tp.ranks)[tp.rank])


def distance(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.double()
    return float((a - b).norm() / (b.norm() if b.norm() > 0 else 1))


def same_on_all_ranks(tensor: Tensor, tp: Tp) -> bool:
    """Bitwise: the raw bytes of every rank against this rank's."""
    mine = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    gathered = [torch.empty_like(mine) for _ in range(tp.ranks)]
    dist.all_gather(gathered, mine, group=tp.group)
    return all(torch.equal(other, mine) for other in gathered)


BOUNDS = {  # loss, value and ce; hidden gradient; weight gradient
    torch.float64: (1e-10, 1e-10, 1e-10),
    torch.float32: (3e-6, 3e-6, 3e-6),
    torch.bfloat16: (3e-6, 2**-8, 2**-8),
}
CROSS_ENTROPY_BOUNDS = {
    torch.float64: (1e-12, 1e-12, 1e-12),
    torch.float32: (1e-6, 2e-6, 2e-6),
    torch.bfloat16: (1e-6, 2**-8, 2**-8),
}


def equals_dense(tp: Tp) -> None:
    for kind in ROW_LOSSES:
        for dtype, bounds in (CROSS_ENTROPY_BOUNDS if kind is CROSS_ENTROPY else BOUNDS).items():
            for masked_fraction in (0.5, 1.0):
                case = make_case(tp, dtype, masked_fraction=masked_fraction)
                got, want = run(case, tp, kind=kind), dense(case, tp, kind)
                assert 0 < want.output.correct.sum() < case.masked.sum()
                found = [distance(a, b) for a, b in zip(got.output[:3], want.output[:3], strict=True)]
                found += [distance(got.hidden, want.hidden), distance(got.weight, want.weight)]
                limits = (bounds[0], bounds[0], bounds[0], bounds[1], bounds[2])
                assert all(f <= limit for f, limit in zip(found, limits, strict=True)), (kind, dtype, found)
                assert torch.equal(got.output.correct, want.output.correct), (kind, dtype)


def bits_are_equal_on_all_ranks_and_runs(tp: Tp) -> None:
    for kind in ROW_LOSSES:
        for dtype in BOUNDS:
            case = make_case(tp, dtype)
            first, second = run(case, tp, kind=kind), run(case, tp, kind=kind)
            for tensor in (*first.output, first.hidden):
                assert same_on_all_ranks(tensor, tp), (kind, dtype)
            for a, b in zip((*first.output, *first[1:]), (*second.output, *second[1:]), strict=True):
                assert torch.equal(a, b), (kind, dtype)


def a_shard_of_nothing_but_padding_is_exact_and_gets_no_gradient(tp: Tp) -> None:
    shard_rows = 64
    case = make_case(tp, torch.float64, vocab=shard_rows * (tp.ranks - 1) - 3, shard_rows=shard_rows)
    for kind in ROW_LOSSES:
        got, want = run(case, tp, kind=kind), dense(case, tp, kind)
        close = 1e-12 if kind is CROSS_ENTROPY else 1e-10
        assert distance(got.output.loss, want.output.loss) < close and distance(got.hidden, want.hidden) < close
        assert distance(got.weight, want.weight) < close
        padding = torch.arange(tp.rank * shard_rows, (tp.rank + 1) * shard_rows) >= case.vocab_size
        assert not got.weight[padding].any() and padding.all() == (tp.rank == tp.ranks - 1)


def ties_across_shards_go_to_the_lowest_token_id(tp: Tp) -> None:
    case = make_case(tp, torch.float64, masked_fraction=1.0)
    logits = case.hidden @ case.full_weight[: case.vocab_size].t()
    best = logits.argmax(1)
    twin = (best + case.vocab_size // 2) % case.vocab_size  # another shard's id, above for some rows, below for others
    weight = case.full_weight.clone()
    for row in range(6):
        weight[twin[row]] = weight[best[row]]
    for targets in (best, twin):
        tied = case._replace(full_weight=weight, targets=targets)
        want = dense(tied, tp).output.correct
        assert torch.equal(run(tied, tp).output.correct, want) and want.any() and not want.all()
    flat = case._replace(full_weight=torch.zeros_like(weight), targets=torch.arange(TOKENS) * case.vocab_size // TOKENS)
    assert torch.equal(run(flat, tp).output.correct, flat.targets == 0)


def grad_output_scales_every_gradient(tp: Tp) -> None:
    case = make_case(tp, torch.float64)
    for kind in ROW_LOSSES:
        plain, scaled = run(case, tp, kind=kind), run(case, tp, factor=-0.37, kind=kind)
        assert distance(scaled.hidden, plain.hidden * -0.37) < 1e-15
        assert distance(scaled.weight, plain.weight * -0.37) < 1e-15


def one_gather_and_one_reduction_a_chunk_and_none_without_masked_rows(tp: Tp) -> None:
    """Two gathers for the losses of the whole distribution: they need the softmax's normaliser before their sums."""
    calls: list[str] = []
    gather, reduce = exchange.all_gather, dist.all_reduce

    def counted(name: str, collective: Callable) -> Callable:
        def call(*args, **kwargs):
            calls.append(name)
            return collective(*args, **kwargs)

        return call

    try:
        exchange.all_gather, dist.all_reduce = counted("gather", gather), counted("reduce", reduce)
        case = make_case(tp, torch.float32)
        chunks = -(-int(case.masked.sum()) // CHUNK)
        for kind in ROW_LOSSES:
            run(case, tp, kind=kind)
            gathers = ["gather"] * (1 if kind is CROSS_ENTROPY else 2)
            assert chunks > 1 and calls == [*gathers, "reduce"] * chunks, calls
            calls.clear()
        with torch.no_grad():
            weight = case.full_weight.chunk(tp.ranks)[tp.rank].requires_grad_()
            arguments = (case.hidden, weight, case.targets, case.masked, case.loss_weight, 1.0)
            diffusion_loss(*arguments, tp_group=tp.group, vocab_size=case.vocab_size, chunk_rows=CHUNK)
        assert calls == ["gather"] * chunks, calls
        calls.clear()
        empty = run(case._replace(masked=torch.zeros_like(case.masked)), tp)
        assert not calls and empty.output.loss == 0 and not empty.hidden.any() and not empty.weight.any()
        assert empty.weight.shape == (case.full_weight.shape[0] // tp.ranks, HIDDEN)
    finally:
        exchange.all_gather, dist.all_reduce = gather, reduce


def broken_rows_are_non_finite_on_every_rank(tp: Tp) -> None:
    case = make_case(tp, torch.float32)
    row = int(case.masked.nonzero()[0])
    lost = case.targets.clone()
    lost[row] = case.vocab_size  # a padding id: no rank has it
    spoiled = case.full_weight.clone()
    spoiled[case.vocab_size - 1, 0] = torch.nan  # one logit a row, on one rank only
    gone = case.current.clone()
    gone[row] = case.vocab_size
    uniform = row_loss("uniform")
    cases = [
        (c, kind) for kind in ROW_LOSSES for c in (case._replace(targets=lost), case._replace(full_weight=spoiled))
    ]
    for broken, kind in [*cases, (case._replace(current=gone), uniform)]:
        got = run(broken, tp, kind=kind)
        if kind is uniform and broken.current is gone:
            assert got.output.value[row].isnan() and got.hidden[row].isnan().all() and got.weight.isnan().any()
            continue
        assert not got.output.loss.isfinite() and got.hidden[row].isnan().all() and not got.output.correct[row]
        assert got.weight.isnan().any()


def unequal_or_short_shards_are_refused_on_every_rank(tp: Tp) -> None:
    check_vocab_shards(64, 64 * tp.ranks - 5, tp.group)
    for rows, vocab, words in ((64 + (tp.rank == 1), 100, ("64", "65")), (64, 64 * tp.ranks + 1, ("64", "vocab_size"))):
        try:
            check_vocab_shards(rows, vocab, tp.group)
        except ValueError as error:
            assert all(word in str(error) for word in words), error
        else:
            raise AssertionError(f"{rows} rows for {vocab} ids were accepted")


LAWS = {
    law.__name__: law
    for law in (
        equals_dense,
        bits_are_equal_on_all_ranks_and_runs,
        a_shard_of_nothing_but_padding_is_exact_and_gets_no_gradient,
        ties_across_shards_go_to_the_lowest_token_id,
        grad_output_scales_every_gradient,
        one_gather_and_one_reduction_a_chunk_and_none_without_masked_rows,
        broken_rows_are_non_finite_on_every_rank,
        unequal_or_short_shards_are_refused_on_every_rank,
    )
}


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    reports: dict[str, str] = {}
    report = folder / f"{rank}.json"
    for ranks in TP_SIZES:
        groups = [list(range(start, start + ranks)) for start in range(0, world - ranks + 1, ranks)]
        for members in groups:
            group = dist.new_group(members)
            if rank not in members:
                continue
            tp = Tp(group, members.index(rank), ranks)
            for name, law in LAWS.items():
                try:
                    law(tp)
                except Exception:  # whatever broke is the report
                    reports[f"{name}/tp{ranks}"] = f"rank {rank} of {members}:\n{traceback.format_exc()}"
                    report.write_text(json.dumps(reports))
                    os._exit(1)  # out of step with its peers from here on
                reports[f"{name}/tp{ranks}"] = "held"
                report.write_text(json.dumps(reports))
    dist.barrier()
    os._exit(0)  # a gloo group still referenced aborts a normal exit


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))

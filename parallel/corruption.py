"""Silent corruption: values that have several copies are compared over the ranks, and those that have one with themselves, by bits.

What is compared, for whatever engine and layout:
- copies: parameters as the forward uses them, over the data-parallel ranks (and the tensor-parallel ones, where those hold the
  same); float32 weights and moments over all ranks that hold the same box of a tensor (replicas, tensor-parallel copies);
- the forward's values with the float32 weights that they follow from, on the rank that holds these;
- float32 weights and moments with themselves, between the end of one update and the beginning of the next.

No tolerance: equal work in equal order gives equal bits, and where it does not, something is wrong. One number per tensor is
exchanged in one all-gather; values stay where they are.
"""

from __future__ import annotations

import hashlib
import socket
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.boxes import Boxes
from parallel.checksum import checksum, same_bits
from parallel.engine import Engine
from parallel.optimizer import MOMENTS
from parallel.shape import ModelShape, parameter_table

FORWARD = "forward"
KINDS = ("weight", *MOMENTS)
_NOTHING = 0  # the place of what a rank does not hold


class CorruptionError(RuntimeError):
    """Values in memory are not what they must be."""


@dataclass(frozen=True)
class Finding:
    """Values that are wrong, the same finding on every rank.

    what: `copies` of one value differ; the forward's values are not `rounded` from the weights; a value `changed` although nothing
    wrote it. tensor: KIND/NAME, KIND one of forward, weight, exp_avg, exp_avg_sq. ranks: those whose values are wrong, or may be:
    with three copies or more the odd ones out, else all that disagree. copies: how many were compared. rounding: may be no more
    than sums that tensor-parallel ranks took over different wires in different orders.
    """

    what: Literal["copies", "rounded", "changed"]
    tensor: str
    ranks: tuple[int, ...]
    hosts: tuple[str, ...]
    copies: int = 1
    rounding: bool = False

    def __str__(self) -> str:
        each = [f"rank {rank} on {host}" for rank, host in zip(self.ranks, self.hosts)]
        where = ", ".join(each[:8]) + (f" and {len(each) - 8} more" if len(each) > 8 else "")
        if self.what == "rounded":
            return f"{self.tensor} of {where} does not follow from the float32 weights there"
        if self.what == "changed":
            return f"{self.tensor} of {where} changed between two updates"
        if len(self.ranks) == self.copies:
            return f"{self.tensor}: {self.copies} copies disagree and none is in the majority ({where})"
        return (
            f"{self.tensor} of {where} differs from the other {self.copies - len(self.ranks)} of {self.copies} copies"
        )


def require_none(findings: Sequence[Finding]) -> None:
    """CorruptionError, naming them, if there are findings that cannot be explained by rounding."""
    findings = [finding for finding in findings if not finding.rounding]
    if findings:
        more = f"; and {len(findings) - 5} more" if len(findings) > 5 else ""
        raise CorruptionError(f"memory is corrupted: {'; '.join(map(str, findings[:5]))}{more}")


class CorruptionCheck:
    """Checks of one engine. Every method but `remember` and `forget` is collective over all ranks, and gives all the same."""

    def __init__(self, engine: Engine, shape: ModelShape):
        """Collective: the ranks tell each other what they hold of which tensor. The engine's layout must not change."""
        self._engine, self._mesh = engine, engine.mesh
        self._table = parameter_table(shape)
        keys = [f"{kind}/{name}" for kind in (FORWARD, *KINDS) for name in self._table]
        self._columns = {key: column for column, key in enumerate(keys)}
        self._hosts = self._from_all_objects(socket.gethostname())
        places = torch.zeros(len(self._columns), dtype=torch.int64)
        for key, place in self._places():
            places[self._columns[key]] = place
        self._of_rank = self._from_all(places.to(self._mesh.device))
        self._first = _first_alike(self._of_rank)
        self._remembered: dict[str, Tensor] = {}
        self._promises_no_order = self._mesh.device.type == "cuda"  # NCCL of its sums; gloo's is the same everywhere

    def compare_copies(self) -> list[Finding]:
        """What differs between copies now, and forward values that do not follow from their float32 weights."""
        state = self._engine.state()
        sums = {key: checksum(view for _, view in boxes.parts) for key, boxes in state.items()}
        wrong: dict[str, Tensor] = {}
        for name, whole in self._engine.whole_parameters():
            sums[f"{FORWARD}/{name}"] = checksum([whole])
            wrong[f"{FORWARD}/{name}"] = self._unlike(name, whole, state[f"weight/{name}"])
        everyone = self._from_all(torch.cat([self._row(sums), self._row(wrong)]))
        found, flags = everyone[:, : len(self._columns)], everyone[:, len(self._columns) :]
        return [*self._differing(found), *self._flagged("rounded", flags)]

    def remember(self) -> None:
        """Takes note of this rank's float32 weights and moments, behind an update. Talks to nobody."""
        self._remembered = self._own()

    @property
    def remembers(self) -> bool:
        """Whether `compare_own` has something to compare with: the same on all ranks if they call the rest alike."""
        return bool(self._remembered)

    def forget(self) -> None:
        """The state is about to be written for a good reason, e.g. from a checkpoint."""
        self._remembered = {}

    def compare_own(self) -> list[Finding]:
        """What changed since `remember`, which is forgotten; nothing if there is nothing to compare with."""
        before, self._remembered = self._remembered, {}
        if not before:
            return []
        changed = {key: (total != before[key]) for key, total in self._own().items()}
        return self._flagged("changed", self._from_all(self._row(changed)))

    def require_own(self) -> None:
        """CorruptionError if anything changed since `remember`; made to be called by Engine.train_step before its update."""
        require_none(self.compare_own())

    def _own(self) -> dict[str, Tensor]:
        return {key: checksum(view for _, view in boxes.parts) for key, boxes in self._engine.state().items()}

    def _places(self) -> Iterable[tuple[str, int]]:
        """(tensor, a number that ranks share if and only if they hold the same part of it)."""
        for key, boxes in self._engine.state().items():
            if boxes.parts:
                yield key, _number([(tuple(offset), tuple(view.shape)) for offset, view in boxes.parts])
        for name, whole in self._engine.whole_parameters():
            share = None if self._table[name].tp_dim is None else self._mesh.tp_rank
            yield f"{FORWARD}/{name}", _number([share, tuple(whole.shape)])

    def _unlike(self, name: str, whole: Tensor, weights: Boxes) -> Tensor:
        """Whether any part of a whole parameter has other bits than this rank's float32 weights rounded to its dtype."""
        cut = self._table[name].tp_dim
        unlike = torch.zeros((), dtype=torch.bool, device=whole.device)
        for offset, view in weights.parts:
            begin = list(offset)
            if cut is not None:
                begin[cut] -= self._mesh.tp_rank * whole.shape[cut]
            part = whole[tuple(slice(b, b + n) for b, n in zip(begin, view.shape))]
            unlike |= ~same_bits(part, view.to(whole.dtype))
        return unlike

    def _row(self, values: dict[str, Tensor]) -> Tensor:
        """int64 [columns] on the device: the values at the places of their names, else 0. Waits for nothing."""
        row = torch.zeros(len(self._columns), dtype=torch.int64, device=self._mesh.device)
        if values:
            places = torch.tensor([self._columns[key] for key in values], device=row.device)
            row[places] = torch.stack([value.to(row.device, torch.int64) for value in values.values()])
        return row

    def _from_all(self, row: Tensor) -> Tensor:
        """[ranks, ...] on the CPU: every rank's row."""
        everyone = torch.empty(self._mesh.world_size, *row.shape, dtype=row.dtype, device=row.device)
        if self._mesh.world_size == 1:
            everyone[0] = row
        else:
            dist.all_gather_into_tensor(everyone.view(-1), row)
        return everyone.cpu()

    def _from_all_objects(self, mine: str) -> list[str]:
        everyone: list[Any] = [mine] * self._mesh.world_size
        if self._mesh.world_size > 1:
            dist.all_gather_object(everyone, mine)
        return everyone

    def _differing(self, sums: Tensor) -> list[Finding]:
        """sums: [ranks, columns]."""
        odd = (sums != sums.gather(0, self._first)).any(0)
        found = []
        for key, column in self._columns.items():
            if not odd[column]:
                continue
            for place in sorted(set(self._of_rank[:, column].tolist()) - {_NOTHING}):
                held = {
                    rank: int(sums[rank, column])
                    for rank in range(self._mesh.world_size)
                    if self._of_rank[rank, column] == place
                }
                ranks = _odd_ones_out(held)
                if ranks:
                    hosts = tuple(self._hosts[r] for r in ranks)
                    found.append(
                        Finding(
                            "copies",
                            key,
                            ranks,
                            hosts,
                            len(held),
                            self._promises_no_order and between_shares(held, self._mesh.tp),
                        )
                    )
        return found

    def _flagged(self, what: Literal["rounded", "changed"], flags: Tensor) -> list[Finding]:
        """flags: [ranks, columns], not 0 where something is wrong."""
        found = []
        for key, column in self._columns.items():
            if flags[:, column].any():
                ranks = tuple(flags[:, column].nonzero().flatten().tolist())
                found.append(Finding(what, key, ranks, tuple(self._hosts[r] for r in ranks)))
        return found


def _odd_ones_out(held: dict[int, int]) -> tuple[int, ...]:
    """The ranks whose value is not the one that more than half of them have; all ranks if there is none such and they differ."""
    (most, count), *others = Counter(held.values()).most_common()
    if not others:
        return ()
    return tuple(rank for rank, value in held.items() if 2 * count <= len(held) or value != most)


def between_shares(held: Mapping[int, int], tp: int) -> bool:
    """Whether copies (rank -> checksum) differ over tensor-parallel ranks alone: each of these sums its gradients over other ranks,
    perhaps in another order, and agrees with everyone of its own.
    """
    of_share: dict[int, set[int]] = {}
    for rank, value in held.items():
        of_share.setdefault(rank % tp, set()).add(value)
    return len(of_share) > 1 and all(len(values) == 1 for values in of_share.values())


def _number(value: object) -> int:
    """A number for what `value` looks like, int64, never 0."""
    digest = hashlib.blake2b(repr(value).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True) or 1


def _first_alike(places: Tensor) -> Tensor:
    """[ranks, columns] -> for each the first rank whose number in that column is the same."""
    first = np.empty(places.shape, np.int64)
    for column, numbers in enumerate(places.numpy().T):
        _, index, inverse = np.unique(numbers, return_index=True, return_inverse=True)
        first[:, column] = index[inverse]
    return torch.from_numpy(first)

"""The report's answer to what to run next: the optima beyond the cells, and the recommended run."""

from __future__ import annotations

from html import escape
from typing import Optional, Union

from data.errors import InputError
from pretrain.flops import PEAK_FLOPS
from pretrain.study.report import tables
from pretrain.study.report.fit_file import APPROACHES, Fit, Prediction
from pretrain.study.report.numbers import count, data, flops, html, show, significant
from pretrain.study.report.recommend import BEYOND, Recommendation, Rules, objective_of, planned

NEXT = 10.5  # largest extrapolation that the table shows: 3 and 10 times the largest budget
_HEAD = ("compute (FLOPs)", "approach", "N", "D (tokens)", "tokens per parameter", "loss", "batch, learning rate")


def next_budget(fit: Fit, rules: Optional[Rules], gpu: str, mfu: float) -> str:
    """What each approach says of 3 and 10 times the largest budget: size, tokens, loss; batch and rate by the study's rules.

    gpu, mfu: whose hours are shown, at that share of its peak.
    """
    note = f"{gpu} hours: C at {100 * mfu:g} % of {PEAK_FLOPS[gpu] / 1e12:g} TFLOP/s (dense bf16). Brackets: 95 % intervals."
    if rules:
        note += " Batch and learning rate follow the study's rules; they were not searched for at these sizes."
    said = []
    for objective in fit.objectives.values():
        title = f"Optima beyond the cells, {objective.name}"
        beyond = [p for p in objective.predictions if BEYOND < p.extrapolation <= NEXT and p.N_opt and p.D_opt]
        if not beyond:
            reasons = [f"{words}: {objective.refused(a)}" for a, words in APPROACHES.items() if objective.refused(a)]
            said.append(tables.refused(title, "; ".join(reasons) or "no approach predicts one"))
            continue
        kind = objective_of(fit, rules) if rules and objective is fit.first else objective.name
        rows = [_row(p, rules, kind, gpu, mfu) for p in sorted(beyond, key=_order)]
        said.append(tables.table(escape(title), [*_HEAD, f"{gpu} hours"], rows, note))
    return "".join(said)


def _order(prediction: Prediction) -> tuple[float, int]:
    names = list(APPROACHES)
    return prediction.C, names.index(prediction.approach) if prediction.approach in names else len(names)


def _row(p: Prediction, rules: Optional[Rules], kind: str, gpu: str, mfu: float) -> list[str]:
    trained = "–"
    if rules and kind in ("masked", "autoregressive"):
        try:
            cell, _ = planned(rules, kind, p)
            trained = f"{data(cell.batch, str(cell.batch))}, {data(cell.lr, f'{cell.lr:.3g}')}"
        except InputError as error:
            trained = f'<span class="reason">{html(str(error))}</span>'
    hours = p.C / (mfu * PEAK_FLOPS[gpu] * 3600)
    ratio = p.D_opt.value / p.N_opt.value if p.D_opt and p.N_opt else 0.0
    return [
        f"{flops(p.C)} ({p.extrapolation:.3g}×)",
        APPROACHES.get(p.approach, escape(p.approach)),
        show(p.N_opt, "count"),
        show(p.D_opt, "count"),
        data(ratio, significant(ratio, 3)),
        show(p.loss),
        trained,
        data(hours, count(hours) if hours >= 0.01 else significant(hours, 2)),
    ]


def recommended(recommendation: Union[Recommendation, str]) -> str:
    """The recommended run in words with the first lines of its file, or why there is none."""
    if isinstance(recommendation, str):
        return tables.refused("Recommended run", recommendation)
    lines = "".join(line for line in recommendation.text.splitlines(keepends=True) if line.startswith("#"))
    cell, config = recommendation.cell, recommendation.config
    model = config.model
    shape = (
        f"{model.num_layers} layers, width {model.hidden_size}, {model.num_heads} heads ({model.num_kv_heads} of keys and values), "
        f"feed-forward {model.ffn_hidden_size}; {cell.steps} steps of {cell.batch} × {config.data.sequence_length} tokens"
    )
    return (
        f'<h3>Recommended run</h3><p><a href="recommended.yaml">recommended.yaml</a>: {data(cell.N, count(cell.N, 4))} parameters, '
        f"{data(cell.D, count(cell.D, 4))} tokens; {shape}. See its cost with "
        f"<code>python -m pretrain plan --config recommended.yaml --gpus {cell.ranks}</code>.</p><pre>{escape(lines)}</pre>"
    )

"""The report as one HTML page: pictures inside it, no script, nothing fetched from anywhere."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from typing import Optional, Union

from pretrain.study.report import tables
from pretrain.study.report.fit_file import Fit, Objective, number
from pretrain.study.report.next_budget import next_budget, recommended
from pretrain.study.report.numbers import html
from pretrain.study.report.plots import Drawn, Picture
from pretrain.study.report.recommend import Recommendation, Rules
from pretrain.study.report.references import parameters
from pretrain.study.report.style import CSS
from pretrain.study.report.words import summary


def page(
    fit: Fit,
    pictures: dict[str, list[Drawn]],
    recommendation: Union[Recommendation, str],
    rules: Optional[Rules],
    gpu: str,
    mfu: float,
) -> str:
    """The whole page. pictures: of each objective by its name, those of all under "". recommendation: or why there is none."""
    title = f"Scaling-law study {fit.name}"
    links = [("summary", "Summary"), ("next", "Next budget"), ("compute", "Loss and compute")]
    links += [(f"objective-{i}", name) for i, name in enumerate(fit.objectives, 1)] + [
        ("cells", "Cells"),
        ("method", "Method"),
    ]
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="under">{_under(fit)}</p>',
        "<nav>" + "".join(f'<a href="#{anchor}">{escape(words)}</a>' for anchor, words in links) + "</nav>",
        '<section id="summary" class="summary"><ul>'
        + "".join(f"<li>{line}</li>" for line in summary(fit))
        + "</ul></section>",
        '<section id="next"><h2>The next budget</h2>',
        next_budget(fit, rules, gpu, mfu),
        recommended(recommendation),
        '</section><section id="compute"><h2>Loss and compute</h2>',
        *(_drawn(one) for one in pictures.get("", [])),
        tables.gap(fit),
        "</section>",
    ]
    for i, objective in enumerate(fit.objectives.values(), 1):
        body += [
            f'<section id="objective-{i}"><h2>{escape(objective.name)}</h2>',
            *_section(objective, pictures),
            "</section>",
        ]
    body += [
        '<section id="cells"><h2>Cells</h2>',
        *(_cells(o, len(fit.objectives) > 1) for o in fit.objectives.values()),
    ]
    body += ["<h3>Left out</h3>", tables.excluded(fit), "</section>"]
    body += ['<section id="method"><h2>Method</h2>', method(fit), "</section>"]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, '
        f'initial-scale=1"><title>{escape(title)}</title><style>{CSS}</style></head><body><main>\n'
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )


def _under(fit: Fit) -> str:
    given = fit.raw["input"]
    read = f"{given['rows']} rows read, {given['used']} fitted; " if "rows" in given and "used" in given else ""
    cost = f"C: FLOPs of the whole training, convention “{escape(fit.flops)}”"
    return f"{read}N: {escape(parameters(fit.count))}; {cost}; loss: nats per token."


def _section(objective: Objective, pictures: dict[str, list[Drawn]]) -> list[str]:
    return [
        *(_drawn(one) for one in pictures.get(objective.name, [])),
        tables.minima(objective),
        tables.optimum_laws(objective),
        tables.numbers_of(objective, "parametric", "The parametric law L = E + A / N^alpha + B / D^beta"),
        tables.numbers_of(objective, "frontier", "Loss at the optimum against compute"),
        tables.numbers_of(objective, "data_constrained", "Repeated data")
        if "data_constrained" in objective.parts
        else "",
        tables.holdout(objective),
        tables.predictions(objective),
    ]


def _cells(objective: Objective, named: bool) -> str:
    return (f"<h3>{escape(objective.name)}</h3>" if named else "") + tables.losses(objective)


def _drawn(one: Drawn) -> str:
    if not isinstance(one, Picture):
        return tables.refused(one.title, one.reason)
    source = base64.b64encode(one.png).decode()
    return (
        f'<figure id="{escape(one.name)}"><h3>{escape(one.title)}</h3>'
        f'<img src="data:image/png;base64,{source}" alt="{escape(one.alt)}">'
        f"<figcaption>{escape(one.caption)}</figcaption></figure>"
    )


def method(fit: Fit) -> str:
    """How the intervals came about, and what they do not cover."""
    bootstrap = fit.raw.get("bootstrap") or {}
    level = number(bootstrap.get("level"))
    said = [
        f"Intervals: {100 * level.value:g} %" if level else "Intervals",
        f" from {bootstrap['samples']} bootstrap samples, seed {bootstrap.get('seed')}"
        if bootstrap.get("samples")
        else "",
        f" ({html(str(bootstrap['method']))})" if bootstrap.get("method") else "",
        ". They cover the noise of the losses about the fitted forms. They do not cover a wrong form, a learning rate or batch "
        "that is off at some sizes, or other data; the further a prediction extrapolates, the more those weigh.",
    ]
    notes: Sequence[object] = fit.raw["input"].get("notes") or []
    listed = "".join(f"<li>{html(str(note))}</li>" for note in notes)
    where = html(f"Read from {fit.raw['input'].get('path') or fit.path.name}.")
    return f"<p>{''.join(said)}</p><p>{where}</p>" + (f"<ul>{listed}</ul>" if listed else "")

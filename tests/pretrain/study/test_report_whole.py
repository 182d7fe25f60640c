"""From a planned study's results through `study fit` and `study report` to a config that `plan` answers about."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest

from pretrain.load_config import load_config
from pretrain.planning.command import plan as plan_run
from pretrain.study.command_fit import fit
from pretrain.study.command_plan import plan
from pretrain.study.command_report import report
from tests.pretrain.study import fits
from tests.pretrain.study.studies import write_study
from tests.pretrain.study.test_report import Page, shown_alike

LAWS = {
    "masked": {
        "E": 1.5,
        "A": 46.5,
        "B": 120.0,
        "alpha": 0.35,
        "beta": 0.35,
    },  # least near 100 k parameters at these budgets
    "autoregressive": {"E": 1.4, "A": 40.0, "B": 100.0, "alpha": 0.35, "beta": 0.35},
}
SIZES = ["13k", "25k", "56k", "101k", "222k", "396k", "793k"]


def results(folder, lost: int = 1) -> None:
    """results.csv of the planned cells: losses of the planted laws with noise of 0.3 %; the first `lost` cells diverged."""
    draw = np.random.default_rng(0)
    rows = []
    for cell in json.loads((folder / "plan.json").read_text())["cells"]:
        loss = float(fits.loss_of(LAWS[cell["objective"]], cell["N"], cell["D"]) * np.exp(draw.normal(0, 0.003)))
        names = (
            "objective",
            "size",
            "N",
            "D",
            "C",
            "unique_tokens",
            "epochs",
            "budget",
            "repeat",
            "lr",
            "batch",
            "steps",
            "seed",
        )
        rows.append({"cell": cell["id"], **{name: cell[name] for name in names}, "loss": loss, "loss_se": 0.003 * loss})
        rows[-1] |= {"status": "done", "reason": "", "unique_tokens": "", "epochs": ""}
    for row in rows[:lost]:
        row |= {
            "status": "excluded",
            "reason": "diverged: the loss was not finite at step 12",
            "loss": "",
            "loss_se": "",
        }
    with open(folder / "results.csv", "w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


@pytest.mark.parity
def test_a_planned_study_is_fitted_reported_and_continued(tmp_path, corpus, capsys):
    study = write_study(
        tmp_path,
        corpus,
        family="configs/families/tiny.yaml",
        sizes=SIZES,
        budgets=[3e11, 9e11, 2.7e12, 8.1e12],
        max_epochs=1e6,
        learning_rate={"rule": "power", "at": 4e-3, "of": "width", "reference": 64, "exponent": -0.5},
    )
    assert plan([str(study)]) == 0
    folder = tmp_path / "study"
    results(folder)
    assert fit([str(folder), "--samples", "100"]) == 0
    assert report([str(folder), "--gpu", "H100"]) == 0
    assert "recommended run: " in capsys.readouterr().out

    found = json.loads((folder / "fit.json").read_text())
    page = Page((folder / "report" / "index.html").read_text())
    assert not page.open and len(page.images) == 10
    assert "diverged: the loss was not finite at step 12" in page.words
    assert "non-embedding parameters" in page.words and "convention “exact”" in page.words
    values = {value for value, _ in page.numbers}
    for prediction in found["predictions"]:
        assert {
            number for key in ("N_opt", "D_opt", "loss") for number in prediction[key].values() if number is not None
        } <= values
    assert [(value, words) for value, words in page.numbers if not shown_alike(value, words)] == []

    file = folder / "report" / "recommended.yaml"
    config = load_config(["--config", str(file)])
    wanted = next(
        p
        for p in found["objectives"]["masked"]["predictions"]
        if p["extrapolation"] > 1.1 and p["approach"] == "isoflop"
    )
    assert plan_run(["--config", str(file), "--gpus", "1", "--json", str(tmp_path / "plan.json")]) == 0
    N = json.loads((tmp_path / "plan.json").read_text())["parameters"]["non_embedding"]
    assert abs(math.log(N / wanted["N_opt"]["value"])) < 0.1
    D = config.train.steps * config.train.global_batch_size * config.data.sequence_length
    assert abs(D / wanted["D_opt"]["value"] - 1) < 0.01
    assert config.optimizer.lr == pytest.approx(4e-3 * (config.model.hidden_size / 64) ** -0.5, rel=1e-5)


def test_a_study_that_bears_no_law_is_reported_with_its_refusals(tmp_path, corpus):
    study = write_study(tmp_path, corpus, budgets=[2e9, 4e9], objectives=["masked"], max_epochs=1e6)
    assert plan([str(study)]) == 0
    folder = tmp_path / "study"
    results(folder, lost=0)
    assert fit([str(folder), "--samples", "100"]) == 0
    assert report([str(folder)]) == 0
    page = Page((folder / "report" / "index.html").read_text())
    parts = json.loads((folder / "fit.json").read_text())["objectives"]["masked"].values()
    refused = [part["refused"] for part in parts if "refused" in part]
    assert len(refused) >= 3 and not page.open
    words = " ".join(page.words.replace("\N{NO-BREAK SPACE}", " ").split())
    assert all(" ".join(reason.split())[:40] in words for reason in refused)

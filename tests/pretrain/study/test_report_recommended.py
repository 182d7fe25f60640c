"""The recommended run: a config that can be trained, of the predicted size and tokens, whose first lines say whence."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import yaml

import pretrain.study.report.recommend as recommend_module
from data.errors import InputError
from parallel.shape import ModelShape, parameter_counts
from pretrain.check_values import check_values
from pretrain.config import Config
from pretrain.flops import flops_per_token_in
from pretrain.load_config import load_config
from pretrain.lr_schedule import check_schedule
from pretrain.planning.case import case_of, check_layout, masked_fraction
from pretrain.study.command_plan import plan
from pretrain.study.command_report import report
from pretrain.study.design.corpus import Corpus
from pretrain.study.design.family import Size, load_family
from pretrain.study.fitting.digest import digest_of
from pretrain.study.report.fit_file import Number, read_fit
from pretrain.study.report.next_budget import next_budget
from pretrain.study.report.recommend import choose, recommend, rules_of
from pretrain.study.report.recommend_shape import NEAR, shape_for
from tests.pretrain.study import fits
from tests.pretrain.study.studies import SIZES, write_study

SPEC = {
    "name": "planted",
    "base": "configs/quickstart.yaml",
    "overrides": {"data.shards": "nowhere/train", "data.val_shards": "nowhere/val", "model.vocab_size": 32000},
    "family": "configs/families/smdm.yaml",
    "flops": "6n",
    "budgets": list(fits.BUDGETS),
    "learning_rate": {"rule": "power", "at": 4e-4, "of": "parameters", "reference": 1e8, "exponent": -0.3},
    "batch": {"rule": "power", "at": 256, "of": "budget", "reference": 1e18, "exponent": 0.2},
    "batch_multiple": 8,
}


@pytest.fixture
def study(tmp_path):
    """A study's folder with its YAML and a fit; changes of both by key."""

    def make(content=None, **changes):
        folder = tmp_path / "planted"
        fits.write(folder, content or fits.fit())
        (folder / "study.yaml").write_text(yaml.safe_dump({"study": SPEC | changes}))
        return folder

    return make


def counted(size: Size, vocab: int = 32000) -> int:
    return parameter_counts(ModelShape(**vars(size), vocab_size=vocab))["non_embedding"]


def refuse_all(content):
    masked = content["objectives"]["masked"]
    for part in ("parametric", "isoflop", "envelope"):
        masked[part] = {"refused": "fewer than 3 budgets"}
    masked["predictions"] = []
    return content


def test_a_planned_study_recommends_by_what_its_cells_were_planned_with(tmp_path, corpus, monkeypatch):
    """Whatever became of the base and the family since; a file named with --study is taken as it is today."""
    file = write_study(tmp_path, corpus, family=str(tmp_path / "family.yaml"), overrides={"model.norm_eps": 1e-6})
    (tmp_path / "family.yaml").write_text(yaml.safe_dump({"sizes": SIZES}))
    assert plan([str(file)]) == 0
    fits.write(tmp_path / "study", fits.fit())
    base = yaml.safe_load((tmp_path / "base.yaml").read_text())
    base["optimizer"]["weight_decay"] = 0.5
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    (tmp_path / "family.yaml").write_text(yaml.safe_dump({"sizes": {"s": SIZES["l"]}}))
    fit = read_fit(str(tmp_path / "study"))
    rules = rules_of(fit)
    assert (rules.base.optimizer.weight_decay, rules.base.model.norm_eps) == (Config().optimizer.weight_decay, 1e-6)
    assert rules.family == load_family(SIZES) and rules.study.name == "study"
    there = rules_of(fit, str(file)).corpus
    monkeypatch.setattr(recommend_module, "look_at", None)  # nor are the data looked at
    assert (rules.corpus.tokens, rules.corpus.fingerprint) == (there.tokens, there.fingerprint) and there.tokens
    assert rules_of(fit).corpus == rules.corpus
    monkeypatch.undo()
    today = rules_of(fit, str(file))
    assert today.base.optimizer.weight_decay == 0.5 and len(today.family) == 1


def test_a_fit_of_results_that_have_changed_since_is_not_reported(study, capsys):
    folder = study()

    def results(third: str) -> None:
        rows = ("a,1e6,1e8,3.0,done,", "b,1e6,2e8,,excluded,diverged at step 3", third)
        (folder / "results.csv").write_text("\n".join(("cell,N,D,loss,status,reason", *rows)) + "\n")

    results("c,2e6,1e8,,missing,running: step 3 of 9")
    content = fits.fit()
    content["input"]["digest"] = digest_of(folder / "results.csv")
    fits.write(folder, content)
    assert read_fit(str(folder)).study is not None
    results("c,2e6,1e8,,missing,running: step 4 of 9")
    assert read_fit(str(folder)).study is not None
    (folder / "own.json").write_text((folder / "fit.json").read_text())
    (folder / "plan.json").write_text("{}")
    for third in ("c,2e6,1e8,2.9,done,", "c,2e6,1e8,,excluded,cut: step 4 of 9"):
        results(third)
        with pytest.raises(
            InputError, match=r"other cells than when fit\.json was made: run .*study fit \S*planted. again"
        ):
            read_fit(str(folder))
        with pytest.raises(InputError, match=r"study fit \S*planted --json \S*own\.json. again"):
            read_fit(str(folder / "own.json"))
    content["input"]["digest"] = ""  # a fit of another table that lies beside the study
    fits.write(folder, content)
    assert read_fit(str(folder)).study is not None


def test_the_file_is_a_config_of_train_with_the_predicted_size_and_tokens(study):
    folder = study()
    fit = read_fit(str(folder))
    made = recommend(fit, rules_of(fit))
    file = folder / "recommended.yaml"
    file.write_text(made.text)
    config = load_config(["--config", str(file)])
    check_values(config)
    check_schedule(config)
    check_layout(case_of(config, 1))
    prediction = next(p for p in fit.first.predicted("isoflop") if p.extrapolation > 1.0001)
    shape = ModelShape(**{name: getattr(config.model, name) for name in ModelShape.__dataclass_fields__})
    N = parameter_counts(shape)["non_embedding"]
    D = config.train.steps * config.train.global_batch_size * config.data.sequence_length
    assert abs(math.log(N / prediction.N_opt.value)) <= NEAR
    assert abs(D - prediction.D_opt.value) <= config.train.global_batch_size * config.data.sequence_length
    assert (N, D) == (made.cell.N, made.cell.D)
    assert config.objective.kind == "masked" and config.run.name == "planted-next"
    # the rules, by hand
    assert config.optimizer.lr == pytest.approx(4e-4 * (N / 1e8) ** -0.3, rel=1e-5)
    spent = D * flops_per_token_in("6n", shape, 128, masked_fraction(config.objective))
    assert config.train.global_batch_size == 8 * round(256 * (spent / 1e18) ** 0.2 / 8)
    assert config.train.validate_every == 400 and config.train.sample_every == 800  # a run's habits, not a cell's


def test_its_first_lines_say_where_the_numbers_come_from_with_interval_and_extrapolation(study):
    folder = study()
    fit = read_fit(str(folder))
    lines = [line for line in recommend(fit, rules_of(fit)).text.splitlines() if line.startswith("#")]
    text = " ".join(lines)
    assert "study planted, objective masked, for 1.92e+20 FLOPs: 3 times the largest fitted budget" in text
    assert "IsoFLOP parabolas" in text and "588 M (452 M to 725 M)" in text
    assert "Predicted loss: 3.195 (3.158 to 3.232)" in text and "neither was searched for" in text


def test_a_wide_interval_and_more_tokens_than_the_data_have_are_said(study):
    content = fits.fit(two=False)
    for prediction in content["objectives"]["masked"]["predictions"]:
        prediction["N_opt"] |= {"low": prediction["N_opt"]["value"] / 5, "high": prediction["N_opt"]["value"] * 5}
    fit = read_fit(str(study(content)))
    text = recommend(fit, replace(rules_of(fit), corpus=Corpus(10**9, ""))).text
    assert "spans a factor of 25" in text
    assert "reads them 54.4 times" in text and "Prepare more text" in text


def test_names_with_line_breaks_stay_comments(study, tmp_path):
    folder = study().rename(tmp_path / "two\nrun: {name: evil}")
    fit = read_fit(str(folder))
    text = recommend(fit, rules_of(fit)).text
    assert yaml.safe_load(text)["run"]["name"] == "planted-next"


@pytest.mark.parametrize(
    ("gone", "left"), [((), "isoflop"), (("isoflop",), "parametric"), (("isoflop", "parametric"), "envelope")]
)
def test_the_first_approach_that_answers_is_followed(study, gone, left):
    content = fits.fit(two=False)
    masked = content["objectives"]["masked"]
    masked["predictions"] = [p for p in masked["predictions"] if p["approach"] not in gone]
    assert choose(read_fit(str(study(content)))).approach == left


def test_an_approach_and_a_budget_can_be_asked_for(study):
    fit = read_fit(str(study()))
    chosen = choose(fit, "envelope", 6.4e20)
    assert chosen.approach == "envelope" and chosen.C == pytest.approx(6.4e20)
    with pytest.raises(InputError, match="--budget 7e.19 was not predicted"):
        choose(fit, "auto", 7e19)


def test_without_any_answer_there_is_no_file_but_the_reasons(study, capsys):
    folder = study(fits.fit(two=False))
    assert report([str(folder)]) == 0 and (folder / "report" / "recommended.yaml").exists()
    study(refuse_all(fits.fit(two=False)))
    assert report([str(folder)]) == 0
    assert "no recommended run" in capsys.readouterr().out
    assert not (folder / "report" / "recommended.yaml").exists()
    page = (folder / "report" / "index.html").read_text()
    assert "IsoFLOP parabolas: fewer than 3 budgets" in page


def test_a_study_whose_run_could_not_start_is_told_why(study):
    fit = read_fit(str(study(ranks=11, batch_multiple=1)))
    with pytest.raises(InputError, match="study.ranks 11"):
        recommend(fit, rules_of(fit))


def test_the_table_of_the_next_budget_has_the_rules_batch_and_rate(study):
    fit = read_fit(str(study()))
    rules = rules_of(fit)
    made = recommend(fit, rules)
    table = next_budget(fit, rules, "H800", 0.4)
    assert f'<data value="{made.cell.batch}">' in table and f'<data value="{made.cell.lr!r}">' in table


SMDM = load_family("configs/families/smdm.yaml")


@pytest.mark.parametrize("name", ["6M", "170M", "1028M", "2121M"])
def test_a_size_of_the_family_is_taken_as_it_is(name):
    assert shape_for(counted(SMDM[name]) * 1.004, SMDM, counted)[1] == SMDM[name]


@pytest.mark.parametrize("wanted", [2e6, 1.1e7, 2.6e7, 3e9, 7e9, 3e10, 1e11])
def test_between_and_beyond_the_sizes_a_legal_shape_keeps_the_familys_proportions(wanted):
    _, size = shape_for(wanted, SMDM, counted)
    assert abs(math.log(counted(size) / wanted)) < NEAR
    assert size.hidden_size % size.num_heads == 0 and size.num_heads % size.num_kv_heads == 0
    assert (size.hidden_size // size.num_heads) % 2 == 0 and size.num_kv_heads == size.num_heads
    assert 3 < size.ffn_hidden_size / size.hidden_size < 5
    assert 15 < size.hidden_size / size.num_layers < 400


def test_grouped_heads_stay_grouped_and_one_size_is_family_enough():
    llada = Size(num_layers=22, num_heads=32, hidden_size=2048, ffn_hidden_size=5634, num_kv_heads=4)
    _, size = shape_for(8e9, {"1B": llada}, counted)
    assert size.num_heads == 8 * size.num_kv_heads and size.hidden_size == 64 * size.num_heads
    assert abs(math.log(counted(size) / 8e9)) < NEAR
    ratio = (8e9 / counted(llada)) ** (1 / 3)
    assert size.num_layers / 22 == pytest.approx(ratio, rel=0.25) and size.hidden_size / 2048 == pytest.approx(
        ratio, rel=0.25
    )


def test_an_interval_holds_what_it_does_not_exclude():
    assert Number(1.0, 0.5, 2.0).holds(0.5) and not Number(1.0, 0.5, 2.0).holds(2.1)
    assert (
        Number(1.0, None, 2.0).holds(-9) and Number(1.0, 0.5, None).holds(9) and not Number(1.0, 0.5, None).holds(0.4)
    )

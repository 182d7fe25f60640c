"""The lm-evaluation-harness itself, offline, on tasks of our own: what it is told, and what it makes of it."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

# Read by the harness's data library when it is first imported.
os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"
lm_eval = pytest.importorskip("lm_eval", reason="pip install -r requirements-eval.txt")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402

from data.errors import InputError  # noqa: E402
from pretrain.cli import execute  # noqa: E402
from pretrain.evaluation.evaluated_run import EvaluatedRun, score_together  # noqa: E402
from pretrain.evaluation.harness_model import PalimpsestLM  # noqa: E402
from pretrain.evaluation.likelihood import LikelihoodOptions, Request  # noqa: E402
from pretrain.evaluation.text_pairs import encode_pair  # noqa: E402
from pretrain.sampling.sampler import SamplingOptions, generate  # noqa: E402
from tests.pretrain.evaluated_case import CHOICES, QUESTIONS, STARTS, TASKS, TEXTS, make_run, write_tasks  # noqa: E402

LENGTH = 24


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "masked", corpus, LENGTH)
    make_run(folder / "autoregressive", corpus, LENGTH, kind="autoregressive")
    make_run(folder / "shift", corpus, LENGTH, shift=True)
    make_run(folder / "uniform", corpus, LENGTH, kind="uniform")
    return folder


@pytest.fixture(scope="module")
def masked(runs) -> EvaluatedRun:
    return EvaluatedRun.open(str(runs / "masked"))


def ask(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, given, number) for number, given in enumerate(arguments)]


def test_the_harness_runs_all_three_kinds_of_tasks_and_its_results_say_how(runs, masked, tasks, tmp_path, capsys):
    """acc and bits per byte, computed once more from the scores that the model class gives to each question."""
    arguments = [
        "--include-path",
        tasks,
        "--draws",
        6,
        "--cfg-scale",
        0.25,
        "--seed",
        5,
        "--json",
        tmp_path / "found.json",
    ]
    names = ",".join(TASKS)
    assert execute(["evaluate", "--run", str(runs / "masked"), "--harness", names, *map(str, arguments)]) == 0
    found, text = json.loads((tmp_path / "found.json").read_text()), capsys.readouterr().out
    model = PalimpsestLM(masked, draws=6, cfg_scale=0.25, seed=5)
    right = []
    for question, gold in QUESTIONS:
        scores = model.loglikelihood(ask("loglikelihood", *[(question, choice) for choice in CHOICES]))
        right.append(int(np.argmax([value for value, _ in scores])) == gold)
    assert found["results"]["local_choice"]["acc,none"] == pytest.approx(np.mean(right))
    rolling = model.loglikelihood_rolling(ask("loglikelihood_rolling", *[(text,) for text in TEXTS]))
    per_byte = -sum(rolling) / sum(len(text.encode()) for text in TEXTS) / math.log(2)
    assert found["results"]["local_rolling"]["bits_per_byte,none"] == pytest.approx(per_byte, rel=1e-5)
    said = model.generate_until(
        ask("generate_until", *[(text, {"until": ["\n"], "max_gen_toks": 6}) for text in STARTS])
    )
    assert found["results"]["local_generate"]["exact_match,none"] == np.mean([text == "" for text in said])
    for part in (found, found["config"]):
        assert (part["estimator"], part["draws"], part["seed"], part["cfg_scale"]) == ("fixed_count", 6, 5, 0.25)
        assert part["bound"] == "lower bound"
    assert found["config"]["mean_standard_error"] > 0 and found["lm_eval_version"] == lm_eval.__version__
    assert "lower bound; fixed_count, draws an answer 6, seed 5, CFG scale 0.25" in text
    assert "local_choice" in text and "bits_per_byte" in text and "prompts lost their beginning" in text


def test_the_registered_name_and_model_args_do(runs):
    model = get_model("palimpsest").create_from_arg_string(
        f"run={runs / 'masked'},draws=3,cfg_scale=1,greedy=False", {"batch_size": "4"}
    )
    assert isinstance(model, PalimpsestLM)
    assert model.options == LikelihoodOptions(draws=3, cfg_scale=1.0, batch_size=4, greedy=False)


def test_answers_get_the_score_of_their_tokens(masked):
    pairs = [("def f(", "self):"), ("", "import"), ("x = ", "1"), ("a" * 90, " b")]
    model = PalimpsestLM(masked, draws=5)
    found = model.loglikelihood(ask("loglikelihood", *pairs))
    expected = score_together(
        masked,
        masked.scored(),
        [encode_pair(masked, *pair) for pair in pairs],
        LikelihoodOptions(draws=5, batch_size=8),
    )
    assert found == [(score.log_likelihood, score.greedy) for score in expected]
    assert all(type(value) is float and type(greedy) is bool for value, greedy in found)
    assert model.get_model_info()["cut_prompts"] == 1
    assert model.loglikelihood(ask("loglikelihood", ("", ""), ("x", ""))) == [(0.0, True)] * 2


@pytest.mark.parametrize("name", ["masked", "autoregressive", "shift"])
def test_rolling_windows_score_every_token_once_as_the_harness_cuts_them(runs, name):
    run = EvaluatedRun.open(str(runs / name))
    model = PalimpsestLM(run, draws=2)
    tokens = run.tokenizer.encode_batch([TEXTS[0]])[0].astype(np.int64)
    assert len(tokens) > 2 * LENGTH, "several windows"
    start = [] if name == "autoregressive" else [run.tokenizer.special.eos]
    windows, at = [], 0
    while at < len(tokens):
        answer = tokens[at : at + LENGTH - 1]
        before = tokens[at + len(answer) - LENGTH : at]  # the last window may be short: then it has more context
        windows.append(Request(np.array(before if at else start, np.int64), answer))
        assert not at or len(windows[-1].prompt) == 1 or at + len(answer) == len(tokens)
        at += len(answer)
    scores = score_together(run, run.scored(), windows, LikelihoodOptions(draws=2, batch_size=8))
    found = model.loglikelihood_rolling(ask("loglikelihood_rolling", (TEXTS[0],), ("",)))
    assert found == [pytest.approx(sum(score.log_likelihood for score in scores), rel=1e-6), 0.0]
    assert all(score.cut == 0 for score in scores)
    error = math.sqrt(sum(score.standard_error**2 for score in scores))
    assert model.get_model_info()["mean_standard_error"] == pytest.approx(error / 2, rel=1e-6)
    if name == "autoregressive":
        assert error == 0 and model.get_model_info()["bound"] == "exact"


def test_generated_texts_end_at_the_first_stop_word_and_depend_on_their_prompt_alone(masked):
    model = PalimpsestLM(masked, batch_size=3)
    whole = model.generate_until(ask("generate_until", *[(text, {"until": [], "max_gen_toks": 10}) for text in STARTS]))
    special, prompt = masked.tokenizer.special, masked.tokenizer.encode_batch([STARTS[0]])[0].astype(np.int64)
    ids = torch.from_numpy(np.concatenate([prompt, np.full(10, special.mask)]))[None]
    filled = generate(
        masked.predictor(),
        ids,
        ids != special.mask,
        mask_id=special.mask,
        options=SamplingOptions(steps=10),
        forbidden_ids=masked.never,
        eos_id=special.eos,
    )[0, len(prompt) :].tolist()
    assert whole[0] == masked.tokenizer.decode([*filled, special.eos][: [*filled, special.eos].index(special.eos)])
    assert sum(map(bool, whole)) >= 3
    stop = next(text for text in whole if len(text) > 3)[2]
    cut = model.generate_until(ask("generate_until", *[(text, {"until": stop, "max_gen_toks": 10}) for text in STARTS]))
    assert cut == [text.split(stop)[0] for text in whole] and cut != whole
    drawn = {"until": [], "max_gen_toks": 10, "do_sample": True, "temperature": 1.5}
    starts = [*STARTS, "x = 1", "y = 1", "z = 1"]  # the last ones are of one shape
    assert len({len(masked.tokenizer.encode_batch([text])[0]) for text in starts[-3:]}) == 1
    one = model.generate_until(ask("generate_until", *[(text, drawn) for text in starts]))
    other = PalimpsestLM(masked, batch_size=1).generate_until(
        ask("generate_until", *[(text, drawn) for text in starts[::-1]])
    )
    assert one == other[::-1] and one[: len(STARTS)] != whole
    again = PalimpsestLM(masked, seed=1).generate_until(ask("generate_until", *[(text, drawn) for text in starts]))
    assert again != one
    assert model.shortened == 0
    model.generate_until(ask("generate_until", ("x", {"until": [], "max_gen_toks": 4000})))
    assert model.shortened == 1


def test_an_objective_without_likelihood_still_generates(runs):
    model = PalimpsestLM(EvaluatedRun.open(str(runs / "uniform")), steps=3)
    (text,) = model.generate_until(ask("generate_until", ("x = ", {"until": [], "max_gen_toks": 8})))
    assert isinstance(text, str)
    with pytest.raises(InputError, match="not available for it"):
        model.loglikelihood(ask("loglikelihood", ("x", "y")))


def test_a_run_without_likelihoods_reports_none(runs, tasks, tmp_path, capsys):
    file = tmp_path / "found.json"
    common = ["--include-path", tasks, "--harness", "local_generate", "--steps", 2, "--seed", 4, "--json", file]
    for name, reported in (("uniform", False), ("masked", True)):
        assert execute(["evaluate", "--run", str(runs / name), *map(str, common)]) == 0
        found, text = json.loads(file.read_text()), capsys.readouterr().out
        for part in (found, found["config"]):
            assert all((key in part) == reported for key in ("measure", "bound", "estimator", "draws"))
            assert part["seed"] == 4
        assert ("log-likelihood" in text) == reported and "seed 4" in text


def test_the_size_of_batches_may_be_left_to_the_model(runs, capsys):
    def made(size: object) -> PalimpsestLM:
        return get_model("palimpsest").create_from_arg_string(f"run={runs / 'masked'}", {"batch_size": size})

    for size in ("auto", "auto:4"):
        assert made(size).options.batch_size == made(None).options.batch_size == 8
        assert capsys.readouterr().err == f"palimpsest: batch_size {size} is not searched for, 8 is taken\n"
    assert made("3").options.batch_size == 3 and not capsys.readouterr().err
    for size in ("many", "2.5", "", "0"):
        with pytest.raises(InputError, match="batch_size is"):
            made(size)


def test_the_request_that_a_model_breaks_on_is_named(runs, corpus, masked, tmp_path):
    (token,) = masked.tokenizer.encode_batch(["~"])[0].tolist()
    run = EvaluatedRun.open(str(make_run(tmp_path / "broken", corpus, LENGTH, nan_token=token)))
    model, metadata = PalimpsestLM(run, draws=2), ("arc", 17, 1)
    until = {"until": [], "max_gen_toks": 4}
    wrong = [
        (model.loglikelihood, "loglikelihood", [("x = ", "1"), ("~ ", "os")], "request 1"),
        (
            model.loglikelihood_rolling,
            "loglikelihood_rolling",
            [("x",), (TEXTS[0] + "~",)],
            r"request 1, window \d",
        ),
        (model.generate_until, "generate_until", [("x = [1, 2", until), ("~ ", until)], "request 1"),
    ]
    for method, kind, arguments, where in wrong:
        with pytest.raises(InputError, match=f"^{kind} {where}: .* not finite"):
            method(ask(kind, *arguments))
    with pytest.raises(InputError, match=r"^loglikelihood request 0 \(task arc, document 17\): "):
        model.loglikelihood([Instance("loglikelihood", {}, ("~ ", "os"), 0, metadata)])


def test_an_option_that_generation_does_not_know_is_refused_only_where_it_would_matter(masked):
    model = PalimpsestLM(masked)
    known = {"until": [], "max_gen_toks": 4}
    model.generate_until(ask("generate_until", ("x", {**known, "do_sample": False, "top_k": 5})))
    with pytest.raises(InputError, match="generation option `top_k` means nothing"):
        model.generate_until(ask("generate_until", ("x", {**known, "do_sample": True, "temperature": 1.0, "top_k": 5})))


def test_mistakes_are_one_line(runs, tasks, capsys):
    common = ["evaluate", "--run", str(runs / "masked"), "--include-path", str(tasks)]

    def refused(*arguments: str) -> str:
        assert execute([*common, *arguments]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    (tasks / "broken.yaml").write_text(
        json.dumps({"task": "broken", "dataset_path": "json", "dataset_kwargs": {"data_files": "/nowhere.jsonl"}})
    )
    assert "the tasks cannot be loaded (" in refused("--harness", "broken")
    (tasks / "broken.yaml").unlink()
    common[-1] = str(tasks / "nowhere")
    assert "--include_path" in refused("--harness", "local_choice")

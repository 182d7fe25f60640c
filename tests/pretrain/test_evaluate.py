"""Laws of `evaluate`: bounds against enumeration and against answer likelihoods, exact bytes, honest errors, any layout."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.shard_set import ShardSet
from parallel.row_losses import row_loss
from pretrain.cli import execute
from pretrain.evaluation.evaluate import evaluate_blocks
from pretrain.evaluation.evaluated_run import EvaluatedRun, score_together
from pretrain.evaluation.likelihood import LikelihoodOptions, Request
from pretrain.evaluation.ratio import Estimate, ratio
from pretrain.evaluation.text_pairs import encode_pair, text_start
from pretrain.evaluation.validation import Validation, loss_and_tokens
from tests.distributed.launch import run as launch
from tests.pretrain.evaluated_case import MODEL, make_run, write_tasks

LENGTH = 6
os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"  # read when the harness is first imported


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory) -> Path:
    """Runs of every objective, on texts of 6 tokens; `plain` on texts of 32."""
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "plain", corpus, 32)
    make_run(folder / "masked", corpus, LENGTH)
    make_run(folder / "bert", corpus, LENGTH, kind="bert")
    make_run(folder / "shift", corpus, LENGTH, shift=True)
    make_run(folder / "block", corpus, LENGTH, kind="block", block_size=3)
    make_run(folder / "autoregressive", corpus, LENGTH, kind="autoregressive")
    make_run(folder / "isolate", corpus, LENGTH, data={"packing": "isolate"})
    make_run(folder / "uniform", corpus, LENGTH, scale=0.0, kind="uniform")
    make_run(folder / "flow", corpus, LENGTH, kind="flow")
    return folder


@pytest.fixture(scope="module")
def shards(corpus) -> ShardSet:
    return ShardSet.open(corpus / "val")


def evaluated(capsys, *arguments: object) -> tuple[dict, str]:
    """The JSON and the text of one command."""
    out = Path(str(arguments[1])) / "found.json"
    assert execute(["evaluate", *map(str, arguments), "--json", str(out)]) == 0
    return json.loads(out.read_text()), capsys.readouterr().out


def refused(capsys, *arguments: object) -> str:
    assert execute(["evaluate", *map(str, arguments)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_the_bound_of_blocks_is_the_expectation_over_every_mask(runs, shards):
    """16 blocks, each of whose 63 masks is run: the estimate may differ by what its draws leave open and no more."""
    run, count = EvaluatedRun.open(str(runs / "masked")), 16
    exact = 0.0
    for g in range(count):
        ids = torch.from_numpy(shards.read_tokens(g * LENGTH, LENGTH).astype(np.int64))
        masks = torch.tensor(list(itertools.product((False, True), repeat=LENGTH))[1:])
        logp = torch.log_softmax(run.predictor()(torch.where(masks, shards.special.mask, ids)).double(), -1)
        costs = -(logp.gather(2, ids.expand(len(masks), -1)[..., None])[..., 0] * masks).sum(1)
        for size in range(1, LENGTH + 1):
            exact += float(costs[masks.sum(1) == size].mean()) / size
    exact /= count * LENGTH
    found = evaluate_blocks(run, shards, most=count, draws=48, micro_batch=64)
    assert 0 < found["se_of_draws"] < 0.02 * exact, "else anything would do"
    assert abs(found["nelbo"]["value"] - exact) < 3 * found["se_of_draws"]
    assert (found["blocks"], found["tokens"]) == (count, count * LENGTH)


@pytest.mark.parametrize("name", ["masked", "bert", "shift", "block", "autoregressive"])
def test_blocks_and_answers_agree_whatever_the_objective(runs, shards, name):
    """Two ways to one number: the loss of a training batch (its layout, two copies, shifted targets), and scored predictions."""
    run, count = EvaluatedRun.open(str(runs / name)), 12
    draws = 1 if name == "autoregressive" else 64
    found = evaluate_blocks(run, shards, most=count, draws=draws, micro_batch=64)
    given = int(name == "shift")
    requests = [
        Request(ids[:given], ids[given:])
        for ids in (shards.read_tokens(g * LENGTH, LENGTH).astype(np.int64) for g in range(count))
    ]
    scores = score_together(run, run.scored(), requests, LikelihoodOptions(draws=64, greedy=False, seed=3))
    tokens = sum(score.tokens for score in scores)
    value = -sum(score.log_likelihood for score in scores) / tokens
    assert tokens == found["tokens"] == count * (LENGTH - given)
    if name == "autoregressive":
        assert found["nelbo"]["value"] == pytest.approx(value, rel=1e-6) and found["bound"] == "exact"
        assert found["measure"] == "NLL" and found["estimator"] == "chain rule"
    else:
        error = math.sqrt(sum(score.standard_error**2 for score in scores)) / tokens
        assert abs(found["nelbo"]["value"] - value) < 3.5 * math.hypot(error, found["se_of_draws"])
        assert error < 0.05 * value, "else anything would agree"
        assert found["bound"] == "upper bound" and ("in each block of 3" in found["estimator"]) == (name == "block")


def test_the_uniform_bound_of_a_model_that_knows_nothing_is_log_vocabulary(runs, shards):
    """With constant predictions the reverse process is the stationary one, and the bound is KL(token || uniform) = log N exactly
    (but for the ends of the noise levels, which objective.eps leaves out)."""
    run = EvaluatedRun.open(str(runs / "uniform"))
    found = evaluate_blocks(run, shards, most=60, draws=24, micro_batch=64)
    assert found["se_of_draws"] < 0.08 * found["nelbo"]["value"], "else anything would do"
    assert abs(found["nelbo"]["value"] - math.log(MODEL.vocab_size)) < 3.5 * found["se_of_draws"] + 0.02


def test_what_validation_says_during_training_is_what_evaluate_says(runs, shards, capsys, corpus):
    run = EvaluatedRun.open(str(runs / "plain"))
    metrics = Validation(shards, 32, 5, 33).run(run)
    found, text = evaluated(capsys, "--run", runs / "plain", "--shards", corpus / "val", "--blocks", 33)
    assert found["nelbo"] == pytest.approx({"value": metrics["val/nelbo"], "se": metrics["val/nelbo_se"]}, rel=1e-6)
    assert found["perplexity"]["value"] == pytest.approx(metrics["val/ppl_bound"], rel=1e-5)
    assert "upper bound of the negative log-likelihood; fixed-count masks" in text
    assert "draws a block 1, seed 0, CFG off" in text


def test_validation_calls_a_number_what_it_is(runs, shards):
    words = {
        "masked": "NELBO .* <= ",
        "autoregressive": "NLL .* = ",
        "uniform": "NELBO .* <= ",
        "flow": "NELBO .* <= ",
    }
    for name, expected in words.items():
        run = EvaluatedRun.open(str(runs / name))
        validation = Validation(shards, LENGTH, 8, 8, config=run.config)
        metrics = validation.run(run, 40)
        assert re.match(f"validation {expected}", validation.sentence(metrics)), validation.sentence(metrics)
        assert all(map(math.isfinite, metrics.values()))


def test_flow_is_measured_by_the_bound_of_uniform_noise_and_goes_on_with_its_own_loss(runs, shards):
    """Read as a uniform network, which is not taught a posterior, it has another number; its head has its row loss back."""
    flow = EvaluatedRun.open(str(runs / "flow"))
    own = row_loss("symmetric_kl", 0.1)
    flow.model.head.row_loss = own
    as_uniform = replace(flow.config, objective=replace(flow.config.objective, kind="uniform"))
    found = [Validation(shards, LENGTH, 8, 8, config=config).run(flow) for config in (flow.config, as_uniform)]
    assert found[0] != found[1] and flow.model.head.row_loss is own
    assert all(map(math.isfinite, found[0].values()))


def test_units_follow_from_each_other_and_their_errors_from_the_jackknife(runs, shards):
    run = EvaluatedRun.open(str(runs / "plain"))
    found = evaluate_blocks(run, shards, most=60, draws=2, micro_batch=16)
    e = {name: Estimate(**found[name]) for name in ("nelbo", "bits_per_token", "bits_per_byte", "perplexity")}
    bits = e["bits_per_token"].value * found["tokens"]
    assert bits == pytest.approx(e["nelbo"].value * found["tokens"] / math.log(2))
    assert bits == pytest.approx(e["bits_per_byte"].value * found["bytes"])
    assert e["perplexity"].value == pytest.approx(math.exp(e["nelbo"].value))
    step = 1e-4 * e["nelbo"].se
    slope = (math.exp(e["nelbo"].value + step) - math.exp(e["nelbo"].value - step)) / (2 * step)
    assert e["perplexity"].se == pytest.approx(slope * e["nelbo"].se, rel=1e-3)
    validation = Validation(shards, 32, 64, 60, draws=2)
    table = validation.per_sample(run, 2, loss_and_tokens).view(60, 2, 2).mean(1).numpy()
    sizes = np.array([len(_text(run, shards, g)) for g in range(60)])
    assert found["bytes"] == sizes.sum()
    for name, units in (("bits_per_token", table[:, 1]), ("bits_per_byte", sizes)):
        one_less = (table[:, 0].sum() - table[:, 0]) / (units.sum() - units) / math.log(2)
        jackknife = math.sqrt(59 / 60 * np.sum((one_less - one_less.mean()) ** 2))
        assert e[name].se == pytest.approx(jackknife, rel=0.03)


def _text(run: EvaluatedRun, shards: ShardSet, g: int) -> bytes:
    """The bytes of block g by GPT-2's table of characters, character by character."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}
    ids = [i for i in shards.read_tokens(g * 32, 32).tolist() if i != shards.special.eos]
    return bytes(table[c] for i in ids for c in run.tokenizer.backend.id_to_token(i) or "")


def test_the_bytes_of_a_whole_set_are_its_text(runs, corpus, capsys, shards):
    found, text = evaluated(capsys, "--run", runs / "plain", "--shards", corpus / "val", "--batch-size", 64)
    assert found["bytes"] == found["text_bytes"] == shards.utf8_bytes
    assert found["tokens"] == shards.tokens and "the set's texts have" not in text


def test_the_error_of_the_draws_is_the_spread_over_seeds(runs, shards):
    run = EvaluatedRun.open(str(runs / "masked"))
    for draws in (2, 8):
        found = [evaluate_blocks(run, shards, most=16, draws=draws, seed=s, micro_batch=64) for s in range(8)]
        spread = np.std([f["nelbo"]["value"] for f in found], ddof=1)
        said = math.sqrt(np.mean([f["se_of_draws"] ** 2 for f in found]))
        assert 0.5 < said / spread < 2.5, "strata make it smaller than it is said to be, never larger"
    assert math.isnan(evaluate_blocks(run, shards, most=4, micro_batch=64)["se_of_draws"])


@pytest.mark.parametrize("name", ["masked", "block"])
def test_the_error_of_the_draws_is_never_too_small_where_one_level_rules_the_loss(runs, shards, name):
    """A network whose tokens cost t^2 in the first three places, nothing in the others: the loss of a block with parts of their own
    levels (in an order of chance) is that of its first level, which is then noise of the draw, not a difference between strata."""
    run = EvaluatedRun.open(str(runs / name))

    def forward(microbatch):
        value = microbatch["masked"] * microbatch["t"].double() ** 2
        value[:, 3:] = 0
        return SimpleNamespace(value=value)

    run.forward = forward
    for draws in (2, 8):
        found = [evaluate_blocks(run, shards, most=12, draws=draws, seed=s, micro_batch=64) for s in range(40)]
        spread = np.std([f["nelbo"]["value"] for f in found], ddof=1)
        said = math.sqrt(np.mean([f["se_of_draws"] ** 2 for f in found]))
        assert said > 0.75 * spread
        assert said < 1.35 * spread or name == "masked", "parts in an order of chance are hardly stratified"


def test_a_ratio_of_sums_and_its_error():
    g = torch.Generator().manual_seed(0)
    values = []
    for _ in range(2000):
        n = torch.randint(1, 9, (50,), generator=g).double()
        values.append(ratio(n * (2 + 0.5 * torch.randn(50, generator=g, dtype=torch.float64)), n))
    spread = np.std([found.value for found in values])
    assert np.mean([found.value for found in values]) == pytest.approx(2, abs=0.01)
    assert np.sqrt(np.mean([found.se**2 for found in values])) == pytest.approx(spread, rel=0.05)
    nothing = torch.zeros(3, dtype=torch.float64)
    assert math.isnan(ratio(nothing, nothing).value)
    one = ratio(torch.tensor([3.0, 0.0]), torch.tensor([2.0, 0.0]))
    assert one.value == 1.5 and math.isnan(one.se)


PAIRS = [
    {"prompt": "def f(", "answer": "self):\n"},
    {"prompt": "import ", "answer": "os"},
    {"prompt": "", "answer": "class"},
    {"prompt": "x = [1, 2, 3]\n" * 6, "answer": "y = x"},
]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, PAIRS)) + "\n\n")
    return file


def test_pairs_are_scored_as_their_tokens_are(runs, pairs, capsys):
    found, text = evaluated(
        capsys, "--run", runs / "plain", "--pairs", pairs, "--draws", 12, "--cfg-scale", 0.5, "--seed", 3
    )
    run = EvaluatedRun.open(str(runs / "plain"))
    requests = [encode_pair(run, pair["prompt"], pair["answer"]) for pair in PAIRS]
    options = LikelihoodOptions(draws=12, cfg_scale=0.5, seed=3)
    scores = score_together(run, run.scored(), requests, options)
    assert [answer["log_likelihood"] for answer in found["answers"]] == pytest.approx([s[0] for s in scores], rel=1e-5)
    assert [answer["se"] for answer in found["answers"]] == pytest.approx([s[1] for s in scores], rel=1e-4)
    assert [answer["bytes"] for answer in found["answers"]] == [7, 3, 5, 6], (
        "spaces behind a prompt belong to the answer"
    )
    total = sum(score.log_likelihood for score in scores)
    assert found["per_pair"]["value"] == pytest.approx(total / 4, rel=1e-5)
    assert found["per_token"]["value"] == pytest.approx(total / found["tokens"], rel=1e-5)
    assert found["per_byte"]["value"] == pytest.approx(total / 21, rel=1e-5)
    assert found["cut_prompts"] == 1 and "1 prompts lost their beginning" in text
    assert "lower bound; fixed_count, draws an answer 12, seed 3, CFG scale 0.5" in text
    assert (found["estimator"], found["draws"], found["seed"], found["cfg_scale"]) == ("fixed_count", 12, 3, 0.5)


def test_a_broken_model_is_named_with_the_first_block_and_the_pair(runs, corpus, shards, tmp_path, capsys):
    """A network that gives no number where it reads one rare token."""
    tokenizer = EvaluatedRun.open(str(runs / "plain")).tokenizer
    early, late = (shards.read_tokens(start, count).tolist() for start, count in ((0, 64), (64, 1216)))
    texts = {token: tokenizer.decode([token]) for token in sorted(set(late) - set(early), key=late.count)}
    token, text = next(
        (t, c) for t, c in texts.items() if c.strip() == c and tokenizer.encode_batch([c])[0].tolist() == [t]
    )
    broken = make_run(tmp_path / "broken", corpus, 32, nan_token=token)
    run, pairs = EvaluatedRun.open(str(broken)), tmp_path / "pairs.jsonl"
    given = [("x", "y"), (text, " = os"), ("z", "y = 1")]
    assert token in encode_pair(run, *given[1]).prompt
    pairs.write_text("\n".join(json.dumps({"prompt": prompt, "answer": answer}) for prompt, answer in given))
    validation = Validation(shards, 32, 8, 40, config=run.config)
    found = validation.per_sample(run, 2, loss_and_tokens)[:, 0]
    wrong = [g for g, value in enumerate(found.tolist()) if not math.isfinite(value)]
    assert 0 < len(wrong) < 20 and wrong[0] > 0, "else any name would do"
    said = refused(capsys, "--run", broken, "--shards", corpus / "val", "--blocks", 40)
    assert f"no finite loss in {len(wrong)} of the 40 blocks of" in said
    assert f"block {wrong[0]} first (from token {32 * wrong[0]} on)" in said
    for options in ([], ["--greedy", "false"], ["--cfg-scale", 1]):
        said = refused(capsys, "--run", broken, "--pairs", pairs, "--draws", 2, *options)
        assert f"--pairs {pairs}, pair 2 of 3: the best logit of a position is not finite" in said


def test_prompt_and_answer_are_the_tokens_of_both_together(runs):
    run = EvaluatedRun.open(str(runs / "plain"))
    for prompt, answer in (("def f(", "self):"), ("import ", "os"), ("x = 1", "\ny")):
        request = encode_pair(run, prompt, answer)
        whole = run.tokenizer.encode_batch([prompt + answer])[0]
        assert np.array_equal(np.concatenate(request), whole)
        assert run.tokenizer.decode(request.prompt) == prompt.rstrip()
    assert len(run.tokenizer.encode_batch(["self"])[0]) == 1, "a token over the border"
    for cut in range(1, 4):
        request = encode_pair(run, "self"[:cut], "self"[cut:])
        assert run.tokenizer.decode(request.prompt) == "self"[:cut]
        assert run.tokenizer.decode(request.answer) == "self"[cut:], "all of the answer and nothing else is scored"
    eos = [run.tokenizer.special.eos]
    before = {
        name: text_start(EvaluatedRun.open(str(runs / name))).tolist()
        for name in ("plain", "isolate", "autoregressive", "shift")
    }
    assert before == {"plain": eos, "isolate": [], "autoregressive": [], "shift": eos}
    assert encode_pair(run, " ", "x").prompt.tolist() == eos and len(encode_pair(run, "x", "").answer) == 0


def test_numbers_do_not_depend_on_ranks_or_batch_size(runs, corpus, pairs, tmp_path, capsys):
    """One launch of two ranks: blocks with several draws (27 samples, batches of 8: the ranks' shares are uneven), and answers."""
    common = {
        "blocks": ["--run", runs / "plain", "--shards", corpus / "val", "--blocks", 9, "--draws", 3],
        "pairs": ["--run", runs / "plain", "--pairs", pairs, "--draws", 7],
        "autoregressive": ["--run", runs / "autoregressive", "--shards", corpus / "val", "--blocks", 5],
    }
    said, two = on_two_ranks(common, tmp_path)
    assert "nats per token" in said[0] and "nats per token" not in said[1]
    for name, options in common.items():
        for size in (8, 5):
            one, _ = evaluated(capsys, *options, "--batch-size", size)
            assert flat(two[name]) == pytest.approx(flat(one), rel=1e-5, abs=1e-6)


@pytest.mark.parity
def test_tasks_do_not_depend_on_ranks_or_batch_size(runs, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    names = ("--harness", "local_choice,local_generate", "--include-path", write_tasks(tmp_path))
    common = {"harness": ["--run", runs / "plain", *names, "--draws", 3]}
    _, two = on_two_ranks(common, tmp_path)
    one, _ = evaluated(capsys, *common["harness"], "--batch-size", 3)
    assert flat(two["harness"]) == pytest.approx(flat(one), rel=1e-5, abs=1e-6)


def on_two_ranks(commands: dict[str, list], folder: Path) -> tuple[list[str], dict[str, dict]]:
    """What each rank said, and the JSON of each command."""
    files = {name: folder / f"two-{name}.json" for name in commands}
    lines = [["evaluate", *map(str, options), "--json", str(files[name])] for name, options in commands.items()]
    (folder / "commands.json").write_text(json.dumps(lines))
    said = launch("tests.pretrain.evaluate_worker", [str(folder / "commands.json")], 2)
    return said, {name: json.loads(file.read_text()) for name, file in files.items()}


def flat(found: object) -> dict:
    """Every number and text of a report by its place."""
    if isinstance(found, dict | list):
        items = found.items() if isinstance(found, dict) else enumerate(found)
        return {f"{key}/{inner}": value for key, part in items for inner, value in flat(part).items()}
    return {"": math.inf if found is None else found} if not isinstance(found, str) else {found: 1}


def test_mistakes_are_one_line(runs, corpus, pairs, tmp_path, capsys):
    plain, val = ("--run", runs / "plain"), ("--shards", corpus / "val")
    assert "give one of --shards, --pairs, --harness, not 0" in refused(capsys, *plain)
    assert "not 2 of them" in refused(capsys, *plain, *val, "--pairs", pairs)
    assert "--cfg_scale means nothing with --shards" in refused(capsys, *plain, *val, "--cfg-scale", 1)
    assert "--blocks means nothing with --pairs" in refused(capsys, *plain, "--pairs", pairs, "--blocks", 1)
    assert "--steps means nothing with --pairs, only with --harness" in refused(
        capsys, *plain, "--pairs", pairs, "--steps", 1
    )
    assert "--draws is 0" in refused(capsys, *plain, *val, "--draws", 0)
    assert "cfg_scale is -1" in refused(capsys, *plain, "--pairs", pairs, "--cfg-scale", -1)
    assert "no checkpoint there" in refused(capsys, "--run", tmp_path, *val)
    assert "no such folder" in refused(capsys, *plain, "--shards", tmp_path / "nowhere")
    assert "not available for it" in refused(capsys, "--run", runs / "uniform", "--pairs", pairs)
    assert "cannot be read" in refused(capsys, *plain, "--pairs", tmp_path / "nowhere")
    for text, where in (
        ('{"prompt": "a"}', "line 1"),
        ('{"prompt": "a", "answer": "b"}\n[]', "line 2"),
        ("\n", "no pairs"),
    ):
        (tmp_path / "bad.jsonl").write_text(text)
        assert where in refused(capsys, *plain, "--pairs", tmp_path / "bad.jsonl")
    long = {"prompt": "", "answer": "word " * 100}
    (tmp_path / "long.jsonl").write_text(json.dumps(long))
    assert "long.jsonl, pair 1 of 1: the answer has" in refused(capsys, *plain, "--pairs", tmp_path / "long.jsonl")


def test_without_the_harness_one_line_says_how_to_get_it(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
    said = refused(capsys, "--run", "not even looked at", "--harness", "arc_easy")
    assert said == "error: evaluate: --harness needs the package lm_eval: pip install -r requirements-eval.txt\n"


def test_a_set_of_another_tokenizer_is_refused(runs, corpus, tmp_path, capsys):
    from data.prepare import prepare
    from data.prepare_options import PrepareOptions

    (tmp_path / "text.txt").write_text("other words entirely\n" * 400)
    prepare(
        PrepareOptions(
            out=str(tmp_path / "other"),
            inputs=[str(tmp_path / "text.txt")],
            vocab_size=300,
            val_fraction=0,
            processes=1,
        ),
        progress=False,
    )
    said = refused(capsys, "--run", runs / "plain", "--shards", tmp_path / "other" / "train")
    assert "was made with another tokenizer than the run" in said

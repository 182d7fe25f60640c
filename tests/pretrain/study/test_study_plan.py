"""`study plan`: cells that spend what was asked, names that never change, and nothing trained is planned away."""

from __future__ import annotations

import contextlib
import json
import re
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from data.errors import InputError
from data.prepare import prepare
from data.prepare_options import PrepareOptions
from data.shard_set import ShardSet
from parallel.shape import ModelShape, parameter_counts
from pretrain.config import Config
from pretrain.load_config import load_config
from pretrain.study.command_plan import plan
from pretrain.study.design.cells import Cell, base_config
from pretrain.study.design.corpus import Corpus, look_at, part_of, write_part
from pretrain.study.design.costs import Rate, measured_rate, table
from pretrain.study.design.family import load_family
from pretrain.study.design.identity import cell_id
from pretrain.study.design.plan import Plan, make_plan, open_study, write_plan
from pretrain.study.design.rules import micro_batch, value_of, whole_batch
from pretrain.study.design.spec import RuleConfig, load_study, to_yaml
from pretrain.submission.slurm_cell import cell as slurm_cell
from tests.pretrain.study.studies import SIZES, write_study


@pytest.fixture(scope="module")
def pieces(tmp_path_factory) -> Path:
    """Real text in many small shards."""
    out = tmp_path_factory.mktemp("pieces") / "stdlib"
    options = {"vocab_size": 512, "limit_bytes": 1 << 20, "val_fraction": 0.1, "processes": 1}
    prepare(
        PrepareOptions(out=str(out), source="stdlib", shard_tokens=12000, chunk_tokens=4096, **options), progress=False
    )
    return out


@pytest.fixture(scope="module")
def tokens(corpus) -> int:
    return ShardSet.open(str(corpus / "train"), "size").tokens


def made(folder: Path, corpus: Path, config=None, **study) -> Plan:
    return make_plan(load_study(str(write_study(folder, corpus, config, **study))))


def cells(folder: Path, corpus: Path, config=None, **study) -> list[Cell]:
    return [cell for cell, _ in made(folder, corpus, config, **study).cells]


def by_hand(size: dict[str, int], objective: str, vocab: int = 512, length: int = 32) -> float:
    """FLOPs of a token: 6 x (matrices of the blocks, and the head where it is computed) + 12 x layers x hidden x length."""
    layers, h, f = size["num_layers"], size["hidden_size"], size["ffn_hidden_size"]
    kv = h // size["num_heads"] * size["num_kv_heads"]
    matrices = layers * (2 * h * h + 2 * h * kv + 3 * h * f)
    return 6 * (matrices + vocab * h * (0.5 if objective == "masked" else 1.0)) + 12 * layers * h * length


def test_isoflop_cells_spend_their_budget_to_half_a_step(tmp_path, corpus):
    found = cells(tmp_path, corpus)
    assert [(c.objective, c.budget, c.size) for c in found] == [
        (kind, budget, size) for kind in ("masked", "autoregressive") for budget in (2e9, 4e9, 8e9) for size in SIZES
    ]
    for cell in found:
        flops = by_hand(SIZES[cell.size], cell.objective)
        assert cell.D == cell.steps * cell.batch * 32 and cell.C == pytest.approx(cell.D * flops, rel=1e-3)
        assert abs(cell.C - cell.budget) <= 0.501 * 8 * 32 * flops


def test_what_a_cell_trains_is_what_its_row_says(tmp_path, corpus):
    plan = made(
        tmp_path, corpus, ranks=2, batch={"rule": "constant", "at": 12}, batch_multiple=4, warmup=0.1, decay=0.3
    )
    assert write_plan(plan) == []
    planned = open_study(plan.folder)
    assert len(planned.cells) == 18
    lines = (plan.folder / "cells.txt").read_text().splitlines()
    for number, cell in list(enumerate(planned.cells))[::5]:
        run, *words = slurm_cell(plan.folder / "cells.txt", number + 1)
        assert words == [lines[number]] and run == str(planned.run_folder(cell).absolute())
        config = load_config(["--config", *words])
        assert (config.train.steps, config.train.global_batch_size, config.optimizer.lr) == (cell.steps, 12, 4e-3)
        assert config.train.micro_batch_size == 6 and config.train.validate_every == cell.steps
        assert config.optimizer.warmup_steps == max(1, round(0.1 * cell.steps))
        assert config.optimizer.decay_steps == round(0.3 * cell.steps) and config.optimizer.min_lr == pytest.approx(
            4e-4
        )
        assert config.objective.kind == cell.objective and config.run.seed == cell.seed == 3
        assert config.tracking.uri == "none" and config.train.sample_every == 0
        shape = ModelShape(**{name: getattr(config.model, name) for name in ModelShape.__dataclass_fields__})
        assert parameter_counts(shape)["non_embedding"] == cell.N
        assert {name: getattr(config.model, name) for name in SIZES["s"]} == SIZES[cell.size]


def test_a_cell_keeps_its_name_whatever_else_the_study_has(tmp_path, corpus):
    before = {cell.place: cell.id for cell in cells(tmp_path / "a", corpus)}
    for more in (
        {"budgets": [1e9, 8e9, 2e9, 4e9, 16e9]},
        {"repeats": 3},
        {"objectives": ["autoregressive", "masked"]},
        {"sizes": ["l", "s"]},
        {"ranks": 2},
        {"name": "other", "dir": str(tmp_path / "elsewhere")},
        {"max_epochs": 7.0, "min_steps": 2, "validations": 3},
        {"config": {"health": {"beat_seconds": 5.0}, "train": {"log_every": 3, "micro_batch_size": 2}}},
    ):
        again = {cell.place: cell.id for cell in cells(tmp_path / "b", corpus, more.pop("config", None), **more)}
        common = before.keys() & again.keys()
        assert len(common) >= 12 and all(before[place] == again[place] for place in common)
        assert len(set(again.values())) == len(again)


def test_a_name_follows_from_what_defines_the_result_and_from_nothing_else():
    given = {"budget": 1e18, "tokens": 1e9, "unique": None, "repeat": 0}
    config = Config()
    name = cell_id("masked", "6M", config, "data", **given)
    assert name == "masked-6M-c1e18-3458a654"  # no release may change it: finished cells would be lost
    others = {
        "lr": replace(config, optimizer=replace(config.optimizer, lr=1e-3)),
        "batch": replace(config, train=replace(config.train, global_batch_size=64)),
        "steps": replace(config, train=replace(config.train, steps=7)),
        "validation": replace(config, train=replace(config.train, val_samples=64)),
        "objective": replace(config, objective=replace(config.objective, eps=0.01)),
        "seed": replace(config, run=replace(config.run, seed=1)),
        "length": replace(config, data=replace(config.data, sequence_length=64)),
        "model": replace(config, model=replace(config.model, rope_theta=10.0)),
    }
    names = {key: cell_id("masked", "6M", other, "data", **given) for key, other in others.items()}
    names["data"] = cell_id("masked", "6M", config, "other data", **given)
    names["unique"] = cell_id("masked", "6M", config, "data", **given | {"unique": 1000})
    assert len({name, *names.values()}) == 11


def test_planning_again_changes_no_byte(tmp_path, corpus):
    study = write_study(tmp_path, corpus, repeats=2)
    assert plan([str(study)]) == 0
    folder = tmp_path / "study"

    def state() -> dict[str, tuple[bytes, int]]:
        files = [path for path in folder.rglob("*") if path.is_file()]
        return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files if path.name != ".lock"}

    before = state()
    assert plan([str(study)]) == 0 and state() == before
    again = load_study(str(folder / "study.yaml"))
    assert to_yaml(again) == (folder / "study.yaml").read_text()
    assert plan([str(study), "--study.budgets", "[2e9, 4e9, 8e9, 3e9]"]) == 0
    after = state()
    assert all(after[path] == before[path] for path in before if "/cells/" in path) and len(after) == len(before) + 12
    assert plan([str(study)]) == 0
    assert {path: content for path, (content, _) in state().items()} == {
        p: content for p, (content, _) in before.items()
    }


def test_what_was_trained_is_not_planned_otherwise(tmp_path, corpus):
    """A metrics file stands for the training, whose config the run folder keeps."""
    assert plan([str(write_study(tmp_path, corpus))]) == 0
    folder = tmp_path / "study"
    planned = open_study(folder)
    run = planned.run_folder(planned.cells[4])
    run.mkdir(parents=True)
    (run / "config.yaml").write_bytes(planned.config_file(planned.cells[4]).read_bytes())
    other = write_study(tmp_path, corpus, {"optimizer": {"lr": 1e-3}})
    assert plan([str(other)]) == 0  # nothing has run yet
    assert plan([str(write_study(tmp_path, corpus))]) == 0
    (run / "metrics.jsonl").write_text('{"step": 1, "time": 0}\n')
    before = (folder / "plan.json").read_bytes()
    write_study(tmp_path, corpus, {"optimizer": {"lr": 1e-3}})
    with pytest.raises(InputError, match=rf"{planned.cells[4].id} has been trained.*optimizer.lr 0.004 -> 0.001"):
        plan([str(other)])
    assert (folder / "plan.json").read_bytes() == before
    sooner = write_study(tmp_path, corpus, budgets=[2e9, 8e9])  # a budget that is not asked for any more is no change
    assert plan([str(sooner)]) == 0 and (run / "metrics.jsonl").exists()


def test_too_many_tokens_or_too_few_steps_leave_a_cell_out_with_the_reason(tmp_path, corpus, tokens):
    flops = by_hand(SIZES["s"], "masked")
    budgets = [1e8, tokens * flops * 1.5]
    found = cells(tmp_path, corpus, budgets=budgets, sizes=["s"], objectives=["masked"], min_steps=100)
    assert [cell.status for cell in found] == ["excluded", "excluded"]
    assert found[0].reason.startswith("too few steps: ") and found[1].reason.startswith("lacks tokens: needs ")
    again = cells(tmp_path, corpus, budgets=budgets, sizes=["s"], objectives=["masked"], min_steps=100, max_epochs=2.0)
    assert [cell.status for cell in again] == ["excluded", "planned"] and again[1].epochs == pytest.approx(
        1.5, abs=0.01
    )
    assert again[1].unique_tokens == tokens and found[1].id == again[1].id


def test_a_ladder_takes_its_tokens_from_its_rule(tmp_path, corpus):
    rule = {"design": "ladder", "budgets": [], "objectives": ["masked"], "max_epochs": 100.0}
    fixed = cells(tmp_path, corpus, tokens=[2560, 5120], **rule)
    assert [(cell.size, cell.D, cell.budget) for cell in fixed] == [(s, d, None) for s in SIZES for d in (2560, 5120)]
    ratio = cells(tmp_path, corpus, tokens_per_parameter=[2.0], **rule)
    assert all(abs(cell.D - 2 * cell.N) <= 128 for cell in ratio)
    total = cells(tmp_path, corpus, tokens_per_parameter=[2.0], count="total", **rule)
    assert all(cell.N == other.N + 2 * 512 * SIZES[cell.size]["hidden_size"] for cell, other in zip(total, ratio))


def test_unique_tokens_are_a_part_of_the_set_that_train_can_read(tmp_path, pieces):
    rule = {"design": "ladder", "budgets": [], "objectives": ["masked"], "sizes": ["s"]}
    plan = made(tmp_path, pieces, unique=[50000, 110000], epochs=[1, 4], **rule)
    found = [cell for cell, _ in plan.cells]
    assert len(found) == 4 and all(cell.status == "planned" for cell in found)
    small, large = set(found[0].part), set(found[2].part)
    assert small < large  # a larger part holds the smaller one
    for cell, config in plan.cells:
        assert cell.D / cell.unique_tokens == pytest.approx(round(cell.epochs), rel=0.01)
        write_part(pieces / "train", list(cell.part), Path(config.data.shards))
        part = ShardSet.open(config.data.shards, "full")
        assert cell.unique_tokens == min(part.tokens, cell.D)  # whole steps may end a little before the last token
        assert abs(part.tokens / (50000 if cell in found[:2] else 110000) - 1) < 0.2
        whole = ShardSet.open(str(pieces / "train"), "size")
        first = sum(shard.tokens for shard in whole.shards[: cell.part[0]])
        assert (part.read_tokens(0, 500) == whole.read_tokens(first, 500)).all()
    with pytest.raises(InputError, match="study.unique 1000: whole shards .* prepare the set with smaller ones"):
        made(tmp_path, pieces, unique=[1000], epochs=[1], **rule)


def test_unique_tokens_that_give_the_same_shards_are_refused_with_what_to_do(tmp_path, pieces):
    rule = {"design": "ladder", "budgets": [], "objectives": ["masked"], "sizes": ["s"], "epochs": [1]}
    sizes = [shard.tokens for shard in ShardSet.open(str(pieces / "train"), "size").shards]
    whole, most = sum(sizes), max(sizes)
    (cell,) = [cell for cell, _ in made(tmp_path, pieces, unique=[110000], **rule).cells]
    part = sum(
        sizes[number] for number in cell.part
    )  # what whole shards give, and so does anything within half a shard
    assert min(sizes) > 4000
    same = (
        rf"study\.unique: {part} and {{}} give the same {len(cell.part)} whole shards \({part:,} tokens\) of the {len(sizes)} that "
        rf"data\.shards has \({whole:,} tokens\): leave one of them out, or take values more than {most:,} tokens \(the largest "
        r"shard\) apart{}"
    )
    with pytest.raises(InputError) as error:
        made(tmp_path, pieces, unique=[part + 2000, 50000, part], **rule)
    smaller = r", or prepare the set with smaller shards \(prepare --shard-tokens 2000\)"
    assert re.fullmatch(same.format(part + 2000, smaller), str(error.value))
    assert len(made(tmp_path, pieces, unique=[part + 2000, 50000], **rule).cells) == 2  # one left out, as it says
    for near, first in ((part + 100, part), (part, part)):  # no set should have such small shards
        with pytest.raises(InputError) as error:
            made(tmp_path, pieces, unique=[near, first], **rule)
        assert re.fullmatch(same.format(near, ""), str(error.value))
    with pytest.raises(
        InputError, match=rf"same {len(sizes)} whole shards .* leave one of them out, or prepare a larger"
    ):
        made(tmp_path, pieces, unique=[whole, round(1.1 * whole)], **rule)
    corpus = look_at(load_config(["--config", str(tmp_path / "base.yaml")]))
    for low in range(most, whole - most, 3000):  # values so far apart do give different shards
        with contextlib.suppress(InputError):  # no whole shards near it
            assert part_of(corpus, low)[0] != part_of(corpus, low + most + 1)[0]


def test_rules_are_powers_and_batches_are_multiples():
    quantities = {"parameters": 4e6, "width": 256.0, "tokens": 1e9, "batch": 64.0}
    assert value_of(RuleConfig(), quantities, 0.3) == 0.3
    assert value_of(RuleConfig(at=0.1), quantities, 0.3) == 0.1
    rule = RuleConfig(rule="power", at=1e-3, of="width", reference=64, exponent=-0.5)
    assert value_of(rule, quantities, 0.3) == pytest.approx(5e-4)
    rule = RuleConfig(rule="power", at=32, of="tokens", reference=1e6, exponent=1 / 3)
    assert whole_batch(value_of(rule, quantities, 0), 16) == 320 and whole_batch(3.0, 16) == 16
    assert [micro_batch(12, most) for most in (1, 5, 8, 99)] == [1, 4, 6, 12]


def test_sizes_per_budget_lie_evenly_around_the_estimate(tmp_path, corpus):
    optimum = {"coefficient": 1.92e-4, "exponent": 0.62, "autoregressive": 1.9, "spread": 3.0}
    family = "configs/families/smdm.yaml"
    plan = made(tmp_path, corpus, family=family, budgets=[6e18, 1e20], sizes_per_budget=5, optimum=optimum)
    for budget, masked in ((6e18, 84e6), (1e20, 479e6)):
        for kind, best in (("masked", masked), ("autoregressive", masked * 1.9)):
            found = [cell.N for cell, _ in plan.cells if (cell.budget, cell.objective) == (budget, kind)]
            assert len(found) == 5 and min(found) < best / 2 and max(found) > best * 2
            assert all(cell.status == "excluded" for cell, _ in plan.cells)  # of a corpus of half a million tokens


@pytest.mark.parametrize("family, head", [("smdm", 30), ("chinchilla", 40), ("tiny", 11), ("two_layers", 10)])
def test_published_families_have_the_parameters_that_their_names_say(family, head):
    sizes = load_family(f"configs/families/{family}.yaml")
    assert len(sizes) >= head
    for name, size in sizes.items():
        shape = ModelShape(vocab_size=32000, **{key: getattr(size, key) for key in size.__dataclass_fields__})
        counted = parameter_counts(shape)["non_embedding"]
        if family == "chinchilla":  # its two feed-forward matrices of 4 h: 12 h^2 a layer
            assert counted == pytest.approx(12 * size.num_layers * size.hidden_size**2, rel=0.025)
        elif family == "smdm":
            assert round(counted / 1e6) == int(name.removesuffix("M"))
        else:
            unit, places = {"k": (1e3, 0), "M": (1e6, 1)}[name[-1]]
            assert abs(counted / unit - float(name[:-1])) < 1.5 * 10.0**-places


def test_the_cost_table_adds_up(tmp_path, corpus):
    found = cells(tmp_path, corpus, budgets=[2e9, 4e9], sizes=["s", "m"], objectives=["masked"])
    lines = table(found, Rate(1e9, "said", {}))
    total = sum(cell.C for cell in found)
    assert (
        lines[-2]
        == f"in all: 4 cells, {sum(c.D for c in found) / 1e3:.3g} k tokens, {total:.3g} FLOPs, 12 s of one rank"
    )
    rate = measured_rate(found, {found[0].id: 2.0, found[1].id: 1.0})
    assert rate.flops == pytest.approx((found[0].C + found[1].C) / 3) and rate.by_size["m"] == found[1].C
    assert measured_rate(found, {}) is None and "not known" in table(found, None)[-1]


BAD = {
    "unknown key": ({"bugets": [1e9]}, "unknown key study.bugets: did you mean study.budgets"),
    "unknown inner key": ({"batch": {"att": 3}}, "unknown key study.batch.att: did you mean study.batch.at"),
    "ill-typed": ({"budgets": "much"}, "study.budgets must be a list of float, got much"),
    "negative": ({"budgets": [-1e9]}, "study.budgets is .*positive"),
    "no budgets": ({"budgets": []}, "study.budgets is .*FLOPs for design isoflop"),
    "twice": ({"budgets": [1e9, 1e9]}, "different from each other"),
    "tokens with budgets": ({"tokens": [1e6]}, "with design isoflop the budgets say"),
    "ladder without tokens": ({"design": "ladder", "budgets": []}, "a ladder takes its tokens from one of"),
    "epochs alone": ({"design": "ladder", "budgets": [], "epochs": [2]}, "study.epochs is .*ladder with unique"),
    "no such size": ({"sizes": ["xxl"]}, "study.sizes: xxl is not in the family: s, m, l"),
    "no such family": ({"family": "nowhere.yaml"}, "no file nowhere.yaml; there are: configs/families/"),
    "bad size": ({"family": {"a": {"num_layers": 1}}}, "study.family: a.num_heads is None"),
    "no such base": ({"base": "nowhere.yaml"}, "study.base: no file nowhere.yaml"),
    "override": ({"overrides": {"train.stepps": 3}}, "study.overrides: config: unknown key train.stepps"),
    "override of the study's own": ({"overrides": {"train.steps": 3}}, "the study itself sets train.steps"),
    "layout": ({"ranks": 3}, "is no multiple of study.ranks 3: set study.batch_multiple"),
    "memory": ({"gpu_memory": 1e-6}, "cell masked-s-c2e9-.* memory: about"),
    "power without value": ({"learning_rate": {"rule": "power"}}, "say study.learning_rate.at"),
    "shares": ({"warmup": 0.5, "decay": 0.6}, "study.decay is 0.6"),
    "name": ({"name": "a/b"}, "study.name is 'a/b', it must be a plain folder name"),
    "a rate of nothing": ({"overrides": {"optimizer.lr": 0}}, "optimizer.lr is 0.0, it must be positive"),
    "no samples": ({"overrides": {"train.micro_batch_size": 0}}, "train.micro_batch_size is 0, it must be positive"),
    "no length": ({"overrides": {"data.sequence_length": 0}}, "data.sequence_length is 0, it must be positive"),
    "a source without a path": ({"overrides": {"data.shards": [{"weight": 1.0}]}}, "every source needs a `path`"),
    "a rule beyond numbers": (
        {"batch": {"rule": "power", "at": 8, "of": "parameters", "reference": 1e-300, "exponent": 3.0}},
        "it must give a positive number",
    ),
    "a size that is no name": ({"family": {"a/b": SIZES["s"]}}, "the size 'a/b' must have a plain name"),
    "a password": (
        {"overrides": {"tracking.uri": "https://bob:hunter2@host"}},
        "an address in it holds a user, a password or a query",
    ),
    "small vocabulary": ({"overrides": {"model.vocab_size": 300}}, "model.vocab_size 300 is smaller than the 512 ids"),
    "same cells": ({"budgets": [2e9, 2.0001e9]}, "train the same: their tokens differ by less"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_line_that_names_the_key_and_nothing_is_written(tmp_path, corpus, case):
    keys, said = BAD[case]
    study = write_study(tmp_path, corpus, **keys)
    with pytest.raises(InputError, match=said) as error:
        plan([str(study)])
    assert "\n" not in str(error.value) and not (tmp_path / "study").exists() and not (tmp_path / "b").exists()


def test_data_that_are_not_there_are_a_mistake_but_for_a_dry_run(tmp_path, corpus, capsys):
    study = write_study(tmp_path, tmp_path / "nowhere")
    with pytest.raises(InputError, match="data.shards: .*no such folder"):
        plan([str(study)])
    assert plan([str(study), "--dry-run"]) == 0
    assert "dry run: nothing written" in capsys.readouterr().out and not (tmp_path / "study").exists()


def test_a_study_that_is_at_work_is_left_alone(tmp_path, corpus):
    from pretrain.study.design.plan import hold

    study = write_study(tmp_path, corpus)
    holder = subprocess.Popen(
        [
            *(sys.executable, "-c"),
            "import sys; from pathlib import Path; from pretrain.study.design.plan import hold\n"
            "with hold(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()",
            str(tmp_path / "study"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="is in use by another `study` command"):
            plan([str(study)])
    finally:
        holder.communicate(timeout=20)
    with hold(tmp_path / "study"):
        pass


def test_planning_ninety_cells_needs_no_torch_and_under_two_seconds_of_processor(tmp_path, corpus):
    budgets = [6e18, 1e19, 3e19, 6e19, 1e20]
    study = write_study(tmp_path, corpus, family="configs/families/smdm.yaml", budgets=budgets, sizes_per_budget=9)
    code = (
        "import sys; from pretrain.cli import run; code = run(sys.argv[1:]); assert 'torch' not in sys.modules, 'torch'; "
        "sys.exit(code)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code, "study", "plan", str(study)], capture_output=True, text=True, timeout=60
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert len(json.loads((tmp_path / "study" / "plan.json").read_text())["cells"]) == 90
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2.0


@pytest.mark.parametrize("name", ["study_smdm", "study_stdlib"])
def test_shipped_studies_can_be_planned(name, capsys):
    assert plan([f"configs/{name}.yaml", "--dry-run"]) == 0
    assert "left out" not in capsys.readouterr().out


def test_remote_data_count_by_their_address(tmp_path, corpus):
    study = write_study(tmp_path, corpus, {"data": {"shards": "https://host/sets/train"}})
    made = make_plan(load_study(str(study)))
    assert made.corpus.tokens is None and "remote" in made.notes[0]
    assert all(cell.unique_tokens is None and cell.status == "planned" for cell, _ in made.cells)
    other = yaml.safe_load((tmp_path / "base.yaml").read_text())
    other["data"]["shards"] = "https://host/sets/others"
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(other))
    again = make_plan(load_study(str(study)))
    assert isinstance(again.corpus, Corpus) and {c.id for c, _ in again.cells}.isdisjoint({c.id for c, _ in made.cells})


def test_an_override_can_take_a_key_of_the_base_back(tmp_path, corpus):
    file = write_study(
        tmp_path, corpus, {"objective": {"mask_ratio": [0.1, 0.9]}}, overrides={"objective.mask_ratio": None}
    )
    assert base_config(load_study(str(file))).objective.mask_ratio is None


def test_a_dry_run_of_few_unique_tokens_needs_no_data(tmp_path, corpus):
    file = write_study(
        tmp_path,
        tmp_path / "nowhere",
        design="ladder",
        budgets=[],
        unique=[20_000],
        epochs=[1, 4],
        objectives=["masked"],
    )
    found = make_plan(load_study(str(file)), need_data=False)
    assert {round(cell.epochs) for cell, _ in found.cells} == {1, 4}

"""Where a run goes on in its stream, what is refused, and what a reset does."""

from __future__ import annotations

import copy

import pytest

from data.errors import InputError
from pretrain.config import Config
from pretrain.load_config import to_dict
from pretrain.loop.stream_position import StreamPosition, go_on


def trainer(config: Config, step: int, **more) -> dict:
    return {"config": to_dict(config), "step": step, "data_fingerprint": "d", **more}


def changed(config: Config, **values) -> Config:
    other = copy.deepcopy(config)
    for key, value in values.items():
        section, name = key.split("__")
        setattr(getattr(other, section), name, value)
    return other


def test_nothing_changed_goes_on_where_it_was_whatever_the_layout():
    config = Config()
    assert go_on(config, "d", trainer(config, 7), "f") == StreamPosition()
    other = changed(
        config, train__micro_batch_size=1, data__workers=3, parallel__tensor=2, parallel__engine="fsdp2", optimizer__lr=1.0,
        data__shards="moved", train__steps=99, data__max_bad_shards=2,
    )  # fmt: skip
    assert go_on(other, "d", trainer(config, 7), "f") == StreamPosition()
    assert StreamPosition().consumed(7, 32) == 224


@pytest.mark.parametrize(
    "change",
    [
        {"run__seed": 1}, {"data__sequence_length": 512}, {"data__shuffle_window": 9}, {"train__global_batch_size": 48},
        {"objective__eps": 0.01}, {"data__packing": "isolate"}, {"data__cfg_dropout": 0.1},
    ],
)  # fmt: skip
def test_another_stream_is_refused_unless_it_is_reset_on_purpose(change):
    config = Config()
    now = changed(config, **change)
    key = next(iter(change)).replace("__", ".")
    with pytest.raises(InputError, match=rf"{key} \(there .*now.*data\.reset_stream=true"):
        go_on(now, "d", trainer(config, 7), "f")
    position = go_on(changed(now, data__reset_stream=True), "d", trainer(config, 7), "f")
    assert position.step == 7 and [list(r["changed"]) for r in position.resets] == [[key]]
    same_blocks = key in ("train.global_batch_size", "objective.eps", "data.packing", "data.cfg_dropout")
    batch = now.train.global_batch_size
    expected = -(-224 // batch) * batch if same_blocks else 0
    assert position.sample == expected and position.resets[0]["sample_before"] == 224
    assert position.consumed(9, batch) == expected + 2 * batch


def test_a_run_that_spelled_out_what_a_default_means_is_the_same_run():
    config = Config()
    then = trainer(config, 7)
    then["config"]["objective"] |= {"normalizer": "tokens", "mask_ratio": [0.0, 1.0]}
    assert go_on(config, "d", then, "f") == StreamPosition()
    for name in ("power", "candidates", "normalizer", "mask_ratio"):  # a config from before there was such a key
        del then["config"]["objective"][name]
    assert go_on(config, "d", then, "f") == StreamPosition()
    with pytest.raises(InputError, match="objective.normalizer .there tokens, now answers"):
        go_on(changed(config, objective__normalizer="answers"), "d", then, "f")


def test_other_data_needs_a_reset_too_and_another_model_is_never_the_same_run():
    config = Config()
    with pytest.raises(InputError, match="data.shards .*other shards, tokenizer or mixture"):
        go_on(config, "other", trainer(config, 7), "f")
    position = go_on(changed(config, data__reset_stream=True), "other", trainer(config, 7), "f")
    assert (position.step, position.sample) == (7, 0)
    model = changed(config, model__num_layers=9, data__reset_stream=True)
    with pytest.raises(InputError, match="model.num_layers"):
        go_on(model, "d", trainer(config, 7), "f")


def test_a_reset_is_kept_and_a_second_one_counts_from_the_first():
    config = Config()
    bigger = changed(config, train__global_batch_size=48, data__reset_stream=True)
    first = go_on(bigger, "d", trainer(config, 7), "f")
    again = go_on(bigger, "d", trainer(bigger, 9, stream=first.saved()), "f")
    assert again == first, "the flag alone resets nothing"
    assert first.consumed(9, 48) == 240 + 96
    third = go_on(changed(bigger, train__global_batch_size=100), "d", trainer(bigger, 9, stream=first.saved()), "f")
    assert (third.step, third.sample) == (9, 400) and len(third.resets) == 2
    assert third.resets[1]["sample_before"] == 336


def test_a_skipped_range_is_never_read_again_and_every_step_keeps_whole_sets_of_noise_levels():
    batch = 32
    position = StreamPosition().behind(17, 10, batch, "spikes")
    assert position.skips == ({"step": 10, "samples": [320, 543], "reason": "spikes"},)
    read = [position.consumed(step, batch) for step in range(10, 15)]
    assert read == [544, 576, 608, 640, 672] and all(sample % batch == 0 for sample in read)
    again = position.behind(12, 10, batch, "spikes")  # back to the same place: only what was read since
    assert again.sample == 608 and again.skips[1]["samples"] == [544, 607]
    further = position.behind(12, 4, batch, "spikes")  # back to before the first skip: nothing is read twice
    assert (further.step, further.sample) == (4, 608) and further.consumed(5, batch) == 640


def test_a_resumed_run_keeps_its_skips_and_so_does_a_reset():
    config = Config()
    skipped = StreamPosition().behind(17, 10, 32, "spikes")
    assert go_on(config, "d", trainer(config, 20, stream=skipped.saved()), "f") == skipped
    assert "skips" not in StreamPosition().saved(), "a run without trouble has the checkpoint that it always had"
    bigger = changed(config, train__global_batch_size=48, data__reset_stream=True)
    reset = go_on(bigger, "d", trainer(config, 20, stream=skipped.saved()), "f")
    assert reset.skips == skipped.skips and len(reset.resets) == 1
    assert reset.resets[0]["sample_before"] == 544 + 320 and reset.sample == 864

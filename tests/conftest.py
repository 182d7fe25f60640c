"""What several packages' tests share: a small real corpus, prepared once."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults import Record

# The bounds are those of float32 on a CPU, and ranks of one test are more than most machines have GPUs. Before torch starts.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# A shell that starts something behind itself (`make test &`, many CI runners) has it ignore Ctrl-C, and all that it starts too.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Files of few, long tests, the longest first. They begin first, or one of two workers is left alone with them at the end.
LONGEST = (
    "test_watch test_tracking_server test_preemption test_first_failure test_checkpoint_faults test_training_run test_bad_input "
    "test_rollback_run test_loader test_passing_faults test_status test_evaluate test_prepare_restart test_doctor"
).split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """The first megabyte of the standard library, prepared: train/ and val/ with a vocabulary of 512."""
    from data.prepare import prepare
    from data.prepare_options import PrepareOptions

    out = tmp_path_factory.mktemp("corpus") / "stdlib"
    prepare(
        PrepareOptions(
            out=str(out), source="stdlib", vocab_size=512, limit_bytes=1 << 20, val_fraction=0.1, processes=1
        ),
        progress=False,
    )
    return out


@pytest.fixture(autouse=True)
def torchs_own_linear() -> Iterator[None]:
    """A run that trains with ZeRO-3 in the tests' own process and fails leaves DeepSpeed's linear in torch."""
    yield
    if zero := sys.modules.get("deepspeed.runtime.zero.partition_parameters"):
        functional = sys.modules["torch.nn.functional"]
        functional.linear = getattr(zero.InsertPostInitMethodToModuleSubClasses, "linear_bk", functional.linear)


@pytest.fixture
def measured(record_property) -> Callable[[str, str], None]:
    """measured(what, value): a figure for the row of this test's fault in docs/faults.md."""
    return lambda what, value: record_property("measured", (what, value))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """A fault test that passes leaves its record, one that fails takes an older one away."""
    report = (yield).get_result()
    mark = item.get_closest_marker("fault")
    if mark is None or report.when != "call":
        return
    record = Record(item.nodeid, *mark.args, **mark.kwargs)
    record.measured = dict(value for name, value in item.user_properties if name == "measured")
    if report.passed:
        record.write()
    else:
        record.path().unlink(missing_ok=True)

"""What a config means for layout and memory, and whether it can be: asked by `plan` and by `submit`. No torch is imported."""

from __future__ import annotations

from typing import Optional

from data.errors import InputError
from parallel.layout import Layout
from parallel.layout_rules import Case, Change, in_words
from parallel.legality import judge
from parallel.shape import ModelShape
from pretrain.config import Config, ObjectiveConfig
from pretrain.memory import GIB, Memory, cure, memory_per_gpu

NOTHING_FITS = "no smaller microbatch, recomputation or tensor parallelism up to 8 is enough: use more GPUs"
_INTERVALS = 1000  # of the midpoint rule over noise levels


def case_of(config: Config, world: int) -> Case:
    """What layout and memory depend on, for `world` ranks."""
    model = ModelShape(**{name: getattr(config.model, name) for name in ModelShape.__dataclass_fields__})
    values = {name: getattr(config.parallel, name) for name in Layout.__dataclass_fields__}
    layout = Layout(**values | {"layers_per_stage": tuple(config.parallel.layers_per_stage)})
    return Case(
        model,
        world,
        layout,
        config.train.global_batch_size,
        config.train.micro_batch_size,
        config.data.sequence_length * copies(config.objective),
        config.train.precision == "bf16",
        config.train.compile,
    )


def copies(objective: ObjectiveConfig) -> int:
    """Columns that the model computes for a token of text: with `block` a noisy and a clean copy stand side by side."""
    return 2 if objective.kind == "block" else 1


def tokens_seen(config: Config) -> float:
    """Tokens that a token attends to, in the mean over columns; documents that are kept apart count as one (an upper bound)."""
    length = config.data.sequence_length
    return (length + config.objective.block_size) / 2 if config.objective.kind == "block" else float(length)


def masked_fraction(objective: ObjectiveConfig) -> float:
    """Expected share of a step's text tokens whose logits are computed: those that count in the loss."""
    if objective.kind not in ("masked", "block", "bert"):
        return 1.0
    from data.noise import Schedule  # numpy: `submit` does without

    low, high = objective.mask_ratio or ((0.15, 0.99) if objective.kind == "bert" else (0.0, 1.0))
    schedule = Schedule(objective.schedule, objective.power, low, high)
    return sum(schedule.probability((i + 0.5) / _INTERVALS) for i in range(_INTERVALS)) / _INTERVALS


def check_layout(case: Case) -> None:
    """InputError with the nearest layout that works."""
    if problem := judge(case):
        raise InputError(f"layout: {problem.reason}; nearest that works: {problem.alternative}")


def change_in_words(change: Change) -> str:
    """As a command line takes it: "parallel.tensor=2, train.micro_batch_size=1"."""
    return ", ".join(f"{key}={in_words(value)}" for key, value in change.items())


def cure_in_words(case: Case, limit_bytes: float) -> str:
    """The mildest change after which `case` fits, or that there is none."""
    change: Optional[Change] = cure(case, limit_bytes)
    if change:
        return f"this fits: {change_in_words(change)}"
    return NOTHING_FITS


def check_memory(case: Case, gpu_memory_gib: float) -> Memory:
    """The estimate; InputError if it does not fit, with the mildest change after which it would."""
    memory = memory_per_gpu(case)
    if memory.total > gpu_memory_gib * GIB:
        raise InputError(
            f"memory: about {memory.sentence()} a GPU, --gpu-memory is {gpu_memory_gib:g} GiB; "
            f"{cure_in_words(case, gpu_memory_gib * GIB)} (--gpu-memory 0 checks nothing)"
        )
    return memory

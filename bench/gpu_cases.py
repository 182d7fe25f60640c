"""What the GPU benchmark measures: its tasks, the rows of their tables, the sizes. Plain data, no torch.

Every row is known before anything runs, so that a row which could not be measured is printed with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

from bench.tables import Table

GOAL_BLOCK_MFU = 0.50
NOMINAL_MATMUL = 790e12  # FLOP/s that a dense bf16 matmul of random data reaches on an H200: the loss's nominal floor
BACKENDS = ("default", "cudnn", "flash")


@dataclass(frozen=True)
class Sizes:
    """Shapes and repeats. block, small: fields of ModelShape; step: the same, or empty for configs/llada_1b.yaml."""

    device: str
    compiler: str  # backend of torch.compile
    repeats: int
    matmul: int  # rows of the square matmul that gives the ceiling
    block: dict[str, int]
    sequence: int
    batches: tuple[int, ...]
    loss: dict[str, Any]  # tokens, hidden, vocab, masked_fraction
    chunk_rows: tuple[int, ...]
    small: dict[str, Any]
    small_tokens: int
    step: dict[str, int]
    step_sequence: int
    micro_batches: tuple[int, ...]


FULL = Sizes(
    device="cuda", compiler="inductor", repeats=10, matmul=8192,
    block={"num_layers": 4, "hidden_size": 4096, "num_heads": 32, "num_kv_heads": 32, "ffn_hidden_size": 12288,
           "vocab_size": 128},
    sequence=4096, batches=(1, 2, 4),
    loss={"tokens": 16384, "hidden": 4096, "vocab": 126464, "masked_fraction": 0.5}, chunk_rows=(1024, 2048, 4096),
    small={"num_layers": 2, "hidden_size": 256, "num_heads": 4, "num_kv_heads": 2, "ffn_hidden_size": 512,
           "vocab_size": 1000, "init_std": 0.08},
    small_tokens=256, step={}, step_sequence=4096, micro_batches=(2, 4, 8, 16),
)  # fmt: skip

SMOKE = Sizes(
    device="cpu", compiler="eager", repeats=3, matmul=128,
    block={"num_layers": 2, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 4, "ffn_hidden_size": 96,
           "vocab_size": 128},
    sequence=64, batches=(1,),
    loss={"tokens": 128, "hidden": 64, "vocab": 1024, "masked_fraction": 0.5}, chunk_rows=(64,),
    small={"num_layers": 2, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "ffn_hidden_size": 96,
           "vocab_size": 200, "init_std": 0.15},
    small_tokens=48,
    step={"num_layers": 2, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "ffn_hidden_size": 96,
          "vocab_size": 256},
    step_sequence=64, micro_batches=(1, 2),
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """One child process. share: its part of the time budget, in seconds of a budget of 480."""

    name: str
    share: float

    @property
    def part(self) -> str:
        return self.name.partition(".")[0]


# In this order. The eager step on the engine also searches the micro batch that the compiled ones then use.
TASKS = (
    Task("a", 110), Task("b", 50), Task("d", 50),
    Task("c.deepspeed.eager", 50), Task("c.fsdp2.eager", 40), Task("c.plain.eager", 40),
    Task("c.deepspeed.compiled", 55), Task("c.fsdp2.compiled", 45), Task("c.plain.compiled", 40),
)  # fmt: skip


@dataclass(frozen=True)
class BlockCase:
    batch: int
    compiled: bool
    backend: str

    @property
    def label(self) -> str:
        return f"batch {self.batch}, {'compiled' if self.compiled else 'eager'}, attention {self.backend}"


def block_cases(sizes: Sizes) -> list[BlockCase]:
    """What is used first, then the quick eager ones, then the compilations that may find no time any more."""
    *smaller, largest = sizes.batches
    cases = [BlockCase(largest, True, "default")]
    cases += [BlockCase(batch, False, backend) for batch in sizes.batches for backend in BACKENDS]
    cases += [BlockCase(largest, True, backend) for backend in BACKENDS[1:]]
    return cases + [BlockCase(batch, True, "default") for batch in smaller]


@dataclass(frozen=True)
class CorrectCase:
    precision: str
    backend: str
    compiled: bool = False
    documents: bool = False

    @property
    def label(self) -> str:
        text = f"{self.precision}, attention {self.backend}, {'compiled' if self.compiled else 'eager'}"
        return text + (", two documents" if self.documents else "")


def correct_cases() -> list[CorrectCase]:
    cases = [CorrectCase("float32", "default"), CorrectCase("float32", "default", documents=True)]
    cases += [CorrectCase("bfloat16", backend) for backend in BACKENDS]
    cases.append(CorrectCase("bfloat16", "default", compiled=True))
    return [*cases, CorrectCase("bfloat16", "default", documents=True)]


def micro_label(micro: Optional[int]) -> str:
    return "micro batch: the chosen one" if micro is None else f"micro batch {micro}"


def sight_label(backend: str, documents: bool) -> str:
    return f"{'two documents' if documents else 'one document'}, attention {backend}"


def plan(task: Task, sizes: Sizes) -> list[Table]:
    """The tables of a task, all rows planned and none run."""
    return {"a": _plan_blocks, "b": _plan_loss, "d": _plan_correct, "c": _plan_step}[task.part](task, sizes)


def _plan_blocks(task: Task, sizes: Sizes) -> list[Table]:
    s, n = sizes.block, sizes.matmul
    ceiling = Table.planned(
        "ceiling", "(a) ceiling: one dense matmul of random data, bfloat16", ("ms", "TFLOP/s"), [f"{n} x {n} x {n}"]
    )
    blocks = Table.planned(
        "block",
        f"(a) transformer blocks: {s['num_layers']} blocks, hidden {s['hidden_size']}, {s['num_heads']} heads, "
        f"ffn {s['ffn_hidden_size']}, sequence {sizes.sequence}, bfloat16",
        ("forward ms", "backward ms", "both ms", "TFLOP/s", "MFU", "goal", "peak GiB", "kernel", "first call s",
         "graphs", "breaks"),
        [case.label for case in block_cases(sizes)],
        "FLOPs a token and block: 6 x matmul parameters + 12 x hidden x sequence (full attention); forward is a third.",
        f"goal: MFU >= {GOAL_BLOCK_MFU:.0%} of the dense bfloat16 peak. kernel: the attention op that ran.",
    )  # fmt: skip
    return [ceiling, blocks]


def _plan_loss(task: Task, sizes: Sizes) -> list[Table]:
    x = sizes.loss
    rivals = ["floor: 3 matmuls of the masked rows", "naive full logits", "masked rows only"]
    return [Table.planned(
        "loss",
        f"(b) diffusion loss: {x['tokens']} tokens, masked fraction {x['masked_fraction']}, hidden {x['hidden']}, "
        f"vocab {x['vocab']}, bfloat16, forward and backward",
        ("ms", "x floor", "x nominal floor", "TFLOP/s", "extra MiB", "loss"),
        [*rivals, "torch linear_cross_entropy, masked rows", *(f"ours, chunks of {rows}" for rows in sizes.chunk_rows)],
        f"nominal floor: the floor's FLOPs at {NOMINAL_MATMUL / 1e12:.0f} TFLOP/s. TFLOP/s counts the floor's FLOPs, "
        "whatever a row computed. extra MiB: peak above the inputs, the two gradients included.",
    )]  # fmt: skip


def _plan_correct(task: Task, sizes: Sizes) -> list[Table]:
    s = sizes.small
    errors = Table.planned(
        "correct",
        f"(d) loss and gradients against the float64 reference: {s['num_layers']} layers, hidden {s['hidden_size']}, "
        f"vocab {s['vocab_size']}, 2 x {sizes.small_tokens} tokens",
        ("loss", "all gradients", "worst gradient", "worst parameter", "expected", "met"),
        [case.label for case in correct_cases()],
        "relative errors: |loss - ref| / |ref|; |g - ref| / |ref| (L2) over all parameters, and of the worst one.",
        "The reference computes in float64 on the same bfloat16-rounded weights.",
    )
    sight = Table.planned(
        "sight",
        "(d) who sees whom, bfloat16: largest change of the logits of the first half when the last token changes",
        ("change", "expected", "met"), [sight_label(b, False) for b in BACKENDS] + [sight_label("default", True)],
    )  # fmt: skip
    return [errors, sight]


def _plan_step(task: Task, sizes: Sizes) -> list[Table]:
    _, engine, mode = task.name.split(".")
    trainer = {
        "deepspeed": "DeepSpeed engine, ZeRO stage 3 on 1 device",
        "fsdp2": "FSDP2 engine on 1 device",
        "plain": "yardstick: bf16 model, fp32 masters, torch fused AdamW",
    }[engine]
    model = "the model of configs/llada_1b.yaml"
    if sizes.step:
        model = f"{sizes.step['num_layers']} layers of {sizes.step['hidden_size']}"
    return [Table.planned(
        f"step.{engine}.{mode}",
        f"(c) whole training step, {trainer}, {mode}: {model}, sequence {sizes.step_sequence}, bfloat16",
        ("micro", "step ms", "tokens/s", "MFU", "masked", "peak GiB", "loss", "first step s", "graphs", "breaks"),
        [micro_label(m) for m in (sizes.micro_batches if mode == "eager" else (None,))],
        "step: copy of the batch to the device, forward, backward, clipping, AdamW; no loader. Accumulation 1. "
        "loss: first -> last step, on random tokens. MFU counts the head for the masked tokens alone.",
    )]  # fmt: skip

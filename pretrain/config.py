"""The typed configuration: one dataclass per section, filled from YAML plus dotted overrides (`--section.key value`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Optional, Union


@dataclass
class RunConfig:
    """Where the run lives.

    Args:
        dir: folder that holds all runs.
        name: folder of this run inside it; `train` on an existing one resumes it.
        seed: the only seed: parameters, noise levels, masks and shuffles all follow from it.
    """

    dir: str = "runs"
    name: str = "run"
    seed: int = 0


@dataclass
class ModelConfig:
    """Sizes of the bidirectional transformer.

    Args:
        num_layers: transformer blocks.
        hidden_size: width of the residual stream.
        num_heads: attention heads.
        num_kv_heads: key/value heads; fewer than num_heads is grouped-query attention.
        ffn_hidden_size: inner width of the SwiGLU feed-forward layer.
        vocab_size: token ids the model knows, the mask token included.
        rope_theta: base of the rotary position frequencies.
        norm_eps: added inside RMSNorm's root.
        tie_embeddings: use the embedding as output head as well.
        norm_impl: `torch`, or `apex` (NVIDIA's fused RMSNorm, built from source).
        init_std: standard deviation of the initial weights; output projections divide it by sqrt(2 num_layers).
    """

    num_layers: int = 4
    hidden_size: int = 256
    num_heads: int = 4
    num_kv_heads: int = 4
    ffn_hidden_size: int = 704
    vocab_size: int = 8192
    rope_theta: float = 500000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    norm_impl: Literal["torch", "apex"] = "torch"
    init_std: float = 0.02


@dataclass
class SourceConfig:
    """One source of a mixture.

    Args:
        path: folder or address of a shard set.
        weight: its share of the samples, relative to the others'; none for all sources: each counts by its tokens.
        epochs: how often it is read at most (fractions too); the others then share the rest. None: without end.
        name: in metrics, and what its order follows from; by default the folder's (for NAME/train, NAME).
    """

    path: str
    weight: Optional[float] = None
    epochs: Optional[float] = None
    name: str = ""


@dataclass
class DataConfig:
    """What the model reads.

    Args:
        shards: folder or address of the training set (manifest.json, tars), made by `prepare`; or a list of sources, each with
            `path` and perhaps `weight`, `epochs`, `name`.
        val_shards: folder or address of the validation set.
        sequence_length: tokens in a block.
        shuffle_window: tokens shuffled among each other (0: the whole set); small for network and remote storage.
        packing: `concat`: documents end to end, cut into blocks (LLaDA); `isolate`: the same blocks, whose documents do not see
            each other and begin at position 0.
        pad_policy: `excluded`: padding carries no loss and is never attended to; `eos_in_loss`: what a row of whole documents
            has left is text like any other (LLaDA's SFT: the model learns to end).
        random_length_prob: chance that a sample is cut to a uniform random length (LLaDA: 0.01).
        cfg_dropout: chance that a sample's condition is hidden; 0 = off, the objective is unchanged.
        cfg_condition: what the condition is: `prefix`, a random clean prefix of each block; `spans`, the prompts and
            conditions in the shards.
        workers: loader processes per rank; 0 reads in the training process. The stream does not depend on it.
        verify: check at the start: `full` (sha256 of every shard), `size`, or `auto` (full below 2 GiB).
        max_bad_shards: shards that may be missing or damaged; their samples count for nothing, alike on all ranks.
        reset_stream: begin a new stream where a resumed run has another seed, batch, length or data; else that is refused.
        cache_dir: where remote shards are kept.
        cache_gib: most space they take there.
    """

    shards: Union[str, list[dict[str, Union[str, float, None]]]] = ""
    val_shards: str = ""
    sequence_length: int = 256
    shuffle_window: int = 0
    packing: Literal["concat", "isolate"] = "concat"
    pad_policy: Literal["excluded", "eos_in_loss"] = "excluded"
    random_length_prob: float = 0.01
    cfg_dropout: float = 0.0
    cfg_condition: Optional[Literal["prefix", "spans"]] = None
    workers: int = 0
    verify: Literal["auto", "full", "size"] = "auto"
    max_bad_shards: int = 0
    reset_stream: bool = False
    cache_dir: str = "~/.cache/palimpsest/shards"
    cache_gib: float = 64.0


@dataclass
class ObjectiveConfig:
    """What is corrupted, and what the loss is (docs/objectives.md has the formulas).

    Args:
        kind: `masked`: tokens replaced by [MASK], predicted all at once (LLaDA, MDLM); `block`: block after block, masked
            diffusion inside each (BD3-LM); `bert`: masked with a variable rate and plain cross-entropy; `uniform`: tokens
            replaced by random ones; `flow`: Gaussian noise on one-hot vectors, seen through argmax; `autoregressive`.
        schedule: of the noise: `linear`, `cosine`, or `polynomial` (alpha = 1 - t^power).
        power: of `polynomial`.
        mask_ratio: [low, high] of the mask probability; null: [0, 1], for `bert` [0.15, 0.99]. Less than [0, 1] is no bound.
        eps: smallest mask probability of `bernoulli`; `uniform` and `flow` keep it from both ends.
        t_sampling: noise levels `stratified` over the global batch, or `iid`.
        noise_unit: what has a noise level of its own: each `sequence`, or each `document` (data.packing isolate).
        masking: `bernoulli`, or `fixed_count` (exactly l tokens; linear: l uniform, weight eligible / l).
        weighting: weight tokens by the schedule. Off (always, for `bert`): plain cross-entropy, not a likelihood bound.
        normalizer: what the summed loss is divided by, of the global batch: `tokens`, all loss-eligible ones; `masked`, those
            that count in the loss; `answers`, each document's loss by its own length, then by their number (LLaDA's SFT);
            null: tokens, for `bert` masked.
        block_size: tokens of a block (`block`); divides data.sequence_length.
        shift: predict token i from position i - 1, for weights that come from an autoregressive model.
        anneal_attention: steps over which attention grows from causal to full (0 = full from the start).
        smoothing: label smoothing of `flow`'s symmetric KL.
        temperature: of `flow`'s soft inputs, first and last.
        temperature_steps: steps over which it falls.
        candidates: ids that `flow`'s soft inputs mix beside the clean one.
    """

    kind: Literal["masked", "block", "bert", "uniform", "flow", "autoregressive"] = "masked"
    schedule: Literal["linear", "cosine", "polynomial"] = "linear"
    power: float = 2.0
    mask_ratio: Optional[tuple[float, float]] = None
    eps: float = 1e-3
    t_sampling: Literal["stratified", "iid"] = "stratified"
    noise_unit: Literal["sequence", "document"] = "sequence"
    masking: Literal["bernoulli", "fixed_count"] = "bernoulli"
    weighting: bool = True
    normalizer: Optional[Literal["tokens", "masked", "answers"]] = None
    block_size: int = 0
    shift: bool = False
    anneal_attention: int = 0
    smoothing: float = 0.01
    temperature: tuple[float, float] = (1e-3, 1e-8)
    temperature_steps: int = 500_000
    candidates: int = 7


@dataclass
class TrainConfig:
    """The loop.

    Args:
        steps: optimizer steps of the whole run; the learning-rate schedule follows it.
        stop_at: checkpoint and stop after this step (0 = never); the schedules still follow `steps`.
        init_from: checkpoint whose weights (and nothing else) a new run starts from.
        compile: torch.compile each transformer block.
        global_batch_size: samples in one optimizer step, over all ranks.
        micro_batch_size: samples a rank computes at once; the rest is gradient accumulation.
        precision: `fp32`, or `bf16` with fp32 master weights and fp32 gradient accumulation.
        grad_clip: largest global gradient norm (0 = no clipping).
        checkpoint_every: steps between checkpoints (0 = only at the end).
        async_checkpoint: write checkpoints behind training, from one host copy of each rank's shard.
        keep_checkpoints: newest complete checkpoints kept.
        validate_every: steps between validations (0 = never).
        val_samples: most validation blocks used, from the start of the set (0 = all).
        sample_every: steps between logged samples (0 = never).
        log_every: steps between console lines.
        max_skipped: non-finite steps in a row before the run rolls back (health.max_rollbacks says how often).
    """

    steps: int = 1000
    stop_at: int = 0
    init_from: Optional[str] = None
    compile: bool = False
    global_batch_size: int = 32
    micro_batch_size: int = 8
    precision: Literal["fp32", "bf16"] = "fp32"
    grad_clip: float = 1.0
    checkpoint_every: int = 500
    async_checkpoint: bool = False
    keep_checkpoints: int = 2
    validate_every: int = 200
    val_samples: int = 256
    sample_every: int = 0
    log_every: int = 10
    max_skipped: int = 10


@dataclass
class OptimizerConfig:
    """AdamW and its learning rate.

    Args:
        impl: `torch`, or `apex` (NVIDIA's FusedAdam, built from source).
        lr: peak learning rate.
        min_lr: where `wsd` and `cosine` end.
        betas: Adam's decay rates.
        eps: Adam's denominator offset.
        weight_decay: decoupled decay of matrices; norm gains are not decayed.
        schedule: `constant`, `wsd` (warm-up, stable, linear decay), `cosine`, or `stages`.
        warmup_steps: linear warm-up from 0.
        decay_steps: length of wsd's last phase.
        stages: for `stages`: [until_step, lr, constant|linear] each; `linear` runs there from the rate before.
    """

    impl: Literal["torch", "apex"] = "torch"
    lr: float = 4e-4
    min_lr: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    schedule: Literal["constant", "wsd", "cosine", "stages"] = "wsd"
    warmup_steps: int = 100
    decay_steps: int = 100
    stages: list[tuple[int, float, Literal["constant", "linear"]]] = field(default_factory=list)


@dataclass
class ParallelConfig:
    """How the model is spread; the data-parallel size is what the world leaves.

    Args:
        engine: `deepspeed` (ZeRO 0 to 3), or `fsdp2` (torch-native ZeRO-3, every schedule).
        zero_stage: what is sharded over data-parallel ranks: 0 nothing, 1 optimizer states, 2 gradients too, 3 parameters too.
        shard_group: data-parallel ranks that share one set of shards, replicated over such groups (0 = all ranks).
        tensor: tensor-parallel ranks (neighbouring ranks; keep them inside one node).
        pipeline: pipeline stages, each a run of consecutive layers on its own ranks.
        layers_per_stage: layers of each stage in order (two stages a rank if interleaved or zbv); empty = even.
        schedule: order of microbatches in the pipeline; `interleaved_zb` and `zbv` (zero-bubble) need engine fsdp2.
        sequence_parallel: keep a share of the tokens on each tensor-parallel rank between tensor-parallel regions.
        activation_checkpointing: `full` recomputes each block in the backward pass, `selective` all of it but attention,
            `none` keeps everything.
        timeout_seconds: longest wait of any collective.
    """

    engine: Literal["deepspeed", "fsdp2"] = "deepspeed"
    zero_stage: Literal[0, 1, 2, 3] = 3
    shard_group: int = 0
    tensor: int = 1
    pipeline: int = 1
    layers_per_stage: list[int] = field(default_factory=list)
    schedule: Literal["gpipe", "1f1b", "interleaved", "interleaved_zb", "zbv"] = "1f1b"
    sequence_parallel: bool = False
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    timeout_seconds: int = 600


@dataclass
class TrackingConfig:
    """MLflow.

    Args:
        uri: tracking store; empty = `sqlite:///` in run.dir; `none` = only metrics.jsonl.
        experiment: MLflow experiment name.
        system_every: seconds between system metrics (processor, memory, disk, network, GPUs) of each host; 0 = none.
        artifacts: also keep the config, the code version and logged samples in the store.
    """

    uri: str = ""
    experiment: str = "palimpsest"
    system_every: float = 30.0
    artifacts: bool = True


@dataclass
class HealthConfig:
    """Weeks on a cluster: signals, hangs, numerical trouble, corrupted memory, restarts.

    Args:
        preempt_signal: beside SIGTERM: checkpoint, leave with exit code 75 and be requeued (slurm/pretrain.sbatch).
        stall_seconds: a rank that makes no progress in a step for so long is a fault (`watch`); six times that while a run
            starts, validates or saves.
        beat_seconds: between what a rank publishes of itself in RUN/health.
        spike_sigma: a loss whose logarithm is so many deviations above its recent ones is a spike (0 = never).
        spike_window: steps whose losses it is compared with.
        spike_patience: spikes within as many steps twice over that make a run roll back to its last good checkpoint.
        max_rollbacks: roll-backs without a new checkpoint between them, after which the run ends.
        check_every: steps between comparisons of parameters over ranks, and of each rank's own before and after (0 = never). Every
            checkpoint is preceded by one.
        max_restarts: faults within a day after which a run is not started again (`restart`).
        restart_backoff_seconds: pause before the second restart without progress in between; doubles each time, up to 15 minutes.
    """

    preempt_signal: Literal["USR1", "HUP", "URG"] = "USR1"
    stall_seconds: float = 300.0
    beat_seconds: float = 10.0
    spike_sigma: float = 8.0
    spike_window: int = 200
    spike_patience: int = 5
    max_rollbacks: int = 3
    check_every: int = 1000
    max_restarts: int = 8
    restart_backoff_seconds: float = 60.0


@dataclass
class Config:
    """Everything a run depends on."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    health: HealthConfig = field(default_factory=HealthConfig)

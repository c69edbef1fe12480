"""Every setting of a run, as frozen dataclasses. One YAML file fills them; nothing else does.

A field's default lives here or in method_config.py and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_kvpo import settings
from megatron_kvpo.method_config import (
    AdvantageConfig,
    CodecConfig,
    EnergyConfig,
    LossConfig,
    MemoryConfig,
    ModelConfig,
    RoutingConfig,
    StreamConfig,
    check_positive,
)
from megatron_kvpo.reward_config import RewardConfig

__all__ = [
    "AdvantageConfig", "AlarmsConfig", "CheckpointConfig", "CodecConfig", "DataConfig",
    "EnergyConfig", "EvaluationConfig", "HeartbeatConfig", "LogConfig", "LossConfig",
    "MemoryConfig", "ModelConfig", "OptimizerConfig", "ParallelConfig", "PolicyConfig",
    "RewardConfig", "RoutingConfig", "RunConfig", "StreamConfig", "load_config",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How the ranks are divided. The data axis is what remains."""

    tensor: int = 1
    """Ranks that share each linear layer and the heads."""

    sequence_parallel: bool = False
    """Share tokens between linear layers over the tensor ranks."""

    context: int = 1
    """Ranks that share a pass's tokens, heads during attention (Ulysses)."""

    branch: int = 1
    """Ranks that share the branches of a group."""

    timeout_s: int = 600
    """A collective that waits longer ends the run."""

    memory_gib: float | None = None
    """What a rank may take of its GPU's memory; None is all."""

    deterministic: bool = False
    """Only kernels that sum in one order, slower ones on a GPU: a run that is repeated or resumed
    has the same bits. On CPU ranks it has without."""

    def __post_init__(self) -> None:
        check_positive("parallel", tensor=self.tensor, context=self.context, branch=self.branch,
                  timeout_s=self.timeout_s)  # fmt: skip
        if self.memory_gib is not None:
            check_positive("parallel", memory_gib=self.memory_gib)
        if self.sequence_parallel and self.tensor == 1:
            raise ValueError("parallel.sequence_parallel shares tokens over the tensor ranks: "
                             "set parallel.tensor above 1")  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW in float32."""

    lr: float = 1e-5
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    warmup_updates: int = 5
    decay: Literal["none", "linear"] = "none"
    """After the warm-up: keep the rate, or let it fall in a line to 0 at num_updates."""

    grad_clip: float = 1.0
    ema_decay: float = 0.999
    distributed: bool = False
    """Share AdamW's moments over the ranks that hold replicas (megatron-core's distributed
    optimizer): each keeps 1/n of them."""

    bucket_mib: float = 128.0
    """Gradients are averaged in pieces of about so much, each as soon as it is complete."""

    def __post_init__(self) -> None:
        if self.bucket_mib <= 0:
            raise ValueError(f"optimizer.bucket_mib {self.bucket_mib} must be positive")
        if self.lr < 0 or not 0 <= self.ema_decay < 1 or self.warmup_updates < 0:
            raise ValueError(
                f"optimizer.lr {self.lr} and optimizer.warmup_updates {self.warmup_updates} must "
                f"not be negative, optimizer.ema_decay {self.ema_decay} must lie in [0, 1)"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyConfig:
    """Which weights train and how the sampling policy follows them."""

    mode: Literal["lora", "full"] = "lora"
    lora_rank: int = 256
    lora_alpha: float = 256.0
    adapter: Path | None = None
    """Adapter to continue: a PEFT folder, a lora.pt, a LoRA file or a run's checkpoint. It is the
    reference too. None starts at the base."""

    merge: bool = False
    """Rollouts, replays and evaluations have the acting adapter in a copy of the weights, dithered
    to their type: faster, and less exact; docs/numerics.md. The gradient's pass has it beside."""

    rollouts_per_policy_sync: int = 2
    """Updates between copies of the current policy into the one that samples."""

    groups_per_update: int = 1
    """Prompts per optimizer step, over all data ranks."""

    max_rows: int = 96
    """Sequences of one evaluation or backward pass; more are sent in turns."""

    rollout_rows: int | None = None
    """Sequences of a group that roll out, and are replayed, at once; more go in turns, which takes
    fewer pages. None is all of them."""

    def __post_init__(self) -> None:
        if self.adapter is not None and self.mode == "full":
            raise ValueError(
                f"policy.adapter is {self.adapter} and policy.mode full: merge it first "
                "(tools/convert_checkpoint.py export --to merged) or train with policy.mode lora"
            )
        if self.merge and self.mode == "full":
            raise ValueError("policy.merge merges adapters: set policy.mode lora, or leave it out")
        check_positive("policy", lora_rank=self.lora_rank, groups_per_update=self.groups_per_update,
                  rollouts_per_policy_sync=self.rollouts_per_policy_sync,
                  max_rows=self.max_rows,
                  rollout_rows=1 if self.rollout_rows is None else self.rollout_rows)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Prompts of the run."""

    prompts: Path = Path("prompts.jsonl")
    """One JSON object a line: {"segments": [...], "switch_frames": [...]}; `video` and
    `video_frames` continue a video (docs/continuation.md)."""

    video_fps: float | None = None
    """Pixel frames a second at which videos that are continued are taken, by timestamps: those that
    the generator was trained at. None takes a file's as they stand."""

    embeddings: Path | None = None
    """What tools.encode_prompts made of the prompts, those of the evaluation too. None is the word
    encoder of the shapes world."""

    def __post_init__(self) -> None:
        if self.video_fps is not None:
            check_positive("data", video_fps=self.video_fps)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """Held-out videos, the same noises at every evaluation."""

    prompts: Path | None = None
    noises_per_prompt: int = 8
    every: int = 0
    """Updates between evaluations on the way; 0 evaluates before and after only."""

    seed: int = 1_000_003
    adapter: Literal["ema", "current"] = "ema"
    filmstrips: int = 6
    """Prompts shown in the report."""

    def __post_init__(self) -> None:
        check_positive("evaluation", noises_per_prompt=self.noises_per_prompt,
                       filmstrips=self.filmstrips)  # fmt: skip
        if self.every < 0:
            raise ValueError(f"evaluation.every is {self.every}: use 0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Saving and resuming."""

    every: int = 100
    """Updates between checkpoints; one is written at the end too. 0 writes none."""

    keep: int = 2
    resume: bool | Literal["auto", "never", "must"] = True
    """`true` or `auto`: continue from the newest sound checkpoint in the run's folder, if there is
    one. `must`: there has to be one. `false` or `never`: start anew."""

    background: bool = False
    """Copy tensors to the host and write them while the run goes on: the same files, at the cost of
    a rank's share of a checkpoint in host memory."""

    tolerated_failures: int = 1
    """Saves in a row that may fail with a warning. One more ends the run, as does a failure of its
    last save."""

    def __post_init__(self) -> None:
        check_positive("checkpoint", keep=self.keep)
        counts = {"every": self.every, "tolerated_failures": self.tolerated_failures}
        for name, value in counts.items():
            if value < 0:
                raise ValueError(f"checkpoint.{name} is {value}: use 0 or more")
        if self.resume in ("auto", "never"):  # so that `if resume` means what it says
            object.__setattr__(self, "resume", self.resume == "auto")


@dataclass(frozen=True, kw_only=True, slots=True)
class HeartbeatConfig:
    """Finding and naming a rank that hangs."""

    every_s: float = 5.0
    limit_s: float = 1800.0
    """Without a sign of progress for so long, every rank leaves its stacks in the run's folder and
    the run ends with code 75. Several ranks wait no longer than 0.95 parallel.timeout_s, when
    collectives are about to give up. 0 watches nothing."""

    def __post_init__(self) -> None:
        check_positive("heartbeat", every_s=self.every_s)
        if self.limit_s and self.limit_s < 2 * self.every_s:
            raise ValueError(
                f"heartbeat.limit_s {self.limit_s:g} is below two beats of heartbeat.every_s "
                f"{self.every_s:g}: raise the one, lower the other, or set limit_s to 0"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    """Where a run reports to. A JSONL is always written."""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """`auto`: online when logged in, else offline."""

    project: str = "megatron-kvpo"
    group: str | None = None
    """Of wandb: runs that are shown together, as the seeds of one recipe."""

    tags: tuple[str, ...] = ()
    tensorboard: bool = False
    """Write events for TensorBoard into the run's folder. Wants the package tensorboard."""

    costs: bool = True
    """Seconds, tokens, operations and memory of the stages in every line."""

    peak_tflops: float | None = None
    """What MFU is measured against: a GPU's dense bfloat16 TFLOP/s. None: by its name, where that
    is known; on others there is no MFU."""

    samples_every: int = 100
    """Updates between videos of a group's anchor, best and worst branch, with a table of all
    groups' scores and energies in wandb and TensorBoard. 0: none."""

    report: bool = True

    def __post_init__(self) -> None:
        if self.peak_tflops is not None:
            check_positive("log", peak_tflops=self.peak_tflops)
        if self.samples_every < 0:
            raise ValueError(f"log.samples_every is {self.samples_every}: use 0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class AlarmsConfig:
    """What must hold at every start. A failed alarm stops the run and says which."""

    enabled: bool = True
    energy_tolerance: float = 1e-9
    """Largest anchor energy under the weights that sampled it."""

    ratio_tolerance: float = 1e-5
    """Largest |ratio - 1| before the first update, times temperature."""

    dump: bool = True
    """Before an alarm, or energies and advantages that are not finite, end the run, write the
    update's groups and weights for tools.replay_group."""

    dump_updates: tuple[int, ...] = ()
    """Updates, counted from 0, that are written in any case."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """The root. Sections are named after what reads them."""

    name: str = "run"
    folder: Path = Path("runs")
    num_updates: int = 1500
    seed: int = 42
    device: Literal["auto", "cpu", "cuda"] = "auto"
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    codec: CodecConfig = field(default_factory=CodecConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    energy: EnergyConfig = field(default_factory=EnergyConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    heartbeat: HeartbeatConfig = field(default_factory=HeartbeatConfig)
    log: LogConfig = field(default_factory=LogConfig)
    alarms: AlarmsConfig = field(default_factory=AlarmsConfig)

    def __post_init__(self) -> None:
        check_positive("run", num_updates=self.num_updates)
        if self.model.dtype != "float32" and self.policy.mode == "full":
            raise ValueError(
                f"model.dtype is {self.model.dtype} and policy.mode full: weights that train are "
                "float32. Train an adapter (policy.mode lora) or set model.dtype to float32"
            )
        if self.model.fp8 and self.policy.mode == "full":
            raise ValueError(
                f"model.fp8 is {list(self.model.fp8)} and policy.mode full: products in 8 bits "
                "need a frozen base. Train an adapter (policy.mode lora), or leave model.fp8 out"
            )
        service = self.reward.service
        if (service.urls or service.spawn) and service.patience_s >= self.parallel.timeout_s:
            raise ValueError(
                f"reward.service.patience_s {service.patience_s:g} is not below parallel.timeout_s "
                f"{self.parallel.timeout_s}: ranks that wait for other ranks' scores would give up "
                "first; raise the one or lower the other"
            )
        if self.energy.grad_steps > len(self.stream.steps):
            raise ValueError(
                f"energy.grad_steps {self.energy.grad_steps} exceeds the "
                f"{len(self.stream.steps)} denoising steps"
            )
        if self.stream.num_frames > self.model.max_frames:
            raise ValueError(
                f"stream.num_frames {self.stream.num_frames} exceeds model.max_frames "
                f"{self.model.max_frames}"
            )

    @property
    def run_folder(self) -> Path:
        """Where this run writes."""
        return self.folder / self.name


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a recipe and dotted overrides. ValueError names the setting and the remedy."""
    return settings.load(RunConfig, path, overrides)

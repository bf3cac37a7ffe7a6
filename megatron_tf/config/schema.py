"""The configuration of a run: frozen dataclasses that check themselves; names follow Megatron-LM's flags."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from megatron_tf.config.growth import GrowthStage, grown_model
from megatron_tf.config.model import ModelConfig
from megatron_tf.config.types import STRICT, Count, NonNegative, ParameterKind


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ParallelConfig:
    """How the model is spread over ranks."""

    tensor_model_parallel_size: Count = 1
    """Ranks that share each layer's parameter tokens."""
    pipeline_model_parallel_size: Count = 1
    """Stages the layers are cut into."""
    data_parallel_size: Count | None = None
    """Replicas that share a batch; by default what is left of the world size."""
    data_parallel_shard_size: Count | None = None
    """Replicas that share one copy of parameters, gradients and Adam's moments, each holding a part: all of them by
    default; 1 for a whole copy on each; between, groups of replicas with a copy each."""
    sequence_parallel: bool = False
    """Shard activations between layers on the sequence over the tensor-parallel ranks."""
    pipeline_schedule: Literal["1f1b", "gpipe"] = "1f1b"
    """Order of forward and backward micro-batches over the stages."""
    distributed_timeout_seconds: Count = 600
    """How long a rank waits for another before it gives up with an error."""

    def __post_init__(self) -> None:
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ValueError("sequence_parallel needs tensor_model_parallel_size > 1; set it to false")


@dataclass(frozen=True, config=STRICT, kw_only=True)
class DataConfig:
    """The tokens to train on."""

    data_path: Annotated[list[str], Field(min_length=1)]
    """Prefixes of .bin/.idx pairs; or pairs "WEIGHT PREFIX" to blend several by weight."""
    valid_data_path: Annotated[list[str], Field(min_length=1)] | None = None
    """Data sets for validation, whole, in place of a share of data_path."""
    tokenizer_type: str
    """HFTokenizer, SentencePieceTokenizer, TikTokenizer or NullTokenizer."""
    tokenizer_model: Path | None = None
    """The tokenizer's file; its hash must be the one the data was made with."""
    eod_token: str | None = None
    """The token that ends a document; by default the one that the tokenizer's files name."""
    split: str = "969,30,1"
    """Shares of the documents for training, validation and test."""
    order: Literal["counter", "megatron"] = "counter"
    """counter: a run's first samples are the same however long it is planned; megatron: Megatron-LM's order."""
    eod_mask_loss: bool = False
    """Take no loss of what follows an end of document."""
    reset_attention_mask: bool = False
    """Let documents of one sample not see each other, and count positions anew in each."""
    data_cache_path: Path | None = None
    """Where index files are kept; by default beside the first data prefix."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class TrainingConfig:
    """Batches, length of the run, numbers."""

    seq_length: Count
    """Tokens of one sample."""
    micro_batch_size: Count
    """Samples one rank runs at a time."""
    global_batch_size: Count
    """Samples of one optimizer step, over all data-parallel ranks."""
    rampup_batch_size: tuple[Count, Count, Count] | None = None
    """[START, INCREMENT, SAMPLES]: steps have START samples at first and grow by INCREMENT at a time, evenly over the
    first SAMPLES of the run, to global_batch_size."""
    train_iters: Count
    """Optimizer steps the whole run is to last, those before a resume included."""
    seed: NonNegative = 1234
    """Decides initial values, the order of the data and what is dropped."""
    deterministic: bool = False
    """Take only algorithms that repeat every bit on the same layout and machine; one that cannot is an error."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of activations and of matrix products; parameters, sums of gradients and Adam stay fp32."""
    max_skipped_steps: Count = 5
    """So many batches in a row whose loss or gradient is not finite end the run, saved as it was before them."""
    loss_spike_sigmas: Annotated[float, Field(gt=0)] = 8.0
    """A loss so many standard deviations of its noise above the last ones is reported as a spike."""
    rewind_after_spikes: Count | None = None
    """After so many spikes in a row go back to the last checkpoint and go on behind the data read since; by default
    spikes are only reported."""
    exit_duration_in_mins: Annotated[float, Field(gt=0)] | None = None
    """Save and end with exit code 75 at the first step after so many minutes of this job."""
    hidden_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the embedding's, each attention's and each ffn's output that is dropped."""
    attention_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the weights of attention over tokens that is dropped; it needs kernels.attention sdpa."""
    recompute_granularity: Literal["none", "selective", "full"] = "none"
    """What is made again in backward instead of kept: nothing; the scores of each Pattention; all of each layer."""
    eval_interval: NonNegative = 0
    """Steps between evaluations on the validation split; 0 for none."""
    eval_iters: Count = 10
    """Global batches of one evaluation."""

    def batch_size_at(self, consumed_samples: int) -> int:
        """Samples of the step that begins after so many, as Megatron-LM ramps them up."""
        if self.rampup_batch_size is None:
            return self.global_batch_size
        start, increment, samples = self.rampup_batch_size
        increments = (self.global_batch_size - start) // increment
        return start + increment * min(increments, consumed_samples * increments // samples)

    def samples_of(self, steps: int) -> int:
        """Samples of so many steps from the first one on."""
        samples, ramp = 0, self.rampup_batch_size[2] if self.rampup_batch_size else 0
        for step in range(steps):
            if samples >= ramp:
                return samples + (steps - step) * self.global_batch_size
            samples += self.batch_size_at(samples)
        return samples

    @property
    def batch_sizes(self) -> Sequence[int]:
        """Every size a step can have."""
        start, increment, _ = self.rampup_batch_size or (self.global_batch_size, 1, 0)
        return range(start, self.global_batch_size + 1, increment)

    def __post_init__(self) -> None:
        if self.rampup_batch_size is not None:
            start, increment, _ = self.rampup_batch_size
            if start >= self.global_batch_size or (self.global_batch_size - start) % increment:
                raise ValueError(
                    f"rampup_batch_size cannot go from {start} by {increment} at a time to global_batch_size "
                    f"({self.global_batch_size}): START must be below it, and what is between divisible by INCREMENT"
                )
        for size in self.batch_sizes:
            if size % self.micro_batch_size:
                key = "global_batch_size" if size == self.global_batch_size else "a batch of rampup_batch_size"
                raise ValueError(f"{key} ({size}) must be divisible by micro_batch_size ({self.micro_batch_size})")


@dataclass(frozen=True, config=STRICT, kw_only=True)
class LossScaleConfig:
    """Scaling of the loss under training.precision fp16, so that small gradients do not vanish."""

    loss_scale: Annotated[float, Field(gt=0)] | None = None
    """A constant; by default the scale is dynamic, and the other keys say how."""
    initial_loss_scale: Annotated[float, Field(gt=0)] = 2.0**32
    """Scale of the first step."""
    min_loss_scale: Annotated[float, Field(gt=0)] = 1.0
    """Lowest scale: overflows there count as batches that are not finite."""
    loss_scale_window: Count = 1000
    """Steps in a row without overflow after which the scale is doubled."""
    hysteresis: Count = 2
    """Overflows before the scale is halved; from then on each one halves it, until it is doubled."""

    def __post_init__(self) -> None:
        if self.initial_loss_scale < self.min_loss_scale:
            raise ValueError(
                f"initial_loss_scale ({self.initial_loss_scale}) is below min_loss_scale ({self.min_loss_scale})"
            )


@dataclass(frozen=True, config=STRICT, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    lr: Annotated[float, Field(gt=0)]
    """Highest learning rate."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["cosine", "linear", "constant", "WSD"] = "cosine"
    """Shape of the decay from lr to min_lr; WSD (warm up, stable, decay) stays at lr and decays at the end."""
    lr_decay_iters: Count | None = None
    """Step at which min_lr is reached; by default train_iters."""
    lr_warmup_iters: NonNegative = 0
    """Steps of linear warm-up from zero."""
    lr_warmup_fraction: Annotated[float, Field(ge=0, lt=1)] | None = None
    """The same as a share of lr_decay_iters or lr_decay_tokens."""
    lr_wsd_decay_iters: Count | None = None
    """Steps of linear decay at the end of WSD; by default a tenth of lr_decay_iters or lr_decay_tokens."""
    lr_decay_tokens: Count | None = None
    """Tokens trained on when min_lr is reached: the schedule then goes by tokens instead of steps."""
    lr_warmup_tokens: NonNegative = 0
    """Tokens of linear warm-up from zero."""
    lr_wsd_decay_tokens: Count | None = None
    """Tokens of linear decay at the end of WSD."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled decay of every parameter but those of the final norm."""
    weight_decay_by_kind: dict[ParameterKind, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """Another decay for some kinds of parameters (embedding, qkv, proj, ffn, final_norm, head): {embedding: 0.0}."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of the second moment."""
    adam_eps: Annotated[float, Field(gt=0)] = 1e-8
    """Term added to the root of the second moment."""
    clip_grad: Annotated[float, Field(ge=0)] = 1.0
    """Largest global gradient norm; 0 leaves gradients as they are."""

    def __post_init__(self) -> None:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr ({self.min_lr}) is above lr ({self.lr})")
        by_steps, by_tokens = (
            [key for key in (f"lr_decay_{unit}", f"lr_warmup_{unit}", f"lr_wsd_decay_{unit}") if getattr(self, key)]
            for unit in ("iters", "tokens")
        )
        if by_tokens and (by_steps or self.lr_decay_tokens is None):
            raise ValueError(
                f"a schedule by tokens needs lr_decay_tokens and no key by steps: given are {by_tokens + by_steps}"
            )
        if self.lr_warmup_fraction is not None and (self.lr_warmup_iters or self.lr_warmup_tokens):
            raise ValueError("a warm-up is given twice: as lr_warmup_fraction, and in steps or tokens; give one")
        decay = self.lr_wsd_decay_iters or self.lr_wsd_decay_tokens
        if decay is not None and self.lr_decay_style != "WSD":
            raise ValueError(f"lr_wsd_decay_iters and _tokens are for lr_decay_style: WSD, it is {self.lr_decay_style}")


@dataclass(frozen=True, config=STRICT, kw_only=True)
class CheckpointConfig:
    """Where the run is kept."""

    save: Path | None = None
    """Directory of this run's checkpoints; a run started again goes on from the newest one in it."""
    load: Path | None = None
    """Checkpoint to start from where `save` holds none yet (a grown one, say)."""
    save_interval: NonNegative = 0
    """Steps between checkpoints; 0 for one at the end only."""
    keep_last: Count | None = None
    """Older checkpoints are removed beyond this many."""
    keep_every: Count | None = None
    """Checkpoints of steps that are a multiple of this are never removed."""
    async_save: bool = True
    """Write in the background while training goes on; a save then stalls for the copy to host memory only."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class KernelsConfig:
    """Which implementation computes what; auto takes the fastest one that is there, and says so once."""

    pattention: Literal["auto", "eager", "compiled", "triton"] = "auto"
    """What happens between a Pattention's two products."""
    attention: Literal["auto", "sdpa", "flash_attn", "transformer_engine"] = "auto"
    """Attention over tokens; flash_attn is version 4 where it is there and the GPU is recent enough, else 2."""
    norm: Literal["auto", "torch", "apex", "transformer_engine"] = "auto"
    """Layer norms."""
    optimizer: Literal["auto", "torch", "apex", "transformer_engine"] = "auto"
    """AdamW; torch's is the fused one."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class LoggingConfig:
    """What the run says."""

    log_interval: Count = 10
    """Steps between lines of the log."""
    tensorboard_dir: Path | None = None
    """Directory for TensorBoard event files."""
    metrics_file: Path | None = None
    """File for one JSON object per step; a resumed run appends."""
    wandb_project: str | None = None
    """Project of Weights & Biases that gets the metrics too."""
    wandb_exp_name: str | None = None
    """Name of the run there; started again under the same name it goes on."""
    wandb_save_dir: Path | None = None
    """Directory for the files of Weights & Biases."""
    peak_teraflops: Annotated[float, Field(gt=0)] | None = None
    """Rate of one device's matrix products in 1e12 operations a second, to tell the model FLOP utilisation (MFU) by;
    known for common GPUs in 16 bits."""
    communication_interval: NonNegative = 100
    """Steps between those that are profiled for the time ranks spend communicating; 0 for none."""
    profile_dir: Path | None = None
    """Directory for traces of steps, one a rank: of those between profile_step_start and _end, and of the step after
    SIGUSR2."""
    profile_step_start: Count | None = None
    """First step to trace."""
    profile_step_end: Count | None = None
    """Last step to trace."""

    def __post_init__(self) -> None:
        ends = self.profile_step_start, self.profile_step_end
        if (None in ends) != (ends == (None, None)):
            raise ValueError("profile_step_start and profile_step_end belong together: give both, or neither")
        if ends != (None, None) and self.profile_dir is None:
            raise ValueError("profile_step_start needs profile_dir: a directory for the traces")


@dataclass(frozen=True, config=STRICT, kw_only=True)
class RunConfig:
    """A whole run."""

    model: ModelConfig
    training: TrainingConfig
    optimizer: OptimizerConfig
    data: DataConfig
    loss_scale: LossScaleConfig = Field(default_factory=LossScaleConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    kernels: KernelsConfig = Field(default_factory=KernelsConfig)
    growth: list[GrowthStage] = Field(default_factory=list)
    """Stages of growth within the run, in their order; `model` is what it begins with."""

    def at_stage(self, number: int) -> "RunConfig":
        """The run's configuration after `number` stages of growth. Raises ValueError for a growth that can't be."""
        model, layout = self.model, {}
        for stage in self.growth[:number]:
            model = grown_model(model, stage)
            for key in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
                if (size := getattr(stage, key)) is not None:
                    layout[key] = size
        parallel = dataclasses.replace(self.parallel, **layout)
        return dataclasses.replace(self, model=model, parallel=parallel, growth=[])

    def __post_init__(self) -> None:
        self._check_tensor_parallel()
        self._check_growth()
        self._check_stopping()
        self._check_attention()
        if self.training.recompute_granularity == "selective" and self.model.layer != "tokenformer":
            raise ValueError(
                "training.recompute_granularity=selective needs model.layer=tokenformer: choose full or none"
            )
        parallel = self.parallel
        if parallel.pipeline_model_parallel_size > self.model.num_layers:
            raise ValueError(
                f"parallel.pipeline_model_parallel_size ({parallel.pipeline_model_parallel_size}) is more "
                f"than model.num_layers ({self.model.num_layers}): every stage needs a layer"
            )

    def _check_tensor_parallel(self) -> None:
        size = self.parallel.tensor_model_parallel_size
        self.model.check_tensor_parallel(size)
        if self.parallel.sequence_parallel and self.training.seq_length % size:
            raise ValueError(
                f"training.seq_length ({self.training.seq_length}) must be divisible by "
                f"parallel.tensor_model_parallel_size ({size}) under sequence_parallel"
            )

    def _check_growth(self) -> None:
        for number, stage in enumerate(self.growth):
            if (stage.at_step is None) == (stage.at_tokens is None):
                raise ValueError(f"growth[{number}]: say when, by either at_step or at_tokens")
            try:
                self.at_stage(number + 1)
            except ValueError as error:
                raise ValueError(f"growth[{number}]: {error}") from None
        for key in ("at_step", "at_tokens"):
            times = [time for stage in self.growth if (time := getattr(stage, key)) is not None]
            if times != sorted(set(times)):
                raise ValueError(f"growth: {key} must increase from stage to stage, it is {times}")
        if self.growth and self.checkpoint.save is None:
            raise ValueError("growth needs checkpoint.save: the model is saved before it grows")

    def _check_attention(self) -> None:
        for key in ("attention_dropout", "deterministic"):
            if getattr(self.training, key) and self.kernels.attention not in ("auto", "sdpa"):
                raise ValueError(f"training.{key} needs kernels.attention sdpa, it is {self.kernels.attention}")

    def _check_stopping(self) -> None:
        if self.training.rewind_after_spikes is not None and self.checkpoint.save is None:
            raise ValueError("training.rewind_after_spikes needs checkpoint.save: there is nothing to go back to")
        if self.training.exit_duration_in_mins is not None and self.checkpoint.save is None:
            raise ValueError("training.exit_duration_in_mins needs checkpoint.save: the run is saved before it ends")

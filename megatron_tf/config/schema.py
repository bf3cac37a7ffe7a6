"""The configuration of a run: frozen dataclasses that check themselves; names follow Megatron-LM's flags."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from megatron_tf.config.growth import GrowthStage, grown_model
from megatron_tf.config.model import ModelConfig
from megatron_tf.config.types import STRICT, Count, NonNegative


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ParallelConfig:
    """How the model is spread over ranks."""

    tensor_model_parallel_size: Count = 1
    """Ranks that share each layer's parameter tokens."""
    pipeline_model_parallel_size: Count = 1
    """Stages the layers are cut into."""
    data_parallel_size: Count | None = None
    """Replicas that share a batch; by default what is left of the world size."""
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
    train_iters: Count
    """Optimizer steps the whole run is to last, those before a resume included."""
    seed: NonNegative = 1234
    """Decides initial values and the order of the data."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Type of activations and of matrix products; parameters, sums of gradients and Adam stay fp32."""
    max_skipped_steps: Count = 5
    """So many batches in a row whose loss or gradient is not finite end the run, saved as it was before them."""
    exit_duration_in_mins: Annotated[float, Field(gt=0)] | None = None
    """Save and end with exit code 75 at the first step after so many minutes of this job."""
    recompute_granularity: Literal["none", "selective", "full"] = "none"
    """What is made again in backward instead of kept: nothing; the scores of each Pattention; all of each layer."""
    eval_interval: NonNegative = 0
    """Steps between evaluations on the validation split; 0 for none."""
    eval_iters: Count = 10
    """Global batches of one evaluation."""


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
    """The same as a share of lr_decay_iters, in place of lr_warmup_iters."""
    lr_wsd_decay_iters: Count | None = None
    """Steps of linear decay at the end of WSD; by default a tenth of lr_decay_iters."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled decay of the embedding and of every parameter token; norms have none."""
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
        if self.lr_warmup_fraction is not None and self.lr_warmup_iters:
            raise ValueError("lr_warmup_iters and lr_warmup_fraction are two ways to say the same: give one")
        if self.lr_wsd_decay_iters is not None and self.lr_decay_style != "WSD":
            raise ValueError(f"lr_wsd_decay_iters is for lr_decay_style: WSD, it is {self.lr_decay_style}")


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


@dataclass(frozen=True, config=STRICT, kw_only=True)
class RunConfig:
    """A whole run."""

    model: ModelConfig
    training: TrainingConfig
    optimizer: OptimizerConfig
    data: DataConfig
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
        if self.training.recompute_granularity == "selective" and self.model.layer != "tokenformer":
            raise ValueError(
                "training.recompute_granularity=selective needs model.layer=tokenformer: choose full or none"
            )
        parallel, training = self.parallel, self.training
        if parallel.pipeline_model_parallel_size > self.model.num_layers:
            raise ValueError(
                f"parallel.pipeline_model_parallel_size ({parallel.pipeline_model_parallel_size}) is more "
                f"than model.num_layers ({self.model.num_layers}): every stage needs a layer"
            )
        if training.global_batch_size % training.micro_batch_size:
            raise ValueError(
                f"training.global_batch_size ({training.global_batch_size}) must be divisible by "
                f"training.micro_batch_size ({training.micro_batch_size})"
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

    def _check_stopping(self) -> None:
        if self.training.exit_duration_in_mins is not None and self.checkpoint.save is None:
            raise ValueError("training.exit_duration_in_mins needs checkpoint.save: the run is saved before it ends")

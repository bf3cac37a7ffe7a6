"""The configuration of a run: frozen dataclasses that check themselves; names follow Megatron-LM's flags."""

import dataclasses
import difflib
import math
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from megatron_tf.config.errors import ConfigError
from megatron_tf.config.growth import GrowthStage, grown_model
from megatron_tf.config.model import ModelConfig
from megatron_tf.config.optimizer import LossScaleConfig, OptimizerConfig
from megatron_tf.config.types import STRICT, Count, FilePath, Name, NonNegative, Number, Prefix, Seed

_NUMPY_SEEDS = 2**32
DATA_CONTENT = "data.content"
"""In checkpoint.allow_changes: what is in the files of data.data_path."""


def check_weights(key: str, entries: Sequence[str]) -> None:
    """Raise ConfigError, with `key`, for datasets of which some have a weight and others none, or with weights that
    are no shares of a whole."""
    fields = [entry.split(maxsplit=1) for entry in entries]
    if all(len(field) == 1 for field in fields):
        return
    try:
        weights = [float(weight) for weight, _ in fields]
    except ValueError:
        raise ConfigError(f"{key}: write every entry as PREFIX, or every one as WEIGHT PREFIX: {entries}") from None
    if not all(0 <= weight < math.inf for weight in weights) or sum(weights) == 0:
        raise ConfigError(f"{key}: weights must be finite and not negative, and not all of them zero: {weights}")


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
    distributed_timeout_seconds: Annotated[Count, Field(le=10**8)] = 600
    """How long a rank waits for another before it gives up with an error."""

    def __post_init__(self) -> None:
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ConfigError("sequence_parallel needs tensor_model_parallel_size > 1; set it to false")


@dataclass(frozen=True, config=STRICT, kw_only=True)
class DataConfig:
    """The tokens to train on."""

    data_path: Annotated[list[Prefix], Field(min_length=1)]
    """Prefixes of .bin/.idx pairs; or pairs "WEIGHT PREFIX" to blend several by weight."""
    valid_data_path: Annotated[list[Prefix], Field(min_length=1)] | None = None
    """Datasets for validation, whole, in place of a share of data_path."""
    tokenizer_type: str
    """HFTokenizer, SentencePieceTokenizer, TikTokenizer or NullTokenizer."""
    tokenizer_model: FilePath | None = None
    """The tokenizer's file; its hash must be the one the data was made with. A vocab.json has merges.txt next to it."""
    eod_token: Annotated[str, Field(min_length=1)] | None = None
    """The token that ends a document; by default the one that the tokenizer's files name."""
    split: str = "969,30,1"
    """Shares of the documents for training, validation and test."""
    order: Literal["counter", "megatron"] = "counter"
    """counter: a run's first samples are the same however long it is planned; megatron: Megatron-LM's order."""
    eod_mask_loss: bool = False
    """Take no loss of what follows an end of document."""
    reset_attention_mask: bool = False
    """Let documents of one sample not see each other, and count positions anew in each."""
    data_cache_path: FilePath | None = None
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
    seed: Seed = 1234
    """Decides initial values, the order of the data and what is dropped."""
    deterministic: bool = False
    """Take only algorithms that repeat every bit on the same layout and machine; one that cannot is an error."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of activations and of matrix products; parameters, sums of gradients and Adam stay fp32."""
    max_skipped_steps: Count = 5
    """Abort after this many consecutive batches with a non-finite loss or gradient; the state before them is saved."""
    loss_spike_sigmas: Annotated[Number, Field(gt=0)] = 8.0
    """A loss so many standard deviations of its noise above the last ones is reported as a spike."""
    rewind_after_spikes: Count | None = None
    """After so many spikes in a row go back to the last checkpoint and go on behind the data read since; by default
    spikes are only reported."""
    exit_duration_in_mins: Annotated[Number, Field(gt=0)] | None = None
    """Save and end with exit code 75 at the first step after so many minutes of this job."""
    hidden_dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    """Share of the embedding's, each attention's and each ffn's output that is dropped."""
    attention_dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.0
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
        # whole numbers alone: every rank, and every resume, counts the same size
        increments = (self.global_batch_size - start) // increment
        return start + increment * min(increments, consumed_samples * increments // samples)

    def samples_of(self, steps: int) -> int:
        """Samples of so many steps from the first one on."""
        samples = 0
        ramp = self.rampup_batch_size[2] if self.rampup_batch_size else 0
        for step in range(steps):
            # from here on every step is alike: only those of the ramp are counted one by one
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
                raise ConfigError(
                    f"rampup_batch_size cannot go from {start} by {increment} at a time to global_batch_size "
                    f"({self.global_batch_size}): START must be below it, and what is between divisible by INCREMENT"
                )
        for size in self.batch_sizes:
            if size % self.micro_batch_size:
                key = "global_batch_size" if size == self.global_batch_size else "a batch of rampup_batch_size"
                raise ConfigError(f"{key} ({size}) must be divisible by micro_batch_size ({self.micro_batch_size})")


@dataclass(frozen=True, config=STRICT, kw_only=True)
class CheckpointConfig:
    """Where the run is kept."""

    save: FilePath | None = None
    """Directory of this run's checkpoints; a run started again goes on from the newest one in it."""
    load: FilePath | None = None
    """Checkpoint to start from where `save` holds none yet (a grown one, say)."""
    save_interval: NonNegative = 0
    """Steps between checkpoints; 0 for one at the end only."""
    keep_last: Count | None = None
    """Older checkpoints are removed beyond this many."""
    keep_every: Count | None = None
    """Checkpoints of steps that are a multiple of this are never removed."""
    finetune: bool = False
    """Take only the weights from `load`, and start with them at step 0: with new data, schedule and optimizer state."""
    allow_changes: list[str] = Field(default_factory=list)
    """Keys that may differ from the checkpoint's although the data read or the learning rate then silently change, such
    as [training.seed, data.data_path]; data.content stands for what is in the files."""
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
    tensorboard_dir: FilePath | None = None
    """Directory for TensorBoard event files."""
    metrics_file: FilePath | None = None
    """File for one JSON object per step; a resumed run appends."""
    wandb_project: Name | None = None
    """Project of Weights & Biases that gets the metrics too."""
    wandb_exp_name: Name | None = None
    """Name of the run there; started again under the same name it goes on."""
    wandb_save_dir: FilePath | None = None
    """Directory for the files of Weights & Biases."""
    peak_teraflops: Annotated[Number, Field(gt=0)] | None = None
    """Rate of one device's matrix products in 1e12 operations a second, to tell the model FLOP utilisation (MFU) by;
    known for common GPUs in 16 bits."""
    communication_interval: NonNegative = 100
    """Steps between those that are profiled for the time ranks spend communicating; 0 for none."""
    profile_dir: FilePath | None = None
    """Directory for traces of steps, one a rank: of those between profile_step_start and _end, and of the step after
    SIGUSR2."""
    profile_step_start: Count | None = None
    """First step to trace."""
    profile_step_end: Count | None = None
    """Last step to trace."""

    def __post_init__(self) -> None:
        ends = self.profile_step_start, self.profile_step_end
        if (None in ends) != (ends == (None, None)):
            raise ConfigError("profile_step_start and profile_step_end belong together: give both, or neither")
        if self.profile_step_start and self.profile_step_end and self.profile_step_start > self.profile_step_end:
            raise ConfigError(
                f"profile_step_end ({self.profile_step_end}) is before profile_step_start ({self.profile_step_start})"
            )
        if ends != (None, None) and self.profile_dir is None:
            raise ConfigError("profile_step_start needs profile_dir: a directory for the traces")


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
        """The run's configuration after `number` stages of growth. Raises ConfigError for a growth that can't be."""
        model = self.model
        layout = {}
        for stage in self.growth[:number]:
            model = grown_model(model, stage)
            for key in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
                if (size := getattr(stage, key)) is not None:
                    layout[key] = size
        parallel = dataclasses.replace(self.parallel, **layout)
        return dataclasses.replace(self, model=model, parallel=parallel, growth=[])

    def __post_init__(self) -> None:
        # each section has checked itself: what is left are facts of several sections
        self._check_tensor_parallel()
        self._check_growth()
        self.model.check_rotary()
        self._check_saving()
        self._check_data()
        if self.optimizer.lr_decay_iters is None and self.optimizer.lr_decay_tokens is None:
            self.optimizer.check_end("iters", "training.train_iters", self.training.train_iters)
        self._check_attention()
        if self.training.recompute_granularity == "selective" and self.model.layer != "tokenformer":
            raise ConfigError(
                "training.recompute_granularity=selective needs model.layer=tokenformer: choose full or none"
            )
        parallel = self.parallel
        if parallel.pipeline_model_parallel_size > self.model.num_layers:
            raise ConfigError(
                f"parallel.pipeline_model_parallel_size ({parallel.pipeline_model_parallel_size}) is more "
                f"than model.num_layers ({self.model.num_layers}): every stage needs a layer"
            )

    def _check_tensor_parallel(self) -> None:
        size = self.parallel.tensor_model_parallel_size
        self.model.check_tensor_parallel(size)
        if self.parallel.sequence_parallel and self.training.seq_length % size:
            raise ConfigError(
                f"training.seq_length ({self.training.seq_length}) must be divisible by "
                f"parallel.tensor_model_parallel_size ({size}) under sequence_parallel"
            )

    def _check_growth(self) -> None:
        for number, stage in enumerate(self.growth):
            if (stage.at_step is None) == (stage.at_tokens is None):
                raise ConfigError(f"growth[{number}]: say when, by either at_step or at_tokens")
            # all stages are built now: a run would otherwise find the impossible one only when it gets there
            try:
                self.at_stage(number + 1)
            except ConfigError as error:
                raise ConfigError(f"growth[{number}]: {error}") from None
        for key in ("at_step", "at_tokens"):
            # each key on its own: how steps and tokens compare, only the run can tell
            times = [time for stage in self.growth if (time := getattr(stage, key)) is not None]
            if times != sorted(set(times)):
                raise ConfigError(f"growth: {key} must increase from stage to stage, it is {times}")
        if self.growth and self.checkpoint.save is None:
            raise ConfigError("growth needs checkpoint.save: the model is saved before it grows")

    def _check_attention(self) -> None:
        for key in ("attention_dropout", "deterministic"):
            if getattr(self.training, key) and self.kernels.attention not in ("auto", "sdpa"):
                raise ConfigError(f"training.{key} needs kernels.attention sdpa, it is {self.kernels.attention}")

    def _check_data(self) -> None:
        for key in ("data_path", "valid_data_path"):
            check_weights(f"data.{key}", getattr(self.data, key) or [])
        try:
            shares = [float(share) for share in self.data.split.split(",")]
        except ValueError:
            shares = []
        if len(shares) != 3 or not all(0 <= share < math.inf for share in shares) or sum(shares) == 0:
            raise ConfigError(f"data.split is {self.data.split!r}: write three shares, such as 969,30,1")
        if self.data.order == "megatron" and self.training.seed >= _NUMPY_SEEDS:
            raise ConfigError(f"training.seed ({self.training.seed}) must be below 2**32 under data.order megatron")

    def _check_saving(self) -> None:
        checkpoint = self.checkpoint
        needed = {
            "training.rewind_after_spikes": "there is nothing to go back to",
            "training.exit_duration_in_mins": "the run is saved before it ends",
            "checkpoint.save_interval": "the run has no place to save in",
            "checkpoint.keep_last": "the run has no place to save in",
            "checkpoint.keep_every": "the run has no place to save in",
        }
        for key, why in needed.items():
            section, _, name = key.partition(".")
            if getattr(getattr(self, section), name) and checkpoint.save is None:
                raise ConfigError(f"{key} needs checkpoint.save: {why}")
        if checkpoint.finetune and checkpoint.load is None:
            raise ConfigError("checkpoint.finetune needs checkpoint.load: the checkpoint whose weights to take")
        known = self._keys()
        for key in checkpoint.allow_changes:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else "write section.key"
                raise ConfigError(f"checkpoint.allow_changes: unknown key {key!r}; {hint}")

    def _keys(self) -> list[str]:
        keys = []
        for section in dataclasses.fields(self):
            if section.name != "growth":  # a list of stages, whose keys have no names of their own
                keys += [f"{section.name}.{key.name}" for key in dataclasses.fields(getattr(self, section.name))]
        return [*keys, DATA_CONTENT]

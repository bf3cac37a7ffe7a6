"""The configuration of a run: frozen dataclasses that check themselves; names follow Megatron-LM's flags."""

import dataclasses
import difflib
from typing import Annotated, Literal

from pydantic import Field, ValidationError
from pydantic.dataclasses import dataclass

from megatron_tf.config.context_parallel import check_context_parallel
from megatron_tf.config.data_phases import DataPhase
from megatron_tf.config.data_values import parse_data_path, parse_split
from megatron_tf.config.errors import ConfigError, message_of
from megatron_tf.config.grown_model import grown_model
from megatron_tf.config.growth import LAYOUT_KEYS, GrowthStage
from megatron_tf.config.model import ModelConfig
from megatron_tf.config.moment import check_moments, name_of_stage, reachable
from megatron_tf.config.optimizer import LossScaleConfig, OptimizerConfig
from megatron_tf.config.parallel import ParallelConfig
from megatron_tf.config.schedules import check_schedules, schedule_after
from megatron_tf.config.training import TrainingConfig
from megatron_tf.config.types import STRICT, Count, FilePath, Name, NonNegative, Number, Prefix

_NUMPY_SEEDS = 2**32
DATA_CONTENT = "data.content"
"""Name in checkpoint.allow_changes for the contents of the files in data.data_path."""
ANY_DATA = "data"
"""Name in checkpoint.allow_changes for everything that decides which data is read, and in which order."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class DataConfig:
    """The tokens to train on."""

    data_path: Annotated[list[Prefix], Field(min_length=1)]
    """Prefixes of .bin/.idx pairs, or entries "WEIGHT PREFIX" to blend several by weight."""
    valid_data_path: Annotated[list[Prefix], Field(min_length=1)] | None = None
    """Datasets used entirely for validation, instead of the validation split of data_path."""
    tokenizer_type: str
    """HFTokenizer, SentencePieceTokenizer, TikTokenizer or NullTokenizer."""
    tokenizer_model: FilePath | None = None
    """The tokenizer's file; it must be the one the data was preprocessed with, which is checked by its hash. A
    vocab.json needs merges.txt next to it."""
    eod_token: Annotated[str, Field(min_length=1)] | None = None
    """The end-of-document token; by default the one named in the tokenizer's files."""
    split: str = "969,30,1"
    """Relative shares of the documents for training, validation and test."""
    order: Literal["lanes", "counter", "megatron"] | None = None
    """Order of the samples: lanes, in which every token of an epoch is read once through any change of the data;
    counter, samples in random order; megatron, Megatron-LM's order, bit for bit. By default a resumed run keeps its
    order, and a new one has lanes, or counter with packing best_fit."""
    phases: list[DataPhase] = Field(default_factory=list)
    """Changes of the sets, their weights, seq_length and batch sizes during the run, in order; needs order lanes."""
    packing: Literal["concatenate", "best_fit"] = "concatenate"
    """How documents become training samples: concatenate, end to end and cut every seq_length tokens; best_fit, whole
    documents in rows of seq_length tokens, of which only longer documents are cut, in order counter."""
    loss_mask: bool | None = None
    """Chat data: true counts only the answers in the loss, false every token; it must be set if data_path or
    valid_data_path has chat data. Datasets of text count every token."""
    eod_mask_loss: bool = False
    """Exclude the token after each end of document from the loss."""
    reset_attention_mask: bool = False
    """Mask attention across the documents within a sample and restart position ids at each (intra-document masking)."""
    data_cache_path: FilePath | None = None
    """Directory for cached index files; by default next to the first data prefix."""

    @property
    def order_of_new_run(self) -> Literal["lanes", "counter", "megatron"]:
        """Return the order of samples in a run that does not resume from a checkpoint."""
        return self.order or ("counter" if self.packing == "best_fit" else "lanes")


@dataclass(frozen=True, config=STRICT, kw_only=True)
class CheckpointConfig:
    """Where and when the run is saved, and where it starts from."""

    save: FilePath | None = None
    """Directory for the checkpoints of this run; a restarted run resumes from the newest one in it."""
    load: FilePath | None = None
    """Checkpoint to start from if `save` has none yet, for example a grown one."""
    save_interval: NonNegative = 0
    """Steps between checkpoints; 0 saves only at the end."""
    keep_last: Count | None = None
    """Keep only this many of the newest checkpoints; by default all."""
    keep_every: Count | None = None
    """Never remove checkpoints of steps that are a multiple of this."""
    finetune: bool = False
    """Take only the weights from `load` and start at step 0, with fresh data order, schedule and optimizer state."""
    allow_changes: list[str] = Field(default_factory=list)
    """Keys that may differ from the checkpoint's although this changes which data is read or the learning rate, such as
    [training.seed]; data.content stands for the contents of the data files, data for everything about the data."""
    async_save: bool = True
    """Write checkpoints in the background; training then only stalls for the copy to host memory."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class KernelsConfig:
    """Implementation of each operation; auto chooses by device and dtype, and logs its choice once."""

    pattention: Literal["auto", "eager", "native", "compiled", "triton"] = "auto"
    """The normalization between the two matrix products of a Pattention; native is C++ for a CPU in fp32 and bf16."""
    attention: Literal["auto", "sdpa", "flash_attn", "transformer_engine"] = "auto"
    """Attention between tokens; flash_attn uses version 4 if it is installed and the GPU supports it, else version
    2."""
    norm: Literal["auto", "torch", "apex", "transformer_engine"] = "auto"
    """Layer norms."""
    optimizer: Literal["auto", "torch", "apex", "transformer_engine"] = "auto"
    """AdamW; torch selects PyTorch's fused implementation."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class LoggingConfig:
    """What the run logs, where metrics go, and which steps are profiled."""

    log_interval: Count = 10
    """Steps between log lines."""
    tensorboard_dir: FilePath | None = None
    """Directory for TensorBoard event files."""
    metrics_file: FilePath | None = None
    """JSON Lines file that gets one object per step; a resumed run appends to it."""
    wandb_project: Name | None = None
    """Weights & Biases project to log the metrics to."""
    wandb_exp_name: Name | None = None
    """Name of the Weights & Biases run; a restart with the same name continues it."""
    wandb_save_dir: FilePath | None = None
    """Directory for the local files of Weights & Biases."""
    peak_teraflops: Annotated[Number, Field(gt=0)] | None = None
    """Peak matrix-multiplication rate of one device in TFLOP/s, from which the model FLOPs utilization (MFU) is
    computed; known for common GPUs in 16 bits."""
    communication_interval: NonNegative = 100
    """Profile one step out of this many to measure the time spent in communication; 0 disables it."""
    straggler_factor: Annotated[Number, Field(gt=1)] | None = 1.5
    """Name the slowest rank with a log line if it works this many times as long as the median of the ranks with the
    same work, without the time that it waits for others; null disables it. Needs communication_interval."""
    profile_dir: FilePath | None = None
    """Directory for profiler traces, one per rank, of the steps from profile_step_start to profile_step_end and of the
    step after a SIGUSR2."""
    profile_step_start: Count | None = None
    """First step to trace; needs profile_dir."""
    profile_step_end: Count | None = None
    """Last step to trace, inclusive."""

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
    """Complete configuration of a run."""

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
    """Growth stages during the run, in order; `model` describes the model before the first one."""

    def at_stage(self, number: int, phase: int = 0) -> "RunConfig":
        """Return the configuration after the first `number` growth stages and the first `phase` phases of the data,
        with the learning-rate schedule in force.

        Raises ConfigError for an invalid growth, and for a configuration that is invalid after these changes.
        """
        try:
            return self._at_stage(number, phase)
        except ValidationError as error:  # what pydantic makes of a ConfigError in the resulting configuration
            raise ConfigError(message_of(error.errors()[0])) from None

    def _at_stage(self, number: int, phase: int) -> "RunConfig":
        model, training, data_path = self.model, self.training, self.data.data_path
        for change in self.data.phases[:phase]:
            training = change.training_after(training)
            data_path = change.data_path or data_path
        layout = {}
        for stage in self.growth[:number]:
            model = grown_model(model, stage)
            for key in LAYOUT_KEYS:
                if (value := getattr(stage, key)) is not None:
                    layout[key] = value
        parallel = dataclasses.replace(self.parallel, **layout)
        schedule = schedule_after(self.growth, number)
        optimizer = self.optimizer.with_schedule(schedule) if schedule else self.optimizer
        data = dataclasses.replace(self.data, data_path=data_path, phases=[])
        return dataclasses.replace(
            self, model=model, training=training, data=data, parallel=parallel, optimizer=optimizer, growth=[]
        )

    def __post_init__(self) -> None:
        # each section has validated itself: only constraints across sections are left
        self._check_tensor_parallel()
        check_context_parallel(self.parallel, self.model, self.training, attention=self.kernels.attention)
        self._check_phases()
        self._check_growth()
        self.model.check_rotary()
        self._check_saving()
        self._check_data()
        if self.optimizer.lr_decay_iters is None and self.optimizer.lr_decay_tokens is None:
            self.optimizer.check_end("iters", "training.train_iters", self.training.train_iters)
        self._check_kernels()
        if self.training.precision == "fp8" and self.model.layer != "tokenformer":
            raise ConfigError("training.precision=fp8 needs model.layer=tokenformer: choose bf16")
        if self.training.recompute_granularity == "selective" and self.model.layer != "tokenformer":
            raise ConfigError(
                "training.recompute_granularity=selective needs model.layer=tokenformer: choose full or none"
            )
        self._check_stages()

    def _check_tensor_parallel(self) -> None:
        size = self.parallel.tensor_model_parallel_size
        self.model.check_tensor_parallel(size)
        if self.parallel.sequence_parallel and self.training.seq_length % size:
            raise ConfigError(
                f"training.seq_length ({self.training.seq_length}) must be divisible by "
                f"parallel.tensor_model_parallel_size ({size}) under sequence_parallel"
            )

        if self.parallel.tp_comm_overlap_chunks > 1 and self.model.layer != "tokenformer":
            raise ConfigError("parallel.tp_comm_overlap_chunks needs model.layer=tokenformer: set it to 1")

    def _check_stages(self) -> None:
        parallel, layers = self.parallel, self.model.num_layers
        if parallel.num_stages > layers:
            raise ConfigError(
                f"parallel.pipeline_model_parallel_size ({parallel.pipeline_model_parallel_size}), with "
                f"{parallel.stages_per_rank} stage(s) on each rank, is more than model.num_layers ({layers}): every "
                f"stage needs a layer"
            )
        layout = parallel.pipeline_model_parallel_layout
        if layout is not None and sum(layout) != layers:
            raise ConfigError(
                f"parallel.pipeline_model_parallel_layout places {sum(layout)} layers ({layout}), but model.num_layers "
                f"is {layers}"
            )

    def _check_phases(self) -> None:
        phases = self.data.phases
        check_moments("data.phases", phases)
        for number, phase in enumerate(phases):
            parse_data_path(phase.data_path or [], key=f"data.phases[{number}].data_path")
        if phases and self.data.packing == "best_fit":
            raise ConfigError("data.phases reads documents end to end, in lanes: set data.packing to concatenate")
        if phases and self.data.order_of_new_run != "lanes":
            raise ConfigError(f"data.phases needs data.order lanes, but it is {self.data.order}")
        if phases and self.checkpoint.save is None:
            raise ConfigError("data.phases needs checkpoint.save: the run is saved before its data change")

    def _check_growth(self) -> None:
        check_moments("growth", self.growth)
        check_schedules(self.growth, self.training.train_iters)
        # build all stages now: otherwise a run would only fail when it reaches the impossible one
        for stage, phase in reachable(self.growth, self.data.phases):
            if stage or phase:
                self._check_stage(stage, phase)
        if self.growth and self.checkpoint.save is None:
            raise ConfigError("growth needs checkpoint.save: the model is saved before it grows")

    def _check_stage(self, stage: int, phase: int) -> None:
        """Raise ConfigError, naming the change that leads there, if a stage is invalid."""
        try:
            self.at_stage(stage, phase)
        except ConfigError as error:
            raise ConfigError(f"{name_of_stage(stage, phase)}: {error}") from None

    def _check_kernels(self) -> None:
        for key in ("attention_dropout", "deterministic"):
            if getattr(self.training, key) and self.kernels.attention not in ("auto", "sdpa"):
                raise ConfigError(f"training.{key} needs kernels.attention sdpa, but it is {self.kernels.attention}")
        if self.model.norm == "rmsnorm" and self.kernels.norm not in ("auto", "torch"):
            raise ConfigError(f"kernels.norm={self.kernels.norm} computes layer norms only: choose auto or torch")

    def _check_data(self) -> None:
        for key in ("data_path", "valid_data_path"):
            parse_data_path(getattr(self.data, key) or [], key=f"data.{key}")
        parse_split(self.data.split)
        if self.data.order == "megatron" and self.training.seed >= _NUMPY_SEEDS:
            raise ConfigError(f"training.seed ({self.training.seed}) must be below 2**32 under data.order megatron")
        if self.data.packing == "best_fit" and self.data.order_of_new_run != "counter":
            raise ConfigError(
                f"data.packing best_fit packs each epoch, but data.order {self.data.order} reads documents end to "
                f"end: set data.order to counter, or data.packing to concatenate"
            )

    def _check_saving(self) -> None:
        checkpoint = self.checkpoint
        needed = {
            "training.rewind_after_spikes": "there is no checkpoint to rewind to",
            "training.exit_duration_in_mins": "the run is saved before it exits",
            "checkpoint.save_interval": "the directory for checkpoints",
            "checkpoint.keep_last": "the directory for checkpoints",
            "checkpoint.keep_every": "the directory for checkpoints",
        }
        for key, why in needed.items():
            section, _, name = key.partition(".")
            if getattr(getattr(self, section), name) and checkpoint.save is None:
                raise ConfigError(f"{key} needs checkpoint.save: {why}")
        if checkpoint.finetune and checkpoint.load is None:
            raise ConfigError("checkpoint.finetune needs checkpoint.load: the checkpoint to take the weights from")
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
        return [*keys, DATA_CONTENT, ANY_DATA]

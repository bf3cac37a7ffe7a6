"""What a checkpoint's metadata.json holds: the record of a run. docs/checkpoint_format.md describes every key.

Each dataclass reads itself from JSON, ignoring keys it does not know, and writes its fields in their order. Fields
without a default are required of every writer; the others were absent from some writer's file, and then have their
default. `from_json` raises CheckpointError that names the file and the key which is missing or impossible.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Self

from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.checkpoint.json_object import JsonObject
from megatron_tf.config import ConfigError, ModelConfig, parse_config, to_dict

MOST_STEPS = 10**15
"""No run takes more; steps become names of directories."""

Identity = Mapping[str, Any]
"""What tells a tokenizer, or a training set, from another one: made by `data` and `training`, compared as a whole."""


@dataclass(frozen=True)
class TrainingCounters:
    """How far a run has come."""

    step: int
    """Optimizer steps done."""
    samples: int
    """Samples read, over all data-parallel ranks: the position in the data."""
    tokens: int
    """Tokens trained on."""
    adam_steps: int
    """Steps that Adam's bias correction counts."""
    skipped: int
    """Batches that were read and are not in the model: those whose loss or gradient was non-finite, and those of the
    steps that a rewind undid."""
    overflows: int = 0
    """Batches that were read and not trained on, since their gradients overflowed at a loss scale too high."""

    @classmethod
    def from_json(cls, values: JsonObject) -> Self:
        """Read the key `training`."""
        return cls(
            step=values.count("step", most=MOST_STEPS),
            samples=values.count("samples"),
            tokens=values.count("tokens"),
            adam_steps=values.count("adam_steps"),
            skipped=values.count("skipped"),
            overflows=values.count("overflows", 0),
        )


START = TrainingCounters(step=0, samples=0, tokens=0, adam_steps=0, skipped=0)
"""Of a model that no run of ours has trained."""


@dataclass(frozen=True)
class Usage:
    """What a run has used, over all its jobs, ranks and stages of growth."""

    flops: float = 0.0
    """Operations of the model in all steps."""
    device_seconds: float = 0.0
    """For how long devices were held."""

    @classmethod
    def from_json(cls, values: JsonObject) -> Self:
        """Read the key `usage`."""
        return cls(values.number("flops", 0.0), values.number("device_seconds", 0.0))


@dataclass(frozen=True)
class SpikeHistory:
    """What the spike detector had seen when the run was saved."""

    losses: tuple[float, ...]
    """The last ones that were no spikes, oldest first."""
    in_a_row: int
    """Spikes up to the last step."""

    @classmethod
    def from_json(cls, values: JsonObject) -> Self:
        """Read the key `run.spikes`."""
        return cls(tuple(values.number_items("losses")), values.count("in_a_row"))


@dataclass(frozen=True)
class RunDetails:
    """What else a run needs to be resumed as if it had never stopped. Version 0.1 wrote none of it."""

    data: tuple[Identity, ...] | None = None
    """Identity of each training set; None where it is not known."""
    spikes: SpikeHistory | None = None
    """None where no loss has been seen."""
    evaluation_due: bool = False
    """Whether a stop left out the evaluation after this step."""
    blend: str | None = None
    """Name of the order in which datasets take turns under data.order counter; a run keeps it."""

    @classmethod
    def from_json(cls, values: JsonObject) -> Self:
        """Read the key `run`."""
        has_data = values.has("data")
        return cls(
            data=tuple(identity.values for identity in values.sections("data")) if has_data else None,
            spikes=values.optional("spikes", SpikeHistory.from_json, None),
            evaluation_due=values.boolean("evaluation_due", False),
            blend=values.text("blend") if values.has("blend") else None,
        )

    def to_json(self) -> dict[str, Any]:
        """The key `run`."""
        spikes = self.spikes
        return {
            "data": None if self.data is None else [dict(identity) for identity in self.data],
            "spikes": None if spikes is None else {"losses": list(spikes.losses), "in_a_row": spikes.in_a_row},
            "evaluation_due": self.evaluation_due,
            "blend": self.blend,
        }


@dataclass(frozen=True)
class LossScale:
    """State of the dynamic loss scale of fp16."""

    scale: float
    growth_tracker: int
    """Steps since the scale changed or gradients overflowed."""
    hysteresis_tracker: int
    """Overflows that are left before the scale is halved; negative after more of them."""

    @classmethod
    def from_json(cls, values: JsonObject) -> Self:
        """Read the key `loss_scale`."""
        return cls(values.number("scale"), values.whole("growth_tracker"), values.whole("hysteresis_tracker"))


@dataclass(frozen=True)
class GrowthEvent:
    """A growth or a shrinking that the model has behind it, in a run or by the tool."""

    step: int
    samples: int
    tokens: int
    kinds: Mapping[str, list[Any]]
    """Kind of tokens -> [old, new]: a number, or a list with one for each layer."""
    init: str
    """How new tokens were made, as in a stage of `growth`; "shrink" where tokens were dropped."""
    seed: int
    inserted_layers: list[int] = field(default_factory=list)
    """New layers, counted as they are after the growth; written only where there are some."""

    @classmethod
    def from_json(cls, values: JsonObject) -> Self:
        """Read an entry of the key `lineage`."""
        kinds = values.section("kinds")
        for kind, change in kinds.values.items():
            if not isinstance(change, list) or len(change) != 2:
                raise CheckpointError(f"{kinds.source}: {kinds.path}.{kind} is {change!r}, expected [old, new]")
        return cls(
            step=values.count("step"),
            samples=values.count("samples"),
            tokens=values.count("tokens"),
            kinds=kinds.values,
            init=values.text("init"),
            seed=values.whole("seed"),
            inserted_layers=values.items("inserted_layers") if values.has("inserted_layers") else [],
        )

    def to_json(self) -> dict[str, Any]:
        """An entry of the key `lineage`."""
        values = asdict(self)
        if not self.inserted_layers:
            del values["inserted_layers"]
        return values


@dataclass(frozen=True)
class AfterGrowth:
    """How training continues after the last growth."""

    step: int
    """Optimizer step of the growth."""
    rewarmup_iters: int
    """Steps of linear warm-up after it."""
    old_tokens_lr_scale: float
    """Learning rate of the old parameter tokens relative to the new ones."""
    old_rows: Mapping[str, int]
    """Tensor of tokens -> how many of its first rows are old."""

    @classmethod
    def from_json(cls, values: JsonObject) -> Self:
        """Read the key `after_growth`."""
        return cls(
            step=values.count("step"),
            rewarmup_iters=values.count("rewarmup_iters"),
            old_tokens_lr_scale=values.number("old_tokens_lr_scale"),
            old_rows=values.counts("old_rows"),
        )


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run as its checkpoint knows it, or as it is between two steps."""

    model: ModelConfig
    """The model of this checkpoint."""
    config: Mapping[str, Any]
    """The whole configuration of the run that wrote it, as JSON values: other versions have other keys."""
    tau: Mapping[str, float]
    """Temperature of every Pattention of the whole model, by module."""
    tokenizer: Identity
    """Identity of the tokenizer behind the ids."""
    lineage: tuple[GrowthEvent, ...] = ()
    """Growth so far, oldest first. Every writer writes it, if only an empty list."""
    training: TrainingCounters = START
    """Every writer writes it."""
    usage: Usage = Usage()
    details: RunDetails = RunDetails()
    """The key `run`."""
    loss_scale: LossScale | None = None
    """Of fp16 with a dynamic scale only."""
    after_growth: AfterGrowth | None = None
    """None where the model has not grown."""
    growth_stage: int | None = None
    """Stages of the run's `growth` that it has behind it; None where that is not known: in older checkpoints, and
    where a tool made the model."""
    others: Mapping[str, Any] = field(default_factory=dict)
    """Keys of a later version: a tool that makes a checkpoint from this one writes them again."""

    @classmethod
    def from_json(cls, values: Any, source: object) -> Self:
        """Read what the file `source` holds."""
        _check_step(values, source)
        top = JsonObject(source, "", values)
        config = top.section("config")
        _check_config(config)
        return cls(
            model=read_model(top.section("model")),
            config=config.values,
            tau=top.numbers("tau"),
            tokenizer=top.section("tokenizer").values,
            lineage=tuple(GrowthEvent.from_json(event) for event in top.sections("lineage")),
            training=TrainingCounters.from_json(top.section("training")),
            usage=top.optional("usage", Usage.from_json, Usage()),
            details=top.optional("run", RunDetails.from_json, RunDetails()),
            loss_scale=top.optional("loss_scale", LossScale.from_json, None),
            after_growth=top.optional("after_growth", AfterGrowth.from_json, None),
            growth_stage=top.count("growth_stage") if top.has("growth_stage") else None,
            others={key: value for key, value in top.values.items() if key not in _KEYS},
        )

    def to_json(self) -> dict[str, Any]:
        """What metadata.json holds, in its order of keys; optional ones are left out where nothing is known."""
        training = asdict(self.training)
        values: dict[str, Any] = {
            "model": to_dict(self.model),
            "config": dict(self.config),
            "tau": dict(self.tau),
            "tokenizer": dict(self.tokenizer),
            "lineage": [event.to_json() for event in self.lineage],
            "training": training,
        }
        # a run counts what it uses before it saves: without usage no run of ours has trained the model, nor
        # counted overflows, and neither is written
        if self.usage != Usage():
            values["usage"] = asdict(self.usage)
        elif not self.training.overflows:
            del training["overflows"]
        if self.details != RunDetails():
            values["run"] = self.details.to_json()
        for key in ("loss_scale", "after_growth"):
            if (section := getattr(self, key)) is not None:
                values[key] = asdict(section)
        if self.growth_stage is not None:
            values["growth_stage"] = self.growth_stage
        return values | dict(self.others)

    @property
    def seq_length(self) -> int:
        """Tokens of a sample of the run."""
        length: int = self.config["training"]["seq_length"]
        return length

    @property
    def seed(self) -> int:
        """Seed of the run."""
        seed: int = self.config["training"]["seed"]
        return seed

    @property
    def data(self) -> Mapping[str, Any]:
        """The section `data` of the configuration; empty where it has none."""
        return self.config.get("data") or {}

    def with_model(self, model: ModelConfig) -> Self:
        """The record of another model, in both places that hold it."""
        old = self.config.get("model") or {}
        return replace(self, model=model, config={**self.config, "model": {**old, **to_dict(model)}})

    def with_data(self, **keys: Any) -> Self:
        """The record with other values for some keys of the section `data`."""
        return replace(self, config={**self.config, "data": {**self.data, **keys}})

    def after_step(self, samples: int, tokens: int, flops: float) -> Self:
        """One optimizer step further."""
        training = replace(
            self.training,
            step=self.training.step + 1,
            samples=self.training.samples + samples,
            tokens=self.training.tokens + tokens,
            adam_steps=self.training.adam_steps + 1,
        )
        return replace(self, training=training, usage=replace(self.usage, flops=self.usage.flops + flops))

    def after_skip(self, samples: int) -> Self:
        """One batch further in the data, and not a step: the schedule stays where it was."""
        counters = self.training
        training = replace(counters, samples=counters.samples + samples, skipped=counters.skipped + 1)
        return replace(self, training=training)

    def after_overflow(self, samples: int) -> Self:
        """As `after_skip`, for no fault of the batch."""
        counters = self.training
        training = replace(counters, samples=counters.samples + samples, overflows=counters.overflows + 1)
        return replace(self, training=training)


_KEYS = {field.name for field in fields(RunRecord)} - {"details", "others"} | {"run"}


def is_same_tokenizer(saved: Identity, found: Identity) -> bool:
    """Whether a checkpoint's tokenizer is the one that was `found`.

    Weights that were imported with --vocab-size know the number of ids alone: any tokenizer with as many is accepted.
    """
    if saved.get("is_unknown"):
        return bool(saved.get("vocab_size") == found.get("vocab_size"))
    return saved == found


def _check_step(values: Any, source: object) -> None:
    """Raise CheckpointError for a file that is not metadata at all."""
    try:
        values["training"]["step"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{source} does not say training.step: {error!r}") from error


def _check_config(config: JsonObject) -> None:
    """Raise CheckpointError where what readers take from the configuration is missing or impossible."""
    training = config.section("training")
    training.count("seq_length", least=1)
    training.whole("seed")
    if config.has("data"):
        config.section("data")


def read_model(section: JsonObject) -> ModelConfig:
    """The model that the key `model` describes."""
    known = {key: value for key, value in section.values.items() if key in ModelConfig.__dataclass_fields__}
    try:
        return parse_config(ModelConfig, known, f"{section.source}: {section.path}")
    except ConfigError as error:
        raise CheckpointError(str(error).splitlines()[0]) from error

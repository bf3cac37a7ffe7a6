"""The record of a run, stored in a checkpoint's metadata.json. docs/checkpoint_format.md describes every key.

Each dataclass reads itself from JSON, ignoring unknown keys, and writes its fields in order. Fields without a default
are required; the others may be missing from files of older versions. `from_json` raises CheckpointError naming the file
and the key that is missing or invalid.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Self

from megatron_tf.checkpoint.after_growth import read_after_growth
from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.checkpoint.generations import Generations
from megatron_tf.checkpoint.growth_event import GrowthEvent
from megatron_tf.checkpoint.json_object import JsonObject
from megatron_tf.checkpoint.run_state import START, Identity, LossScale, RunDetails, TrainingCounters, Usage
from megatron_tf.checkpoint.schedule_start import ScheduleStart
from megatron_tf.config import ConfigError, ModelConfig, ScheduleConfig, parse_config, to_dict


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The state of a run between two steps, as it is stored in a checkpoint, without its tensors."""

    model: ModelConfig
    """The model of this checkpoint."""
    config: Mapping[str, Any]
    """The complete configuration of the run as JSON values, since other versions may have other keys."""
    tau: Mapping[str, float]
    """Temperature of every Pattention of the whole model: module path -> tau."""
    tokenizer: Identity
    """Identity of the tokenizer that the ids belong to."""
    lineage: tuple[GrowthEvent, ...] = ()
    """Growth events so far, oldest first; always written, even if empty."""
    training: TrainingCounters = START
    """Always written."""
    usage: Usage = field(default_factory=Usage)
    details: RunDetails = field(default_factory=RunDetails)
    """The key `run`."""
    loss_scale: LossScale | None = None
    """Only for fp16 with a dynamic loss scale."""
    generations: Generations | None = None
    """None if a single count of updates, training.adam_steps, describes all rows, as in a model that never grew."""
    schedule_start: ScheduleStart | None = None
    """None if no growth stage has set a schedule: that of the run counts from its first step."""
    growth_stage: int | None = None
    """Number of stages of the run's `growth` that are done; None if unknown: in older checkpoints, and if a command
    made the model."""
    others: Mapping[str, Any] = field(default_factory=dict)
    """Unknown keys of a later version, which commands copy to the checkpoints they make from this one."""

    @classmethod
    def from_json(cls, values: Any, source: object) -> Self:
        """Read the contents of the file `source`."""
        _check_step(values, source)
        top = JsonObject(source, "", values)
        config = top.section("config")
        _check_config(config)
        model = read_model(top.section("model"))
        lineage = tuple(GrowthEvent.from_json(event) for event in top.sections("lineage"))
        training = TrainingCounters.from_json(top.section("training"))
        return cls(
            model=model,
            config=config.values,
            tau=_read_taus(top),
            tokenizer=top.section("tokenizer").values,
            lineage=lineage,
            training=training,
            usage=top.optional("usage", Usage.from_json, Usage()),
            details=top.optional("run", RunDetails.from_json, RunDetails()),
            loss_scale=top.optional("loss_scale", LossScale.from_json, None),
            generations=_read_generations(top, model, training=training, num_growths=len(lineage)),
            schedule_start=top.optional("schedule_start", ScheduleStart.from_json, None),
            growth_stage=top.count("growth_stage") if top.has("growth_stage") else None,
            others={key: value for key, value in top.values.items() if key not in _KEYS},
        )

    def to_json(self) -> dict[str, Any]:
        """Return the contents of metadata.json in the order of its keys; unknown optional values are omitted."""
        training = asdict(self.training)
        values: dict[str, Any] = {
            "model": to_dict(self.model),
            "config": dict(self.config),
            "tau": dict(self.tau),
            "tokenizer": dict(self.tokenizer),
            "lineage": [event.to_json() for event in self.lineage],
            "training": training,
        }
        # a run counts its usage before it saves: without usage, the model has not been trained by this program and
        # has no overflows either, so neither is written
        if self.usage != Usage():
            values["usage"] = asdict(self.usage)
        elif not self.training.overflows:
            del training["overflows"]
        if self.details != RunDetails():
            values["run"] = self.details.to_json()
        if self.loss_scale is not None:
            values["loss_scale"] = asdict(self.loss_scale)
        if self.generations is not None:
            values["generations"] = self.generations.to_json()
        if self.schedule_start is not None:
            values["schedule_start"] = asdict(self.schedule_start)
        if self.growth_stage is not None:
            values["growth_stage"] = self.growth_stage
        return values | dict(self.others)

    @property
    def seq_length(self) -> int:
        """Sequence length of the run's samples, in tokens."""
        length: int = self.config["training"]["seq_length"]
        return length

    @property
    def seed(self) -> int:
        """The key training.seed of the run."""
        seed: int = self.config["training"]["seed"]
        return seed

    @property
    def data(self) -> Mapping[str, Any]:
        """The section `data` of the configuration; empty if there is none."""
        return self.config.get("data") or {}

    @property
    def all_generations(self) -> Generations:
        """The generation of every row, also of a model that never grew."""
        return self.generations or Generations.original(self.training.adam_steps)

    def with_generations(self, generations: Generations) -> Self:
        """Return a copy with these generations, which are only written where a single count does not describe them."""
        if not generations.are_original:
            return replace(self, generations=generations)
        steps = generations.table[0].exp_avg_steps
        return replace(self, generations=None, training=replace(self.training, adam_steps=steps))

    def with_model(self, model: ModelConfig) -> Self:
        """Return a copy with another model, which is stored both on its own and in the configuration."""
        old = self.config.get("model") or {}
        return replace(self, model=model, config={**self.config, "model": {**old, **to_dict(model)}})

    def after_growth(
        self,
        model: ModelConfig,
        *,
        kinds: Mapping[str, list[Any]],
        init: str,
        inserted_layers: Sequence[int] = (),
        dropped_layers: Sequence[int] = (),
        hidden_size: list[int] | None = None,
    ) -> Self:
        """Return the record of `model`, which a growth or shrinking made from this one, with the event in its lineage.

        The keywords are the fields of GrowthEvent that describe the change.
        """
        event = GrowthEvent(
            step=self.training.step,
            samples=self.training.samples,
            tokens=self.training.tokens,
            kinds=kinds,
            init=init,
            seed=self.seed,
            inserted_layers=list(inserted_layers),
            dropped_layers=list(dropped_layers),
            hidden_size=hidden_size,
        )
        # which stage of a run's `growth` this was is known to the run, not to a command
        return replace(self.with_model(model), lineage=(*self.lineage, event), growth_stage=None)

    def with_data(self, **keys: Any) -> Self:
        """Return a copy with other values for some keys of the section `data`."""
        return replace(self, config={**self.config, "data": {**self.data, **keys}})

    def with_schedule(self, schedule: ScheduleConfig) -> Self:
        """Return a copy whose learning rate follows `schedule`, counted from here."""
        optimizer = {**(self.config.get("optimizer") or {}), **to_dict(schedule)}
        start = ScheduleStart(self.training.step, self.training.tokens)
        return replace(self, config={**self.config, "optimizer": optimizer}, schedule_start=start)

    def after_step(self, samples: int, tokens: int, flops: float) -> Self:
        """Return the record after one more optimizer step."""
        training = replace(
            self.training,
            step=self.training.step + 1,
            samples=self.training.samples + samples,
            tokens=self.training.tokens + tokens,
            adam_steps=self.training.adam_steps + 1,
        )
        return replace(self, training=training, usage=replace(self.usage, flops=self.usage.flops + flops))

    def after_skip(self, samples: int) -> Self:
        """Return the record after a skipped batch: the data advances, but not the step or the schedule."""
        counters = self.training
        training = replace(counters, samples=counters.samples + samples, skipped=counters.skipped + 1)
        return replace(self, training=training)

    def after_overflow(self, samples: int) -> Self:
        """Return the record after a batch skipped because of the loss scale rather than the batch itself."""
        counters = self.training
        training = replace(counters, samples=counters.samples + samples, overflows=counters.overflows + 1)
        return replace(self, training=training)


_KEYS = {field.name for field in fields(RunRecord)} - {"details", "others"} | {"run", "after_growth"}


def _read_generations(
    top: JsonObject, model: ModelConfig, *, training: TrainingCounters, num_growths: int
) -> Generations | None:
    if top.has("generations"):
        return Generations.from_json(top.section("generations"))
    if not top.has("after_growth"):
        return None
    generations = read_after_growth(
        top.section("after_growth"),
        model,
        num_growths=num_growths,
        step=training.step,
        adam_steps=training.adam_steps,
    )
    return None if generations.are_original else generations


def is_same_tokenizer(saved: Identity, found: Identity) -> bool:
    """Return whether a checkpoint's tokenizer is the one that was `found`.

    For weights imported with --vocab-size only the number of ids is known: any tokenizer of that size is accepted.
    """
    if saved.get("is_unknown"):
        return bool(saved.get("vocab_size") == found.get("vocab_size"))
    return saved == found


def _check_step(values: Any, source: object) -> None:
    """Raise CheckpointError if the file is not a checkpoint's metadata."""
    try:
        values["training"]["step"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{source} does not say training.step: {error!r}") from error


def _read_taus(top: JsonObject) -> dict[str, float]:
    taus = top.numbers("tau")
    for name, tau in taus.items():
        if tau <= 0:
            raise CheckpointError(f"{top.source}: tau of {name} is {tau}, expected a number above 0")
    return taus


def _check_config(config: JsonObject) -> None:
    """Raise CheckpointError if a key that readers take from the configuration is missing or invalid."""
    training = config.section("training")
    training.count("seq_length", least=1)
    training.whole("seed")
    for name in ("model", "data", "optimizer"):
        if config.has(name):
            config.section(name)


def read_model(section: JsonObject) -> ModelConfig:
    """Read the model configuration from the key `model`."""
    known = {key: value for key, value in section.values.items() if key in ModelConfig.__dataclass_fields__}
    try:
        return parse_config(ModelConfig, known, f"{section.source}: {section.path}")
    except ConfigError as error:
        raise CheckpointError(str(error).splitlines()[0]) from error

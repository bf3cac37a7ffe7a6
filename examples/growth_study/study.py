"""The study as study.yaml states it: models, budgets and arms."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from megatron_tf.config import ModelConfig
from megatron_tf.errors import UserError
from megatron_tf.tokenformer.sizes import parameter_count, training_flops

SCHEDULES = ("restart", "one_cosine", "wsd")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What each run uses."""

    ranks: int = 1
    """Processes of the trainer, started by torchrun if there are several."""
    device: str = "cpu"
    """Device of the evaluation on the held-out text; the trainer uses a GPU where there is one."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to arrive at a model: from scratch, or grown.

    A budget is in tokens per non-embedding parameter. That of an arm says what its last model would cost from scratch;
    a grown arm spends the same FLOPs in total, those of its small run included.
    """

    name: str
    family: str
    size: str
    """The last model."""
    budgets: Sequence[float]
    """The first is that of its sweep."""
    seeds: int
    """Number of seeds, which start at 1; Study.seeds_at is that of a budget."""
    topic: str
    """The table of the report that shows it."""
    grow_from: Mapping[str, Any] | None = None
    """`size` and `budget_ratio` of the small run; None for an arm from scratch."""
    stages: Sequence[Mapping[str, Any]] = ()
    """One growth each: `to`, the size that it results in; `budget_ratio`, except for the last; keys of `growth:`."""
    schedule: str = "restart"
    main: bool = False
    rate_of: str | None = None
    """The arm whose chosen learning rate this one uses; by default it has its own sweep."""
    rate_factor: float = 1.0
    """Its learning rate relative to the chosen one; the small run that it grows from has its own."""
    rates: Sequence[float] = ()
    """The learning rates of its sweep; by default those of its family."""
    baseline: str | None = None
    """The arm that it is compared with; by default the same size from scratch."""

    @property
    def tuned_by(self) -> str:
        """Name of the arm whose sweep sets the learning rate."""
        return self.rate_of or self.name

    @property
    def starts_from(self) -> str | None:
        """Name of the arm from scratch whose model it grows from."""
        return f"{self.family}_{self.grow_from['size']}" if self.grow_from else None

    @property
    def compared_with(self) -> str:
        """Name of the baseline."""
        return self.baseline or f"{self.family}_{self.size}"


def _pairs(choices: Mapping[str, str | list[str]]) -> Iterator[tuple[str, str]]:
    """Yield each arm with each of those that it is compared with."""
    for name, others in choices.items():
        yield from ((name, other) for other in ([others] if isinstance(others, str) else others))


class Study:
    """The contents of study.yaml, whose comments describe its keys. Raises UserError if it is not valid."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        try:
            self.base: Mapping[str, Any] = values["base"]
            self.families: Mapping[str, Any] = values["families"]
            self.rates: Mapping[str, list[float]] = values["rates"]
            self.chosen_rates: Mapping[str, float] = values["chosen_rates"] or {}
            self.schedule: Mapping[str, float] = values["schedule"]
            self.save_interval: int = values["save_interval"]
            self.seeds: Mapping[str, int] = values["seeds"]
            self.max_seeds: Mapping[float, int] = values.get("max_seeds", {})
            self.better_baselines: Mapping[str, str] = values.get("better_baselines", {})
            self.choices = list(_pairs(values.get("choices", {})))
            self.answer: Mapping[str, list[str]] = values.get("answer", {})
            self.machine = _machine(values.get("machine", {}))
            self.arms = {arm.name: arm for arm in map(self._arm, values["arms"])}
            main = [arm.name for arm in self.arms.values() if arm.main]
            self.at_a_glance: Sequence[str] = values.get("at_a_glance", main)
        except KeyError as error:
            raise UserError(f"study: the key {error} is missing") from None
        names = {
            name for arm in self.arms.values() for name in (arm.tuned_by, arm.compared_with, arm.starts_from) if name
        }
        names |= {*self.chosen_rates, *self.at_a_glance, *itertools.chain(*self.answer.values(), *self.choices)}
        names |= {*self.better_baselines, *self.better_baselines.values()}
        if unknown := sorted(names - {*self.arms}):
            raise UserError(
                f"study: grow_from, rate_of, baseline, better_baselines, choices, answer, at_a_glance or chosen_rates "
                f"need arms that do not exist: {unknown}"
            )

    @classmethod
    def read(cls, path: Path) -> "Study":
        """Read the study from a file."""
        return cls(yaml.safe_load(path.read_text()))

    def _arm(self, values: Mapping[str, Any]) -> Arm:
        known = {field.name for field in fields(Arm)}
        if unknown := sorted(set(values) - known):
            raise UserError(f"study: arm {values.get('name')}: unknown keys {unknown}; known are {sorted(known)}")
        name = values.get("name") or f"{values['family']}_{values['size']}"
        seeds = self.seeds["main" if values.get("main") else "other"]
        rates = self.rates[values["family"]]
        try:
            arm = Arm(**{"seeds": seeds, "topic": "scratch", "rates": rates, **values, "name": name})
        except TypeError as error:
            raise UserError(f"study: arm {name}: {error}") from None
        if bool(arm.grow_from) != bool(arm.stages) or arm.schedule not in SCHEDULES:
            raise UserError(
                f"study: arm {name}: grow_from and stages belong together, and schedule is one of {SCHEDULES}"
            )
        return arm

    def seeds_at(self, arm: Arm, budget: float) -> range:
        """Return the seeds of an arm's runs at a budget; `max_seeds` limits them at costly ones."""
        return range(1, min(arm.seeds, self.max_seeds.get(budget, arm.seeds)) + 1)

    def model(self, family: str, size: str) -> dict[str, Any]:
        """Return the `model` section of a size."""
        try:
            return {**self.base["model"], **self.families[family]["model"], **self.families[family]["sizes"][size]}
        except KeyError as error:
            raise UserError(f"study: unknown family or size: {error} of {family} {size}") from None

    def steps(self, family: str, size: str, budget: float) -> int:
        """Return the number of steps that a budget pays for."""
        return max(1, round(budget * non_embedding(self.model_config(family, size)) / self.step_tokens))

    def model_config(self, family: str, size: str) -> ModelConfig:
        """Return the model of a size. Raises ConfigError if it is not valid."""
        return ModelConfig(**self.model(family, size))

    @property
    def step_tokens(self) -> int:
        """Tokens in one step."""
        return int(self.base["training"]["global_batch_size"] * self.base["training"]["seq_length"])

    def step_flops(self, family: str, size: str) -> float:
        """Return the FLOPs of one step."""
        per_token = training_flops(self.model_config(family, size), self.base["training"]["seq_length"])
        return float(per_token * self.step_tokens)


def non_embedding(model: ModelConfig) -> int:
    """Count the parameters without the embedding and an untied output layer."""
    copies = 2 if model.untie_embeddings_and_output_weights else 1
    return parameter_count(model) - copies * model.padded_vocab_size * model.hidden_size


def _machine(values: Mapping[str, Any]) -> Machine:
    try:
        return Machine(**values)
    except TypeError as error:
        raise UserError(f"study: machine: {error}") from None

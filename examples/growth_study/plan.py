"""The runs of the study: one for each arm, budget, learning rate and seed, and the small runs that they grow from."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from runs import Run
from study import Arm, Study

from megatron_tf.config import ModelConfig
from megatron_tf.config.grown_model import grown_model
from megatron_tf.config.growth import GrowthStage
from megatron_tf.errors import UserError

SWEEP_SEED = 0
"""Seed of the sweeps. That of final runs starts at 1, so that no rate is chosen on a seed that is reported."""
Part = tuple[str, int]
"""A size and the steps that it is trained for."""


class Plan:
    """The runs of a study."""

    def __init__(self, study: Study) -> None:
        self.study = study

    def sweep(self) -> Iterator[Run]:
        """Yield the runs of each arm at each of the rates, at its first budget, with a seed of their own.

        An arm whose small run has no chosen rate yet is left out.
        """
        for arm in self.study.arms.values():
            if arm.rate_of is None and self._small_rate(arm, 1.0) is not None:
                for rate in arm.rates:
                    yield self.run(arm, arm.budgets[0], rate=rate, seed=SWEEP_SEED, kind="sweep")

    def final(self) -> Iterator[Run]:
        """Yield the final runs of each arm whose rate, and that of its small run, are chosen."""
        for arm in self.study.arms.values():
            rate = self.study.chosen_rates.get(arm.tuned_by)
            if rate is not None and self._small_rate(arm, rate) is not None:
                for budget in arm.budgets:
                    for seed in self.study.seeds_at(arm, budget):
                        yield self.run(arm, budget, rate=rate * arm.rate_factor, seed=seed, kind="final")

    def waiting(self) -> list[str]:
        """Return the arms that have no final runs because a rate is not chosen."""
        planned = {run.arm for run in self.final()}
        return [name for name in self.study.arms if name not in planned]

    def run(self, arm: Arm, budget: float, *, rate: float, seed: int, kind: str) -> Run:
        """Return a run of an arm, with the small run that it grows from as parent."""
        study = self.study
        total = study.steps(arm.family, arm.size, budget)
        flops = total * study.step_flops(arm.family, arm.size)
        steps = total
        parent, growth = None, []
        if arm.grow_from:
            parts = self._parts(arm, flops, budget)
            parent = self._small(arm, parts, budget=budget, rate=rate, seed=seed)
            growth = self._growth(arm, parts, rate=rate)
            steps = sum(part_steps for _, part_steps in parts)
            flops = sum(part_steps * study.step_flops(arm.family, size) for size, part_steps in parts[1:])
            schedule = parent.schedule
        else:
            schedule = self._schedule("wsd" if arm.schedule == "wsd" else "cosine", rate, total)
        first = parent.size if parent else arm.size
        config = self._config(arm.family, first, seed=seed, steps=steps, schedule=schedule)
        if growth:
            config["growth"] = growth
        return Run(
            arm=arm.name,
            family=arm.family,
            size=arm.size,
            kind=kind,
            budget=budget,
            rate=rate,
            seed=seed,
            is_main=arm.main,
            config=config,
            schedule=schedule,
            flops=flops,
            parent=parent,
        )

    def _small_rate(self, arm: Arm, rate: float) -> float | None:
        """Return the rate of an arm's small run; None if it is not chosen. One schedule over all has one rate."""
        if arm.starts_from is None or arm.schedule != "restart":
            return rate
        return self.study.chosen_rates.get(self.study.arms[arm.starts_from].tuned_by)

    def _parts(self, arm: Arm, flops: float, budget: float) -> list[Part]:
        """Return the size and the steps of the small run and of each stage; the last gets the rest of `flops`."""
        study, family = self.study, arm.family
        before = [arm.grow_from or {}, *({"size": stage["to"], **stage} for stage in arm.stages[:-1])]
        parts = [(part["size"], study.steps(family, part["size"], budget * part["budget_ratio"])) for part in before]
        flops -= sum(steps * study.step_flops(family, size) for size, steps in parts)
        last = round(flops / study.step_flops(family, arm.size))
        if last < 1:
            raise UserError(
                f"study: arm {arm.name}: the stages before the last cost more than budget {budget:g} of {arm.size}"
            )
        return [*parts, (arm.size, last)]

    def _small(self, arm: Arm, parts: Sequence[Part], *, budget: float, rate: float, seed: int) -> Run:
        """Return the run that an arm grows from. All arms with the same one share it."""
        assert arm.grow_from is not None
        size, steps = parts[0]
        total = sum(part_steps for _, part_steps in parts)
        small_rate = self._small_rate(arm, rate)
        assert small_rate is not None
        name, schedule = {
            "restart": (f"{arm.family}_{size}", self._schedule("cosine", small_rate, steps)),
            "wsd": (f"{arm.family}_{size}_stable", self._schedule("stable", small_rate, steps)),
            "one_cosine": (f"{arm.family}_{size}_cosine_of_{total}", self._schedule("cosine", small_rate, total)),
        }[arm.schedule]
        return Run(
            arm=name,
            family=arm.family,
            size=size,
            kind="small",
            budget=budget * arm.grow_from["budget_ratio"],
            rate=small_rate,
            seed=seed,
            is_main=arm.main,
            config=self._config(arm.family, size, seed=seed, steps=steps, schedule=schedule),
            schedule=schedule,
            flops=steps * self.study.step_flops(arm.family, size),
        )

    def _growth(self, arm: Arm, parts: Sequence[Part], *, rate: float) -> list[dict[str, Any]]:
        """Return the `growth:` of a run. Raises UserError if a stage does not result in the size that it names."""
        growth: list[dict[str, Any]] = []
        at_step = 0
        for number, stage in enumerate(arm.stages):
            (before, steps), (after, following) = parts[number : number + 2]
            at_step += steps
            old, new = self.study.model(arm.family, before), self.study.model(arm.family, after)
            keys = {"at_step": at_step, **_difference(old, new)}
            keys |= {key: value for key, value in stage.items() if key not in ("to", "budget_ratio")}
            is_last = number == len(arm.stages) - 1
            if arm.schedule == "restart" or (arm.schedule == "wsd" and is_last):
                keys["optimizer"] = self._schedule("cosine" if arm.schedule == "restart" else "decay", rate, following)
            grown = grown_model(ModelConfig(**old), GrowthStage(**keys))
            if stage["to"] != after or grown != ModelConfig(**new):
                raise UserError(
                    f"study: arm {arm.name}: growing {before} to {stage['to']} does not give {after}: {grown}"
                )
            growth.append(keys)
        return growth

    def _schedule(self, style: str, rate: float, steps: int) -> dict[str, Any]:
        """Return the keys of a learning-rate schedule over `steps`: cosine, wsd, or its parts stable and decay."""
        shares, keys = self.study.schedule, {"lr": rate}
        if style != "decay":
            keys["lr_warmup_iters"] = round(shares["warmup_fraction"] * steps)
        if style == "stable":
            return {**keys, "lr_decay_style": "constant"}
        keys |= {"min_lr": shares["min_lr_fraction"] * rate, "lr_decay_iters": steps}
        if style == "cosine":
            return {**keys, "lr_decay_style": "cosine"}
        decay = max(1, round(shares["wsd_decay_fraction"] * steps))
        return {**keys, "lr_decay_style": "WSD", "lr_wsd_decay_iters": decay}

    def _config(self, family: str, size: str, *, seed: int, steps: int, schedule: Mapping[str, Any]) -> dict[str, Any]:
        """Return a configuration of the trainer without paths."""
        config = {section: dict(keys) for section, keys in self.study.base.items()}
        config["model"] = self.study.model(family, size)
        config["training"] |= {"seed": seed, "train_iters": steps}
        config["optimizer"] |= schedule
        config["checkpoint"] = {"save_interval": self.study.save_interval, "keep_last": 1}
        return config


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of `growth:` that turn one model into another."""
    keys = ("qkv_tokens", "proj_tokens", "ffn_tokens", "num_layers")
    growth = {key: new[key] for key in keys if new.get(key) != old.get(key)}
    if new["hidden_size"] != old["hidden_size"]:
        growth["hidden_multiple"] = new["hidden_size"] / old["hidden_size"]
    return growth

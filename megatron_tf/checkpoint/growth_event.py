"""An entry of the key `lineage` in a checkpoint's metadata.json."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.checkpoint.json_object import JsonObject


@dataclass(frozen=True)
class GrowthEvent:
    """One growth or shrinking of the model, during a run or by reshard-checkpoint."""

    step: int
    samples: int
    tokens: int
    kinds: Mapping[str, list[Any]]
    """Kind of tokens -> [old, new]; each is a number, or a list with one number per layer."""
    init: str
    """How new tokens were initialized, as in a stage of `growth`; "shrink" if tokens were dropped, "drop_layers" if
    layers were, "divide_hidden" if the copies of a wider model were merged."""
    seed: int
    inserted_layers: list[int] = field(default_factory=list)
    """Indices of new layers after the growth; only written if there are any."""
    dropped_layers: list[int] = field(default_factory=list)
    """Indices, before the event, of layers that were dropped; only written if there are any."""
    hidden_size: list[int] | None = None
    """[old, new] width; only written if it changed."""

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
            dropped_layers=values.items("dropped_layers") if values.has("dropped_layers") else [],
            hidden_size=_read_widths(values) if values.has("hidden_size") else None,
        )

    def to_json(self) -> dict[str, Any]:
        """Return an entry of the key `lineage`."""
        values = asdict(self)
        for key in ("inserted_layers", "dropped_layers", "hidden_size"):
            if not values[key]:
                del values[key]
        return values


def _read_widths(event: JsonObject) -> list[int]:
    widths = event.items("hidden_size")
    if [type(width) for width in widths] != [int, int] or min(widths) < 1:
        raise CheckpointError(f"{event.source}: {event.path}.hidden_size is {widths!r}, expected [old, new]")
    return widths

"""What both kinds of growth in width have in common."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from megatron_tf.checkpoint.generations import Generations, Run
from megatron_tf.checkpoint.transformed import Normal
from megatron_tf.growth.parts import Part, PartMaker
from megatron_tf.tokenformer.parameters import Parameter


@dataclass(frozen=True, kw_only=True)
class Widening(ABC):
    """Builds the parts of each tensor of a wider model."""

    maker: PartMaker
    generations: Generations
    """Those of the old rows."""
    seed: int
    """The run's seed."""
    stream: str
    """Prefix of the names of the random streams of the noise."""

    @abstractmethod
    def parts(self, old: Parameter, new: Parameter) -> list[Part]:
        """Return the parts of parameter `new` of the wider model, which is `old` in the old one, in row order."""

    def runs(self, old: Parameter) -> list[Run]:
        """Return the generations of the old rows."""
        return self.generations.runs(old.name, old.shape[0])

    def noise(self, old: Parameter, rows: int, *, start: int = 0, copy: int | None = None) -> Normal | None:
        """Return the noise of `rows` rows from `start` on, or of a numbered copy of rows; None if the stage has none.

        Its standard deviation is relative to the initial one of the old parameter.
        """
        std = self.maker.stage.noise * old.initial.std
        if not std:
            return None
        stream = f"{self.stream}.{old.name}" if copy is None else f"{self.stream}.{old.name}.copy{copy}"
        return Normal(stream, seed=self.seed, start=start, stop=start + rows, std=std)

    def ring(self, old: Parameter, rows: int, *, number: int, copies: int) -> list[Normal]:
        """Return noise to add to copy `number` of rows and noise to subtract, which is what is added to the next one
        around a ring of `copies`; empty if the stage has none."""
        noises = (self.noise(old, rows, copy=copy % copies) for copy in (number, number + 1))
        return [noise for noise in noises if noise is not None]

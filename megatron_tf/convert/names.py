"""Names of parameters in another format, as a table: where each module is, and what its tensors are called."""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_tf.config import ModelConfig
from megatron_tf.tokenformer.parameters import Module, Parameter, Role, model_parameters


@dataclass(frozen=True)
class NameTable:
    """Turns (module, role) into a format's names, and those back into our parameters.

    A path may hold `{layer}`, the number of the layer from 0, or `{block}`, `{norm}` and `{head}`, the places in a
    format that numbers what runs one after another: embedding, a transposition, layers, another one, norm, head.
    """

    paths: Mapping[Module, str]
    roles: Mapping[Role, str]

    def name(self, module: Module, role: Role, *, num_layers: int, layer: int = 0) -> str:
        """Return the format's name of a parameter in a model of `num_layers` layers."""
        path = self.paths[module].format(layer=layer, block=layer + 2, norm=num_layers + 3, head=num_layers + 4)
        return f"{path}.{self.roles[role]}"

    def of(self, parameter: Parameter, num_layers: int) -> str:
        """Return the format's name of a parameter of ours, in a model of `num_layers` layers."""
        return self.name(parameter.module, parameter.role, num_layers=num_layers, layer=parameter.layer or 0)

    def parameters(self, model: ModelConfig) -> dict[str, Parameter]:
        """List the parameters of a model by the format's names, in our order."""
        return {self.of(parameter, model.num_layers): parameter for parameter in model_parameters(model).values()}

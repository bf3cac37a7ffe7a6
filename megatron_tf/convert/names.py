"""Tables of parameter names in other formats: the path of each module and the names of its tensors."""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_tf.config import ModelConfig
from megatron_tf.tokenformer.parameters import Module, Parameter, Role, model_parameters


@dataclass(frozen=True)
class NameTable:
    """Maps (module, role) to the names of a format, and those back to our parameters.

    A path may contain `{layer}`, the index of the layer, or `{block}`, `{norm}` and `{head}`, the indices in a format
    that numbers consecutive modules: embedding, a transposition, layers, another transposition, norm, head.
    """

    paths: Mapping[Module, str]
    roles: Mapping[Role, str]

    def name(self, module: Module, role: Role, *, num_layers: int, layer: int = 0) -> str:
        """Return the format's name of the tensor of a module and role, in a model of `num_layers` layers."""
        path = self.paths[module].format(layer=layer, block=layer + 2, norm=num_layers + 3, head=num_layers + 4)
        return f"{path}.{self.roles[role]}"

    def of(self, parameter: Parameter, num_layers: int) -> str:
        """Return the format's name of a parameter of ours, in a model of `num_layers` layers."""
        return self.name(parameter.module, parameter.role, num_layers=num_layers, layer=parameter.layer or 0)

    def parameters(self, model: ModelConfig) -> dict[str, Parameter]:
        """List the parameters of a model by the format's names, in our order."""
        return {self.of(parameter, model.num_layers): parameter for parameter in model_parameters(model).values()}

"""The logical parameters of a model, declared once, from its configuration alone.

A name means one logical tensor, whatever ranks and files it is split over:

    embedding.weight
    layers.{i}.attention.{query,key,value,proj}.{key,value}_tokens     of a plain transformer: .weight
    layers.{i}.ffn.{key,value}_tokens                                  of a plain transformer: ffn.{up,down}.weight
    final_norm.{weight,bias}
    head.weight                                                        untied only

Everything that depends on which parameter it is (decay, initial value, sharding, growth, its name in other formats)
asks its `Parameter`; nothing else reads a name. `tests/unit/test_parameters.py` holds both.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from megatron_tf.config import ModelConfig, ParameterKind
from megatron_tf.tokenformer.initial_values import Initial, normal_rows, value_token_std
from megatron_tf.tokenformer.normalisation import NORMALISATIONS


class Module(StrEnum):
    """What a parameter belongs to: a module's name within its layer, or within the model where it is in none."""

    EMBEDDING = "embedding"
    QUERY = "attention.query"
    KEY = "attention.key"
    VALUE = "attention.value"
    PROJ = "attention.proj"
    FFN = "ffn"
    FFN_UP = "ffn.up"
    FFN_DOWN = "ffn.down"
    FINAL_NORM = "final_norm"
    HEAD = "head"


class Role(StrEnum):
    """Which tensor of its module a parameter is."""

    KEYS = "key_tokens"
    VALUES = "value_tokens"
    WEIGHT = "weight"
    BIAS = "bias"


_ATTENTION: dict[Module, ParameterKind] = {
    Module.QUERY: "qkv",
    Module.KEY: "qkv",
    Module.VALUE: "qkv",
    Module.PROJ: "proj",
}
# whose outputs are added to the residual stream
_ENDS_BRANCH = (Module.PROJ, Module.FFN, Module.FFN_DOWN)


@dataclass(frozen=True)
class Parameter:
    """One logical parameter."""

    name: str
    shape: tuple[int, ...]
    layer: int | None
    """None outside the layers."""
    module: Module
    role: Role
    kind: ParameterKind
    """What a configuration calls it: by it weights decay and parameter tokens are counted."""
    is_sharded: bool
    """Whether tensor-parallel ranks share its rows; otherwise each rank holds all of them."""
    initial: Initial
    decays: bool
    """Whether `optimizer.weight_decay` applies to it, unless its kind has a decay of its own."""

    @property
    def path(self) -> str:
        """The name of its module in the whole model."""
        return _path(self.layer, self.module)

    @property
    def pattern(self) -> str:
        """The name with a star for the layer's number."""
        return self.name if self.layer is None else self.name_in_layer("*")

    @property
    def is_token(self) -> bool:
        """Whether its rows are parameter tokens of a Pattention: those that growth appends to."""
        return self.role in (Role.KEYS, Role.VALUES)

    @property
    def ends_branch(self) -> bool:
        """Whether these are values that are added to the residual stream: zeros there make a layer the identity."""
        return self.role is Role.VALUES and self.module in _ENDS_BRANCH

    def name_in_layer(self, layer: int | str) -> str:
        """Return the name of the same parameter in another layer."""
        return f"{_path(layer, self.module)}.{self.role}"

    def initial_rows(self, seed: int, start: int, stop: int) -> Tensor:
        """Make rows [start, stop) of its initial values under a run's `seed`: fp32, on the CPU."""
        shape = (stop - start, *self.shape[1:])
        std = self.initial.std
        if not std:
            return torch.full(shape, self.initial.constant)
        columns = math.prod(self.shape[1:])
        return normal_rows(self.name, seed=seed, start=start, stop=stop, columns=columns, std=std).view(shape)


def model_parameters(config: ModelConfig) -> dict[str, Parameter]:
    """List every parameter of the whole model by name, in the one order that files and sums over parameters follow.

    It is the order of `TokenFormer(config).named_parameters()`.
    """
    return {parameter.name: parameter for parameter in _declared(config)}


def layer_parameters(config: ModelConfig, layer: int) -> Iterator[Parameter]:
    """List the parameters of one layer, in order."""
    ffn_rows = config.token_counts("ffn")[layer]
    # the order of these is the order of a layer's modules, and so of names
    if config.layer == "tokenformer":
        rows = {module: config.token_counts(kind)[layer] for module, kind in _ATTENTION.items()}
        rows[Module.FFN] = ffn_rows
        roles = [Role.KEYS, Role.VALUES]
    else:
        rows = dict.fromkeys(_ATTENTION, config.hidden_size)
        rows |= {Module.FFN_UP: ffn_rows, Module.FFN_DOWN: ffn_rows}
        roles = [Role.WEIGHT]
    for module, num_rows in rows.items():
        for role in roles:
            yield _projection(config, layer=layer, module=module, role=role, rows=num_rows)


def key_tokens(config: ModelConfig) -> dict[str, Parameter]:
    """List the key tokens of every Pattention, by its path; a plain transformer has none."""
    return {parameter.path: parameter for parameter in _declared(config) if parameter.role is Role.KEYS}


def initial_taus(config: ModelConfig) -> dict[str, float]:
    """Return the temperature of every Pattention of a new model, by its path."""
    norm = NORMALISATIONS[config.norm_activation]
    return {path: norm.initial_tau(keys.shape[0]) for path, keys in key_tokens(config).items()}


def _declared(config: ModelConfig) -> Iterator[Parameter]:
    yield _vocabulary(config, Module.EMBEDDING, "embedding")
    for layer in range(config.num_layers):
        yield from layer_parameters(config, layer)
    for role, constant in ((Role.WEIGHT, 1.0), (Role.BIAS, 0.0)):
        yield Parameter(
            name=f"{Module.FINAL_NORM}.{role}",
            shape=(config.hidden_size,),
            layer=None,
            module=Module.FINAL_NORM,
            role=role,
            kind="final_norm",
            is_sharded=False,
            initial=Initial(constant=constant),
            decays=False,
        )
    if config.untie_embeddings_and_output_weights:
        yield _vocabulary(config, Module.HEAD, "head")


def _vocabulary(config: ModelConfig, module: Module, kind: ParameterKind) -> Parameter:
    return Parameter(
        name=f"{module}.{Role.WEIGHT}",
        shape=(config.padded_vocab_size, config.hidden_size),
        layer=None,
        module=module,
        role=Role.WEIGHT,
        kind=kind,
        is_sharded=True,
        initial=Initial(std=config.init_method_std),
        decays=True,
    )


def _projection(config: ModelConfig, *, layer: int, module: Module, role: Role, rows: int) -> Parameter:
    # in a plain transformer, the two weights whose products are added to the residual stream are drawn as values are
    is_value = role is Role.VALUES or (role is Role.WEIGHT and module in _ENDS_BRANCH)
    std = value_token_std(config.num_layers, config.hidden_size) if is_value else config.init_method_std
    return Parameter(
        name=f"{_path(layer, module)}.{role}",
        shape=(rows, config.hidden_size),
        layer=layer,
        module=module,
        role=role,
        kind=_ATTENTION.get(module, "ffn"),
        is_sharded=True,
        initial=Initial(std=std),
        decays=True,
    )


def _path(layer: int | str | None, module: Module) -> str:
    return str(module) if layer is None else f"layers.{layer}.{module}"

"""The logical parameters of a model, declared once, from its configuration alone.

A name identifies one logical tensor, regardless of the ranks and files it is sharded over:

    embedding.weight
    layers.{i}.attention.{query,key,value,proj}.{key,value}_tokens     of a plain transformer: .weight
    layers.{i}.ffn.{key,value}_tokens                                  of a plain transformer: ffn.{up,down}.weight
    layers.{i}.ffn.gate.weight                                         with mlp: swiglu
    layers.{i}.{attention,ffn}_norm.weight                             with norm: rmsnorm
    layers.{i}.attention.{query,key}_norm.weight                       with qk_norm
    final_norm.{weight,bias}                                           with norm: rmsnorm no bias
    head.weight                                                        only if untied

Every property of a parameter (weight decay, initial values, sharding, growth, its name in other formats) is read from
its `Parameter`; no other code parses names. `tests/unit/test_parameters.py` checks both.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

import torch
from torch import Tensor

from megatron_tf.config import ModelConfig, ParameterKind
from megatron_tf.tokenformer.initial_values import Initial, normal_rows, value_token_std
from megatron_tf.tokenformer.normalization import NORMALIZATIONS


class Module(StrEnum):
    """The module of a parameter, by its name within the layer, or within the model if it is outside the layers."""

    EMBEDDING = "embedding"
    ATTENTION_NORM = "attention_norm"
    QUERY = "attention.query"
    KEY = "attention.key"
    VALUE = "attention.value"
    PROJ = "attention.proj"
    QUERY_NORM = "attention.query_norm"
    KEY_NORM = "attention.key_norm"
    FFN_NORM = "ffn_norm"
    FFN = "ffn"
    FFN_GATE = "ffn.gate"
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
_HIDDEN_UNITS = (Module.FFN_GATE, Module.FFN_UP, Module.FFN_DOWN)
# modules whose outputs are added to the residual stream
_ENDS_BRANCH = (Module.PROJ, Module.FFN, Module.FFN_DOWN)


@dataclass(frozen=True)
class Parameter:
    """A logical parameter of the whole model, and what the trainer needs to know of it."""

    name: str
    shape: tuple[int, ...]
    layer: int | None
    """None for parameters outside the layers."""
    module: Module
    role: Role
    kind: ParameterKind
    """Its kind in the configuration, which sets weight decay and numbers of parameter tokens by kind."""
    is_sharded: bool
    """Whether its rows are sharded over tensor-parallel ranks rather than replicated."""
    initial: Initial
    decays: bool
    """Whether `optimizer.weight_decay` applies to it, unless `optimizer.weight_decay_by_kind` sets its kind."""

    @property
    def path(self) -> str:
        """Return the name of its module in the whole model."""
        return _path(self.layer, self.module)

    @property
    def pattern(self) -> str:
        """Return its name with a star in place of the layer number."""
        return self.name if self.layer is None else self.name_in_layer("*")

    @property
    def has_units(self) -> bool:
        """Return whether growth appends to its rows: parameter tokens, or the hidden units of an MLP."""
        return self.role in (Role.KEYS, Role.VALUES) or self.module in _HIDDEN_UNITS

    @property
    def units_path(self) -> str:
        """Return the path of the Pattention or MLP whose units its rows are, for a parameter that has units."""
        return self.path if self.role in (Role.KEYS, Role.VALUES) else _path(self.layer, Module.FFN)

    @property
    def writes_output(self) -> bool:
        """Return whether its rows are what a projection or MLP adds up for its output: values, or a down projection."""
        return self.role is Role.VALUES or self.module is Module.FFN_DOWN

    @property
    def ends_branch(self) -> bool:
        """Return whether its rows add up to an output that is added to the residual stream.

        If all of these are zero, the layer is the identity.
        """
        return self.module in _ENDS_BRANCH and self.role is not Role.KEYS

    @property
    def is_transposed(self) -> bool:
        """Return whether it is a weight with a row for each of its inputs, instead of its outputs as torch has them."""
        return self.role is Role.WEIGHT and self.module in _ENDS_BRANCH

    def name_in_layer(self, layer: int | str) -> str:
        """Return the name of the same parameter in another layer."""
        return f"{_path(layer, self.module)}.{self.role}"

    def initial_rows(self, seed: int, start: int, stop: int) -> Tensor:
        """Draw rows [start, stop) of its initial values for the run's `seed`: fp32, on the CPU."""
        shape = (stop - start, *self.shape[1:])
        std = self.initial.std
        if not std:
            return torch.full(shape, self.initial.constant)
        columns = math.prod(self.shape[1:])
        return normal_rows(self.name, seed=seed, start=start, stop=stop, columns=columns, std=std).view(shape)


def model_parameters(config: ModelConfig) -> dict[str, Parameter]:
    """Return every parameter of the whole model by name, in canonical order.

    Files and sums over parameters follow this order, which is that of `TokenFormer(config).named_parameters()`.
    """
    return {parameter.name: parameter for parameter in _declared(config)}


def layer_parameters(config: ModelConfig, layer: int) -> Iterator[Parameter]:
    """Yield the parameters of one layer in canonical order."""
    # this order is the order of a layer's modules, and so of its names
    if config.layer == "transformer":
        yield from _transformer_layer(config, layer)
        return
    rows = {module: config.token_counts(kind)[layer] for module, kind in _ATTENTION.items()}
    rows[Module.FFN] = config.token_counts("ffn")[layer]
    for module, num_rows in rows.items():
        for role in (Role.KEYS, Role.VALUES):
            yield _projection(config, layer=layer, module=module, role=role, rows=num_rows)


def key_tokens(config: ModelConfig) -> dict[str, Parameter]:
    """Return the key tokens of every Pattention by module path; a plain transformer has none."""
    return {parameter.path: parameter for parameter in _declared(config) if parameter.role is Role.KEYS}


def initial_taus(config: ModelConfig) -> dict[str, float]:
    """Return the initial temperature of every Pattention by module path."""
    norm = NORMALIZATIONS[config.norm_activation]
    return {path: norm.initial_tau(keys.shape[0]) for path, keys in key_tokens(config).items()}


def _transformer_layer(config: ModelConfig, layer: int) -> Iterator[Parameter]:
    has_norms, is_gated = config.norm == "rmsnorm", config.mlp == "swiglu"
    projection = partial(_projection, config, layer=layer, role=Role.WEIGHT)
    if has_norms:
        yield _norm(Module.ATTENTION_NORM, layer=layer, size=config.hidden_size)
    for module in _ATTENTION:
        yield projection(module=module, rows=config.hidden_size)
    if config.qk_norm:
        for module in (Module.QUERY_NORM, Module.KEY_NORM):
            yield _norm(module, layer=layer, size=config.head_dim)
    if has_norms:
        yield _norm(Module.FFN_NORM, layer=layer, size=config.hidden_size)
    for module in _HIDDEN_UNITS if is_gated else (Module.FFN_UP, Module.FFN_DOWN):
        yield projection(module=module, rows=config.token_counts("ffn")[layer])


def _declared(config: ModelConfig) -> Iterator[Parameter]:
    yield _vocabulary(config, Module.EMBEDDING, "embedding")
    for layer in range(config.num_layers):
        yield from layer_parameters(config, layer)
    for role in (Role.WEIGHT, Role.BIAS) if config.norm == "layernorm" else (Role.WEIGHT,):
        yield _norm(Module.FINAL_NORM, role=role, size=config.hidden_size)
    if config.untie_embeddings_and_output_weights:
        yield _vocabulary(config, Module.HEAD, "head")


def _norm(module: Module, *, layer: int | None = None, role: Role = Role.WEIGHT, size: int) -> Parameter:
    return Parameter(
        name=f"{_path(layer, module)}.{role}",
        shape=(size,),
        layer=layer,
        module=module,
        role=role,
        kind="final_norm" if layer is None else "norm",
        is_sharded=False,
        initial=Initial(constant=1.0 if role is Role.WEIGHT else 0.0),
        decays=False,
    )


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
    # in a plain transformer, the two weights that write to the residual stream are initialized like values
    is_value = role is Role.VALUES or (role is Role.WEIGHT and module in _ENDS_BRANCH)
    std = value_token_std(config.num_layers, config.hidden_size) if is_value else config.init_method_std
    if is_value and module in _ENDS_BRANCH and config.output_init_method_std is not None:
        std = config.output_init_method_std
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

"""What the tensors of a complete model are, and whether a checkpoint holds them."""

import torch

from megatron_tf.checkpoint.derived import Checkpoint
from megatron_tf.checkpoint.format import CheckpointError
from megatron_tf.config import ModelConfig

Shape = tuple[int, ...]
MODULES = {
    **{f"attention.{part}": "qkv" for part in ("query", "key", "value")},
    "attention.proj": "proj",
    "ffn": "ffn",
}
"""Pattentions of a layer, and the kind of their tokens."""
_GROUPS = ("model", "exp_avg", "exp_avg_sq")
"""Groups that hold a tensor for each parameter; a later writer may add others."""


def model_shapes(model: ModelConfig) -> dict[str, Shape]:
    """The global shape of each logical parameter, in the model's order, without building the model."""
    width = model.hidden_size
    shapes: dict[str, Shape] = {"embedding.weight": (model.padded_vocab_size, width)}
    for layer in range(model.num_layers):
        shapes |= _layer_shapes(model, layer)
    shapes |= {"final_norm.weight": (width,), "final_norm.bias": (width,)}
    if model.untie_embeddings_and_output_weights:
        shapes["head.weight"] = (model.padded_vocab_size, width)
    return shapes


def check_complete(checkpoint: Checkpoint) -> ModelConfig:
    """The model of a checkpoint that holds all of it: the tensors, in fp32, and the tau of each Pattention.

    Raises CheckpointError naming the first one that is missing, too many or of another shape.
    """
    where = checkpoint.directory
    model = checkpoint.record.model
    # before names are made for each layer: their number may be absurd
    if model.num_layers > len(checkpoint.names("model")):
        raise CheckpointError(
            f"{where} is not a complete model: model.num_layers is {model.num_layers:,}, and it holds "
            f"{len(checkpoint.names('model')):,} tensors"
        )
    expected = model_shapes(model)
    for group in _GROUPS:
        if group == "model" or group in checkpoint.groups():
            _check_group(checkpoint, group, expected)
    _check_tau(checkpoint, model)
    return model


def _layer_shapes(model: ModelConfig, layer: int) -> dict[str, Shape]:
    width, name = model.hidden_size, f"layers.{layer}"
    if model.layer == "tokenformer":
        return {
            f"{name}.{module}.{side}_tokens": (model.token_counts(kind)[layer], width)
            for module, kind in MODULES.items()
            for side in ("key", "value")
        }
    shapes: dict[str, Shape] = {f"{name}.{module}.weight": (width, width) for module in MODULES if module != "ffn"}
    hidden_units = model.token_counts("ffn")[layer]
    return shapes | {f"{name}.ffn.{side}.weight": (hidden_units, width) for side in ("up", "down")}


def _check_group(checkpoint: Checkpoint, group: str, expected: dict[str, Shape]) -> None:
    where, names = checkpoint.directory, set(checkpoint.names(group))
    for differing, verb in ((expected.keys() - names, "lacks"), (names - expected.keys(), "also has")):
        if differing:
            more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
            raise CheckpointError(f"{where} is not a complete model: its {group!r} {verb} {min(differing)}{more}")
    for name, shape in expected.items():
        found, dtype = checkpoint.shape(group, name), checkpoint.dtype(group, name)
        if found != shape or dtype != torch.float32:
            raise CheckpointError(
                f"{where} is not the model of its metadata: {group} {name} is {list(found)} {dtype}, expected "
                f"{list(shape)} {torch.float32}"
            )


def _check_tau(checkpoint: Checkpoint, model: ModelConfig) -> None:
    modules: set[str] = set()
    if model.layer == "tokenformer":
        modules = {f"layers.{layer}.{module}" for layer in range(model.num_layers) for module in MODULES}
    differing = modules ^ checkpoint.record.tau.keys()
    if differing:
        raise CheckpointError(f"{checkpoint.directory}: tau is not there for each projection: {min(differing)}")

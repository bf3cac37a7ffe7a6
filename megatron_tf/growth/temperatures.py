"""The temperature of each Pattention after a growth."""

from collections.abc import Mapping, Sequence

from megatron_tf.config import GrowthStage, LayerSource, ModelConfig
from megatron_tf.growth.utility import Utility
from megatron_tf.tokenformer.normalization import NORMALIZATIONS
from megatron_tf.tokenformer.parameters import initial_taus, key_tokens


def grown_taus(
    old_tau: Mapping[str, float],
    model: ModelConfig,
    grown: ModelConfig,
    *,
    stage: GrowthStage,
    layers: Sequence[LayerSource],
    utility: Utility | None = None,
) -> dict[str, float]:
    """Return tau by module path: kept, but for modules whose new tokens have keys that are not zero, and new layers
    that are the identity.

    `utility` is measured for `duplicate_by_utility`.
    """
    norm = NORMALIZATIONS[model.norm_activation]
    initial = initial_taus(grown)
    old_keys = key_tokens(model)
    by_place = {(keys.layer, keys.module): keys for keys in old_keys.values()}
    taus = {}
    for path, keys in key_tokens(grown).items():
        assert keys.layer is not None
        source = layers[keys.layer]
        old = by_place[source.layer, keys.module]
        has_grown = keys.shape[0] != old.shape[0]
        if (source.is_new and stage.layer_init == "identity") or (stage.init == "random" and has_grown):
            taus[path] = initial[path]
            continue
        taus[path] = old_tau[old.path]
        # m copies multiply the L2 norm by sqrt(m), and the sum of a softmax by m
        if stage.init in ("duplicate", "rotated_key"):
            taus[path] *= (keys.shape[0] // old.shape[0]) ** (1 / norm.tau_power)
        elif stage.init == "zero_value":
            taus[path] *= initial[path] / norm.initial_tau(old.shape[0])
        elif utility is not None and has_grown:
            taus[path] *= utility.norm_factors[path]
    return taus

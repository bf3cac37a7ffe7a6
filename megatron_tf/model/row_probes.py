"""Set the probes of parameter tokens in a model."""

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_tf.layers.linear import MLP
from megatron_tf.layers.pattention import Pattention
from megatron_tf.layers.row_probe import RowProbe
from megatron_tf.model.contributions import modules_with_units
from megatron_tf.model.tokenformer import TokenFormer


@contextmanager
def probe_rows(*stages: TokenFormer, enabled: bool = True) -> Iterator[dict[str, RowProbe]]:
    """Probe every Pattention and MLP of the stages within the context; yield the probes by module path.

    If not `enabled`, there are none.
    """
    modules: dict[str, Pattention | MLP] = {}
    for stage in stages if enabled else ():
        modules |= modules_with_units(stage)
    probes = {path: RowProbe() for path in modules}
    for path, module in modules.items():
        module.probe = probes[path]
    try:
        yield probes
    finally:
        for module in modules.values():
            module.probe = None

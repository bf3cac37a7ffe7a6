"""The utility of the old tokens, in a run that grows by duplicate_by_utility."""

from pathlib import Path

from megatron_tf.checkpoint.interface import Checkpoint
from megatron_tf.checkpoint.record import RunRecord
from megatron_tf.config import ConfigError, GrowthStage, RunConfig
from megatron_tf.errors import UserError
from megatron_tf.growth.utility import Utility, measure_utility
from megatron_tf.model.samples import samples_for
from megatron_tf.parallel.mesh import Mesh


def utility_on_all_ranks(checkpoint: Checkpoint, stage: GrowthStage, mesh: Mesh) -> Utility:
    """Measure the utility on rank 0, and return it on every rank, so that all of them grow alike. Collective.

    Raises the error of rank 0, a UserError or an OSError, on every rank.
    """
    found: Utility | UserError | OSError | None = None
    if mesh.is_first_rank:
        try:
            found = measure_utility(checkpoint, stage)
        except (UserError, OSError) as error:
            found = error
    found = mesh.from_first_rank(found)
    if isinstance(found, Exception):
        raise found
    assert found is not None
    return found


def check_utility_data(config: RunConfig, mesh: Mesh, *, record: RunRecord, first: int) -> None:
    """Check that the data of the stages from `first` on can be read and belong to the run's tokenizer. Collective.

    Raises ConfigError on every rank if rank 0, which measures on them, finds an error.
    """
    prefixes = {number: stage.utility_data for number, stage in enumerate(config.growth) if number >= first}
    for number, prefix in prefixes.items():
        if prefix is None:
            continue
        failure = None
        try:
            if mesh.is_first_rank:
                samples_for(record, Path(prefix), 1)
        except (UserError, OSError) as error:
            failure = f"growth[{number}]: utility_data: {error}"
        if reason := mesh.first_failure(failure):
            raise ConfigError(reason)

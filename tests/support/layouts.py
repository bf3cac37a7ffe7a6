"""Layouts of up to eight ranks, and configurations of the small run on them."""

import numpy as np

from tests.support.training import small_run

LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2), (2, 2, 2)]
CASES = [(layout, sp) for layout in LAYOUTS for sp in (False, True) if layout[0] > 1 or not sp]


def layout_config(layout, sequence_parallel=False, untied=False, schedule="1f1b", **sections):
    """Configure the small run on `layout` = (tensor, pipeline, data), with two micro-batches per step."""
    tensor, pipeline, data = layout
    parallel = {
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "data_parallel_size": data,
        "sequence_parallel": sequence_parallel,
        "pipeline_schedule": schedule,
    } | sections.pop("parallel", {})
    model = {"untie_embeddings_and_output_weights": untied} | sections.pop("model", {})
    training = {"micro_batch_size": max(1, 4 // data)} | sections.pop("training", {})
    return small_run(model=model, training=training, parallel=parallel, **sections)


def whole_model(layout, untied, gradients_by_rank):
    """Merge the ranks' gradients into one per logical parameter; all ranks of a stage must have reported the same."""
    _, pipeline, _ = layout
    per_stage = len(gradients_by_rank) // pipeline
    whole = {}
    for stage in range(pipeline):
        first, *others = gradients_by_rank[stage * per_stage : (stage + 1) * per_stage]
        for name, gradient in first.items():
            assert all(np.array_equal(gradient, other[name]) for other in others), name
            whole[name] = whole[name] + gradient if name in whole else gradient
    assert ("head.weight" in whole) == untied
    return whole

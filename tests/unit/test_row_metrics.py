"""What a step measures of old and new rows: updates, contributions, dead tokens; and how they are written."""

import contextlib
import json

import pytest
import torch

from megatron_tf.checkpoint.generations import Generation, Generations, Run
from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.checkpoint.summary import differences
from megatron_tf.commands import pretrain
from megatron_tf.config import OptimizerConfig
from megatron_tf.growth.row_groups import ContributionSums, RowGroup, RowGroups
from megatron_tf.layers.pattention import Pattention
from megatron_tf.layers.row_probe import MOST_ROWS, RowProbe
from megatron_tf.model.row_probes import probe_rows
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.parallel.sharding import RowShard
from megatron_tf.tokenformer.parameters import model_parameters
from megatron_tf.training.observability.observer import Observer
from megatron_tf.training.observability.row_metrics import RowMetrics, as_scalars, as_section, describe
from megatron_tf.training.step.optimizer import Optimizer
from megatron_tf.training.step.state import build_state
from tests.support.commands import make_run
from tests.support.runs import derive_run
from tests.support.training import small_run

NAME, VALUES, PATH = "layers.0.ffn.key_tokens", "layers.0.ffn.value_tokens", "layers.0.ffn"
MODEL = small_run().model
GENERATIONS = [
    Generation(exp_avg_steps=9, exp_avg_sq_steps=9, step_scale=0.5, lr_scale=0.25),
    Generation(growth=1, exp_avg_steps=4, exp_avg_sq_steps=2, rewarmup_iters=9, rewarmup_done=1),
    Generation(growth=2),
    Generation(growth=3, lr_scale=0.0),
]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1, 30.0])
def test_the_norm_of_an_update_is_that_of_the_difference_it_makes(weight_decay):
    generator = torch.Generator().manual_seed(0)
    start, gradient, first, second = torch.randn(4, 8, 3, generator=generator, dtype=torch.float64)
    parameter = torch.nn.Parameter(start.clone())
    shard = RowShard(NAME, (8, 3), 0, 8, parameter.detach(), True)
    optimizer = Optimizer(
        parameters=[parameter],
        shards=[shard],
        declared={NAME: model_parameters(MODEL)[NAME]},
        config=OptimizerConfig(lr=1e-2, weight_decay=weight_decay, clip_grad=0.1),
        mesh=Mesh(torch.device("cpu")),
    )
    optimizer.generations = Generations.of_runs({NAME: [Run(2, generation) for generation in GENERATIONS]})
    optimizer.moments("exp_avg")[0].tensor.copy_(first)
    optimizer.moments("exp_avg_sq")[0].tensor.copy_(second.square())
    parameter.grad = gradient
    optimizer.step(1e-2)
    change = parameter.detach() - start
    slices = [slice(2 * place, 2 * place + 2) for place in range(4)]
    norms = optimizer.update_norms([(0, rows) for rows in slices])
    assert list(map(float, norms)) == pytest.approx([float(change[rows].norm()) for rows in slices], rel=1e-12)
    assert not change[6:].any()
    assert change[:6].all()


def groups_of(*runs):
    """The groups of a model that has grown in one module only."""
    named = {
        name: [Run(count, Generation(growth=growth)) for growth, count in runs]
        if name in (NAME, VALUES)
        else [Run(parameter.shape[0], Generation())]
        for name, parameter in model_parameters(MODEL).items()
    }
    return RowGroups(model_parameters(MODEL), Generations.of_runs(named))


def dead_tokens(squares, *runs):
    """Growth -> dead tokens of a module with these squared contributions."""
    groups = groups_of(*runs)
    values = torch.tensor(squares, dtype=torch.float64)
    totals = ContributionSums(groups, [PATH], values.device)({PATH: values})
    for growth in {growth for growth, _ in runs}:
        first = sum(count for each, count in runs if each < growth)
        expected = sum(squares[first : first + dict(runs)[growth]])
        assert float(totals[groups.keys.index(RowGroup(growth, "ffn", 0)), 0]) == pytest.approx(expected)
    return {key.growth: int(dead) for key, (_, dead) in zip(groups.keys, totals.tolist(), strict=True) if dead}


def test_a_token_is_dead_below_a_hundredth_of_the_median():
    assert dead_tokens([1.0, 0.98e-4, 1.02e-4, 4.0, 1.0], (0, 2), (1, 3)) == {0: 1}
    assert dead_tokens([9.0, 1.0, 1.0, 0.9e-4, 0.0], (0, 3), (1, 2)) == {1: 2}


def test_tokens_that_never_fire_are_dead_even_if_they_are_the_majority():
    assert dead_tokens([1.0, 0.0, 0.0, 0.0], (0, 1), (1, 3)) == {1: 3}
    assert dead_tokens([0.0, 0.0, 0.0, 0.0], (0, 1), (1, 3)) == {0: 1, 1: 3}


def test_a_zero_key_never_fires():
    layer, probe = Pattention(8, 8, num_tokens=6, norm_activation="l2_norm_gelu"), RowProbe()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        layer.key_tokens[4:] = 0
    layer.probe = probe
    layer(torch.randn(5, 8, generator=generator))
    assert [bool(norm) for norm in probe.norms] == [True] * 4 + [False] * 2


@pytest.mark.parametrize("rows", [5, 256, 257, 512, 4096])
def test_a_probe_reads_a_bounded_part_of_the_first_micro_batch(rows):
    generator = torch.Generator().manual_seed(0)
    weights, values = torch.rand(rows, 3, generator=generator), torch.rand(3, 2, generator=generator)
    probe = RowProbe()
    probe.measure(weights, values)
    probe.measure(weights + 1, values)
    assert min(rows, MOST_ROWS / 3) <= probe.num_rows <= MOST_ROWS
    expected = weights.square().mean(0) * values.square().sum(1)
    found = probe.norms.square() / probe.num_rows
    torch.testing.assert_close(found, expected, rtol=1e-6 if rows <= 256 else 0.3, atol=0)


def test_a_probe_reads_all_samples():
    probe, sample = RowProbe(), torch.arange(4096) % 4  # [S, 4] flattened
    probe.measure(torch.nn.functional.one_hot(sample, 4).float(), torch.ones(4, 1))
    assert (probe.norms.square() > 0.8 * probe.num_rows / 4).all()


def test_no_probe_stays_set_after_a_failure():
    model = build_state(small_run(), Mesh(torch.device("cpu"))).model
    projections = model.pattentions().values()
    with contextlib.suppress(RuntimeError), probe_rows(model) as probes:
        assert [projection.probe for projection in projections] == list(probes.values())
        assert len(probes) == 5 * 3
        raise RuntimeError
    assert not any(projection.probe for projection in projections)


def test_groups_cover_the_rows_of_the_layers_once():
    groups = groups_of((0, 50), (2, 14))
    assert groups.are_new
    assert not groups_of((0, 64)).are_new
    counts = dict(zip(groups.keys, groups.tokens, strict=True))
    assert counts[RowGroup(0, "ffn", 0)] == 50
    assert counts[RowGroup(2, "ffn", 0)] == 14
    assert sum(counts.values()) == 3 * (3 * 32 + 24 + 64)
    growths = [(rows, groups.keys[index].growth) for rows, index in groups.slices(NAME, 32, 64)]
    assert growths == [(slice(0, 18), 0), (slice(18, 32), 2)]
    assert list(groups.slices("embedding.weight", 0, 8)) == []


def row(growth, kind, layer, *, tokens=4, **values):
    norms = dict.fromkeys(("grad_norm", "update_norm", "contribution"), 3.0) | values
    return RowMetrics(growth=growth, kind=kind, layer=layer, tokens=tokens, dead=int(bool(tokens)), **norms)


ROWS = [
    row(0, "ffn", 0),
    row(0, "ffn", 1, grad_norm=4.0, update_norm=1 / 3),
    row(0, "proj", 0, tokens=0),
    row(1, "ffn", 1, contribution=0.0, grad_norm=0.0, update_norm=0.0),
]


def test_the_metrics_file_has_each_layer():
    assert as_section(ROWS)["growth_0"]["ffn"] == {
        "layers": [0, 1],
        "grad_norm": [3.0, 4.0],
        "update_norm": [3.0, 0.333333],
        "tokens": [4, 4],
        "contribution": [3.0, 3.0],
        "dead": [1, 1],
    }
    assert as_section(ROWS)["growth_0"]["proj"] == {"layers": [0], "grad_norm": [3.0], "update_norm": [3.0]}
    assert as_section(ROWS)["growth_1"]["ffn"]["layers"] == [1]


def test_scalars_are_by_kind():
    scalars = as_scalars(ROWS)
    assert scalars["rows/ffn/grad_norm/growth_0"] == 5.0
    assert scalars["rows/ffn/dead/growth_0"] == 2
    assert scalars["rows/ffn/tokens/growth_1"] == 4
    assert "rows/proj/dead/growth_0" not in scalars
    assert len(scalars) == 5 + 5 + 2


def test_the_log_line_says_what_is_new():
    text = describe([row(0, "ffn", 0, grad_norm=4.0), row(2, "qkv", 0, contribution=4.0, tokens=1200)])
    assert text == (
        "rows of growth 2: 0.6 of the gradient, 0.71 of the update, 0.8 of the contribution; 1 of 1,200 tokens are dead"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_run(
        tmp_path_factory.mktemp("rows"), training={"train_iters": 6}, optimizer={"lr_decay_iters": 6, "lr": 1e-3}
    )


class Inspected(Observer):
    """Keeps the number of each step whose rows were measured."""

    def __init__(self):
        self.steps = []

    def on_step(self, report):
        self.steps += [report.step] if report.rows else []


def run_of(folder, name, **sections):
    """(metrics by step, numbers of the steps whose rows were measured) of a run that grows after its third step."""
    stage, inspected = {"at_step": 3, "ffn_tokens": 96, "insert_layers": [1]}, Inspected()
    config = derive_run(folder, name, growth=[stage], **sections)
    assert pretrain.main([str(config)], observers=[inspected]) == 0
    lines = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "loss" in line}, inspected.steps


@pytest.mark.slow  # whole runs
@pytest.mark.parametrize("granularity", ["none", "selective", "full"])
def test_inspected_steps_give_the_same_run_as_others(folder, capsys, granularity):
    training = {"recompute_granularity": granularity}
    often, each = run_of(folder, f"often-{granularity}", logging={"log_interval": 1}, training=training)
    out = capsys.readouterr().out
    rarely, last = run_of(folder, f"rarely-{granularity}", logging={"log_interval": 1000}, training=training)
    for step in often:
        for key in ("loss", "grad_norm", "learning_rate"):
            assert often[step][key] == rarely[step][key]
    one, other = (CheckpointReader(folder / f"{name}-{granularity}") for name in ("often", "rarely"))
    assert list(differences(one, other)) == []
    assert [step for step in often if "rows" in often[step]] == each == [4, 5, 6]
    assert [step for step in rarely if "rows" in rarely[step]] == last == [6]  # the last step of a run has a log line
    assert often[6]["rows"] == rarely[6]["rows"]
    assert out.count("rows of growth 1: ") == 3
    ffn = often[4]["rows"]["growth_1"]["ffn"]
    assert ffn["tokens"] == [32, 96, 32, 32][: len(ffn["layers"])]
    assert ffn["dead"] == ffn["tokens"]  # new keys are zero, and so are the values of a new layer
    whole = sum(norm**2 for growth in often[4]["rows"].values() for norm in growth["ffn"]["grad_norm"])
    assert whole**0.5 == pytest.approx(often[4]["grad_norm/ffn"], rel=1e-5)

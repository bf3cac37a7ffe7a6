"""What a dry run measures without values, and its command."""

import contextlib
import json
import sys

import pytest
import torch
import torch.distributed as dist
import yaml
from torch import nn
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor, Shard

from megatron_tf.commands import dry_run as command
from megatron_tf.config import to_dict
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.tokenformer.parameters import Parameter
from megatron_tf.training.dry_run.fake_world import fake_rank
from megatron_tf.training.dry_run.memory import StorageMeter
from megatron_tf.training.dry_run.observed_step import Observation, held_tensors, observe_step
from megatron_tf.training.step.state import build_state
from tests.support.layouts import layout_config
from tests.support.training import PLAIN, small_run

META = torch.device("meta")


def observed(action, held=()):
    """The meter of what `action` allocates on one rank."""
    meter = StorageMeter(META, held)
    with fake_rank(0, tensor=1, pipeline=1, data=1) as mesh, Observation(mesh, meter), meter.following_resizes():
        result = action()
    return meter, result


def test_storage_that_exists_is_counted_once():
    meter, kept = observed(lambda: [x := torch.empty(1000, device=META), x.view(10, 100), x[5:]])
    assert (meter.bytes, meter.peak) == (4000, 4000)
    del kept
    assert (meter.bytes, meter.peak) == (0, 4000)


def test_the_peak_is_that_of_tensors_that_exist_together():
    def action():
        first = torch.empty(1000, device=META)
        del first
        second = torch.empty(600, device=META)
        return second, torch.empty(500, device=META)

    meter, kept = observed(action)
    assert (meter.bytes, meter.peak) == (4400, 4400)
    assert len(kept) == 2


def test_resized_storage_is_counted_with_its_size():
    x = torch.empty(1000, device=META)

    def action():
        x.untyped_storage().resize_(0)
        y = torch.empty(500, device=META)
        x.untyped_storage().resize_(800)
        return y

    meter, _kept = observed(action, [x])
    assert (meter.peak, meter.bytes) == (4000, 2800)


def test_what_a_dtensor_computes_is_counted():
    """Such as the gradients that FSDP leaves."""
    with fake_rank(0, tensor=2, pipeline=1, data=1) as mesh, Observation(mesh, StorageMeter(META, [])) as observation:
        rows = torch.empty(1000, device=META)
        placed = DTensor.from_local(rows, mesh.device_mesh["tp"], [Shard(0)], run_check=False)
        widened = placed.to(torch.float64)
        assert observation.meter.bytes == rows.nbytes + 8 * 1000
    assert widened.shape == (2000,)


def test_saved_activations_are_counted_until_backward():
    weight = nn.Parameter(torch.empty(64, 64, device=META))
    x = torch.empty(32, 64, device=META)

    def action():
        y = (x @ weight).sigmoid().sum()
        forward = meter_of["meter"].bytes
        y.backward()
        return forward

    meter_of = {"meter": StorageMeter(META, [weight, x])}
    meter = meter_of["meter"]
    with fake_rank(0, tensor=1, pipeline=1, data=1) as mesh, Observation(mesh, meter):
        forward = action()
    held = 4 * (64 * 64 + 32 * 64)
    assert forward == held + 4 * 32 * 64 + 4  # the sigmoid's output and the sum
    assert meter.bytes == held + 4 * 64 * 64  # the gradient


@pytest.mark.parametrize(("layout", "shard_size"), [((1, 1, 1), None), ((2, 1, 2), None), ((1, 1, 4), 2)], ids=str)
def test_a_step_leaves_what_the_rank_holds(layout, shard_size):
    config = layout_config(layout, layout[0] > 1, kernels={"pattention": "eager"})
    tensor, pipeline, data = layout
    with fake_rank(0, tensor=tensor, pipeline=pipeline, data=data, shard_size=shard_size) as mesh:
        state = build_state(config, mesh)
        held = sum(each.nbytes for each in held_tensors(state))
        meter = observe_step(state, config).meter
        assert meter.peak > held
        # the counts of updates of AdamW, and single numbers of the step that are still in use
        assert 0 <= meter.bytes - held <= 1024


def test_a_world_leaves_no_trace_in_the_report_of_a_bug():
    """torch names the rank in front of each line, once for every world that the process has been in."""
    hook = sys.excepthook
    with fake_rank(1, tensor=2, pipeline=1, data=1):
        assert sys.excepthook is not hook
    assert sys.excepthook is hook


def test_attention_saves_no_scores_of_pairs_of_tokens():
    """Twice the sequence takes less than 2.2 times the memory of activations, in which the scores would dominate."""
    peaks = []
    for length in (1024, 2048):
        config = small_run(training={"seq_length": length, "global_batch_size": 1}, kernels={"pattention": "eager"})
        with fake_rank(0, tensor=1, pipeline=1, data=1) as mesh:
            state = build_state(config, mesh)
            held = sum(each.nbytes for each in held_tensors(state))
            peaks.append(observe_step(state, config).meter.peak - held)
    assert peaks[1] < 2.2 * peaks[0]


def test_a_fake_world_leaves_torch_as_it_was():
    refuse = FSDPParamGroup._validate_no_meta_params
    with contextlib.suppress(KeyError), fake_rank(3, tensor=2, pipeline=2, data=1):
        assert dist.get_world_size() == 4
        raise KeyError
    assert not dist.is_initialized()
    assert not hasattr(torch, "meta")
    assert FSDPParamGroup._validate_no_meta_params is refuse


def test_a_message_of_an_unknown_kind_is_no_silence():
    with (
        fake_rank(0, tensor=2, pipeline=1, data=1) as mesh,
        Observation(mesh, StorageMeter(META, [])),
        pytest.raises(AssertionError, match="not counted yet"),
    ):
        dist.barrier(group=mesh.group("tp"))


def write_config(folder, **sections):
    config = to_dict(small_run(**sections))
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_the_command_prints_what_the_ranks_hold_and_exchange(tmp_path, capsys):
    path = write_config(tmp_path)
    arguments = [str(path), "--world-size", "8", "--parallel.tensor_model_parallel_size=2", "--disk-rate", "2"]
    assert command.main([*arguments, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["layout"] == {"tensor": 2, "pipeline": 1, "data": 4, "shard_size": 4, "context": 1}
    assert sum(kind["count"] for kind in values["kinds"]) == 8
    assert values["checkpoint"]["seconds"] == values["checkpoint"]["bytes"] / 2e9
    assert command.main(arguments) == 0
    printed = capsys.readouterr()
    start = "tensor 2 x pipeline 1 x data 4, parameters sharded over 4; micro-batches of a step: 2\n"
    assert printed.out.startswith(start)
    assert f"{values['checkpoint']['files']} files" in printed.out
    for kind in values["kinds"]:
        for each in kind["traffic"]:
            assert f"{each['axis']:<12} {each['kind']:<15} {each['calls']:>9,}" in printed.out
    assert printed.err == "pipeline stage 0 of 1\n"


def test_the_command_uses_the_length_and_batch_size_of_a_phase(tmp_path, capsys):
    phases = [{"at_step": 5, "seq_length": 64}, {"at_step": 9, "global_batch_size": 4}]
    sections = {"data": {"phases": phases, "order": None}, "checkpoint": {"save": "run"}}
    arguments = [str(write_config(tmp_path, **sections)), "--world-size", "2", "--json", "--phase"]
    found = []
    for phase in "012":
        assert command.main([*arguments, phase]) == 0
        values = json.loads(capsys.readouterr().out)
        found.append((values["micro_batches"], values["kinds"][0]["peak_bytes"]))
    assert [count for count, _ in found] == [4, 4, 2]
    assert found[0][1] < found[1][1]
    with pytest.raises(SystemExit):
        command.main([*arguments, "3"])
    assert "--phase is 3, but data.phases has 2 entries" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--world-size", "3", "--parallel.tensor_model_parallel_size=2"], "needs a multiple of 2"),
        (["--world-size", "16"], "must be divisible by"),
        (["--world-size", "2", "--parallel.no=1"], "unknown key"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, capsys, arguments, message):
    assert command.main([str(write_config(tmp_path)), *arguments]) == 1
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert message in error[0]


RUNS = {
    "fp32": {},
    "bf16": {"training": {"precision": "bf16"}},
    "full recomputation": {"training": {"recompute_granularity": "full"}},
    "selective recomputation": {"training": {"recompute_granularity": "selective"}},
    "transformer": {"model": PLAIN},
}


@pytest.mark.parametrize("sections", RUNS.values(), ids=list(RUNS))
def test_the_peak_is_that_of_a_step_with_values(sections):
    """But for the ids of a batch, which are on the host for both."""
    training = {"seq_length": 64, "micro_batch_size": 4} | sections.get("training", {})
    config = small_run(**sections | {"training": training}, kernels={"pattention": "eager"})
    dry, real = (observe_step(build_state(config, Mesh(torch.device(name))), config) for name in ("meta", "cpu"))
    assert dry.meter.peak == pytest.approx(real.meter.peak, rel=0.005)
    assert dry.meter.bytes == real.meter.bytes


def test_a_state_without_values_draws_none(monkeypatch):
    """Those of a model of the 175B class would take minutes."""
    monkeypatch.setattr(Parameter, "initial_rows", lambda *arguments: pytest.fail("drawn"))
    assert build_state(small_run(kernels={"pattention": "eager"}), Mesh(META)).shards


@pytest.mark.parametrize("option", ["--world-size=0", "--disk-rate=0", "--disk-rate=nan", "--disk-rate=inf"])
def test_an_impossible_number_is_named(tmp_path, capsys, option):
    with pytest.raises(SystemExit) as exit_of_usage:
        command.main([str(write_config(tmp_path)), "--world-size", "1", option])
    assert exit_of_usage.value.code == 2
    assert f"{option.partition('=')[0]} is" in capsys.readouterr().err

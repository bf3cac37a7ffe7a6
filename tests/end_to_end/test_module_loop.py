"""A training loop around a module that grows against a run that grows, on the same batches."""

import pytest
import torch

import megatron_tf
from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.config import load_config
from megatron_tf.data.batch import DocumentMasking
from megatron_tf.data.build import build_dataset, build_loader
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.tokenformer.dtypes import DTYPES
from megatron_tf.tokenformer.parameters import model_parameters
from megatron_tf.training.step.schedule import learning_rate
from tests.support.commands import make_run, run
from tests.support.runs import derive_run
from tests.support.training import EOD

MOMENTS = ("exp_avg", "exp_avg_sq")
GROWTH = [
    {
        "at_step": 4,
        "ffn_tokens": 128,
        "init": "duplicate",
        "insert_layers": [1],
        "layer_init": "copy_zero",
        "old_tokens_lr_scale": 0.5,
        "rewarmup_iters": 3,
    },
    {
        "at_step": 8,
        "qkv_tokens": {"0": 40, "2-3": 48},
        "proj_tokens": 32,
        "adam_state": "reset_second",
        "new_tokens_lr_scale": 2.0,
        "rewarmup_iters": 2,
        "rewarmup": "new",
    },
]


@pytest.fixture(autouse=True)
def one_thread():
    """As many threads as the run has: sums are split over them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_run(
        tmp_path_factory.mktemp("loop"),
        training={"train_iters": 12, "micro_batch_size": 8, "seed": 5},
        optimizer={"lr_decay_iters": 12, "lr": 1e-2},
    )


def batches(config):
    """The batches of the run, as ids [B, S + 1]."""
    masking = DocumentMasking(EOD)
    with build_loader(
        build_dataset(config), training=config.training, mesh=Mesh(torch.device("cpu")), masking=masking
    ) as loader:
        for _ in range(config.training.train_iters):
            yield next(loader).ids[0]


def adamw_of(model, config, **how):
    """Two groups, as people make them: with weight decay and without."""
    declared = model_parameters(model.config)
    named = dict(model.transformer.named_parameters())
    decays = [p for name, p in named.items() if declared[name].decays]
    others = [p for name, p in named.items() if not declared[name].decays]
    groups = [{"params": decays, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.adam_eps, **how)


def train_in_loop(config, **how):
    dtype = DTYPES[config.training.precision]
    model = megatron_tf.TokenFormer(config.model, seed=config.training.seed, dtype=dtype)
    optimizer = adamw_of(model, config.optimizer, **how)
    stages = {stage["at_step"]: stage for stage in GROWTH}
    for step, ids in enumerate(batches(config)):
        if step in stages:
            model, optimizer = megatron_tf.grow(model, stages[step], optimizer)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optimizer, step, train_iters=config.training.train_iters)
        model.loss(ids[:, :-1], ids[:, 1:]).backward()
        if config.optimizer.clip_grad:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def tensors_of(model, optimizer):
    """Group -> name -> tensor, as a checkpoint has them."""
    found = {group: {} for group in ("model", *MOMENTS)}
    for name, parameter in model.transformer.named_parameters():
        found["model"][name] = parameter.detach()
        for moment in MOMENTS:
            found[moment][name] = optimizer.state[parameter][moment]
    return found


def run_and_loop(folder, name, *, how, **sections):
    """The last checkpoint of a run, and the model and optimizer of a loop with the same configuration."""
    path = derive_run(folder, name, growth=GROWTH, **sections)
    done = run("megatron_tf.pretrain", path)
    assert done.returncode == 0, done.stdout + done.stderr
    config = load_config(path)
    return CheckpointReader(config.checkpoint.save), train_in_loop(config, **how)


def assert_same_run(expected, model, optimizer, *, is_close):
    """Tensors, temperatures, growths and the counts of every row."""
    record = expected.record
    assert (record.model, record.tau, record.training.step) == (model.config, model.current_record().tau, 12)
    kinds = [event.kinds for event in model.record.lineage]
    assert kinds == [event.kinds for event in record.lineage]
    for group, named in tensors_of(model, optimizer).items():
        assert list(named) == expected.names(group)
        for name, tensor in named.items():
            rows = expected.read_rows(group, name, start=0, stop=len(tensor))
            assert is_close(tensor, rows), (group, name)
    for name, parameter in model.transformer.named_parameters():
        assert list(optimizer.runs(parameter)) == record.all_generations.runs(name, len(parameter))
    assert len(record.all_generations.table) > 5


def is_close(tensor, expected):
    return (tensor - expected).abs().max() <= 1e-7 * expected.abs().max()


def test_a_loop_that_grows_twice_trains_as_a_run_does_to_the_bit(folder):
    """With torch's fused AdamW, which runs use, and without clipping, whose norm torch sums in another order."""
    expected, trained = run_and_loop(folder, "bits", how={"fused": True}, optimizer={"clip_grad": 0.0})
    assert_same_run(expected, *trained, is_close=torch.equal)


def test_a_loop_with_clipping_and_the_default_adamw_trains_as_a_run_does_in_float64(folder):
    expected, trained = run_and_loop(
        folder, "fp64", how={}, training={"precision": "fp64"}, optimizer={"clip_grad": 0.5}
    )
    assert_same_run(expected, *trained, is_close=is_close)

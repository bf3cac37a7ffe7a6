"""Values that cannot be are refused before anything starts, with the key."""

import re

import pytest
import yaml

from megatron_tf.config import ConfigError, GrowthStage, RunConfig, load_config, parse_config, to_dict
from megatron_tf.training.step.schedule import learning_rate
from tests.support.training import small_run


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(to_dict(small_run())))
    return path


FLOATS = [
    "optimizer.lr",
    "optimizer.min_lr",
    "optimizer.weight_decay",
    "optimizer.adam_eps",
    "optimizer.clip_grad",
    "model.init_method_std",
    "model.output_init_method_std",
    "model.rotary_base",
    "model.layernorm_epsilon",
    "training.loss_spike_sigmas",
    "training.exit_duration_in_mins",
    "logging.peak_teraflops",
    "loss_scale.loss_scale",
]
INTS = ["training.train_iters", "training.seed", "model.num_layers", "checkpoint.keep_last", "logging.log_interval"]


@pytest.mark.parametrize("key", FLOATS)
@pytest.mark.parametrize("value", [".inf", ".nan", "true"])
def test_numbers_are_finite_and_no_booleans(path, key, value):
    with pytest.raises(ConfigError, match=f"^[^\n]*{key}: [^\n]*$"):
        load_config(path, [f"--{key}={value}"])


@pytest.mark.parametrize("key", INTS)
@pytest.mark.parametrize("value", [".inf", "true", "false", "1.5"])
def test_counts_are_whole_and_no_booleans(path, key, value):
    with pytest.raises(ConfigError, match=f"^[^\n]*{key}: [^\n]*$"):
        load_config(path, [f"--{key}={value}"])


@pytest.mark.parametrize(
    "options, message",
    [
        (["--model.qkv_tokens=[32, true, 32]"], "model.qkv_tokens"),
        (["--optimizer.weight_decay_by_kind={ffn: .nan}"], "optimizer.weight_decay_by_kind"),
        (["--data.split=nan,1,1"], "data.split is 'nan,1,1'"),
        (["--data.split=inf,1,1"], "data.split"),
        (["--data.data_path=['0 a', '0 b']"], "data.data_path: weights"),
        (["--data.data_path=['nan a', '1 b']"], "data.data_path: weights"),
        (["--data.data_path=['-1 a', '2 b']"], "data.data_path: weights"),
        (["--data.valid_data_path=['1 a', b]"], "data.valid_data_path: write every entry"),
        (["--training.seed=1099511627776", "--data.order=megatron"], "training.seed (1099511627776) must be below"),
        (["--checkpoint.save="], "'--checkpoint.save=' has no value"),
        (["--checkpoint.load='  '"], "checkpoint.load: is empty"),
        (["--checkpoint.save_interval=2"], "checkpoint.save_interval needs checkpoint.save"),
        (["--checkpoint.keep_last=2"], "checkpoint.keep_last needs checkpoint.save"),
        (
            ["--logging.profile_dir=p", "--logging.profile_step_start=5", "--logging.profile_step_end=2"],
            "profile_step_end (2) is before profile_step_start (5)",
        ),
        (
            ["--optimizer.lr_warmup_iters=8", "--optimizer.lr_decay_iters=4"],
            "lr_warmup_iters (8) is longer than the whole schedule, which ends at lr_decay_iters (4)",
        ),
        (
            ["--optimizer.lr_warmup_iters=21"],
            "lr_warmup_iters (21) is longer than the whole schedule, which ends at training.train_iters (20)",
        ),
        (
            ["--optimizer.lr_decay_style=WSD", "--optimizer.lr_wsd_decay_tokens=9", "--optimizer.lr_decay_tokens=8"],
            "lr_wsd_decay_tokens (9) is longer than the whole schedule, which ends at lr_decay_tokens (8)",
        ),
        ([f"--training.seed={10**30}"], "training.seed: Input should be less than 18446744073709551616"),
        ([f"--training.train_iters={2**63}"], "training.train_iters: Input should be less than 9223372036854775808"),
        ([f"--model.hidden_size={2**64}"], "model.hidden_size: Input should be less than 2147483648"),
        ([f"--model.qkv_tokens=[32, {2**31}]"], "model.qkv_tokens"),
        (["--model.num_layers=20000000"], "model.num_layers: Input should be less than or equal to 100000"),
        (["--data.split=1e308,1e308,0"], "data.split is '1e308,1e308,0'"),
        (["--data.data_path=['1e308 a', '1e308 b']"], "data.data_path: weights must be finite"),
        ([f"--parallel.distributed_timeout_seconds={10**12}"], "parallel.distributed_timeout_seconds: Input should be"),
        (['--checkpoint.save="a\\0b"'], "checkpoint.save: contains a NUL character, got 'a\\x00b'"),
        (['--data.data_path=["a\\0b"]'], "data.data_path.0: contains a NUL character"),
        (["--logging.wandb_project=''"], "logging.wandb_project: is empty: write a name, or null for none"),
        (["--logging.wandb_exp_name=' '"], "logging.wandb_exp_name: is empty"),
        (["--data.eod_token=''"], "data.eod_token: String should have at least 1 character"),
        (["--training.train_iters=2020-13-45"], "'--training.train_iters=2020-13-45': line 1: month must be in 1..12"),
        (["--model.ffn_tokens={[1]: 2}"], "'--model.ffn_tokens={[1]: 2}': line 1: a key is not a string"),
        (["--model.ffn_tokens=" + "9" * 5000], "cannot read the value of '--model.ffn_tokens=999"),
        (["--model.ffn_tokens=" + "[" * 3000], "it is nested too deeply"),
        (["--model.hidden_size=48"], "rotary_percent (0.25) of heads of hidden_size (48) / num_attention_heads (4)"),
        (["--model.rotary_percent=0.1"], "is 0: it must be an even number above 0"),
    ],
)
def test_what_cannot_be_is_one_line_with_the_key(path, options, message):
    with pytest.raises(ConfigError) as caught:
        load_config(path, options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["optimizer:\n  lr: 0.1\n  lr: 0.2\n", "model: {}\noptimizer: {}\nmodel: {}\n"])
def test_a_key_that_is_given_twice_is_named_with_its_line(tmp_path, text):
    path = tmp_path / "twice.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"twice.yaml: .*key '(lr|model)' is given twice, again in line 3$"):
        load_config(path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("model: {}\ntraining: 2020-13-45\n", "line 2: month must be in 1..12"),
        ("model: {}\n? [1]\n: 3\n", "line 2: a key is not a string"),
        ("model: {}\n\n? {a: 1}\n: 3\n", "line 3: a key is not a string"),
        ("model:\n  ffn_tokens: " + "9" * 5000 + "\n", "line 2: Exceeds the limit"),
        ("a: &a {lr: 1}\nb:\n  <<: *a\n  <<: *a\n", "key '<<' is given twice, again in line 4"),
        ("model: " + "[" * 5000, "it is nested too deeply"),
    ],
)
def test_what_yaml_cannot_build_is_one_line_with_the_line_in_the_file(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert f"{path}: not valid YAML: {message}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_same_key_in_two_sections_and_merged_mappings_are_no_doubles(path):
    path.write_text(path.read_text() + "\n")
    assert load_config(path) == small_run()


def test_growth_stages_are_checked_alike():
    with pytest.raises(ConfigError, match=r"growth.0.noise"):
        parse_config(RunConfig, to_dict(small_run()) | {"growth": [{"at_step": 2, "noise": float("nan")}]}, "test")


@pytest.mark.parametrize("style", ["cosine", "linear", "WSD"])
@pytest.mark.parametrize("end", [1, 4, 10, 100])
def test_every_decay_is_at_min_lr_where_it_ends(style, end):
    schedule = {"lr": 1.0, "min_lr": 0.125, "lr_decay_style": style, "lr_decay_iters": end}
    config = small_run(optimizer=schedule).optimizer
    assert [learning_rate(config, step, train_iters=20) for step in range(end, end + 3)] == [0.125] * 3
    assert learning_rate(config, end - 1, train_iters=20) > 0.125


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hidden_multiple", 1e308, "hidden_multiple: Input should be less than 2147483648"),
        ("num_layers", 2**31 - 1, "num_layers: Input should be less than or equal to 100000"),
        ("old_tokens_lr_scale", 1e308, "old_tokens_lr_scale: Input should be less than or equal to 1000000"),
        ("new_tokens_lr_scale", 1e7, "new_tokens_lr_scale: Input should be less than or equal to 1000000"),
    ],
)
def test_a_growth_beyond_all_bounds_is_refused_at_once(key, value, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_config(GrowthStage, {"at_step": 1, key: value}, "run.yaml")

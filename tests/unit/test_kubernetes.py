"""The manifests for Kubernetes: valid for Kubeflow Trainer, and true to what the run does on signals and exits with."""

import copy

import pytest
import yaml
from torch.distributed.run import get_args_parser

from megatron_tf.commands.torchrun import SECONDS_TO_SAVE, shell_code
from megatron_tf.training.supervision.signals import EXIT_START_AGAIN
from tests.support.paths import ROOT

RUNTIME, JOB = yaml.safe_load_all((ROOT / "examples" / "kubernetes" / "pretrain.yaml").read_text())
JOBSET = RUNTIME["spec"]["template"]["spec"]
NODE = JOBSET["replicatedJobs"][0]["template"]["spec"]


def read_by_kubeflow(manifest):
    """Return a manifest as the API package writes it after reading it: without keys that it does not know."""
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="kubeflow-trainer-api is not installed")
    return getattr(models, f"TrainerV1alpha1{manifest['kind']}").from_dict(copy.deepcopy(manifest)).to_dict()


@pytest.mark.parametrize("manifest", [RUNTIME, JOB], ids=lambda manifest: manifest["kind"])
def test_the_api_of_kubeflow_knows_every_key(manifest):
    assert read_by_kubeflow(manifest) == manifest


def test_a_key_that_the_api_does_not_know_would_be_seen():
    wrong = copy.deepcopy(RUNTIME)
    wrong["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["podFailurePolicies"] = {}
    assert read_by_kubeflow(wrong) != wrong


def test_a_saved_run_starts_again_without_counting_as_failed():
    by_code, by_condition = NODE["podFailurePolicy"]["rules"]
    assert by_code["action"] == by_condition["action"] == "FailJob"
    assert by_code["onExitCodes"]["values"] == [EXIT_START_AGAIN, shell_code(-15)]
    assert by_condition["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    (rule,) = JOBSET["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    # Kubernetes requires it of a Job with a failure policy, and a single new pod could not join the others
    assert NODE["template"]["spec"]["restartPolicy"] == "Never"
    assert NODE["backoffLimit"] == 0


def test_ranks_have_their_time_to_save_before_the_pod_is_killed():
    assert NODE["template"]["spec"]["terminationGracePeriodSeconds"] > SECONDS_TO_SAVE


def test_the_command_is_one_that_torchrun_accepts_and_gets_the_signals_itself():
    trainer = JOB["spec"]["trainer"]
    assert trainer["command"] == ["python", "-m", "megatron_tf.torchrun"]
    parsed = get_args_parser().parse_args(trainer["args"])
    assert (parsed.module, parsed.training_script) == (True, "megatron_tf.pretrain")
    paths = [container["mountPath"] for container in NODE["template"]["spec"]["containers"][0]["volumeMounts"]]
    config, *overrides = parsed.training_script_args
    assert config.startswith(paths[0])
    assert all(override.split("=")[1].startswith(paths[0]) for override in overrides)


def test_the_job_refers_to_the_runtime_and_its_container():
    assert JOB["spec"]["runtimeRef"] == {
        "apiGroup": RUNTIME["apiVersion"].split("/")[0],
        "kind": RUNTIME["kind"],
        "name": RUNTIME["metadata"]["name"],
    }
    (container,) = NODE["template"]["spec"]["containers"]
    assert NODE["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == container["name"]

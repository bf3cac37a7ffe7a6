"""Runs lm-evaluation-harness with the model `megatron_tf`; its options are those of `lm-eval`.

    python -m megatron_tf.lm_eval run --model megatron_tf --model_args checkpoint=RUN --tasks lambada_openai,piqa

lm-eval up to 0.4.13 does not find models outside its own package; later versions read our entry point in
`lm_eval.models`, so that `lm-eval run --model megatron_tf` is equivalent.
"""

import contextlib
import importlib
import sys
import traceback

from megatron_tf.commands.runner import command, import_late
from megatron_tf.errors import UserError
from megatron_tf.extras import install_command


@command()
def main(arguments: list[str] | None = None) -> int:
    """Run lm-eval. Raises UserError for options, tasks and files that it rejects."""
    sys.argv = ["lm-eval", *(sys.argv[1:] if arguments is None else arguments)]  # where lm-eval looks for them
    with contextlib.suppress(ImportError):  # `register` says what is missing
        import_late("lm_eval.models")
    try:
        register()
        importlib.import_module("lm_eval.__main__").cli_evaluate()
    except (ValueError, OSError) as error:
        if _is_of_our_model(error):
            raise
        raise UserError(str(error)) from error  # how lm-eval rejects a task, an option or a file
    finally:
        leave_ranks()
    return 0


def _is_of_our_model(error: Exception) -> bool:
    """Return whether our model raised the error, rather than lm-eval or another library."""
    modules = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(module.startswith("megatron_tf.inference.") for module in modules)


def register() -> None:
    """Register the model for `lm_eval.simple_evaluate(model="megatron_tf", ...)`. Raises UserError without lm-eval."""
    try:
        importlib.import_module("lm_eval.models")  # registers lm-eval's own, which it leaves if there is one already
        registry = importlib.import_module("lm_eval.api.registry").model_registry
    except ImportError as error:
        raise UserError(f"lm-eval is not installed ({error}): {install_command('eval')}") from None
    if "megatron_tf" not in registry:
        registry.register("megatron_tf", target="megatron_tf.inference.lm_eval_model:MegatronTF")


def leave_ranks() -> None:
    """Destroy the process group, if there is one."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()

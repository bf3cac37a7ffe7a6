"""lm-evaluation-harness with the model `megatron_tf`: takes the command line of `lm-eval`, and adds nothing to it.

    python -m megatron_tf.lm_eval run --model megatron_tf --model_args checkpoint=RUN --tasks lambada_openai,piqa

lm-eval up to 0.4.13 finds no models outside its own tree; later ones read our entry point in `lm_eval.models`, and
`lm-eval run --model megatron_tf` is the same there.
"""

import contextlib
import importlib
import sys

from megatron_tf.interrupt import import_late, run_command


def main(arguments: list[str] | None = None) -> int:
    """0 when lm-eval is done, 1 after an error that a user can mend."""
    sys.argv = ["lm-eval", *(sys.argv[1:] if arguments is None else arguments)]  # where lm-eval looks for them
    with contextlib.suppress(ImportError):  # `register` says what is missing
        import_late("lm_eval.models")
    try:
        register()
        importlib.import_module("lm_eval.__main__").cli_evaluate()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        leave_ranks()
    return 0


def register() -> None:
    """Let `lm_eval.simple_evaluate(model="megatron_tf", ...)` find the model. Raises ValueError without lm-eval."""
    try:
        importlib.import_module("lm_eval.models")  # registers lm-eval's own, which it leaves if there is one already
        registry = importlib.import_module("lm_eval.api.registry").model_registry
    except ImportError as error:
        raise ValueError(f"lm-eval is not to be had ({error}): pip install 'megatron_tf[eval]'") from None
    if "megatron_tf" not in registry:
        registry.register("megatron_tf", target="megatron_tf.inference.harness:MegatronTF")


def leave_ranks() -> None:
    """End what connects this process with others."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(run_command(main))

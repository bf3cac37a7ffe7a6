"""Train, grow and evaluate TokenFormers: `megatron-tf COMMAND ...`, or `python -m megatron_tf COMMAND ...`."""

import difflib
import sys

from megatron_tf import __version__
from megatron_tf.commands.registry import COMMANDS
from megatron_tf.commands.runner import run_script


def main() -> int:
    """Run the command and return its exit code; 0 for --help and --version, 2 for an unknown command."""
    requested = sys.argv[1] if len(sys.argv) > 1 else "--help"
    name = requested.replace("_", "-")  # Megatron-LM spells its scripts preprocess_data
    if name in COMMANDS:
        sys.argv = [f"megatron-tf {name}", *sys.argv[2:]]
        return run_script(name)
    if requested in ("-h", "--help"):
        print(usage())
        return 0
    if requested == "--version":
        print(f"megatron_tf {__version__}")
        return 0
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "megatron-tf --help lists them"
    print(f"error: megatron-tf has no command {requested!r}; {hint}", file=sys.stderr)
    return 2


def usage() -> str:
    """Return the usage message, with a summary of each command."""
    lines = [f"  {name:<20}{entry.summary}" for name, entry in COMMANDS.items()]
    return "\n".join(["usage: megatron-tf COMMAND ...", "", *lines, "", "megatron-tf COMMAND --help for details."])


if __name__ == "__main__":
    sys.exit(main())

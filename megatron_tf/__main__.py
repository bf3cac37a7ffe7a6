"""Train, grow and evaluate TokenFormers: `megatron-tf COMMAND ...`, or `python -m megatron_tf COMMAND ...`."""

import difflib
import sys

from megatron_tf.commands.registry import COMMANDS
from megatron_tf.commands.runner import run_script


def main() -> int:
    """The exit code of the command; 0 for --help, 2 where there is no such command."""
    asked = sys.argv[1] if len(sys.argv) > 1 else "--help"
    name = asked.replace("_", "-")  # Megatron-LM's scripts are spelled preprocess_data
    if name in COMMANDS:
        sys.argv = [f"megatron-tf {name}", *sys.argv[2:]]
        return run_script(name)
    if asked in ("-h", "--help"):
        print(usage())
        return 0
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    print(f"error: megatron-tf has no command {asked!r}{hint}\n{usage()}", file=sys.stderr)
    return 2


def usage() -> str:
    """The commands and what they do, as lines."""
    lines = [f"  {name:<20}{entry.summary}" for name, entry in COMMANDS.items()]
    return "\n".join(["usage: megatron-tf COMMAND ...", "", *lines, "", "megatron-tf COMMAND --help says more."])


if __name__ == "__main__":
    sys.exit(main())

"""Show the contents of a checkpoint, verify its checksums, compare it with another one, or measure it on a text.

Examples:
    megatron-tf inspect-checkpoint runs/small --verify
    megatron-tf inspect-checkpoint runs/small --diff runs/resharded
    megatron-tf inspect-checkpoint runs/grown --rows --input held_out.txt --plot rows.png
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from megatron_tf.commands.arguments import file_path, make_parser, parse
from megatron_tf.commands.row_inspection import show_rows
from megatron_tf.commands.runner import command, import_late
from megatron_tf.errors import UserError

if TYPE_CHECKING:
    from megatron_tf.checkpoint.generations import Generation
    from megatron_tf.checkpoint.load import CheckpointReader

NOT_STATE = {"config", "usage", "growth_stage"}
"""Metadata that may differ between two checkpoints that are equivalent for inference and training."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line."""

    directory: Path
    verify: bool
    diff: Path | None
    rows: bool
    input: Path | None
    plot: Path | None
    tokenizer_model: Path | None


@command()
def main(arguments: list[str] | None = None) -> int:
    """Print a summary or a comparison. Returns 1 if --diff finds different tensors or other state."""
    parser = make_parser("inspect-checkpoint", __doc__)
    add = parser.add_argument
    add("directory", type=file_path, help="checkpoint, or directory of a run, whose newest one is used")
    add("--verify", action="store_true", help="first read every file and verify its checksum")
    add(
        "--diff",
        type=file_path,
        metavar="DIR2",
        help="compare all tensors bit for bit, and the metadata, with those of DIR2; exit with 1 if state differs",
    )
    add(
        "--rows",
        action="store_true",
        help="print what the parameter tokens of each growth contribute by layer, and how many are dead; needs --input",
    )
    add("--input", type=file_path, metavar="TEXT", help="text file to measure contributions on")
    add("--plot", type=file_path, metavar="FILE", help="image file to draw the contributions into, such as rows.png")
    add("--tokenizer-model", type=file_path, help="the tokenizer's file, if it has moved since training")
    options = parse(parser, Options, arguments)
    _check_rows(options)
    import_late("megatron_tf.checkpoint.load")
    from megatron_tf.checkpoint.load import CheckpointReader

    reader = CheckpointReader(options.directory)
    if options.verify:
        reader.complete().verify()
        print(f"verified: the checksums of all {len(reader.manifest.files)} files match")
    if options.input is not None:
        plot, tokenizer_model = options.plot, options.tokenizer_model
        return show_rows(reader.directory, options.input, tokenizer_model=tokenizer_model, plot=plot)
    return show(reader.complete()) if options.diff is None else compare(reader, CheckpointReader(options.diff))


def _check_rows(options: Options) -> None:
    """Raise UserError unless --rows and the options that belong to it are given together."""
    if options.rows and options.input is None:
        raise UserError("--rows needs --input TEXT: contributions are measured on the text of a file")
    for name in ("input", "plot", "tokenizer_model"):
        if getattr(options, name) is not None and not options.rows:
            raise UserError(f"--{name.replace('_', '-')} needs --rows")
    if options.rows and options.diff is not None:
        raise UserError("--rows and --diff are two reports: run the tool twice")
    if options.plot is not None:
        from megatron_tf.checkpoint.destination import check_outside_checkpoints

        check_outside_checkpoints(options.plot, "--plot")
        if options.input is not None and options.plot.resolve() == options.input.resolve():
            raise UserError(f"--plot {options.plot} would replace --input: choose another file")


def show(reader: "CheckpointReader") -> int:
    """Print the progress, model, files, tensors and growth of a checkpoint."""
    progress = ", ".join(f"{key} {value:,}" for key, value in reader.record.to_json()["training"].items())
    print(f"{reader.directory}: {progress}")
    show_files(reader)
    for group in reader.groups():
        show_tensors(reader, group)
    show_tau(reader)
    show_lineage(reader)
    show_data(reader)
    return 0


def show_files(reader: "CheckpointReader") -> None:
    """Print the layout on disk."""
    files = reader.manifest.files
    pieces: list[int] = []
    for tensors in reader.manifest.groups.values():
        pieces += [len(entry.pieces) for entry in tensors.values()]
    print(
        f"\n{len(files)} files, {sum(entry.bytes for entry in files.values()):,} bytes; "
        f"a tensor is in {min(pieces)} to {max(pieces)} pieces"
    )
    for name, entry in files.items():
        print(f"  {name:<40}{entry.bytes:>18,}")


def show_tensors(reader: "CheckpointReader", group: str) -> None:
    """Print shapes and norms of the tensors of a group, one line per kind of tensor."""
    from megatron_tf.checkpoint.summary import summarize

    print(f"\n{group:<44}{'tensors':>8}{'shape':>16}{'type':>16}{'parameters':>18}{'norm':>12}")
    rows = summarize(reader, group)
    for row in rows:
        dtype = str(row.dtype).removeprefix("torch.")
        print(
            f"  {row.pattern:<42}{row.num_tensors:>8}{row.shape:>16}{dtype:>16}{row.parameters:>18,}{row.norm:>12.5g}"
        )
    print(f"  {'total':<42}{'':>40}{sum(row.parameters for row in rows):>18,}")


def show_tau(reader: "CheckpointReader") -> None:
    """Print the distinct temperatures and how many modules have each."""
    modules: dict[float, list[str]] = {}
    for name, tau in reader.record.tau.items():
        modules.setdefault(tau, []).append(name)
    print("\ntau")
    for tau, names in sorted(modules.items()):
        print(f"  {tau:.6g} (the root of {tau**2:.6g}): {len(names)} modules, such as {names[0]}")


def show_lineage(reader: "CheckpointReader") -> None:
    """Print the growth events of the model."""
    from megatron_tf.config import TokenInit

    print("\nlineage")
    record = reader.record
    for event in record.lineage:
        changes = [f"{kind} {old} -> {new}" for kind, (old, new) in event.kinds.items()]
        if event.hidden_size is not None:
            changes.insert(0, "hidden_size {} -> {}".format(*event.hidden_size))
        for what, layers in (("new", event.inserted_layers), ("without", event.dropped_layers)):
            if layers:
                changes.append(f"{what} layers {', '.join(map(str, layers))}")
        # how tokens are initialized says nothing about a growth by layers or width alone
        how = "" if event.init in get_args(TokenInit) and not event.kinds else f" by {event.init}"
        changed = ", ".join(changes)
        print(f"  at step {event.step:,} ({event.tokens:,} tokens): {changed}{how}, seed {event.seed}")
    if not record.lineage:
        print("  never grown")
    if start := record.schedule_start:
        print(f"  the learning-rate schedule counts from step {start.step:,} ({start.tokens:,} tokens)")
    for generation in record.generations.table if record.generations else ():
        print(f"  {_described(generation)}")


def show_data(reader: "CheckpointReader") -> None:
    """Print what has been read and left out of each training set, in tokens, under data.order lanes."""
    from megatron_tf.data.phases import Phase

    record = reader.record
    if record.details.phase is None:
        return
    phase = Phase.from_json(record.details.phase)
    states = phase.states_at(record.training.samples)
    print(f"\n{'data':<32}{'epoch':>6}{'read':>18}{'of this epoch':>18}{'in tails':>12}{'skipped':>12}{'rewound':>12}")
    for name, state in states.items():
        position, left_out = state.position, (state.position.left_out, state.skipped, state.rewound)
        print(
            f"  {name:<30}{position.epoch + 1:>6}{state.read:>18,}{position.read_of_epoch():>18,}"
            + "".join(f"{count:>12,}" for count in left_out)
        )
    weights = ", ".join(f"{weight:g} {name}" for name, weight in phase.weights.items())
    print(f"  since sample {phase.first:,}: {weights}; seq_length {phase.seq_length:,}")


def _described(generation: "Generation") -> str:
    """Describe what the optimizer does with the rows of a generation."""
    origin = f"rows of growth {generation.growth}" if generation.growth else "original rows"
    parts = [f"{generation.exp_avg_steps:,} updates in the first moment, {generation.exp_avg_sq_steps:,} in the second"]
    if generation.lr_scale != 1:
        parts.append(f"learning rate times {generation.lr_scale:g}")
    if generation.step_scale != 1:
        parts.append(f"Adam updates times {generation.step_scale:g}")
    if generation.rewarmup < 1:
        parts.append(f"warm-up at {generation.rewarmup_done:,} of {generation.rewarmup_iters:,} steps")
    return f"{origin}: {', '.join(parts)}"


def compare(left: "CheckpointReader", right: "CheckpointReader") -> int:
    """Print the differences; return 1 if any tensor differs, or other state such as tau, else 0."""
    from megatron_tf.checkpoint.summary import differences

    sides = left.record.to_json(), right.record.to_json()
    keys = sorted(sides[0].keys() | sides[1].keys())
    differing = [key for key in keys if _as_text(sides[0].get(key)) != _as_text(sides[1].get(key))]
    for key in differing:
        print(f"metadata {key!r} differs")
    found = list(differences(left, right))
    for line in found:
        print(line)
    if not found:
        count = sum(len(left.names(group)) for group in left.groups())
        print(f"all {count} tensors are the same, bit for bit")
    return 1 if found or set(differing) - NOT_STATE else 0


def _as_text(value: Any) -> str:
    """Convert metadata to text, in which a NaN equals a NaN."""
    return json.dumps(value, sort_keys=True)

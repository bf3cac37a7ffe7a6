"""Say what is in a checkpoint, check it, or compare it with another of any layout."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_tf.commands.arguments import file_path, make_parser, parse
from megatron_tf.commands.runner import command, import_late

if TYPE_CHECKING:
    from megatron_tf.checkpoint.load import CheckpointReader

NOT_STATE = {"config", "usage", "growth_stage"}
"""Metadata that may differ between two checkpoints that compute and train the same."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line."""

    directory: Path
    verify: bool
    diff: Path | None


@command()
def main(arguments: list[str] | None = None) -> int:
    """Print what the options name. Returns 1 where --diff finds a difference of tensors or other state."""
    parser = make_parser("inspect-checkpoint", __doc__)
    add = parser.add_argument
    add("directory", type=file_path, help="checkpoint, or a run's directory of them")
    add("--verify", action="store_true", help="read every file and compare its checksum first")
    add(
        "--diff",
        type=file_path,
        metavar="DIR2",
        help="compare every tensor with DIR2's, bit for bit, and the metadata; exit code 1 where state differs",
    )
    options = parse(parser, Options, arguments)
    import_late("megatron_tf.checkpoint.load")
    from megatron_tf.checkpoint.load import CheckpointReader

    reader = CheckpointReader(options.directory)
    if options.verify:
        reader.complete().verify()
        print(f"verified: the checksums of all {len(reader.manifest.files)} files hold")
    return show(reader.complete()) if options.diff is None else compare(reader, CheckpointReader(options.diff))


def show(reader: "CheckpointReader") -> int:
    """Print everything but the values."""
    progress = ", ".join(f"{key} {value:,}" for key, value in reader.record.to_json()["training"].items())
    print(f"{reader.directory}: {progress}")
    show_files(reader)
    for group in reader.groups():
        show_tensors(reader, group)
    show_tau(reader)
    show_lineage(reader)
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
    """Print sizes and norms of a group by kind of module."""
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
    """Print how many modules have which temperature."""
    modules: dict[float, list[str]] = {}
    for name, tau in reader.record.tau.items():
        modules.setdefault(tau, []).append(name)
    print("\ntau")
    for tau, names in sorted(modules.items()):
        print(f"  {tau:.6g} (the root of {tau**2:.6g}): {len(names)} modules, such as {names[0]}")


def show_lineage(reader: "CheckpointReader") -> None:
    """Print the growth so far."""
    print("\nlineage")
    record = reader.record
    for event in record.lineage:
        kinds = ", ".join(f"{kind} {old} -> {new}" for kind, (old, new) in event.kinds.items())
        if layers := event.inserted_layers:
            kinds = f"{kinds}{', ' if kinds else ''}new layers {', '.join(map(str, layers))}"
        print(f"  at step {event.step:,} ({event.tokens:,} tokens): {kinds} by {event.init}, seed {event.seed}")
    if not record.lineage:
        print("  never grown")
    if after := record.after_growth:
        print(
            f"  since step {after.step:,}: {after.rewarmup_iters:,} steps of warm-up, "
            f"old tokens at {after.old_tokens_lr_scale:g} of the learning rate"
        )


def compare(left: "CheckpointReader", right: "CheckpointReader") -> int:
    """Print where the two differ; 1 if any tensor does, or state outside the tensors, such as tau."""
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
    """A part of the metadata, in which a NaN equals a NaN."""
    return json.dumps(value, sort_keys=True)

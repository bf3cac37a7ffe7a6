"""Check and measure the trainer on this machine's GPU, and write a report: python benchmarks/gpu.py

Each section writes a file under OUTPUT/sections. Complete sections are not repeated, so an interrupted report resumes.
Exits with code 1 and a list if checks fail. Takes about ten minutes, or three with --quick. Needs torch >= 2.11, but
neither an installation nor a network: if packages are missing, `--collect DIR` downloads them on a machine with a
network, and `--packages DIR` uses them here.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu_report import prepare
from benchmarks.gpu_report.collect import collect


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code: 0 if all checks pass."""
    args = _parser().parse_args(arguments)
    if args.collect:
        return collect(args.collect, args.python)
    if args.packages:
        with tempfile.TemporaryDirectory() as target:
            prepare.install_packages(args.packages, Path(target))
            return _run(args)
    return _run(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer shapes and repetitions: about three minutes")
    parser.add_argument("--output", type=Path, default=Path("gpu-report"), help="folder of the report (gpu-report)")
    parser.add_argument("--sections", nargs="+", metavar="NAME", help="run only these, even if they are complete")
    parser.add_argument("--packages", type=Path, metavar="DIR", help="use the wheels downloaded by --collect")
    parser.add_argument("--collect", type=Path, metavar="DIR", help="only download the wheels into this folder")
    parser.add_argument("--python", default="3.12", help="with --collect: the GPU machine's Python (3.12)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu tests the logic on tiny shapes")
    parser.add_argument("--run-sections", nargs="+", metavar="NAME", help=argparse.SUPPRESS)
    parser.add_argument("--repeat-steps", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--deterministic", action="store_true", help=argparse.SUPPRESS)
    return parser


def _run(args: argparse.Namespace) -> int:
    prepare.require_packages()
    prepare.build_extensions()
    import torch

    from benchmarks.gpu_report.endtoend import repeat_steps
    from benchmarks.gpu_report.scale import choose_scale
    from benchmarks.gpu_report.sections import SECTIONS, run_sections

    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: PyTorch sees no GPU: install its CUDA build, or test on --device cpu", file=sys.stderr)
        return 2
    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device("cpu")
    scale = choose_scale(device, is_quick=args.quick)
    if args.repeat_steps:
        repeat_steps(scale, deterministic=args.deterministic)
        return 0
    folder = args.output / "sections"
    folder.mkdir(parents=True, exist_ok=True)
    if args.run_sections:
        run_sections(args.run_sections, scale, folder)
        return 0
    unknown = set(args.sections or ()) - set(SECTIONS)
    if unknown:
        print(f"error: no section {', '.join(sorted(unknown))}: choose from {', '.join(SECTIONS)}", file=sys.stderr)
        return 2
    return _report(args, device)


def _report(args: argparse.Namespace, device: object) -> int:
    from benchmarks.gpu_report.machine import describe_machine
    from benchmarks.gpu_report.report import failures, write_report
    from benchmarks.gpu_report.result import read_result
    from benchmarks.gpu_report.sections import SECTIONS, run_in_process

    folder = args.output / "sections"
    files = {name: folder / f"{name}.json" for name in SECTIONS}
    found = {name: read_result(path) for name, path in files.items() if path.exists()}
    wanted = [name for name in SECTIONS if name not in found or not found[name].is_complete]
    options = ["--output", str(args.output), "--device", args.device, *(["--quick"] if args.quick else [])]
    run_in_process([name for name in SECTIONS if name in (args.sections or wanted)], options, folder)
    results = {name: read_result(path) for name, path in files.items() if path.exists()}
    report = write_report(args.output, describe_machine(device), results)
    wrong = failures(results)
    print(f"\n{report}: {len(wrong)} of {sum(len(r.checks) for r in results.values())} checks fail")
    for line in wrong:
        print(f"- {line}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())

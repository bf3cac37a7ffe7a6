"""Print lm-eval's results of a published TokenFormer next to those of the paper (arXiv 2410.23168, table 1).

    python examples/evaluation/compare_with_paper.py 150M RESULTS

RESULTS is what lm-eval's --output_path named; the newest file in it is read.
"""

import argparse
import json
from pathlib import Path

METRICS = {
    "lambada_openai": "acc,none",
    "hellaswag": "acc_norm,none",
    "piqa": "acc,none",
    "arc_easy": "acc,none",
    "arc_challenge": "acc_norm,none",
    "winogrande": "acc,none",
}
"""Task -> what the paper reports of it: as it is usual, normalized by length where endings differ in length."""
PAPER = {
    "150M": (45.0, 35.5, 64.9, 47.3, 24.9, 50.4),
    "450M": (57.3, 47.5, 69.5, 56.2, 26.7, 54.6),
    "900M": (64.0, 55.3, 72.4, 59.9, 30.6, 56.4),
    "1.5B": (64.7, 60.0, 74.8, 64.8, 32.0, 59.7),
}
"""Size -> percent, in the order of METRICS."""
PERPLEXITY = {"150M": 16.38, "450M": 7.69, "900M": 5.46, "1.5B": 5.24}
"""Size -> perplexity of LAMBADA's last word."""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=PAPER)
    parser.add_argument("results", type=Path)
    arguments = parser.parse_args()
    files = sorted(arguments.results.rglob("results*.json"), key=lambda path: path.stat().st_mtime)
    if not files:
        parser.error(f"{arguments.results} holds no results of lm-eval")
    results = json.loads(files[-1].read_text())["results"]
    rows = [
        (f"{task} {metric.partition(',')[0]}", 100 * results[task][metric], paper)
        for (task, metric), paper in zip(METRICS.items(), PAPER[arguments.size], strict=True)
    ]
    mean = [sum(column) / len(rows) for column in zip(*[row[1:] for row in rows], strict=True)]
    rows += [("mean", *mean)]
    rows += [("lambada_openai perplexity", results["lambada_openai"]["perplexity,none"], PERPLEXITY[arguments.size])]
    print(f"| TokenFormer-{arguments.size} | measured | paper |\n|---|---|---|")
    for name, measured, paper in rows:
        print(f"| {name} | {measured:.4g} | {paper:.4g} |")


if __name__ == "__main__":
    main()

"""Build the figures and the tables of the page from the committed results alone.

    python examples/growth_study/report.py

A table replaces what is between its markers in the page, <!-- table: NAME --> and <!-- end -->.
"""

import argparse
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from comparisons import Evidence
from records import Results
from study import Study
from tables import TOPICS, all_tables

from megatron_tf.commands.runner import command
from megatron_tf.errors import UserError
from megatron_tf.extras import needed_by

HERE = Path(__file__).parent
_MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


@command()
def main(arguments: list[str] | None = None) -> int:
    """Write the figures, and the tables into the page; a page that does not exist gets all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, docs = parser.add_argument, HERE.parents[1] / "docs"
    add("--study", type=Path, default=HERE / "study.yaml", help="the study (default: %(default)s)")
    add("--results", type=Path, default=HERE / "results", help="directory of the results (default: %(default)s)")
    add("--page", type=Path, default=docs / "growth_study.md", help="the page (default: %(default)s)")
    add("--figures", type=Path, default=docs / "growth_study", help="directory of the figures (default: %(default)s)")
    options = parser.parse_args(arguments)
    study, results = Study.read(options.study), Results(options.results)
    if not results.by_id:
        raise UserError(f"{options.results} holds no results: run examples/growth_study/run.py first")
    if unknown := sorted({arm.topic for arm in study.arms.values() if arm.grow_from} - {*TOPICS}):
        raise UserError(f"study: no table shows the topics {unknown}; known are {', '.join(TOPICS)}")
    tables = all_tables(study, results)
    text = options.page.read_text() if options.page.exists() else new_page(tables)
    options.page.parent.mkdir(parents=True, exist_ok=True)
    options.page.write_text(fill(text, tables))
    with needed_by("report.py"):
        from figures import draw_all
    paths = draw_all(study, Evidence(study, results), options.figures)
    print(f"{options.page}, {', '.join(map(str, paths))}: {tables['counts']}")
    return 0


def fill(page: str, tables: Mapping[str, str]) -> str:
    """Return the page with its tables replaced. Raises UserError if a table has no place in it, or a place no table."""
    places = [name for _, name, _ in _MARKED.findall(page)]
    if sorted(places) != sorted(tables):
        missing, unknown = sorted({*tables} - {*places}), sorted({*places} - {*tables})
        raise UserError(f"the page needs each table once: missing {missing}, unknown {unknown}, present {places}")
    return _MARKED.sub(lambda found: f"{found[1]}{tables[found[2]]}\n{found[3]}", page)


def new_page(tables: Mapping[str, str]) -> str:
    """Return a page with a place for each table."""
    parts = [f"## {TOPICS.get(name, name)}\n\n<!-- table: {name} -->\n<!-- end -->\n" for name in tables]
    return "# The growth study\n\n" + "\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())

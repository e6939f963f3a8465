"""Compute the tables of validation, print them, and write them where the documentation includes them.

python -m validation                 # all of them
python -m validation heston kramers  # some of them
"""

import argparse
import math
import platform
import sys
import time
from pathlib import Path
from typing import Any

import kolmo
from kolmo.testing import Table
from validation.tables import TABLES

FOLDER = Path(__file__).parent / "results"


def shown(value: Any) -> str:
    """A cell: numbers to seven digits where they are answers, to two where they are errors."""
    if isinstance(value, float):
        if math.isnan(value):
            return ""
        return f"{value:.1e}" if 0.0 < abs(value) < 1e-2 else f"{value:.7g}"
    return str(value)


def markdown(table: Table, note: str) -> str:
    """The table as Markdown."""
    head = ["| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns)]
    rows = ["| " + " | ".join(shown(v) for v in row) + " |" for row in table.rows]
    return "\n".join([f"**{table.title}.** {note}", "", *head, *rows, ""])


def main() -> int:
    """Compute, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"which tables: {', '.join(TABLES)}")
    options = parser.parse_args()
    unknown = set(options.names) - set(TABLES)
    if unknown:
        parser.error(f"no table named {', '.join(sorted(unknown))}; there are {', '.join(TABLES)}")
    FOLDER.mkdir(exist_ok=True)
    note = f"kolmo {kolmo.__version__}, Python {platform.python_version()}."
    for name in options.names or TABLES:
        begun = time.perf_counter()
        table = TABLES[name]()
        (FOLDER / f"{name}.md").write_text(markdown(table, note), encoding="utf-8")
        sys.stdout.write(f"{table}\n({time.perf_counter() - begun:.1f} s)\n\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())

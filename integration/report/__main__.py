from __future__ import annotations

import argparse
import sys
from pathlib import Path

from integration.report import __doc__ as about
from integration.report import plots
from integration.report.files import Files
from integration.report.page import NAME, page

RESULTS = Path(__file__).resolve().parent.parent / "results"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m integration.report", description=about)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--out", type=Path, help="where to write; default: the same folder")
    parser.add_argument("--check", action="store_true", help="only: is the page up to date?")
    options = parser.parse_args()
    out: Path = options.out or options.results
    files = Files.read(options.results)
    text = page(files)
    if options.check:
        path = out / NAME
        if path.exists() and path.read_text() == text:
            return 0
        print(f"{path} is out of date: run `python -m integration.report`.", file=sys.stderr)
        return 1
    out.mkdir(parents=True, exist_ok=True)
    (out / NAME).write_text(text)
    drawn = plots.draw(files, out)
    print(f"{out / NAME} and {len(drawn)} pictures, from {len(files.all)} files")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The arguments that benchmarks share."""

import argparse
from pathlib import Path
from typing import Any

from . import record


class Parser(argparse.ArgumentParser):
    """A parser that refuses records to which nothing can be added, before anything is measured."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Return the options; `records` are the files to add to."""
        options = super().parse_args(args, namespace)
        try:
            files = [options.json, options.record and record.file_in(options.record)]
            options.records = [file for file in files if file]
            for file in options.records:
                record.opened(file)
        except (OSError, ValueError) as reason:
            self.error(str(reason))
        return options


def parser(description: str, *, times: bool = True) -> argparse.ArgumentParser:
    """Return a parser of the arguments that the benchmarks share; not all of them have times to record."""
    kind = Parser if times else argparse.ArgumentParser
    arguments = kind(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--quick", action="store_true", help="small lists only, for a look or a test")
    if not times:
        return arguments
    arguments.add_argument("--samples", type=int, default=9, help="of each contestant, in turns")
    arguments.add_argument("--json", type=Path, metavar="FILE", help="a record to write or add to")
    arguments.add_argument("--picture", type=Path, metavar="FILE", help="where to draw them")
    arguments.add_argument(
        "--record",
        type=Path,
        nargs="?",
        const=Path("bench/results"),
        metavar="FOLDER",
        help="add to this processor's record (in a clone: bench/results)",
    )
    return arguments

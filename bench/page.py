"""Write the page of benchmarks from the records, and a picture for each.

python -m fastema.bench.page [--results FOLDER] [--page FILE] [--pictures FOLDER]
"""

import argparse
from pathlib import Path
from typing import Any

from . import record
from .report import LEGEND, across_moments, tables

HEAD = f"""# Benchmarks

What an update costs, on each processor that was measured. `python -m fastema.bench.page` writes this page
from `bench/results/`, which has all numbers. `python -m fastema.bench.bench_update --record` measures another
processor, or this one again; `python -m fastema.bench.compare BEFORE.json AFTER.json` tells what got slower.

A cell has {LEGEND}.
All were called in turns in one process. GB/s and the share of the ceiling are fastema's; the ceiling is the
best of several loops that only move the same bytes of the same arrays, called back to back. Columns are the
moments of a training loop, which calls once a step:

* **back to back**: again and again, threads awake, short lists in caches;
* **after torch**: right after torch's operations on all threads, which still look out for the next one;
* **after 30 ms** of sleep;
* **cold caches**: after other data, four times the size of the last cache;
* **fresh memory**: between allocations, so that what a call allocates has new pages.

`a <- b` are averages of one type and values of another. But for back to back, Python's own code is cold, too:
it is most of what ten arrays of ten cost."""
ALT = (
    "Time of an update over fastema's, for each list and rival: from the best to the worst of the moments, "
    "on a logarithmic axis."
)
SECTIONS = {
    "update": "Updates",
    "threads": "Updates by one thread and by all",
    "swap": "Swaps",
    "ema": "EMA.update",
    "tensorflow": "Updates of tf.Variables",
    "keras": "Steps of Keras",
    "lightning": "Steps of Lightning",
}


def _processor(of: dict[str, Any]) -> str:
    numbers = [f"{name} {of[name]}" for name in ("family", "model", "stepping") if of.get(name) is not None]
    caches = ", ".join(f"{name} {size}" for name, size in of["caches"].items())
    virtual = f", virtual ({of['hypervisor']})" if of.get("hypervisor") else ""
    return f"{', '.join([of['model_name'], *numbers])}; {of['cpus']} CPUs{virtual}. Caches: {caches}."


def _software(said: dict[str, Any]) -> str:
    build = said["build"]
    libraries = (f"{name} {version}" for name, version in said["libraries"].items())
    ours = f"fastema {build['version']}, {build['compiler']}, {build['instruction_set']}"
    return ", ".join([said["kernel"], f"Python {said['python']}", *libraries, ours])


def _picture(file: Path) -> str:
    return f"updates-{file.stem}.svg"


def draw(folder: Path, pictures: Path) -> list[Path]:
    """Draw the updates of each record that has them; return the files."""
    drawn = []
    for file in sorted(folder.glob("*.json")):
        content = record.read(file)
        if (kept := content["sections"].get("update")) is not None:
            drawn.append(pictures / _picture(file))
            across_moments(record.results_of(kept), content["processor"]["name"], drawn[-1])
    return drawn


def text(folder: Path) -> str:
    """Return the page that a folder of records makes.

    Raises:
        ValueError: A file is no record.
    """
    parts = [HEAD]
    for file in sorted(folder.glob("*.json")):
        content = record.read(file)
        described = content["processor"]
        parts += [f"## {described['name']}", _processor(described)]
        for section, title in SECTIONS.items():
            if (kept := content["sections"].get(section)) is None:
                continue
            parts += [
                f"### {title} on {described['name']}",
                f"{kept['date']}: {_software(kept['software'])}.",
            ]
            if section == "update":
                parts.append(f"![{ALT}](pictures/{_picture(file)})")
            parts += [table.markdown() for table in tables(record.results_of(kept))]
    return "\n\n".join(parts) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=Path("bench/results"), help="folder of records")
    parser.add_argument("--page", type=Path, default=Path("python/docs/benchmarks.md"), help="what to write")
    parser.add_argument("--pictures", type=Path, default=Path("python/docs/pictures"), help="where to draw")
    options = parser.parse_args(arguments)
    options.page.write_text(text(options.results), encoding="utf-8")
    print(f"Page: {options.page}")
    for picture in draw(options.results, options.pictures):
        print(f"Picture: {picture}")


if __name__ == "__main__":
    main()

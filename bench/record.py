"""What was measured on a processor, kept as JSON: one file for each, with a section for each script.

A section says when and with which versions; its results are keyed by list and moment, and a script that
measures some of them again replaces these and leaves the others.
"""

import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import fastema

from .harness import Result, Timing

SCHEMA = 1
LIBRARIES = ("jax", "keras", "numba", "numexpr", "numpy", "tensorflow", "torch")
# Virtual machines hide what a processor is called, and tell its family and models (first to last).
MICROARCHITECTURES = {
    ("AuthenticAMD", 23): ((0x00, 0x2F, "Zen"), (0x30, 0xFF, "Zen 2")),
    ("AuthenticAMD", 25): (
        *((0x00, 0x0F, "Zen 3"), (0x10, 0x1F, "Zen 4"), (0x20, 0x5F, "Zen 3")),
        *((0x60, 0x7F, "Zen 4"), (0xA0, 0xAF, "Zen 4c")),
    ),
    ("AuthenticAMD", 26): ((0x00, 0xFF, "Zen 5"),),
    ("GenuineIntel", 6): (
        *((0x4F, 0x4F, "Broadwell"), (0x55, 0x55, "Skylake"), (0x6A, 0x6C, "Ice Lake")),
        *((0x8F, 0x8F, "Sapphire Rapids"), (0xAD, 0xAE, "Granite Rapids"), (0xCF, 0xCF, "Emerald Rapids")),
    ),
}


def microarchitecture(vendor: str, family: int, model: int) -> str | None:
    """Name what a processor is, by the numbers that it tells; None where they are not known here."""
    for first, last, name in MICROARCHITECTURES.get((vendor, family), ()):
        if first <= model <= last:
            return name
    return None


def _lscpu() -> dict[str, str]:
    """Return what Linux says of the processor; nothing elsewhere."""
    try:
        done = subprocess.run(
            ["lscpu", "--json"], capture_output=True, text=True, check=True, env={**os.environ, "LC_ALL": "C"}
        )
    except (OSError, subprocess.CalledProcessError):
        return {}

    def walked(entries: Iterable[dict[str, Any]]) -> Iterable[tuple[str, str]]:
        for entry in entries:
            yield entry["field"].rstrip(":"), entry["data"] or ""
            yield from walked(entry.get("children", ()))

    return dict(walked(json.loads(done.stdout)["lscpu"]))


def processor() -> dict[str, Any]:
    """Describe this machine's processor, and nothing else of the machine."""
    said = _lscpu()
    numbers = [
        int(n) if (n := said.get(field, "")).isdigit() else None
        for field in ("CPU family", "Model", "Stepping", "CPU(s)", "Thread(s) per core")
    ]
    family, model, stepping, cpus, threads = numbers
    vendor = said.get("Vendor ID", "")
    known = family is not None and model is not None and microarchitecture(vendor, family, model)
    return {
        "name": known or said.get("Model name") or platform.machine(),
        "vendor": vendor,
        "model_name": said.get("Model name", platform.processor()),
        "family": family,
        "model": model,
        "stepping": stepping,
        "cpus": cpus or os.cpu_count(),
        "threads_per_core": threads,
        "hypervisor": said.get("Hypervisor vendor"),
        "caches": {name: said[f"{name} cache"] for name in ("L1d", "L2", "L3") if f"{name} cache" in said},
        "flags": said.get("Flags", ""),
    }


def software() -> dict[str, Any]:
    """Tell the versions of what runs here."""
    release = re.match(r"[\d.]*\d", platform.release())
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "kernel": f"{platform.system()} {release[0] if release else ''}".strip(),
        "python": platform.python_version(),
        "libraries": versions,
        "build": fastema.build_config(),
    }


def _times(timing: Timing | None) -> dict[str, float] | None:
    return timing and {name: float(f"{value:.4g}") for name, value in asdict(timing).items()}


def plain(result: Result) -> dict[str, Any]:
    """Return a result as JSON has it."""
    return {
        "title": result.title,
        "moment": result.moment,
        "bytes_moved": result.bytes_moved,
        "ceiling": _times(result.ceiling),
        "timings": {name: _times(timing) for name, timing in result.timings.items()},
    }


def results_of(section: dict[str, Any]) -> list[Result]:
    """Return the results that a section keeps."""
    return [
        Result(
            entry["title"],
            entry["bytes_moved"],
            {name: Timing(**timing) for name, timing in entry["timings"].items()},
            entry["ceiling"] and Timing(**entry["ceiling"]),
            entry["moment"],
        )
        for entry in section["results"]
    ]


def check(content: Any) -> dict[str, Any]:
    """Return what a record says, which has the form of one.

    Raises:
        ValueError: It has not; what is missing or of another type is named.
    """
    _need(content, "the record", {"schema": int, "processor": dict, "sections": dict})
    if content["schema"] != SCHEMA:
        raise ValueError(f"schema is {content['schema']}, and this reads {SCHEMA}")
    _need(
        content["processor"],
        "processor",
        {"name": str, "vendor": str, "model_name": str, "flags": str, "caches": dict, "cpus": int},
    )
    for name, section in content["sections"].items():
        _need(section, name, {"date": str, "software": dict, "results": list})
        for entry in section["results"]:
            _need(entry, name, {"title": str, "moment": str, "bytes_moved": int, "timings": dict})
            where = f"{name}: {entry['title']}, {entry['moment']}"
            if "fastema" not in entry["timings"]:
                raise ValueError(f"{where}: there is no time of fastema")
            for timing in (*entry["timings"].values(), *filter(None, [entry.get("ceiling")])):
                _need(timing, where, {"median": float, "lower": float, "upper": float})
                if not 0 < timing["lower"] <= timing["median"] <= timing["upper"]:
                    raise ValueError(f"{where}: {timing} are no quartiles")
    return content


def _need(value: Any, where: str, kinds: dict[str, type]) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is no object")
    for name, kind in kinds.items():
        if not isinstance(value.get(name), kind):
            raise ValueError(f"{where}: {name} must be of type {kind.__name__}, not {value.get(name)!r}")


def read(file: Path) -> dict[str, Any]:
    """Read a record.

    Raises:
        ValueError: It is none; the file and what is wrong are named.
    """
    try:
        return check(json.loads(file.read_text(encoding="utf-8")))
    except ValueError as reason:
        raise ValueError(f"{file}: {reason}") from None


def opened(file: Path) -> dict[str, Any]:
    """Return what a record has, to be added to; a new one if there is no such file.

    Raises:
        ValueError: The file is of another processor, or no record.
    """
    here = processor()
    if not file.exists():
        return {"schema": SCHEMA, "processor": here, "sections": {}}
    content = read(file)
    if identity(content["processor"]) != identity(here):
        raise ValueError(f"{file} is of {content['processor']['name']}, and this is {here['name']}")
    return content


def add(file: Path, section: str, results: list[Result]) -> None:
    """Write results into a record, beside or instead of those that it has.

    Raises:
        ValueError: As `opened`.
    """
    content = opened(file)
    kept = content["sections"].get(section, {}).get("results", [])
    new = {(entry["title"], entry["moment"]): entry for entry in map(plain, results)}
    old = {(entry["title"], entry["moment"]): entry for entry in kept}
    content["sections"][section] = {
        "date": datetime.now(UTC).date().isoformat(),
        "software": software(),
        "results": list((old | new).values()),
    }
    text = json.dumps(check(content), indent=1, ensure_ascii=False) + "\n"
    beside = file.with_name(f"{file.name}.new")
    beside.write_text(text, encoding="utf-8")
    beside.replace(file)


def identity(described: dict[str, Any]) -> tuple[Any, ...]:
    """Return what tells a processor from others."""
    return tuple(described.get(name) for name in ("name", "vendor", "model_name", "family", "model", "cpus"))


def file_in(folder: Path) -> Path:
    """Return where the record of this processor is in a folder, or will be.

    Raises:
        FileNotFoundError: There is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no {folder} to record in: run in a clone, or name a folder")
    here = processor()
    maker = here["vendor"].removeprefix("Authentic").removeprefix("Genuine")
    words = re.findall("[a-z0-9]+", f"{maker} {here['name']} {here['cpus']} cpus".lower())
    return folder / f"{'-'.join(words)}.json"

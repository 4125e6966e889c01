"""The plan of the house tells the truth: its rooms are the files that are there, and hops lead somewhere."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "python" / "docs" / "architecture.md"
TEXT = PAGE.read_text(encoding="utf-8")
STEPS = (ROOT / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8")
PACKAGE = ROOT / "python" / "fastema"
SOURCES = {".cpp", ".cu", ".cuh", ".hpp", ".py", ".pyi", ".typed"}
HOPS = sorted(set(re.findall(r"`([\w./]+\.\w+):([\w.:]+)`", TEXT)))
FILES = sorted(set(re.findall(r"`([\w./]+\.(?:cpp|cuh?|hpp|py))[:`]", TEXT + STEPS)))


def rooms():
    """Return the paths in the tree of the page."""
    tree = re.search(r"## Rooms\n\n```\n(.*?)```", TEXT, re.DOTALL)[1]
    folders, found = {}, []
    for line in tree.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        path = f"{folders.get(depth - 1, '')}{name}"
        if name.endswith("/"):
            folders[depth] = path
        else:
            found.append(path)
    return found


def located(file):
    """Return where a file that is named lies; without a folder, its name is enough where no other has it."""
    for folder in (PACKAGE, ROOT):
        if (folder / file).exists():
            return folder / file
    found = [path for folder in (PACKAGE, ROOT / "cpp") for path in folder.rglob(file)]
    assert len(found) == 1, f"{file} is not there"
    return found[0]


def definitions(tree, prefix=""):
    """Yield the qualified names of what a module of Python defines."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield prefix + node.name
        if isinstance(node, ast.ClassDef):
            yield from definitions(node, f"{prefix}{node.name}.")


def test_the_tree_has_every_file_and_no_other():
    files = [path for folder in (ROOT / "cpp", PACKAGE) for path in folder.rglob("*")]
    there = sorted(str(path.relative_to(ROOT)) for path in files if path.suffix in SOURCES)
    assert sorted(rooms()) == there


@pytest.mark.parametrize("file", FILES)
def test_files_that_are_named_are_there(file):
    assert located(file).is_file()


@pytest.mark.parametrize(("file", "name"), HOPS, ids=[f"{file}:{name}" for file, name in HOPS])
def test_every_hop_leads_somewhere(file, name):
    text = located(file).read_text(encoding="utf-8")
    if file.endswith(".py"):
        assert name in definitions(ast.parse(text))
    else:
        for part in name.split("::"):
            assert re.search(rf"\b{part}\b", text), f"{file} has no {part}"

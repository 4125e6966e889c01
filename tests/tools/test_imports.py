"""Who imports whom within fastema: no circle, and the core only where it is spoken to.

The floors, and which module may import which framework, are in pyproject.toml, for import-linter.
"""

import ast
from pathlib import Path

import pytest

import fastema
from processes import output_of

PACKAGE = Path(fastema.__file__).parent
FILES = {
    ".".join(("fastema", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
CORE = "fastema._core"
MODULES = {CORE, *FILES}
# beside the face, which asks for the version
TO_THE_CORE = ["_arrays", "_build", "_elsewhere", "_ema", "_types", "cuda", "functional"]


class WithoutTypeChecking(ast.NodeTransformer):
    """Leaves out what only a type checker executes."""

    def visit_If(self, node):
        if ast.unparse(node.test).endswith("TYPE_CHECKING"):
            return [self.visit(each) for each in node.orelse]
        return self.generic_visit(node)


def imports_of(name):
    """Return the modules of fastema that one imports, at any time."""
    package = name if FILES[name].name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    for node in ast.walk(WithoutTypeChecking().visit(tree)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            source = ".".join([*up, *filter(None, [node.module])])
            members = {f"{source}.{alias.name}" for alias in node.names}
            found |= (members & MODULES) or {source}
            if not members <= MODULES:
                found.add(source)
    return found & MODULES


IMPORTS = {name: imports_of(name) for name in FILES}


def circle_through(start):
    """Return the shortest way from a module back to it, by its imports; an empty one where there is none."""
    ways = [[start]]
    seen = set()
    while ways:
        way = ways.pop(0)
        for name in sorted(IMPORTS.get(way[-1], ())):
            if name == start:
                return [*way, start]
            if name not in seen:
                seen.add(name)
                ways.append([*way, name])
    return []


@pytest.mark.parametrize("name", FILES)
def test_no_module_imports_itself_by_way_of_others(name):
    assert not circle_through(name)


def test_the_core_is_imported_only_where_it_is_spoken_to():
    importers = {name for name, imported in IMPORTS.items() if CORE in imported} - {"fastema"}
    assert {name.split(".")[1] for name in importers} <= set(TO_THE_CORE)


@pytest.mark.parametrize("name", ["fastema", "fastema.cuda", "fastema.__main__", "fastema.posthoc"])
def test_what_is_for_every_framework_loads_none(name):
    frameworks = ["keras", "tensorflow", "torch", "jax", "cupy", "tf_keras", "matplotlib", "sklearn"]
    frameworks += ["accelerate", "transformers"]
    assert output_of(f"import sys, {name}; print([m for m in {frameworks} if m in sys.modules])") == "[]"

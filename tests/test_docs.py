"""The documentation tells the truth: every example in it runs."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import fastema

ROOT = Path(__file__).parent.parent
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(fastema.__path__, "fastema.")
    if not module.name.endswith(("__main__", "_core"))
)
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def imported(name):
    """Import one of our modules; skip the test where that is for a framework that is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as missing:
        if missing.name not in ("jax", "tf_keras", "torch", "triton"):
            raise
        pytest.skip(f"{name} is for {missing.name}, which is not installed")


@pytest.mark.parametrize("name", ["fastema", *MODULES])
def test_examples_in_docstrings(name):
    assert doctest.testmod(imported(name)).failed == 0


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda text: text.splitlines()[0])
def test_readme_snippets(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {})


def test_readme_has_its_two_commands():
    commands = re.search(r"```sh\n(.*?)```", README, re.DOTALL)[1].splitlines()
    assert len(commands) == 2
    assert commands[0].endswith("-m fastema demo")
    assert commands[1].endswith("-m pytest")


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_has_a_docstring(name):
    module = imported(name)
    for public in getattr(module, "__all__", []):
        assert getattr(module, public).__doc__, f"{name}.{public}"

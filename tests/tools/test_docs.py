"""The documentation tells the truth: every example in it runs."""

import doctest
import importlib
import pkgutil
import re
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

import fastema
import installed

ROOT = Path(__file__).parents[2]
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(fastema.__path__, "fastema.")
    if not module.name.endswith(("__main__", "_core"))
)
PAGES = [ROOT / "README.md", *sorted((ROOT / "python" / "docs").glob("*.md"))]
ALL_PAGES = [*PAGES, ROOT / ".github" / "CONTRIBUTING.md"]
OPTIONAL = (
    *("accelerate", "diffusers", "ema_pytorch", "equinox", "flax", "jax", "keras_tuner", "lightning"),
    *("optax", "orbax", "peft", "schedulefree", "tensorboard", "tf_keras", "timm", "torch", "torch_ema"),
    *("transformers", "triton"),
)


@contextmanager
def skipped_without_packages(what):
    """Skip the test where something is for a package that is not installed."""
    try:
        yield
    except ModuleNotFoundError as missing:
        if missing.name not in OPTIONAL:
            raise
        pytest.skip(f"{what} is for {missing.name}, which is not installed")


def imported(name):
    with skipped_without_packages(name):
        return importlib.import_module(name)


def sections(page):
    """Return for each path of headings its Python code, after that of the headings above it.

    All other lines are blank, so that an error names the line of the page.
    """
    lines = page.read_text(encoding="utf-8").splitlines()
    path, fence, owners = (), "", []
    for line in lines:
        if line.startswith("```"):
            fence = "" if fence else line
        elif not fence and (heading := re.match("(#+) (.*)", line)):
            path = (*path[: len(heading[1]) - 1], heading[2])
        owners.append(path if fence == "```python" and line != fence else None)
    return {
        path: "\n".join(
            line if owner and owner == path[: len(owner)] else ""
            for line, owner in zip(lines, owners, strict=True)
        )
        for path in dict.fromkeys(filter(None, owners))
    }


@pytest.mark.parametrize("name", ["fastema", *MODULES])
def test_examples_in_docstrings(name):
    assert doctest.testmod(imported(name)).failed == 0


@pytest.mark.parametrize(
    ("page", "code"),
    [
        pytest.param(page, code, id=f"{page.name}: {path[-1]}")
        for page in PAGES
        for path, code in sections(page).items()
    ],
)
# Lightning's own advice on workers, and what it uses of torch, and KerasTuner of Python, that will change
@pytest.mark.filterwarnings("ignore:::lightning", "ignore:::torch", "ignore:::keras_tuner")
def test_examples_on_pages(page, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, module in installed.without_their_dependencies().items():
        monkeypatch.setitem(sys.modules, name, module)
    with skipped_without_packages("the section"):
        exec(compile(code, page, "exec"), {})


@pytest.mark.parametrize("name", ["coming_from.md", "keras.md", "lightning.md"])
def test_calls_in_tables_are_in_examples(name):
    page = ROOT / "python" / "docs" / name
    code = "\n".join(sections(page).values())
    calls = [
        call
        for line in page.read_text(encoding="utf-8").splitlines()
        if line.startswith("|")
        for call in re.findall("`(.+?)`", line)
    ]
    assert [call for call in calls if call not in code] == []


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]*#?[^)]*)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall("(?m)^#+ (.*)", file.read_text(encoding="utf-8").lower())
            assert anchor in [re.sub(r"[^\w -]", "", x).replace(" ", "-") for x in headings], target


def test_readme_has_its_two_commands():
    section = PAGES[0].read_text(encoding="utf-8").split("## Two commands")[1]
    commands = re.search(r"```sh\n(.*?)```", section, re.DOTALL)[1].splitlines()
    assert len(commands) == 2
    assert commands[0].endswith("-m fastema demo")
    assert commands[1].endswith("-m pytest")


def test_the_reference_has_every_public_name():
    reference = "".join(
        page.read_text(encoding="utf-8") for page in (ROOT / "python" / "docs" / "api").glob("*.md")
    )
    whole = re.findall(r"(?m)^\.\. automodule:: fastema\.(\w+)\n   :members:$", reference)
    assert {"checkpoint", "posthoc", "schedules", *fastema._ON_DEMAND} - {*whole} == {"schedules"}
    described = {*re.findall(r"(?m)^\.\. auto\w+:: fastema\.([\w.]+)$", reference), "BEMA", "Window"}
    assert {*fastema.__all__} - described == set()
    assert {f"schedules.{name}" for name in fastema.schedules.__all__} - described == set()


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_has_a_docstring(name):
    module = imported(name)
    for public in getattr(module, "__all__", []):
        assert getattr(module, public).__doc__, f"{name}.{public}"

"""The documentation as a site: `sphinx-build -W -b html python/docs build/site`.

All frameworks must be installed, as the reference is read from the modules themselves. With `-t online`
Python's, NumPy's, torch's and JAX's own names lead to their sites, whose lists are fetched.
"""

import os
import re
import tomllib
from pathlib import Path
from typing import Any

from numpy.typing import DTypeLike
from sphinx.util.typing import stringify_annotation

import fastema

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SOURCES = f"{PROJECT['urls']['Repository']}/blob/main/"

project = PROJECT["name"]
release = version = PROJECT["version"]
author = PROJECT["authors"][0]["name"]
copyright = f"{author}; MIT"  # noqa: A001  # Sphinx' name for it

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
if globals()["tags"].has("online") or "READTHEDOCS" in os.environ:  # Sphinx puts tags there
    extensions.append("sphinx.ext.intersphinx")
html_theme = "furo"
html_title = f"fastema {release}"
html_theme_options = {
    "source_repository": PROJECT["urls"]["Repository"],
    "source_branch": "main",
    "source_directory": "python/docs/",
}

myst_enable_extensions = ["attrs_inline", "colon_fence"]
myst_heading_anchors = 4
napoleon_use_ivar = True  # else attributes would be described twice
default_role = "py:obj"  # single backticks in docstrings
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 90
ALIASES = {"DTypeLike": DTypeLike, **{name: getattr(fastema, name) for name in ("Arrays", "Array", "Decay")}}
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True
linkcheck_anchors = False
linkcheck_retries = 3
intersphinx_mapping = {
    "python": ("https://docs.python.org/3", None),
    "numpy": ("https://numpy.org/doc/stable", None),
    "torch": ("https://docs.pytorch.org/docs/stable", None),
    "jax": ("https://docs.jax.dev/en/latest", None),
}


def _to_the_sources(app: Any, page: str, lines: list[str]) -> None:
    """Have links of a page that lead out of this folder lead to the repository."""
    folder = Path(app.srcdir, page).parent

    def link(found: re.Match[str]) -> str:
        target = (folder / found[1]).resolve()
        return f"]({SOURCES}{target.relative_to(ROOT)}" if not target.is_relative_to(app.srcdir) else found[0]

    lines[:] = [re.sub(r"\]\((\.\./[^)#]*)", link, lines[0])]


def _by_alias(*described: Any) -> tuple[str | None, str | None]:
    """Write long types as the sources do: of arguments, and of what is returned."""
    signature, returned = described[-2:]
    for alias, stands_for in ALIASES.items():
        written = stringify_annotation(stands_for, "smart")  # what autodoc calls short
        signature = signature and signature.replace(written, alias)
        returned = returned and returned.replace(written, alias)
    return signature, returned


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _to_the_sources)
    app.connect("autodoc-process-signature", _by_alias)

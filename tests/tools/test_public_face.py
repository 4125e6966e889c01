"""Names, arguments and commands that programs rely on change only where data/public_face.txt says so."""

import difflib
from pathlib import Path

import pytest

import public_face
from processes import skip_without

FILE = Path(__file__).parents[1] / "data" / "public_face.txt"
SAID = public_face.read(FILE.read_text(encoding="ascii"))


def test_the_file_has_every_section():
    assert list(SAID) == list(public_face.NEEDED)


@pytest.mark.parametrize("section", public_face.NEEDED)
def test_every_public_name_has_its_arguments_and_no_other_is_there(section):
    if package := public_face.NEEDED[section]:
        skip_without(package)
    found = public_face.section(section)
    changes = difflib.unified_diff(SAID[section], found, "public_face.txt", "the code", n=0, lineterm="")
    assert found == SAID[section], "\n".join([f"[{section}]", *changes])

"""Records of benchmarks: what they say, how two are compared, and the page that is made of them."""

import json
import platform
from dataclasses import replace
from pathlib import Path

import pytest
from fastema.bench import cli, compare, page, record
from fastema.bench.harness import Result, Timing
from fastema.bench.report import tables

ROOT = Path(__file__).parents[2]
KEPT = sorted((ROOT / "bench" / "results").glob("*.json"))


def timing(median, spread=0.01):
    return Timing(median, median * (1 - spread), median * (1 + spread))


def result(ours=1e-3, rival=2e-3, ceiling=9e-4, *, title="list", moment="cold", spread=0.01):
    timings = {
        "fastema": timing(ours, spread),
        "one": timing(rival, spread),
        "other": timing(2 * rival, spread),
    }
    return Result(title, 12_000_000, timings, timing(ceiling, spread), moment)


def recorded(folder, name, *results):
    record.add(folder / name, "update", list(results))
    return folder / name


def test_results_come_back_from_a_record(tmp_path):
    file = recorded(tmp_path, "a.json", result(), result(moment="warm"))
    assert record.results_of(record.read(file)["sections"]["update"]) == [result(), result(moment="warm")]


def test_what_is_measured_again_replaces_itself_and_nothing_else(tmp_path):
    file = recorded(tmp_path, "a.json", result(), result(moment="warm"))
    record.add(file, "swap", [result()])
    record.add(file, "update", [result(5e-3), result(title="new")])
    sections = record.read(file)["sections"]
    assert record.results_of(sections["swap"]) == [result()]
    assert record.results_of(sections["update"]) == [
        result(5e-3),
        result(moment="warm"),
        result(title="new"),
    ]


def test_a_record_names_its_processor_and_no_machine(tmp_path):
    text = recorded(tmp_path, "a.json", result()).read_text(encoding="utf-8")
    content = json.loads(text)
    assert content["processor"]["name"]
    assert content["sections"]["update"]["software"]["libraries"]["numpy"]
    assert len(platform.node()) < 4 or platform.node() not in text


def test_the_record_of_another_processor_is_left_as_it_is(tmp_path):
    file = recorded(tmp_path, "a.json", result())
    content = json.loads(file.read_text(encoding="utf-8"))
    content["processor"]["name"] = "Abacus"
    file.write_text(json.dumps(content), encoding="utf-8")
    before = file.read_bytes()
    with pytest.raises(ValueError, match="is of Abacus, and this is"):
        record.add(file, "update", [result()])
    assert file.read_bytes() == before


def test_a_folder_has_one_record_of_a_processor(tmp_path):
    for section in ("update", "swap"):
        record.add(record.file_in(tmp_path), section, [result()])
    (file,) = tmp_path.iterdir()
    assert sorted(record.read(file)["sections"]) == ["swap", "update"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--json", "spoilt"], "spoilt: the record is no object"), (["--record", "none"], "there is no none")],
)
def test_what_cannot_be_recorded_is_refused_before_anything_is_measured(
    tmp_path, monkeypatch, capsys, arguments, said
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spoilt").write_text("[]", encoding="utf-8")
    with pytest.raises(SystemExit):
        cli.parser("").parse_args(arguments)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda c: c.update(schema=99), "schema is 99"),
        (lambda c: c.pop("processor"), "processor must be of type dict"),
        (lambda c: c["processor"].pop("flags"), "processor: flags must be of type str"),
        (lambda c: c["sections"]["update"].pop("date"), "update: date must be of type str"),
        (
            lambda c: c["sections"]["update"]["results"][0]["timings"].pop("fastema"),
            "there is no time of fastema",
        ),
        (
            lambda c: c["sections"]["update"]["results"][0]["timings"]["one"].update(lower=1.0),
            "are no quartiles",
        ),
    ],
)
def test_what_is_no_record_is_refused_by_name(tmp_path, spoil, said):
    file = recorded(tmp_path, "a.json", result())
    content = json.loads(file.read_text(encoding="utf-8"))
    spoil(content)
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=f"a.json: .*{said}"):
        record.read(file)


@pytest.mark.parametrize(
    ("numbers", "name"),
    [
        (("AuthenticAMD", 25, 0x01), "Zen 3"),
        (("AuthenticAMD", 25, 0x11), "Zen 4"),
        (("GenuineIntel", 6, 0x8F), "Sapphire Rapids"),
        (("AuthenticAMD", 99, 1), None),
    ],
)
def test_a_processor_is_named_by_its_numbers(numbers, name):
    assert record.microarchitecture(*numbers) == name


def compared(tmp_path, before, after):
    files = [recorded(tmp_path, name, *results) for name, results in (("a", before), ("b", after))]
    return compare.main([str(file) for file in files])


def test_a_call_that_got_slower_is_named(tmp_path, capsys):
    after = [result(1.2e-3), result(moment="warm")]
    assert compared(tmp_path, [result(), result(moment="warm")], after) == 1
    assert capsys.readouterr().out.splitlines() == [
        "slower: update: list: cold: 1.20 of its time before, noise up to 1.05",
        "2 calls compared, 1 slower, 0 faster",
    ]


def test_a_slower_machine_makes_no_call_slower(tmp_path):
    assert compared(tmp_path, [result()], [result(2e-3, 4e-3, 1.8e-3)]) == 0


def test_a_difference_within_the_noise_makes_no_call_slower(tmp_path):
    assert compared(tmp_path, [result(spread=0.1)], [result(1.2e-3, spread=0.1)]) == 0


def test_a_call_that_got_faster_and_one_that_is_not_in_both_are_named(tmp_path, capsys):
    assert compared(tmp_path, [result(), result(title="old")], [result(0.5e-3)]) == 0
    printed = capsys.readouterr().out
    assert "faster: update: list: cold: 0.50" in printed
    assert "only in one record: update: old: cold" in printed


def test_records_of_different_processors_are_not_compared(tmp_path, capsys):
    files = [recorded(tmp_path, name, result()) for name in ("a", "b")]
    content = json.loads(files[1].read_text(encoding="utf-8"))
    content["processor"]["model"] = 12345
    files[1].write_text(json.dumps(content), encoding="utf-8")
    assert compare.main([str(file) for file in files]) == 2
    assert "different processors" in capsys.readouterr().err


def test_lists_with_rivals_have_a_table_each_and_all_others_one():
    alone = [replace(result(title=title), timings={"fastema": timing(1e-3)}) for title in ("x", "y")]
    made = tables([result(), result(moment="warm"), *alone])
    assert [table.head for table in made] == ["list", "fastema, of the ceiling"]
    assert [name for name, _ in made[0].rows] == ["one", "other", "fastema", "GB/s", "of the ceiling"]
    assert made[0].columns == ["cold", "warm"]
    assert made[0].rows[0][1][0] == "2  2 ms ±1%"
    assert [name for name, _ in made[1].rows] == ["x", "y"]


def test_the_page_shows_a_picture_for_each_record_of_updates(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    recorded(tmp_path, "a.json", result(), result(moment="warm"), result(title="short"))
    record.add(tmp_path / "b.json", "swap", [result()])
    (picture,) = page.draw(tmp_path, tmp_path)
    assert f"(pictures/{picture.name})" in page.text(tmp_path)
    drawn = picture.read_text(encoding="utf-8")
    assert all(text in drawn for text in ("list", "short", "one", "other", "cold", "warm"))
    page.draw(tmp_path, tmp_path)
    assert picture.read_text(encoding="utf-8") == drawn


@pytest.mark.skipif(not KEPT, reason="there are no records: python -m fastema.bench.bench_update --record")
def test_the_page_is_what_the_records_say():
    """And all of them are records."""
    written = (ROOT / "python" / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    made = page.text(ROOT / "bench" / "results")
    assert written == made, "python -m fastema.bench.page writes it anew"

"""A file is believed in nothing: to read it gives its bits or an error, and touches no other file."""

import gc
import json
import os
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import golden
import hostile
import inputs
from fastema import EMA, checkpoint, posthoc
from fastema.__main__ import main
from processes import output_of, python

GOLDEN, SAVED, SHARDS = hostile.GOLDEN, hostile.SAVED, hostile.SHARDS


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return a folder where programs run, with a file that must stay what it is."""
    (tmp_path / "victim.txt").write_text("what nobody may touch")
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- what a file says beside its arrays -------------------------------------------------------------------

ARGUMENTS = [
    "memory",
    "threads",
    "device",
    "background",
    "initial",
    "only",
    "values",
    "self",
    "path",
    "__class__",
]


@pytest.mark.parametrize("key", ARGUMENTS)
def test_a_file_gives_no_arguments_but_those_that_are_saved(folder, key):
    state = json.loads(hostile.parts_of(SAVED["plain"])[0]["__metadata__"]["fastema"])
    for value in ["victim.txt", str(folder / "victim.txt"), 0, 10**6, None, True, "cpu", "zeros"]:
        text = json.dumps({**state, "config": {**state["config"], key: value}})
        (folder / "ema.safetensors").write_bytes(hostile.with_metadata(SAVED["plain"], "fastema", text))
        before = hostile.watched(folder)
        with pytest.raises(ValueError, match=rf"ema.safetensors .* without '{key}'"):
            EMA.load(folder / "ema.safetensors", hostile.weights_of("plain"))
        assert hostile.watched(folder) == before


PLACES = sorted(
    {
        (name, path)
        for name in ("compensated", "swapped")
        for path in hostile.places_in(json.loads(hostile.parts_of(SAVED[name])[0]["__metadata__"]["fastema"]))
    },
    key=str,
)


def called(x):
    return x if isinstance(x, str) else "-".join(map(str, x)) or "all"


@pytest.mark.parametrize(("name", "place"), PLACES, ids=called)
def test_any_value_in_the_state_is_taken_or_refused_and_nothing_is_touched(folder, name, place):
    state, taken = json.loads(hostile.parts_of(SAVED[name])[0]["__metadata__"]["fastema"]), 0
    for text in hostile.VALUES:
        changed = hostile.with_metadata(SAVED[name], "fastema", hostile.replaced(state, place, text))
        taken += hostile.read(folder, [changed], hostile.weights_of(name)) is not None
    assert taken < len(hostile.VALUES) / 2


def test_a_clock_that_no_float_holds_is_read_as_it_is(folder):
    state = json.loads(hostile.parts_of(SAVED["plain"])[0]["__metadata__"]["fastema"])
    text = json.dumps({**state, "clock": 2**53 + 1, "averaged": 2**53 + 1})
    changed = hostile.with_metadata(SAVED["plain"], "fastema", text)
    assert hostile.read(folder, [changed], hostile.weights_of("plain")).clock == 2**53 + 1


@pytest.mark.parametrize("key", ["step", "decay", "products", "swapped", "copied", "config", "version"])
def test_what_is_missing_in_the_state_is_named(folder, key):
    state = json.loads(hostile.parts_of(SAVED["plain"])[0]["__metadata__"]["fastema"])
    del state[key]
    (folder / "ema.safetensors").write_bytes(
        hostile.with_metadata(SAVED["plain"], "fastema", json.dumps(state))
    )
    with pytest.raises(
        ValueError, match=f"ema.safetensors holds a state that .* state must have '{key}', got"
    ):
        EMA.load(folder / "ema.safetensors", hostile.weights_of("plain"))


@pytest.mark.parametrize(
    "tensor",
    [
        *("fastema.averages.99999999999.kernel", "fastema.kept.kernel", "fastema.averages.0.kernel"),
        *("fastema.averages.01.kernel", "fastema.carries.0.kernel", "fastema.values.0.kernel", "fastema."),
        *("fastema.kept.-1.kernel", "fastema.kept.\u0660.kernel", "fastema.more.0.kernel"),
    ],
)
def test_a_tensor_that_no_state_has_is_refused_by_name(folder, tensor):
    header, body = hostile.parts_of(SAVED["plain"])
    header[tensor] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    (folder / "ema.safetensors").write_bytes(hostile.file_of(header, body))
    with pytest.raises(ValueError, match=f"ema.safetensors .* must have no tensor '{tensor}'"):
        EMA.load(folder / "ema.safetensors", hostile.weights_of("plain"))


def test_a_file_that_does_not_fit_leaves_the_memory_that_is_to_be_mapped(folder):
    (folder / "ema.safetensors").write_bytes(SAVED["plain"])
    with pytest.raises(ValueError, match="does not fit"):
        EMA.load(folder / "ema.safetensors", {"w": np.zeros(3)}, memory="victim.txt")
    assert (folder / "victim.txt").read_text() == "what nobody may touch"


def test_a_list_of_a_million_decays_makes_no_averages(folder):
    state = json.loads(hostile.parts_of(SAVED["plain"])[0]["__metadata__"]["fastema"])
    for names in ({}, {"kernel": [4, 2]}):
        count = 1_000_000
        many = {**state, "products": [0.0] * count, "decay": None, "copied": []}
        many["config"] = {**state["config"], "decay": [0.5] * count}
        header = {
            name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 32]} for name, shape in names.items()
        }
        header["__metadata__"] = {"fastema": json.dumps(many)}
        (folder / "ema.safetensors").write_bytes(hostile.file_of(header, bytes(32 * len(names))))
        with pytest.raises(ValueError, match=r"ema.safetensors"):
            EMA.load(folder / "ema.safetensors", {"kernel": np.zeros((4, 2), np.float32)})


# --- headers ----------------------------------------------------------------------------------------------

ENTRY = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("", "must have '{'"),
        ("[]", "must have '{'"),
        (" {}", "must have '{'"),
        ('{"a":' + ENTRY, "',' or '}'"),
        ('{"a":' + ENTRY + "}x", "its end"),
        ('{"a":' + ENTRY + ',"a":' + ENTRY + "}", "'a' once"),
        ('{"a":' + ENTRY + ',"\\u0061":' + ENTRY + "}", "'a' once"),
        ('{"__metadata__":{"x":"1","x":"2"},"a":' + ENTRY + "}", "'x' once"),
        ('{"__metadata__":{"x":1},"a":' + ENTRY + "}", "a text"),
        ('{"__metadata__":{},"__metadata__":{},"a":' + ENTRY + "}", "__metadata__"),
        ('{"__metadata__":' + ENTRY + "}", "__metadata__"),
        ('{"\\ud800":' + ENTRY + "}", "surrogates not allowed"),
        ('{"a":' + ENTRY.replace("[2]", "[2,true]") + "}", "of dtype, shape and data_offsets"),
        ('{"a":' + ENTRY.replace("[2]", "[-2,-1]") + "}", "of dtype, shape and data_offsets"),
        ('{"a":' + ENTRY.replace("[2]", "[2.0]") + "}", "of dtype, shape and data_offsets"),
        ('{"a":' + ENTRY.replace("[0,8]", "[-0,8]") + "}", "of dtype, shape and data_offsets"),
        (
            '{"a":' + ENTRY.replace("[2]", "[2,-0]").replace("0,8", "0,0") + "}",
            "of dtype, shape and data_offsets",
        ),
        ('{"a":' + ENTRY.replace("[2]", "2") + "}", "of dtype, shape and data_offsets"),
        ('{"a":' + ENTRY.replace("[2]", '[2],"shape":[2]') + "}", "of dtype, shape and data_offsets"),
        ('{"a":' + ENTRY.replace("[2]", '[2],"x":[2]') + "}", "of dtype, shape and data_offsets"),
        ('{"a":' + ENTRY.replace("[2]", f"[{2**62},4]") + "}", "must have .* bytes by its type and shape"),
        ('{"a":' + ENTRY.replace("[2]", f"[{'9' * 5000}]") + "}", "an entry|of dtype, shape"),
        ('{"a":' + ENTRY.replace("[2]", f"[{2**62},{2**62},0]").replace("8]", "0]") + "}", "NumPy takes"),
        ('{"a":' + ENTRY.replace("[2]", "[2" + ",1" * 40 + "]") + "}", "NumPy takes"),
        ('{"a":' + ENTRY.replace("0,8", "1,9") + "}", "'a' must begin at byte"),
        ('{"a":' + ENTRY.replace("0,8", "8,0") + "}", "must have 8 bytes"),
        ('{"a":' + ENTRY.replace("0,8", "0,8,8") + "}", "of dtype, shape and data_offsets"),
        ('{"a":' + ENTRY + ',"b":' + ENTRY + "}", "must begin at byte"),
        ('{"a":' + ENTRY.replace("F32", "f32") + "}", "has type f32, which NumPy has not"),
        ('{"a":' + hostile.DEEP, "an entry for 'a'"),
        ('{"a":{"dtype":' + hostile.DEEP, "an entry for 'a'"),
        ('{"__metadata__":' + hostile.DEEP, "an object of texts"),
    ],
)
def test_a_header_that_is_not_of_the_format_is_refused(folder, header, message):
    path = folder / "a.safetensors"
    path.write_bytes(hostile.file_of(header, bytes(8)))
    with pytest.raises(ValueError, match=rf"a.safetensors.*({message})") as raised:
        checkpoint.File(path)
    assert len(str(raised.value)) < 1000
    for call in (
        lambda: checkpoint.average([path], folder / "mean"),
        lambda: EMA.load(path, {"a": np.zeros(2)}),
    ):
        with pytest.raises(ValueError, match=r"a.safetensors"):
            call()
    assert sorted(os.listdir(folder)) == ["a.safetensors", "victim.txt"]


@pytest.mark.parametrize(
    "header",
    [
        '{ "a" : {"data_offsets": [0, 8], "shape" :\n[2], "dtype":"F32" } , "__metadata__":null}  ',
        '{"__metadata__":{ },"\\u0061":' + ENTRY + "}",
        '{"__metadata__":{"a":"{\\"x\\": [1]}","é":"\\u00e9\\n"},"a":' + ENTRY + "}",
    ],
)
def test_a_header_may_be_written_in_other_ways(folder, header):
    (folder / "a.safetensors").write_bytes(hostile.file_of(header, np.float32([1, 2]).tobytes()))
    assert checkpoint.File(folder / "a.safetensors")["a"].tolist() == [1.0, 2.0]


LIMITED = """
    import resource, sys

    import numpy as np
    from fastema import EMA, checkpoint

    def memory():
        return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()

    path, limit = sys.argv[1], memory() + (1 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for read in (lambda: checkpoint.File(path), lambda: EMA.load(path, {"a": np.zeros(2)})):
        try:
            read()
        except ValueError as error:
            assert path in str(error) and len(str(error)) < 5000, str(error)[:5000]
"""


def garbage(text, size):
    return (text * (size // len(text)))[:size]


HEADERS = {
    "lists": '{"a":[' + garbage("[],", 99_000_000),
    "objects": '{"a":{"b":[' + garbage("{},", 99_000_000),
    "texts": '{"__metadata__":{' + garbage('"":"",', 99_000_000),
    "escapes": '{"' + garbage("\\n", 99_000_000),
    "spaces": "{" + garbage(" ", 99_000_000),
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("header", HEADERS)
def test_a_header_of_100_mb_takes_no_more_than_1_gib(folder, header):
    (folder / "a.safetensors").write_bytes(hostile.file_of(HEADERS[header], b""))
    output_of(LIMITED, folder / "a.safetensors")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("key", ["fastema", "DCP_SHARDING_INFO"])
@pytest.mark.parametrize("text", ['[{"a":0},', "[[],", "[0.25,", '{"aa":'])
def test_a_state_of_99_mb_takes_no_more_than_1_gib(folder, key, text):
    whole = hostile.with_metadata(SHARDS[0], key, garbage(text, 40_000_000))
    path = folder / "ema-00001-of-00001.safetensors"
    path.write_bytes(whole)
    output_of(LIMITED, path)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_million_tensors_take_no_more_than_1_gib(folder):
    (folder / "a.safetensors").write_bytes(hostile.many(1_000_000))
    output_of(LIMITED, folder / "a.safetensors")


# --- sets -------------------------------------------------------------------------------------------------


def test_a_set_whose_files_are_of_two_types_is_refused_by_name(folder):
    header, body = hostile.parts_of(SHARDS[1])
    assert header["kernel"]["dtype"] == "F32"
    header["kernel"]["dtype"] = "I32"
    changed = [SHARDS[0], hostile.file_of(header, body), *SHARDS[2:]]
    assert hostile.read(folder, SHARDS, hostile.weights_of("shards")) is not None
    for path, data in zip(sorted(folder.glob("ema-*")), changed, strict=True):
        path.write_bytes(data)
    with pytest.raises(ValueError, match=r"ema-00002-of.*'kernel' must have one dtype .* float32 and int32"):
        EMA.load(folder / "ema.safetensors", hostile.weights_of("shards"))


@pytest.mark.parametrize("saves", [("a", "a", "b", "b"), ("a", None, None, None), (None, None, None, "a")])
def test_a_set_whose_files_name_several_saves_is_refused(folder, saves):
    files = []
    for whole, save in zip(SHARDS, saves, strict=True):
        state = json.loads(hostile.parts_of(whole)[0]["__metadata__"]["fastema"])
        text = json.dumps({**state, "save": save} if save else state)
        files.append(hostile.with_metadata(whole, "fastema", text))
    assert hostile.read(folder, files, hostile.weights_of("shards")) is None
    with pytest.raises(ValueError, match=r"must be of one save, and their save is .* and "):
        EMA.load(folder / "ema.safetensors", hostile.weights_of("shards"))


def test_a_set_of_many_small_blocks_is_no_grid_of_all_their_edges():
    """Of a block on the diagonal of each of 400 files there would be 800 ** 4 cells."""
    from fastema._arrays.shards import Block
    from fastema.checkpoint._sets import Blocks

    blocks = Blocks("w", (1000,) * 4)
    for i in range(400):
        blocks.add((2 * i,) * 4, np.zeros((1,) * 4))
    with pytest.raises(ValueError, match="'w' must be there in whole"):
        blocks.cut(Block.all_of((1000,) * 4))


# --- mutations --------------------------------------------------------------------------------------------


def mutations(folder, seed, count):
    """Read so many mutated files and sets; return how many were taken."""
    rng, taken = random.Random(seed), 0
    names = [*golden.EMAS, "shards"]
    for i in range(count):
        name = names[i % len(names)]
        files = list(SHARDS) if name == "shards" else [SAVED[name]]
        which = rng.randrange(len(files))
        files[which] = hostile.mutated(files[which], rng)
        try:
            ema = hostile.read(folder, files, hostile.weights_of(name))
        except BaseException:
            print(f"seed {seed}, mutation {i} of {name}: {files[which][:2000]!r}")
            raise
        taken += ema is not None
        hostile.check_alone(folder, files[which])
        for path in folder.glob("ema*"):
            path.unlink()
    return taken


def test_mutated_files_give_their_bits_or_an_error(folder):
    taken = mutations(folder, 20_240_229, 500)
    assert 20 < taken < 250, "so much was read, or refused, that little is shown"


def test_what_the_fuzzer_begins_with_is_taken(folder):
    assert all(inputs.check(data, folder) for data in inputs.seeds())


@pytest.mark.parametrize("path", sorted(inputs.CORPUS.iterdir()), ids=lambda path: path.name[:8])
def test_what_the_fuzzer_found_gives_its_bits_or_an_error(folder, path):
    inputs.check(path.read_bytes(), folder)


def test_inputs_of_the_corpus_are_few_and_named_by_their_bytes():
    found = {path.name: path.read_bytes() for path in inputs.CORPUS.iterdir()}
    assert 100 < len(found) <= 300
    assert sum(map(len, found.values())) <= 400_000
    assert all(name == inputs.name_of(data) for name, data in found.items())


@pytest.mark.slow
def test_20_000_mutated_files_give_their_bits_or_an_error(folder):
    assert mutations(folder, 7, 20_000) > 800


def test_the_mean_of_mutated_files_is_written_or_refused(folder):
    rng, written = random.Random(3), 0
    for _ in range(200):
        written += hostile.check_mean(folder, [hostile.mutated(SAVED["plain"], rng)])
    assert 5 < written < 195
    assert not list(folder.glob(".*"))


def test_the_command_refuses_a_hostile_file_in_a_line(folder, capsys):
    (folder / "a.safetensors").write_bytes(hostile.file_of('{"a":' + hostile.DEEP, b""))
    assert main(["average", "a.safetensors", "-o", "mean.safetensors"]) == 1
    assert "mean.safetensors is not written: a.safetensors is no whole" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["array", "sequence"])
def test_snapshots_of_another_form_than_they_say_are_refused(folder, form):
    for sigma in ("0.05", "0.1"):
        checkpoint.write(folder / f"0000000001-{sigma}.safetensors", {"w": np.ones(2)}, {"form": form})
    with pytest.raises(ValueError, match=rf"{folder}.* must have .* of the form '{form}', got \['w'\]"):
        posthoc.Snapshots(folder).average(0.07)


@pytest.mark.parametrize(
    "name", ["1-1..2", "1-1e", "1-1e-", "1-1-2", f"{'9' * 200}-0.1", "\u0663-0.1", "1-1e999"]
)
def test_files_that_have_no_name_of_a_snapshot_are_none(folder, name):
    (folder / f"{name}.safetensors").touch()
    assert posthoc.Snapshots(folder).paths == {}


# --- what is no file, and what is cut off -----------------------------------------------------------------


@pytest.mark.parametrize("there", ["pipe", "/dev/zero", "."])
def test_what_is_no_file_is_refused_and_not_waited_for(folder, there):
    os.mkfifo(folder / "pipe")
    code = """
        import sys
        import numpy as np
        from fastema import EMA, checkpoint

        for read in (
            lambda: checkpoint.File(sys.argv[1]),
            lambda: EMA.load(sys.argv[1], [np.zeros(2)]),
            lambda: checkpoint.average([sys.argv[1]], "mean"),
        ):
            try:
                read()
            except (ValueError, OSError) as error:
                print(type(error).__name__, sys.argv[1] in str(error))
    """
    kind = "IsADirectoryError" if there == "." else "ValueError"
    kinds = [kind, kind, "ValueError"]  # a folder may be a checkpoint to average, and this one has no weights
    assert output_of(code, there) == "\n".join(f"{kind} True" for kind in kinds)


def test_a_file_that_is_cut_off_while_it_is_loaded_is_an_error(folder):
    """A mapped one is a bus error there, which nobody can catch."""
    code = """
        import os, sys
        import numpy as np
        from fastema import EMA
        from fastema._ema.state import State

        path, weights = sys.argv[1], {"w": np.ones(1 << 20)}
        EMA(weights, 0.5).save(path)
        fitted = State.fitted
        State.fitted = lambda *each: (os.truncate(path, 10_000), fitted(*each))[1]
        try:
            EMA.load(path, weights)
        except ValueError as error:
            print(error)
    """
    done = python(code, folder / "ema.safetensors")
    assert done.returncode == 0, done.stderr
    assert "ema.safetensors was changed while it was read" in done.stdout


def test_a_file_that_is_replaced_while_it_is_loaded_is_the_one_that_was_opened(folder, monkeypatch):
    from fastema._ema.state import State

    path, fitted = folder / "ema.safetensors", State.fitted
    EMA({"w": np.full(1000, 1.0)}, 0.5).save(path)

    def replaced(*each):
        EMA({"w": np.full(1000, 2.0)}, 0.5).save(path)
        return fitted(*each)

    monkeypatch.setattr(State, "fitted", replaced)
    assert (EMA.load(path, {"w": np.zeros(1000)}).averages["w"] == 1.0).all()
    assert (EMA.load(path, {"w": np.zeros(1000)}).averages["w"] == 2.0).all()


def test_open_files_are_closed_again(folder):
    for k in range(1, 5):
        shutil.copy(GOLDEN / f"shards-0000{k}-of-00004.safetensors", folder)
    (folder / "ema.safetensors").write_bytes(SAVED["plain"])
    descriptors = Path("/dev/fd")
    gc.collect()  # what other tests left
    before = len(list(descriptors.iterdir()))
    for path, name in ((folder / "ema.safetensors", "plain"), (folder / "shards.safetensors", "shards")):
        EMA.load(path, hostile.weights_of(name))
        assert len(list(descriptors.iterdir())) == before

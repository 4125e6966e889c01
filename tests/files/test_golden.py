"""Files that older versions wrote are read, and runs that they stopped go on: with the bits of that time."""

import pytest

import fastema
import golden
from fastema import checkpoint, posthoc

VERSIONS = sorted(golden.FOLDER.iterdir())
versions = pytest.mark.parametrize("version", VERSIONS, ids=lambda folder: folder.name)


def begun(options, step=0):
    return {name: golden.weights_at(step)[name] for name in golden.averageable(options)}


def with_clock(state):
    """Return a state with a clock, which 0.1.0 left out where it was the step."""
    step = state["step"]
    return {"clock": step, "averaged": step - step % state["config"]["every"], **state}


@versions
@pytest.mark.parametrize("name", golden.EMAS)
def test_an_ema_is_loaded_as_it_was(version, name):
    path, options = version / f"{name}.safetensors", golden.EMAS[name]
    ema = fastema.EMA.load(path, begun(options))
    assert golden.encoded(ema.state_dict()) == with_clock(golden.read_json(path)["state"])


@versions
@pytest.mark.parametrize("name", golden.EMAS)
@pytest.mark.parametrize("way", ["file", "state"])
def test_an_ema_goes_on_as_it_did(version, name, way):
    path, options = version / f"{name}.safetensors", golden.EMAS[name]
    expected, weights = golden.read_json(path), begun(options)
    if way == "file":
        ema = fastema.EMA.load(path, weights)
    else:
        ema = fastema.EMA(weights, **options)
        ema.load_state_dict(golden.decoded(expected["state"]))
    if ema.is_swapped:
        ema.swap(1)
        assert golden.encoded(weights) == golden.encoded(begun(options, golden.LAST))
    golden.train(ema, weights, range(golden.LAST + 1, golden.LATER + 1))
    assert golden.encoded(ema.state_dict()) == with_clock(expected["later"])


@versions
def test_shards_are_loaded_as_the_whole_that_they_were(version):
    path = version / "shards.safetensors"
    ema, expected = fastema.EMA.load(path, begun(golden.SHARDED)), golden.read_json(path)
    assert ema.step == expected["step"]
    assert [golden.encoded(ema.averages_of(k)) for k in range(2)] == expected["averages"]


@versions
def test_snapshots_are_found_and_read(version):
    folder = version / "snapshots"
    snapshots, expected = posthoc.Snapshots(folder), golden.read_json(folder)
    assert list(snapshots.paths) == [(each["step"], each["sigma_rel"]) for each in expected]
    for path, each in zip(snapshots.paths.values(), expected, strict=True):
        assert golden.encoded(dict(checkpoint.File(path))) == each["averages"]
    assert set(snapshots.average(0.07)) == set(expected[0]["averages"])

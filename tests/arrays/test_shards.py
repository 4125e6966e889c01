"""Parts of arrays that are cut from pieces, and the names of the files that hold them."""

import itertools
from contextlib import ExitStack

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastema import EMA, checkpoint
from fastema._arrays.shards import Block
from fastema.checkpoint import _sets, _source
from fastema.checkpoint._sets import Blocks

CUTS = st.lists(st.integers(0, 6), max_size=3).map(sorted)


def blocks_of(shape, cuts):
    """Return the blocks that cuts along each axis make; some are empty."""
    edges = [[0, *(min(cut, size) for cut in along), size] for along, size in zip(cuts, shape, strict=True)]
    for spans in itertools.product(*(itertools.pairwise(along) for along in edges)):
        begin, end = zip(*spans, strict=True) if spans else ((), ())
        yield Block(shape, begin, tuple(b - a for a, b in zip(begin, end, strict=True)))


@given(shape=st.lists(st.integers(0, 6), max_size=3).map(tuple), data=st.data())
def test_what_is_cut_from_pieces_is_what_is_cut_from_the_whole(shape, data):
    whole = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    saved, loaded = (data.draw(st.tuples(*[CUTS] * len(shape))) for _ in range(2))
    pieces = Blocks("w", shape)
    for block in blocks_of(shape, saved):
        pieces.add(block.begin, whole[block.slices()])
        pieces.add(block.begin, whole[block.slices()].copy())  # of a replica
    for block in (*blocks_of(shape, loaded), None):
        wanted = whole if block is None else whole[block.slices()]
        for source in (pieces, whole):
            found = np.asarray(_sets.cut(source, block, "w"))
            assert found.shape == wanted.shape
            assert np.array_equal(found, wanted)


@pytest.mark.parametrize("piece", [1, 64, 1 << 22])
@given(shape=st.lists(st.integers(0, 6), max_size=3).map(tuple), data=st.data())
def test_what_is_cut_from_a_file_is_what_is_cut_from_the_array(tmp_path, monkeypatch, piece, shape, data):
    """Whatever is read at a time, and however the array lies in memory that it is read to."""
    monkeypatch.setattr(_source, "_PIECE", piece)
    whole = np.arange(np.prod(shape, dtype=int), dtype=np.int32).reshape(shape)
    checkpoint.write(tmp_path / "a.safetensors", {"w": whole, "other": np.zeros(3)})
    with ExitStack() as holder:
        source = _source.Source.at(tmp_path / "a.safetensors", holder if data.draw(st.booleans()) else None)
        stored = _source.Stored(source, source.layout["w"])
        for block in blocks_of(shape, data.draw(st.tuples(*[CUTS] * len(shape)))):
            part = _sets.cut(stored, block, "w")
            inner = tuple(slice(min(1, n), n) for n in block.shape)
            for got, wanted in ((part, whole[block.slices()]), (part[inner], whole[block.slices()][inner])):
                assert got.shape == wanted.shape
                assert np.array_equal(np.asarray(got), wanted)
                for order in "CF":
                    target = np.full((*wanted.shape, 2), -1, np.int32, order)[..., 0]
                    got.read_into(target)
                    assert np.array_equal(target, wanted)


@pytest.mark.parametrize(("begin", "size"), [(3, 1), (3, 2), (2, 2), (1, 4), (1, 3)])
def test_pieces_that_are_not_all_there_or_overlap_are_refused(begin, size):
    pieces = Blocks("w", (5,))
    pieces.add((0,), np.zeros(2))
    pieces.add((begin,), np.zeros(size))
    with pytest.raises(ValueError, match="'w' must be there in whole"):
        pieces.cut(Block((5,), (0,), (5,)))


def test_a_part_of_one_piece_is_a_view_of_it():
    pieces, array = Blocks("w", (4,)), np.arange(2.0)
    pieces.add((2,), array)
    assert np.shares_memory(pieces.cut(Block((4,), (3,), (1,))), array)


def test_a_single_file_may_have_the_name_of_one_of_a_set(tmp_path):
    values = {"w": np.ones(3)}
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        EMA(values, 0.5).save(tmp_path / name)
        assert EMA.load(tmp_path / name, values).averages["w"].tolist() == [1.0] * 3


def test_sets_of_two_numbers_of_files_are_told_apart_only_by_their_files(tmp_path):
    path = tmp_path / "ema.safetensors"
    for total in (1, 2):
        for number in range(1, total + 1):
            _sets.path_of(path, number, total).touch()
    with pytest.raises(ValueError, match="is there as a set of 1 files and as a set of 2 files: give a file"):
        _sets.set_of(path)
    assert len(_sets.set_of(tmp_path / "ema-00001-of-00002.safetensors")) == 2

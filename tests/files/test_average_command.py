"""fastema.checkpoint.average and `python -m fastema average`: the mean of files."""

import io
import json
import os
from fractions import Fraction
from functools import reduce

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import oracle
from fastema import __main__ as command
from fastema import checkpoint
from fastema._commands.progress import Progress
from processes import output_of

bfloat16 = ml_dtypes.bfloat16
PIECE = 1 << 18  # elements: how tensors are cut


@pytest.fixture
def paths(tmp_path):
    return [tmp_path / f"{name}.safetensors" for name in "abc"]


@pytest.fixture
def output(tmp_path):
    return tmp_path / "mean.safetensors"


def write_all(paths, arrays):
    for path, array in zip(paths, arrays, strict=True):
        checkpoint.write(path, {"w": array})


def mean_of(arrays, folder, **options):
    """Return the mean of arrays, by way of files."""
    paths = [folder / f"{i}.safetensors" for i in range(len(arrays))]
    write_all(paths, arrays)
    checkpoint.average(paths, folder / "mean.safetensors", **options)
    return checkpoint.File(folder / "mean.safetensors")["w"]


# --- the mean ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_mean_is_numpys_in_float64_rounded_once(dtype, tmp_path, rng):
    for size in (0, 1, 1000, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE + 17):
        with np.errstate(over="ignore"):
            magnitudes = 10.0 ** rng.integers(-12, 12, (5, size))
            arrays = (rng.standard_normal((5, size)) * magnitudes).astype(dtype)
        with np.errstate(all="ignore"):
            expected = (reduce(np.add, arrays.astype(np.float64)) / 5).astype(dtype)
        assert mean_of(arrays, tmp_path).tobytes() == expected.tobytes()


@given(pair=st.lists(st.tuples(*[st.floats(-(2.0**120), 2.0**120, width=32)] * 2), min_size=1, max_size=20))
def test_the_mean_of_two_float32_files_is_the_exact_one_rounded_once(pair, tmp_path):
    a, b = np.array(pair, np.float32).T
    expected = [
        oracle.nearest((Fraction(float(x)) + Fraction(float(y))) / 2, np.float32)
        for x, y in zip(a, b, strict=True)
    ]
    assert (mean_of([a, b], tmp_path) == np.array(expected)).all()


@pytest.mark.parametrize("dtype", [np.float16, bfloat16])
@given(data=st.data())
def test_the_mean_of_16_bit_files_is_the_exact_one_rounded_once(dtype, data, tmp_path):
    """The casts of ml_dtypes round float64 to float32 first, and so twice."""
    count = data.draw(st.integers(1, 7))
    numbers = st.floats(-1000, 1000, width=16).filter(lambda x: x == 0 or abs(x) > 2**-10)
    columns = data.draw(st.lists(st.lists(numbers, min_size=count, max_size=count), min_size=1, max_size=20))
    arrays = np.array(columns).T.astype(dtype)
    expected = [oracle.nearest(sum(Fraction(float(x)) for x in column) / count, dtype) for column in arrays.T]
    mean = mean_of(arrays, tmp_path)
    assert (mean.astype(np.float64) == np.array(expected, np.float64)).all()


@pytest.mark.parametrize(
    "dtype", [bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, np.float16, np.float32]
)
def test_next_to_a_tie_the_nearer_neighbour_is_taken(dtype, tmp_path):
    """A float64 next to a tie, nearer than float32 resolves, in both directions and signs, and the tie."""
    ulp = float(ml_dtypes.finfo(dtype).eps)
    below, above = np.array([1.0, 1 + ulp]), np.array([1 + ulp, 1 + 2 * ulp])
    tie = (below + above) / 2
    x = np.concatenate([np.nextafter(tie, 0), np.nextafter(tie, 9), tie])
    expected = np.concatenate([below, above, [1.0, 1 + 2 * ulp]])
    mean = mean_of([np.concatenate([x, -x])], tmp_path, dtype=dtype)
    assert (mean.astype(np.float64) == np.concatenate([expected, -expected])).all()


@pytest.mark.parametrize("dtype", [np.float16, bfloat16])
def test_the_mean_of_a_file_with_itself_is_that_file(dtype, tmp_path):
    every = np.arange(2**16, dtype=np.uint16).view(dtype)
    every = every[~np.isnan(every.astype(np.float32))]  # -0, infinities and subnormals stay
    for count in (1, 2, 3, 10):
        assert mean_of([every] * count, tmp_path).tobytes() == every.tobytes()


def test_weights_are_relative(tmp_path, rng):
    arrays = rng.standard_normal((3, 1000)).astype(np.float32)
    wide = arrays.astype(np.float64)
    expected = ((1.0 * wide[0] + 2.5 * wide[1] + -0.5 * wide[2]) / 3.0).astype(np.float32)
    assert (mean_of(arrays, tmp_path, weights=[1, 2.5, -0.5]) == expected).all()
    assert (mean_of(arrays, tmp_path, weights=[2, 5, -1]) == expected).all()
    assert (mean_of(arrays, tmp_path, weights=[4, 4, 4]) == mean_of(arrays, tmp_path)).all()


def test_nan_and_infinities_pass_also_with_a_weight_of_zero(tmp_path):
    arrays = [np.array([np.nan, np.inf, np.inf, 1.0]), np.array([1.0, 1.0, -np.inf, 3.0])]
    np.testing.assert_array_equal(mean_of(arrays, tmp_path), [np.nan, np.inf, np.nan, 2.0])
    np.testing.assert_array_equal(mean_of(arrays, tmp_path, weights=[0, 1]), [np.nan, np.nan, np.nan, 3.0])


def test_complex_tensors_have_means_and_keep_their_type(tmp_path):
    arrays = [np.array([1 + 2j], np.complex64), np.array([3 - 2j], np.complex64)]
    mean = mean_of(arrays, tmp_path, dtype=np.float16)
    assert mean.dtype == np.complex64
    assert mean == 2


# --- what else is in the files ----------------------------------------------------------------------------


def test_integers_and_booleans_are_taken_from_the_last_file(paths, output):
    for i, path in enumerate(paths):
        tensors = {
            "w": np.full((2, 3), i, np.float32),
            "steps": np.array(10**17 + i),
            "on": np.array([i == 2]),
        }
        checkpoint.write(path, tensors)
    assert sorted(checkpoint.average(paths, output, dtype=np.float64)) == ["on", "steps"]
    file = checkpoint.File(output)
    assert file["steps"] == 10**17 + 2
    assert file["on"].all()
    assert (file["w"] == np.ones((2, 3))).all()
    assert file.dtypes == {"w": np.float64, "steps": np.int64, "on": np.bool_}


def test_metadata_on_which_all_agree_are_kept(paths, output):
    for i, path in enumerate(paths):
        checkpoint.write(path, {"w": np.zeros(1)}, {"format": "pt", "step": str(i)})
    checkpoint.average(paths, output)
    assert checkpoint.File(output).metadata == {"format": "pt"}


def test_tensors_need_not_lie_in_one_order(paths, output):
    """Nor at aligned places."""
    for path, names in zip(paths, ("ab", "ba", "ab"), strict=True):
        entries = {
            name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]}
            for i, name in enumerate(names)
        }
        header = json.dumps(entries).encode()
        header += b" " * (3 - len(header) % 4)
        values = np.array([{"a": 1.0, "b": 2.0}[name] for name in names], np.float32)
        path.write_bytes(len(header).to_bytes(8, "little") + header + values.tobytes())
    checkpoint.average(paths, output)
    assert {name: float(x[0]) for name, x in checkpoint.File(output).items()} == {"a": 1.0, "b": 2.0}


@pytest.mark.parametrize("link", ["itself", "symbolic", "hard"])
def test_the_output_may_be_one_of_the_files(paths, link):
    write_all(paths, [np.full(3 * PIECE, float(i)) for i in range(3)])
    output = paths[0] if link == "itself" else paths[0].with_name(link)
    if link == "symbolic":
        output.symlink_to(paths[0])
    elif link == "hard":
        output.hardlink_to(paths[0])
    checkpoint.average(paths, output)
    assert (checkpoint.File(output)["w"] == 1.0).all()
    assert (checkpoint.File(paths[0])["w"] == (0.0 if link == "hard" else 1.0)).all()
    assert (checkpoint.File(paths[1])["w"] == 1.0).all()


def test_an_output_among_the_files_stays_where_one_does_not_fit(paths):
    write_all(paths, [np.zeros(3), np.ones(3), np.ones(4)])
    before = [path.read_bytes() for path in paths]
    with pytest.raises(ValueError, match="must have one shape"):
        checkpoint.average(paths, paths[0])
    assert [path.read_bytes() for path in paths] == before


def test_progress_is_told_in_bytes_of_the_output(paths, output):
    write_all(paths, [np.zeros(2 * PIECE + 5, np.float32)] * 3)
    told = []
    checkpoint.average(paths, output, dtype=np.float16, progress=lambda *numbers: told.append(numbers))
    total = 2 * (2 * PIECE + 5)
    assert told == [(2 * PIECE, total), (4 * PIECE, total), (total, total)]


def test_memory_does_not_grow_with_files(tmp_path):
    """Five files of 64 MB, with holes instead of zeros on the disk."""
    paths = [tmp_path / f"{i}.safetensors" for i in range(5)]
    size = 16 << 20
    header = json.dumps({"w": {"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]}}).encode()
    for path in paths:
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        os.truncate(path, 8 + len(header) + 4 * size)
    code = """
        import sys
        import numpy as np
        from fastema import checkpoint
        from memory import peak

        checkpoint.write(sys.argv[1], {"w": np.zeros(1)})
        checkpoint.average([sys.argv[1]], sys.argv[1])
        before = peak()
        checkpoint.average(sys.argv[2:], sys.argv[1], dtype="bfloat16")
        print(peak() - before)
    """
    assert int(output_of(code, tmp_path / "mean.safetensors", *paths)) < 32 << 20


# --- what does not fit ------------------------------------------------------------------------------------

W = np.zeros((2, 3), np.float32)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"w": W}, r"must have the same tensors: .*a.safetensors has 'n', .*c.safetensors has not"),
        (
            {"w": W, "n": W, "x": W},
            r"must have the same tensors: .*c.safetensors has 'x', .*a.safetensors has",
        ),
        (
            {"w": W.T, "n": W},
            r"'w' must have one shape in all files, got \(2, 3\) in .*a.safetensors and \(3, 2\) in .*c.safe",
        ),
        (
            {"w": W, "n": W.astype(np.float16)},
            r"'n' must have one dtype in all files, got float32 in .*a.safetensors and float16 in .*c.safe",
        ),
    ],
    ids=["lacks", "more", "shape", "dtype"],
)
def test_files_that_do_not_fit_are_refused_by_name_and_nothing_is_written(paths, output, tensors, message):
    for path in paths[:2]:
        checkpoint.write(path, {"w": W, "n": W})
    checkpoint.write(paths[2], tensors)
    with pytest.raises(ValueError, match=message):
        checkpoint.average(paths, output)
    assert sorted(os.listdir(output.parent)) == [path.name for path in paths]


def test_a_file_that_is_none_is_refused_by_name(paths, output):
    write_all(paths[:2], [W, W])
    paths[2].write_bytes(paths[0].read_bytes()[:-1])
    with pytest.raises(
        ValueError,
        match=r"c.safetensors is no whole safetensors file: it must have 96 bytes by its header, got 95",
    ):
        checkpoint.average(paths, output)
    paths[2].unlink()
    with pytest.raises(FileNotFoundError, match=r"c.safetensors"):
        checkpoint.average(paths, output)
    assert not output.exists()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weights": [1, 2]}, ValueError, "weights must hold a number for each of the 3 files, got 2"),
        ({"weights": [1, 1, -2]}, ValueError, r"weights must be finite and not add up to 0"),
        ({"weights": [1e308, 1e308, 0]}, ValueError, r"not add up to 0 or to infinity"),
        ({"weights": [1, 1, np.nan]}, ValueError, r"weights must be finite and not add up to 0"),
        ({"dtype": np.int32}, TypeError, "dtype must be one of float64, float32, .*, got int32"),
    ],
    ids=["count", "zero", "infinite", "NaN", "dtype"],
)
def test_bad_options_are_refused(paths, output, options, error, message):
    write_all(paths, [W] * 3)
    with pytest.raises(error, match=message):
        checkpoint.average(paths, output, **options)
    assert not output.exists()


def test_paths_must_be_several(paths, output):
    with pytest.raises(ValueError, match="files must hold one path or more, got none"):
        checkpoint.average([], output)
    for path in (paths[0], str(paths[0])):
        with pytest.raises(TypeError, match="files must be a sequence of paths"):
            checkpoint.average(path, output)


def test_a_file_that_is_cut_off_while_it_is_read_leaves_the_old_output(paths, output):
    write_all(paths, [np.zeros(3 * PIECE)] * 3)
    checkpoint.write(output, {"old": W})

    def cut(*_):
        os.truncate(paths[1], 1000)

    with pytest.raises(ValueError, match=r"b.safetensors was changed while it was read"):
        checkpoint.average(paths, output, progress=cut)
    assert list(checkpoint.File(output)) == ["old"]
    assert not list(output.parent.glob(".*"))


def test_a_file_that_is_replaced_while_it_is_read_leaves_the_old_output(paths, output):
    """Its tensors may lie elsewhere in the new file."""
    write_all(paths, [np.zeros(3 * PIECE)] * 3)
    checkpoint.write(output, {"old": W})

    def replace(*_):
        checkpoint.write(paths[0], {"v": np.ones(9), "w": np.ones(3 * PIECE)})

    with pytest.raises(ValueError, match=r"a.safetensors was changed while it was read"):
        checkpoint.average(paths, output, progress=replace)
    assert list(checkpoint.File(output)) == ["old"]


def test_more_files_than_a_process_may_have_open_are_averaged(tmp_path):
    program = """
        import resource, sys
        import numpy as np
        from fastema import checkpoint

        paths = [f"{sys.argv[1]}/{i}.safetensors" for i in range(100)]
        for i, path in enumerate(paths):
            checkpoint.write(path, {"w": np.full(3, float(i))})
        resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
        checkpoint.average(paths, sys.argv[1] + "/mean.safetensors")
        print(checkpoint.File(sys.argv[1] + "/mean.safetensors")["w"])
    """
    assert output_of(program, tmp_path) == "[49.5 49.5 49.5]"


# --- the command ------------------------------------------------------------------------------------------


def test_the_command_writes_the_mean_and_says_what_was_not_averaged(paths, output, capsys):
    for i, path in enumerate(paths):
        checkpoint.write(path, {"w": np.full(4, float(i)), "steps": np.array(i)})
    arguments = [*map(str, paths), "-o", str(output), "--weights", "1", "1", "2", "--dtype", "bfloat16"]
    assert command.main(["average", *arguments]) == 0
    mean = checkpoint.File(output)["w"]
    assert mean.dtype == bfloat16
    assert (mean == 1.25).all()
    printed, progress = capsys.readouterr()
    assert printed.splitlines() == [
        f"  0.2500  {paths[0]}",
        f"  0.2500  {paths[1]}",
        f"  0.5000  {paths[2]}",
        f"{output}: the mean of 3 checkpoints",
        f"1 tensors taken from {paths[2]}: steps",
    ]
    assert progress.splitlines()[-1] == "100 %"


def test_the_command_shows_an_order_of_arguments_that_works(capsys):
    with pytest.raises(SystemExit):
        command.main(["average", "--weights", "1", "a.safetensors"])
    assert "usage: python -m fastema average FILE [FILE ...] -o FILE [options]" in capsys.readouterr().err


def test_the_command_says_what_is_wrong_and_fails(paths, output, capsys):
    write_all(paths[:2], [W, W.T])
    assert command.main(["average", str(paths[0]), str(paths[1]), "-o", str(output)]) == 1
    assert f"{output} is not written: 'w' must have one shape in all files" in capsys.readouterr().err
    assert command.main(["average", str(paths[2]), "-o", str(output)]) == 1
    assert "No such file" in capsys.readouterr().err
    assert not output.exists()


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()], ids=["terminal", "file"])
def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere_with_the_time_left(stream):
    seconds = iter(range(10_000))
    show = Progress(stream, lambda: next(seconds) * 36)
    for done in range(1001):
        show(done, 1000)
    printed = stream.getvalue()
    if stream.isatty():
        states = printed.split("\r")[1:]
        assert len(states) == 101
        assert states[0] == f"[{' ' * 50}]   0 %"
        assert states[50] == f"[{'#' * 25}{' ' * 25}]  50 %, 30 min 00 s left"
        assert states[-1] == f"[{'#' * 50}] 100 %{' ' * len(', 36 s left')}\n"
    else:
        lines = printed.splitlines()
        assert [line.split(",")[0] for line in lines] == [f"{percent} %" for percent in range(0, 101, 10)]
        assert lines[1] == "10 %, 54 min 00 s left"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59, "59 s"), (61, "1 min 01 s"), (3600, "1 h 00 min"), (90_061, "25 h 01 min")],
)
def test_durations_are_told_in_their_two_largest_units(seconds, text):
    stream = io.StringIO()
    times = iter([0, seconds])
    Progress(stream, lambda: next(times))(1, 2)
    assert stream.getvalue() == f"50 %, {text} left\n"

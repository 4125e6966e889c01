"""fastema.checkpoint: files that no crash breaks, which everyone can read."""

import json
import os
import sys
import threading
from contextlib import suppress
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

import oracle
from fastema import checkpoint
from processes import output_of, skip_without

NAMES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "C64": np.complex64,
    "I8": np.int8,
    "I16": np.int16,
    "I32": np.int32,
    "I64": np.int64,
    "U8": np.uint8,
    "U16": np.uint16,
    "U32": np.uint32,
    "U64": np.uint64,
    "BOOL": np.bool_,
}


def of_any_bytes(rng, shape, dtype):
    """Return an array of random bytes: NaN, infinities and subnormals among them."""
    if dtype == np.bool_:
        return rng.integers(0, 2, shape).astype(np.bool_)
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer(rng.bytes(count), dtype).reshape(shape)


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "averages.safetensors"


# --- what is in a file ------------------------------------------------------------------------------------


def test_what_was_written_is_read_bit_for_bit(path, rng):
    tensors = {
        f"{code} of {shape}": of_any_bytes(rng, shape, dtype)
        for code, dtype in NAMES.items()
        for shape in [(), (0,), (3,), (2, 0, 3), (5, 7)]
    }
    checkpoint.write(path, tensors, {"step": "7", "größe": "∞"})
    file = checkpoint.File(path)
    assert len(file) == len(tensors)
    assert set(file) == set(tensors)
    assert all(same(file[name], tensor) for name, tensor in tensors.items())
    assert file.shapes == {name: tensor.shape for name, tensor in tensors.items()}
    assert file.dtypes == {name: tensor.dtype for name, tensor in tensors.items()}
    assert file.metadata == {"step": "7", "größe": "∞"}


def test_the_safetensors_package_reads_our_files(path, rng):
    # its NumPy face does not know the 8-bit types
    tensors = {code: of_any_bytes(rng, (3, 5), NAMES[code]) for code in NAMES if not code.startswith("F8")}
    checkpoint.write(path, tensors, {"format": "np"})
    loaded = safetensors.numpy.load_file(path)
    assert set(loaded) == set(tensors)
    assert all(same(loaded[name], tensor) for name, tensor in tensors.items())
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata() == {"format": "np"}


def test_the_codes_of_types_are_those_of_the_safetensors_package():
    for code, dtype in NAMES.items():
        name = np.dtype(dtype).name
        spec = safetensors.TensorSpec(dtype=name, shape=[0], data_ptr=0, data_len=0)
        assert spec.dtype == code


def test_torch_reads_our_files_and_its_tensors_are_written(path):
    skip_without("torch")
    import torch
    from safetensors.torch import load_file

    tensors = {
        "weight": torch.arange(6.0).reshape(2, 3).T,  # not contiguous
        "bias": torch.ones(3, dtype=torch.bfloat16, requires_grad=True),
        "count": torch.tensor(4),
    }
    checkpoint.write(path, tensors)
    loaded = load_file(path)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert loaded["bias"].dtype == torch.bfloat16


def test_files_of_the_safetensors_package_are_read(path, rng):
    tensors = {code: of_any_bytes(rng, (2, 3), NAMES[code]) for code in ("F32", "BF16", "I64", "BOOL")}
    safetensors.numpy.save_file(tensors, path)
    file = checkpoint.File(path)
    assert all(same(file[name], tensor) for name, tensor in tensors.items())
    assert file.metadata == {}


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12.0).reshape(3, 4)[:, ::2],
        np.asfortranarray(np.arange(12, dtype=np.float32).reshape(3, 4)),
        np.arange(4, dtype=">f4"),
        np.arange(4, dtype=ml_dtypes.bfloat16)[::-1],
        np.broadcast_to(np.float16(3), (2, 2)),
    ],
    ids=["holes", "Fortran", "big-endian", "backwards", "broadcast"],
)
def test_arrays_in_any_order_are_written_as_they_look(path, array):
    checkpoint.write(path, {"a": array})
    read = safetensors.numpy.load_file(path)["a"]
    assert read.shape == array.shape
    assert read.dtype == array.dtype.newbyteorder("=")
    assert (read == array).all()


def test_views_are_of_the_mapped_file_read_only_and_aligned(path):
    checkpoint.write(
        path, {"odd": np.ones(3, np.int8), "long name": np.ones(5), "half": np.ones(1, np.float16)}
    )
    file = checkpoint.File(path)
    for name in file:
        assert np.shares_memory(file[name], file[name])
        assert not file[name].flags.writeable
        assert file[name].flags.aligned


def test_views_outlive_the_file_object_and_its_replacement(path):
    checkpoint.write(path, {"a": np.full(1000, 1.0)})
    view = checkpoint.File(path)["a"]
    checkpoint.write(path, {"a": np.full(2000, 2.0)})
    assert (view == 1.0).all()
    assert view.size == 1000
    assert (checkpoint.File(path)["a"] == 2.0).all()


def test_views_are_values_for_an_update(path, rng):
    import fastema

    values = {"w": rng.standard_normal((3, 4)).astype(np.float32), "b": rng.standard_normal(5)}
    checkpoint.write(path, values)
    file = checkpoint.File(path)
    averages = [np.zeros_like(values[name]) for name in file]
    fastema.update(averages, list(file.values()), 0.9)
    for name, average in zip(file, averages, strict=True):
        assert oracle.same_bits(average, oracle.update(np.zeros_like(average), values[name], 0.9))


def test_a_file_without_tensors(path):
    checkpoint.write(path, {}, {"step": "0"})
    assert dict(checkpoint.File(path)) == {}
    assert safetensors.numpy.load_file(path) == {}


# --- what is refused --------------------------------------------------------------------------------------


@given(data=st.data())
def test_a_damaged_file_is_refused_or_read_but_never_read_past_its_end(data, path):
    checkpoint.write(path, {"w": np.ones((2, 3), np.float32), "n": np.arange(3)}, {"step": "1"})
    whole = path.read_bytes()
    damaged = bytearray(whole)
    if data.draw(st.booleans()):
        damaged = damaged[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        damaged[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(damaged)
    with suppress(ValueError):
        file = checkpoint.File(path)
        assert len(damaged) == len(whole)
        assert sum(tensor.nbytes for tensor in file.values()) == 6 * 4 + 3 * 8
    path.unlink()


def test_a_file_with_a_type_that_numpy_lacks_is_refused_by_name(path):
    header = json.dumps({"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(ValueError, match=r"averages.safetensors: 'w' has type F4"):
        checkpoint.File(path)


def test_a_missing_file_is_the_systems_own_error(path):
    with pytest.raises(FileNotFoundError):
        checkpoint.File(path)


@pytest.mark.parametrize(
    ("tensors", "metadata", "error", "message"),
    [
        ({"a": np.zeros(2, np.complex128)}, {}, TypeError, r"tensors\['a'\] must be of F64.* got complex128"),
        ({"a": np.array(["x"])}, {}, TypeError, r"tensors\['a'\] must be of"),
        ({1: np.zeros(2)}, {}, TypeError, "tensors must have names that are texts, got 1"),
        ({"a": [1.0]}, {}, TypeError, r"tensors\['a'\] must be a NumPy array.* got list"),
        ({"__metadata__": np.zeros(1)}, {}, ValueError, "it is the header's"),
        ({}, {"step": 1}, TypeError, "metadata must be texts, got 'step': 1"),
        ({}, {"x": " " * 10**8}, ValueError, "names and metadata must fit into 100000000 bytes"),
        ({"\ud800": np.zeros(1)}, {}, ValueError, "surrogates not allowed"),
    ],
    ids=["complex128", "text", "name", "list", "metadata", "number", "long", "surrogate"],
)
def test_what_cannot_be_written_is_refused_and_the_old_file_stays(path, tensors, metadata, error, message):
    checkpoint.write(path, {"old": np.ones(3)})
    before = path.read_bytes()
    with pytest.raises(error, match=message):
        checkpoint.write(path, tensors, metadata)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_a_folder_that_is_not_there_is_the_one_that_the_error_names(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"No such folder: '{tmp_path}/missing'"):
        checkpoint.write(tmp_path / "missing" / "averages.safetensors", {})


def test_a_folder_or_a_device_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for there in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ValueError, match="must be a file or not be there"):
            checkpoint.write(there, {})
    assert (tmp_path / "pipe").is_fifo()


# --- names ------------------------------------------------------------------------------------------------

SUFFIX = ".safetensors"
LONG = {
    "ascii": "n" * (255 - len(SUFFIX)) + SUFFIX,
    "two bytes": "é" * 121 + "x" + SUFFIX,
    "three bytes": "平" * 81 + SUFFIX,
    "four bytes": "🧮" * 60 + "abc" + SUFFIX,
    "no suffix": "é" * 127 + "n",
    "dots": "." * 255,
    "of a set": "n" * 228 + "-00001-of-00004" + SUFFIX,
}
TOO_LONG = ["n" * 256]
if sys.platform == "linux":  # others count otherwise, and take no bytes but those of a text
    LONG["undecodable"] = os.fsdecode(b"\xff" * 243) + SUFFIX
    TOO_LONG.append("é" * 128)


@pytest.mark.parametrize("name", LONG.values(), ids=LONG)
def test_a_name_may_be_as_long_as_the_system_takes(tmp_path, name):
    assert len(os.fsencode(name)) == 255
    path = tmp_path / name
    for value in (0.0, 1.0):  # anew, and over the old one
        checkpoint.write(path, {"w": np.full(3, value)})
        assert (checkpoint.File(path)["w"] == value).all()
        assert os.listdir(tmp_path) == [name]
    checkpoint.average([path, path], path)
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("size", [1, 99, 100, 101, 102, 142, 143, 245, 246, 247, 255])
def test_what_is_written_beside_has_a_name_that_file_systems_take(path, size, monkeypatch):
    path, seen = path.with_name("n" * size), []
    replace = Path.replace

    def noted(self, target):
        seen.append((self.name, Path(target).name))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", noted)
    checkpoint.write(path, {})
    ((beside, name),) = seen
    assert name == path.name
    assert beside.startswith(".")
    assert beside.endswith(".partial")
    assert len(os.fsencode(beside)) <= 143


def test_what_a_crash_left_of_a_long_name_is_removed_and_no_other(path):
    one, other = path.with_name("n" * 254 + "a"), path.with_name("n" * 254 + "b")
    program = """
        import os, sys
        from pathlib import Path
        from fastema import checkpoint

        Path.replace = lambda *_: (print("crashed", flush=True), os._exit(0))
        checkpoint.write(sys.argv[1], {})
    """
    assert output_of(program, one) == "crashed"
    (left,) = os.listdir(path.parent)
    checkpoint.write(other, {"w": np.ones(3)})
    assert sorted(os.listdir(path.parent)) == sorted([left, other.name])
    checkpoint.write(one, {"w": np.ones(3)})
    assert sorted(os.listdir(path.parent)) == [one.name, other.name]


def test_a_name_that_is_too_long_is_the_systems_own_error_and_nothing_is_written(tmp_path):
    for name in TOO_LONG:
        with pytest.raises(OSError, match="File name too long"):
            checkpoint.write(tmp_path / name, {"w": np.ones(3)})
        assert os.listdir(tmp_path) == []


# --- all or nothing ---------------------------------------------------------------------------------------


def test_killed_at_any_moment_a_writer_leaves_the_old_file_or_the_new(path):
    """A child that rewrites the file again and again is killed 40 times or more, at random moments."""
    code = """
        import os, random, signal, sys, time
        from pathlib import Path
        import numpy as np
        from fastema import checkpoint

        path, random_times = Path(sys.argv[1]), random.Random(7)

        def write(generation):
            size = 400_000 + generation % 7 * 40_000
            tensors = {"w": np.full(size, generation, np.float32), "n": np.array(generation)}
            checkpoint.write(path, tensors, {"generation": str(generation)})

        def read():
            file = checkpoint.File(path)
            generation = int(file.metadata["generation"])
            assert file["n"] == generation, (file["n"], generation)
            assert file["w"].size == 400_000 + generation % 7 * 40_000
            assert (file["w"] == generation).all(), generation
            return generation

        write(0)
        generations, left_behind, kills = [0], 0, 0
        # on a busy machine a child may hardly have begun: then it takes more of them
        while kills < 40 or min(left_behind, len(set(generations))) <= 5:
            kills += 1
            child = os.fork()
            if child == 0:
                generation = generations[-1]
                while True:
                    generation += 1
                    write(generation)
            until = time.monotonic() + random_times.uniform(0.005, 0.05)
            try:
                while time.monotonic() < until:
                    read()  # readers never see half of a file
            finally:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            left_behind += any(path.parent.glob(f".{path.name}.*.partial"))
            generations.append(read())
        assert generations == sorted(generations), generations
        write(generations[-1] + 1)
        assert read() == generations[-1] + 1
        assert os.listdir(path.parent) == [path.name]
        print("all were whole")
    """
    assert output_of(code, path) == "all were whole"


def test_a_full_disk_leaves_the_old_file_and_nothing_else(path):
    code = """
        import os, resource, signal, sys
        import numpy as np
        from fastema import checkpoint

        checkpoint.write(sys.argv[1], {"w": np.zeros(10)})
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            checkpoint.write(sys.argv[1], {"w": np.ones(100_000)})
        except OSError as error:
            print(error.strerror)
        print(os.listdir(os.path.dirname(sys.argv[1])), checkpoint.File(sys.argv[1])["w"].sum())
    """
    assert output_of(code, path) == f"File too large\n['{path.name}'] 0.0"


def test_bytes_are_on_the_disk_before_the_name_and_the_name_before_the_return(path, monkeypatch):
    """Else a power failure leaves the new name with the bytes of neither file."""
    calls = []
    fsync, replace = os.fsync, os.replace

    def seen_fsync(descriptor):
        calls.append(("fsync", os.fstat(descriptor).st_ino, os.fstat(descriptor).st_size))
        fsync(descriptor)

    def seen_replace(old, new):
        calls.append(("replace", os.stat(old).st_ino, os.stat(old).st_size))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "replace", seen_replace)
    monkeypatch.setattr(os, "rename", seen_replace)
    checkpoint.write(path, {"w": np.ones(100_000)})
    new, folder = path.stat(), path.parent.stat()
    assert [call[:2] for call in calls] == [
        ("fsync", new.st_ino),
        ("replace", new.st_ino),
        ("fsync", folder.st_ino),
    ]
    assert calls[0][2] == calls[1][2] == new.st_size


@pytest.mark.parametrize("mark", ["", "0123456789abcdef."], ids=["of an earlier version", ""])
def test_what_a_crash_left_is_removed(path, mark):
    path.with_name(f".{path.name}.{mark}partial").write_bytes(b"half of a file" * 1000)
    checkpoint.write(path, {"w": np.ones(3)})
    assert (checkpoint.File(path)["w"] == 1).all()
    assert os.listdir(path.parent) == [path.name]


def test_writers_at_once_leave_one_of_their_files(path):
    barrier = threading.Barrier(8)
    failures = []

    def write(generation):
        try:
            barrier.wait()
            for _ in range(5):
                checkpoint.write(path, {"w": np.full(50_000 * (generation + 1), generation)})
                file = checkpoint.File(path)["w"]
                assert file.size == 50_000 * (file[0] + 1)
                assert (file == file[0]).all()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=write, args=(generation,)) for generation in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert os.listdir(path.parent) == [path.name]


def test_a_link_stays_a_link(path):
    real = path.with_name("step-7.safetensors")
    checkpoint.write(real, {"w": np.zeros(1)})
    path.symlink_to(real.name)
    checkpoint.write(path, {"w": np.ones(1)})
    assert path.is_symlink()
    assert checkpoint.File(real)["w"] == 1


def test_a_new_file_has_the_rights_of_any_new_file(path):
    checkpoint.write(path, {})
    (path.parent / "other").touch()
    assert path.stat().st_mode == (path.parent / "other").stat().st_mode

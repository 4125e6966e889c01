"""Means of folders as Hugging Face writes them: shards with an index, and what else is in the folder."""

import json
import os
import signal
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

import oracle
from fastema import checkpoint
from processes import output_of

SHARDS = {"a.w": 1, "a.b": 1, "b.w": 2, "steps": 2}
INDEX = "model.safetensors.index.json"


def name_of(number, count=2):
    return f"model-{number:05}-of-{count:05}.safetensors"


def tensors_at(step, dtype=np.float32):
    rng = np.random.default_rng(step)
    return {
        "a.w": rng.standard_normal((5, 3)).astype(dtype),
        "a.b": rng.standard_normal(3).astype(dtype),
        "b.w": rng.standard_normal((3, 2)).astype(dtype),
        "steps": np.array([step]),
    }


def save(folder, tensors, shards=None, metadata=None):
    """Write a folder with an index, or with a single file where there are no shards."""
    folder.mkdir()
    if shards is None:
        checkpoint.write(folder / "model.safetensors", tensors, {"format": "pt"})
        return folder
    count = max(shards.values())
    for number in sorted(set(shards.values())):
        content = {name: tensors[name] for name, at in shards.items() if at == number}
        checkpoint.write(folder / name_of(number, count), content, {"format": "pt"})
    index = {
        "metadata": {"total_size": 1, "total_parameters": 25} if metadata is None else metadata,
        "weight_map": {name: name_of(number, count) for name, number in shards.items()},
    }
    (folder / INDEX).write_text(json.dumps(index))
    return folder


@pytest.fixture
def folders(tmp_path):
    return [save(tmp_path / f"checkpoint-{step}", tensors_at(step), SHARDS) for step in (1, 2, 3)]


def read(folder):
    """Return all tensors of a folder by its index."""
    index = json.loads((folder / INDEX).read_text())
    return {name: checkpoint.File(folder / at)[name] for name, at in index["weight_map"].items()}


def mean(name, steps=(1, 2, 3)):
    total = sum(tensors_at(step)[name].astype(np.float64) for step in steps)
    return (total / len(steps)).astype(np.float32)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_of_shards_is_averaged_into_one_of_the_same_shards(folders, tmp_path):
    assert checkpoint.average(folders, tmp_path / "mean") == ["steps"]
    found = read(tmp_path / "mean")
    assert set(found) == set(SHARDS)
    for name in ("a.w", "a.b", "b.w"):
        assert oracle.same_bits(found[name], mean(name))
    assert found["steps"] == [3]
    for number in (1, 2):
        file = checkpoint.File(tmp_path / "mean" / name_of(number))
        assert set(file) == {name for name, at in SHARDS.items() if at == number}
        assert file.metadata == {"format": "pt"}
    assert sorted(contents(tmp_path / "mean")) == sorted([name_of(1), name_of(2), INDEX])


def test_the_index_tells_the_size_in_the_new_type_and_keeps_what_else_it_said(folders, tmp_path):
    checkpoint.average(folders, tmp_path / "mean", dtype="bfloat16")
    index = json.loads((tmp_path / "mean" / INDEX).read_text())
    assert index["metadata"] == {"total_size": 2 * (15 + 3 + 6) + 8, "total_parameters": 25}
    assert list(index["weight_map"]) == list(SHARDS)
    assert read(tmp_path / "mean")["a.w"].dtype == ml_dtypes.bfloat16


def test_checkpoints_may_be_sharded_otherwise_each_and_the_newest_is_followed(tmp_path):
    one = save(tmp_path / "one", tensors_at(1))
    two = save(tmp_path / "two", tensors_at(2), {"a.w": 1, "a.b": 2, "b.w": 2, "steps": 3})
    file = tmp_path / "three.safetensors"
    checkpoint.write(file, tensors_at(3))
    checkpoint.average([one, file, two], tmp_path / "sharded")
    checkpoint.average([two, file, one], tmp_path / "single")
    checkpoint.average([two, one, file], tmp_path / "file")
    files = [
        read(tmp_path / "sharded"),
        checkpoint.File(tmp_path / "single" / "model.safetensors"),
        checkpoint.File(tmp_path / "file"),
    ]
    steps = [(1, 3, 2), (2, 3, 1), (2, 1, 3)]
    for found, order in zip(files, steps, strict=True):
        assert oracle.same_bits(found["b.w"], mean("b.w", order))
        assert found["steps"] == [order[-1]]
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) == 3


def test_an_index_may_be_given_in_the_place_of_its_folder(folders, tmp_path):
    checkpoint.average([folder / INDEX for folder in folders], tmp_path / "mean")
    assert oracle.same_bits(read(tmp_path / "mean")["a.w"], mean("a.w"))


def test_a_single_file_or_index_of_another_name_will_do(folders, tmp_path):
    for i, folder in enumerate(folders):
        (folder / INDEX).rename(folder / "diffusion_pytorch_model.safetensors.index.json")
        save(tmp_path / f"other-{i}", tensors_at(i + 1))
        (tmp_path / f"other-{i}" / "model.safetensors").rename(tmp_path / f"other-{i}" / "unet.safetensors")
    checkpoint.average(folders, tmp_path / "mean")
    assert (tmp_path / "mean" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    checkpoint.average([tmp_path / f"other-{i}" for i in range(3)], tmp_path / "others")
    found = checkpoint.File(tmp_path / "others" / "unet.safetensors")
    assert oracle.same_bits(found["a.w"], mean("a.w"))


def test_other_files_of_the_newest_folder_are_copied_but_weights_and_the_training_are_not(folders, tmp_path):
    kept = {"config.json": b"{}", "tokenizer.model": b"\0\1", "merges.txt": b"a b", "modeling.py": b"x = 1"}
    left = ["pytorch_model.bin", "optimizer.pt", "rng_state.pth", "training_args.bin", "trainer_state.json"]
    left += ["tf_model.h5", "pytorch_model.bin.index.json", ".hidden", "averages.gguf"]
    for name, content in kept.items():
        (folders[-1] / name).write_bytes(content)
        (folders[0] / name).write_bytes(b"older")
    for name in left:
        (folders[-1] / name).write_bytes(b"?")
    (folders[0] / "only_older.json").write_bytes(b"{}")
    (folders[-1] / "global_step3").mkdir()
    (folders[-1] / "linked.json").symlink_to(folders[-1] / "config.json")
    os.mkfifo(folders[-1] / "pipe.json")
    checkpoint.average(folders, tmp_path / "mean")
    found = contents(tmp_path / "mean")
    weights = {name_of(1), name_of(2), INDEX}
    assert {name: found[name] for name in found.keys() - weights} == {**kept, "linked.json": b"{}"}
    assert not (tmp_path / "mean" / "linked.json").is_symlink()


def test_extra_states_are_those_of_the_newest_of_whatever_shape(tmp_path):
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for i, path in enumerate(paths):
        extra = {"fp8._extra_state": np.full(i, 1.0)} if i else {}
        checkpoint.write(path, {"w": np.full(2, float(i)), **extra})
    assert checkpoint.average(paths, tmp_path / "mean", dtype="float32") == ["fp8._extra_state"]
    file = checkpoint.File(tmp_path / "mean")
    assert oracle.same_bits(file["fp8._extra_state"], np.full(2, 1.0))
    assert file["w"].tolist() == [1.0, 1.0]


def test_what_only_an_ema_reads_is_left_out_of_shards_too(folders, tmp_path):
    for folder in folders:
        path = folder / name_of(1)
        checkpoint.write(
            path, {**checkpoint.File(path), "fastema.kept.0.a.w": np.zeros(3)}, {"fastema": "{}"}
        )
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"]["fastema.kept.0.a.w"] = path.name
        (folder / INDEX).write_text(json.dumps(index))
    checkpoint.average(folders, tmp_path / "mean")
    assert set(read(tmp_path / "mean")) == set(SHARDS)
    assert checkpoint.File(tmp_path / "mean" / name_of(1)).metadata == {}


# --- all or nothing -----------------------------------------------------------------------------------------


def test_an_empty_folder_is_taken_and_any_other_target_refused(folders, tmp_path):
    (tmp_path / "empty").mkdir()
    checkpoint.average(folders, tmp_path / "empty")
    assert oracle.same_bits(read(tmp_path / "empty")["a.w"], mean("a.w"))
    (tmp_path / "file").write_bytes(b"mine")
    for target in (tmp_path / "empty", tmp_path / "file", folders[0]):
        before = contents(tmp_path)
        with pytest.raises(ValueError, match="must not be there, or be an empty folder"):
            checkpoint.average(folders, target)
        assert contents(tmp_path) == before
    with pytest.raises(FileNotFoundError, match="No such folder"):
        checkpoint.average(folders, tmp_path / "nowhere" / "mean")


def test_a_folder_cannot_take_the_place_of_a_file_nor_a_file_that_of_a_folder(folders, tmp_path):
    checkpoint.write(tmp_path / "a.safetensors", tensors_at(1))
    with pytest.raises(ValueError, match="must be a file or not be there"):
        checkpoint.average([tmp_path / "a.safetensors"], folders[0])


def test_a_failure_leaves_nothing(folders, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("full disk")

    before = contents(tmp_path)
    with pytest.raises(RuntimeError):
        checkpoint.average(folders, tmp_path / "mean", progress=fail)
    monkeypatch.setattr("shutil.copyfile", fail)
    (folders[-1] / "config.json").write_text("{}")
    with pytest.raises(RuntimeError):
        checkpoint.average(folders, tmp_path / "mean")
    (folders[-1] / "config.json").unlink()
    assert contents(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(folder.name for folder in folders)


def test_a_file_that_is_changed_when_all_of_it_was_read_is_noticed(folders, tmp_path):
    def change(*_):
        checkpoint.write(folders[0] / name_of(1), tensors_at(9))

    with pytest.raises(ValueError, match=r"checkpoint-1/model-00001-of-00002\.safetensors was changed"):
        checkpoint.average(folders, tmp_path / "mean", progress=change)
    assert not (tmp_path / "mean").exists()


def test_what_a_kill_leaves_is_no_target_and_is_removed_by_the_next_call(folders, tmp_path):
    program = """
        import sys, time
        from fastema import checkpoint

        def stop(*_):
            print("writing", flush=True)
            time.sleep(60)

        checkpoint.average(sys.argv[2:], sys.argv[1], progress=stop)
    """
    target = tmp_path / "mean"
    arguments = [
        sys.executable,
        "-c",
        "import textwrap, sys; exec(textwrap.dedent(sys.argv.pop(1)))",
        program,
    ]
    with subprocess.Popen([*arguments, target, *folders], stdout=subprocess.PIPE) as running:
        assert running.stdout.readline() == b"writing\n"
        beside = list(tmp_path.glob(".mean.*.partial"))
        assert len(beside) == 1
        checkpoint.average(folders, tmp_path / "mean")  # and leaves alone what is being written
        assert list(tmp_path.glob(".mean.*.partial")) == beside
        running.send_signal(signal.SIGKILL)
    for path in target.iterdir():
        path.unlink()
    checkpoint.average(folders, target)
    assert not list(tmp_path.glob(".mean.*"))
    assert oracle.same_bits(read(target)["a.w"], mean("a.w"))


def test_of_two_writers_of_a_folder_one_succeeds_and_the_other_is_refused(folders, tmp_path):
    once = []

    def other(*_):
        if not once:
            once.append(1)
            checkpoint.average(folders[:1], tmp_path / "mean")

    with pytest.raises(OSError, match="not empty"):
        checkpoint.average(folders, tmp_path / "mean", progress=other)
    assert oracle.same_bits(read(tmp_path / "mean")["a.w"], tensors_at(1)["a.w"])
    assert not list(tmp_path.glob(".mean.*"))


# --- what does not fit --------------------------------------------------------------------------------------


def without_shard(folder):
    (folder / name_of(2)).unlink()


def unnamed(folder):
    checkpoint.write(
        folder / name_of(2), {"b.w": np.zeros((3, 2), np.float32), "steps": np.zeros(1), "x": np.ones(1)}
    )


def lacking(folder):
    checkpoint.write(folder / name_of(2), {"b.w": np.zeros((3, 2), np.float32)})


def indexed(text):
    def write(folder):
        (folder / INDEX).write_text(text)

    return write


def of_shape(folder):
    checkpoint.write(
        folder / name_of(1), {"a.w": np.zeros((3, 5), np.float32), "a.b": np.zeros(3, np.float32)}
    )


def second_model(folder):
    checkpoint.write(folder / "model.safetensors", tensors_at(2))


def no_weights(folder):
    for path in folder.iterdir():
        path.unlink()


def several(folder):
    (folder / INDEX).unlink()


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (without_shard, FileNotFoundError, "checkpoint-2/model-00002-of-00002.safetensors"),
        (unnamed, ValueError, f"checkpoint-2/{name_of(2)} has 'x', and {INDEX} does not say so"),
        (lacking, ValueError, f"checkpoint-2/{name_of(2)} must have 'steps', by {INDEX}, and has not"),
        (
            of_shape,
            ValueError,
            rf"'a.w' must have one shape in all files, got \(5, 3\) in .*1/{name_of(1)} and",
        ),
        (second_model, ValueError, "checkpoint-2 must hold the weights of one model .*, and several of"),
        (no_weights, ValueError, "checkpoint-2 must hold the weights of one model .*, and has none"),
        (several, ValueError, "checkpoint-2 must hold the weights of one model .*, and several of"),
        (indexed("{"), ValueError, f"checkpoint-2/{INDEX} is no index of weights: it must be JSON"),
        (indexed("[]"), ValueError, "is no index of weights: it must be an object"),
        (indexed('{"weight_map": {}}'), ValueError, "is no index of weights: it names no tensors"),
        (indexed('{"weight_map": {"w": 3}}'), ValueError, r"it\['weight_map'\]\['w'\] must be a text, got 3"),
        (
            indexed('{"weight_map": {"w": "../../x.safetensors"}}'),
            ValueError,
            "it must name safetensors files beside it, got '../../x.safetensors'",
        ),
        (
            indexed('{"weight_map": {"w": "/x.safetensors"}}'),
            ValueError,
            "must name safetensors files beside",
        ),
        (indexed('{"weight_map": {"w": "model.bin"}}'), ValueError, "must name safetensors files beside"),
    ],
)
def test_folders_that_do_not_fit_are_refused_by_name_and_nothing_is_written(
    folders, tmp_path, damage, kind, message
):
    damage(folders[1])
    before = contents(tmp_path)
    with pytest.raises(kind, match=message):
        checkpoint.average(folders, tmp_path / "mean")
    assert contents(tmp_path) == before


def test_memory_does_not_grow_with_shards(tmp_path):
    """Three checkpoints of three shards of 64 MB, with holes instead of zeros on the disk."""
    size = 16 << 20
    for step in range(3):
        folder = tmp_path / str(step)
        folder.mkdir()
        for number in (1, 2, 3):
            header = json.dumps(
                {f"w{number}": {"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]}}
            ).encode()
            path = folder / name_of(number, 3)
            path.write_bytes(len(header).to_bytes(8, "little") + header)
            os.truncate(path, 8 + len(header) + 4 * size)
        weight_map = {f"w{number}": name_of(number, 3) for number in (1, 2, 3)}
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    code = """
        import sys
        from fastema import checkpoint
        from memory import peak

        before = peak()
        checkpoint.average(sys.argv[2:], sys.argv[1], dtype="float16")
        print(peak() - before)
    """
    grown = int(output_of(code, tmp_path / "mean", *(tmp_path / str(step) for step in range(3))))
    assert grown < 64 << 20, "one of nine files has 64 MB"

"""The benchmarks run, and what they say of memory holds; their times are nobody's to assert."""

import json
import re
import shutil
from pathlib import Path

import pytest
from fastema.bench import (
    bench_accuracy,
    bench_cold,
    bench_cuda,
    bench_ema,
    bench_keras,
    bench_lightning,
    bench_memory,
    bench_merge,
    bench_posthoc,
    bench_tensorflow,
    bench_transformers,
    bench_update,
    ceiling,
    harness,
    lists,
    model_sockets,
    moments,
    record,
)

import fake_cuda
import fastema
from fastema import __main__ as command
from processes import output_of, skip_without

CMAKE = Path(__file__).parents[2] / "CMakeLists.txt"


@pytest.mark.slow
def test_bench_writes_its_numbers_and_prints_its_tables(tmp_path, capsys):
    assert command.main(["bench", "--quick", "--samples", "1", "--folder", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for text in ("Update, ", "Swap, ", "of the ceiling", "Extra memory at the peak, KiB"):
        assert text in printed
    for name, rival in {"update": "NumPy a += w * (v - a)", "swap": "NumPy, a temporary"}.items():
        results = record.read(tmp_path / f"bench-{name}.json")["sections"][name]["results"]
        assert {result["title"] for result in results} == {"10 x 10, f32", "ResNet-50, f32"}
        assert all({"fastema", rival} < set(result["timings"]) for result in results)
        assert (tmp_path / f"bench-{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux' count of the peak")
def test_a_call_takes_less_than_a_mebibyte_of_memory():
    assert bench_memory.extra_kilobytes("ResNet-50", "update") < 1024
    assert bench_memory.extra_kilobytes("ResNet-50", "swap") < 1024
    assert bench_memory.extra_kilobytes("ResNet-50", "NumPy") > 8 * 1024, "the measure sees nothing"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux' count of the peak")
@pytest.mark.skipif(not shutil.which("dd"), reason="dd is not installed")
def test_a_merge_takes_little_memory_beside_dd_and_leaves_nothing(tmp_path, capsys):
    bench_merge.main(["--quick", "--folder", str(tmp_path), "--dtype", "bfloat16"])
    printed = capsys.readouterr().out
    assert "5 checkpoints of 2 files, 0.0 GB in all" in printed
    assert float(printed.split("peak of memory ")[1].split()[0]) < 200, "MB, NumPy and fastema included"
    assert not list(tmp_path.iterdir())


def test_what_a_contestant_refuses_is_said_and_the_others_are_measured(capsys):
    def refuse():
        raise MemoryError("too little of it")

    stopwatch = harness.Stopwatch(most=3, refusals=(MemoryError,))
    timings = harness.measure({"one": refuse, "other": lambda: None}, 2, stopwatch)
    assert list(timings) == ["other"]
    assert "one cannot run: too little of it" in capsys.readouterr().err


def test_every_kind_of_array_can_be_measured():
    for case in bench_update.AGAINST_CEILING:
        how = bench_update.How({"back to back": harness.WARM}, samples=1)
        (result,) = bench_update.measure(("10 x 10", *case[1:]), how)
        assert result.ours.median > 0


def test_every_contestant_is_called_at_each_moment_of_a_training_loop(capsys):
    bench_update.main(["--quick", "--only", "^10 x 10", "--samples", "1"])
    head, _, *rows = capsys.readouterr().out.split("10 x 10, f32")[1].splitlines()
    for moment in moments.moments():
        assert moment in head
    rivals = rows[: next(i for i, row in enumerate(rows) if row.startswith("fastema"))]
    assert {"NumPy a += w * (v - a)", "TensorFlow function"} <= {row.split("  ")[0] for row in rivals}
    assert all(row.count("±") == len(moments.moments()) for row in rivals)


def test_lists_that_are_not_there_are_an_error(capsys):
    with pytest.raises(SystemExit):
        bench_update.main(["--only", "BERT"])
    assert "no list's title matches 'BERT'" in capsys.readouterr().err


def test_the_ceilings_loops_leave_all_bits_of_averages_and_values():
    a, b = (lists.block([(1_000_003,), (5,)], dtype, 1).flat for dtype in ("f32", "bf16"))
    before = a.tobytes(), b.tobytes()
    loops = ceiling.ceilings("update", a, b)
    for loop in loops.values():
        loop()
    if not loops:
        pytest.skip("there is no C++ compiler")
    assert (a.tobytes(), b.tobytes()) == before


def test_arrays_of_a_list_lie_in_one_block_each_at_a_cache_line():
    shapes = [(3,), (70, 2), (0,), (5,)]
    block = lists.block(shapes, "bf16", 1)
    assert [array.shape for array in block.arrays] == shapes
    assert all(array.ctypes.data % 64 == 0 for array in block.arrays)
    for array in block.arrays:
        array[...] = 2
    assert (block.flat == 2).sum() == lists.elements(shapes)


def test_what_threads_bring_can_be_measured(capsys):
    bench_cold.main(["--quick", "--samples", "1"])
    printed = capsys.readouterr().out
    assert "1,048,576 elements" in printed
    assert "one thread / fastema" in printed


@pytest.mark.slow
def test_a_step_of_keras_can_be_measured(capsys):
    bench_keras.main(["--quick", "--samples", "1"])
    assert "200 small, tensorflow" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:::torch")
def test_a_step_of_lightning_can_be_measured(capsys):
    skip_without("torch")
    skip_without("lightning")
    bench_lightning.main(["--quick", "--samples", "1"])
    assert "Lightning's adds" in capsys.readouterr().out


def test_what_counting_adds_to_an_update_can_be_measured(capsys):
    skip_without("torch")
    bench_ema.main(["--quick", "--samples", "1"])
    assert "10 x 10, torch: EMA.update adds" in capsys.readouterr().out


def test_a_step_of_hugging_faces_trainer_can_be_measured(capsys):
    for needed in ("torch", "transformers", "accelerate"):
        skip_without(needed)
    bench_transformers.main(["--quick", "--samples", "1"])
    assert "tiny: a step without averages takes" in capsys.readouterr().out


@pytest.mark.slow
def test_updates_of_tensorflow_can_be_measured(capsys):
    bench_tensorflow.main(["--quick", "--samples", "1"])
    assert "first call, fastema" in capsys.readouterr().out


def test_averages_made_of_snapshots_can_be_measured(tmp_path, capsys):
    bench_posthoc.main(["--quick", "--picture", str(tmp_path / "posthoc.png")])
    assert "snapshots at 64 steps" in capsys.readouterr().out
    assert (tmp_path / "posthoc.png").read_bytes().startswith(b"\x89PNG")


def test_the_benchmark_of_gpus_runs_without_one(tmp_path, capsys):
    pytest.importorskip("torch", reason="torch is not installed")
    fake_cuda.kernels()
    file = tmp_path / "cuda.json"
    bench_cuda.main(["--fake", "--quick", "--samples", "1", "--json", str(file)])
    printed = capsys.readouterr().out
    for text in ("of the copy rate C", "times faster than torch", "us of the host", "offload", "swap GPT-2"):
        assert text in printed
    content = json.loads(file.read_text())
    assert content["kernels"] == bench_cuda.kernels_hash()
    titles = [result["title"] for result in content["results"]]
    cut = r"(swap )?GPT-2 cut to \S+ of 1.24e\+08 elements(, f32)?( <- bf16)?"
    assert sum(re.fullmatch(cut, title) is not None for title in titles) == 3, titles
    assert "1,000 x 1,000 cut to 5e+03 of 1e+06 elements, f32" in titles
    assert content["torch"]
    assert content["foreach"] == {}


def test_the_benchmark_of_gpus_runs_without_one_where_it_is_installed(tmp_path):
    """As a wheel has it: beside it lies what the fake device is made of, and no tests."""
    pytest.importorskip("torch", reason="torch is not installed")
    installed = tmp_path / "installed" / "fastema"
    shutil.copytree(Path(fastema.__file__).parent, installed, ignore=shutil.ignore_patterns("__pycache__"))
    bench = bench_cuda.FOLDER, installed / "bench"
    shutil.copytree(*bench, ignore=shutil.ignore_patterns("results"), dirs_exist_ok=True)
    native = Path(fastema._core.__file__)
    shutil.copy(native, installed)
    shutil.copytree(native.parent / "cuda", installed / "cuda", dirs_exist_ok=True)
    pattern = r"install\(FILES (tests/support.*?)\s+DESTINATION fastema/bench\)"
    listed = re.search(pattern, CMAKE.read_text(), re.DOTALL)
    for name in listed[1].split():
        shutil.copy(CMAKE.parent / name, installed / "bench")
    code = f"""
        import sys
        sys.meta_path = [x for x in sys.meta_path if "ditable" not in type(x).__name__ + type(x).__module__]
        sys.path.insert(0, {str(installed.parent)!r})
        import fastema
        assert fastema.__file__.startswith({str(installed)!r}), fastema.__file__
        from fastema.bench import bench_cuda
        bench_cuda.main(["--fake", "--quick", "--samples", "1"])
    """
    assert "no GPU: a fake device" in output_of(code)


def test_the_kept_results_of_a_gpu_are_of_these_kernels():
    kept = sorted(bench_cuda.FOLDER.glob("cuda-*.json"))
    if not kept:
        pytest.skip("not run on a GPU yet: python -m fastema.bench.bench_cuda --keep")
    content = json.loads(kept[-1].read_text())
    if content["kernels"] != bench_cuda.kernels_hash():
        pytest.skip(f"not run on a GPU since {content['date']}: the kernels were changed")
    assert content["device"]
    assert content["goals"]


@pytest.mark.slow
def test_a_compensated_average_is_float64s_to_a_millionth_after_a_million_steps(capsys):
    with capsys.disabled():
        bench_accuracy.main([])
    assert bench_accuracy.held(0.99999, 1_000_000)["float32 + float32 carry"] < 1e-6


def test_the_model_of_sockets_keeps_to_its_rates():
    machine = model_sockets.Machine(2, 14e9, 250e9, 100e9)
    moved = 1000 * model_sockets.MOVED * model_sockets.PIECE
    ways = [{"own_parts": own, "first_touch": touch} for own in (False, True) for touch in ("one", "all")]
    one, many = (
        [model_sockets.seconds(machine, 1000, threads, **way) for way in ways] for threads in (1, 64)
    )
    assert one == pytest.approx([moved / machine.stream] * 4)  # times are added up piece by piece
    shared = moved / (machine.memory * machine.sockets)
    assert all(shared < time < moved / machine.memory * 1.1 for time in many)
    counter, counter_all, own, own_all = many
    assert own_all < counter_all < counter
    assert own == pytest.approx(counter)
    assert own_all < 1.1 * shared


def test_the_model_of_sockets_prints_its_table(capsys):
    model_sockets.main(["--stream", "14", "--cores", "8"])
    assert "2 sockets of 8 cores, GB/s: one core 14, a socket's memory 250" in capsys.readouterr().out

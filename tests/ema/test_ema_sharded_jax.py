"""fastema.EMA with JAX arrays sharded over devices: each shard is averaged and saved where it lies."""

import textwrap

import processes

FOUR_CPUS = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}

PRELUDE = """
    import sys
    import jax
    import jax.numpy as jnp
    import numpy as np
    import fastema
    import oracle
    from fastema import checkpoint
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

    MESH = Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"))
    FLAT = Mesh(np.array(jax.devices()), ("all",))
    SHARDINGS = {
        "rows": {"kernel": P("a", None), "half": P("b"), "steps": P(), "scale": P()},
        "columns": {"kernel": P(None, "b"), "half": P(), "steps": P(), "scale": P()},
        "both": {"kernel": P("b", "a"), "half": P(("a", "b")), "steps": P(), "scale": P()},
    }

    def whole_at(step):
        rng = np.random.default_rng(step)
        return {
            "kernel": rng.standard_normal((8, 6)).astype(np.float32),
            "half": rng.standard_normal(16).astype(jnp.bfloat16),
            "steps": np.int32(step),
            "scale": rng.standard_normal(3).astype(np.float32),
        }

    def placed(whole, how):
        if how is None:
            return {name: jnp.asarray(x) for name, x in whole.items()}
        spread = {name: NamedSharding(MESH, spec) for name, spec in SHARDINGS[how].items()}
        return {name: jax.device_put(x, spread[name]) for name, x in whole.items()}

    def train(ema, steps, how):
        for step in steps:
            ema.update(placed(whole_at(step), how))

    def trained(steps, how, **options):
        ema = fastema.EMA(placed(whole_at(0), how), **options)
        train(ema, range(1, steps + 1), how)
        return ema

    def same(a, b, lists=1):
        return a.step == b.step and a.decay == b.decay and all(
            oracle.same_bits(np.asarray(a.averages_of(k)[name]), np.asarray(b.averages_of(k)[name]))
            for k in range(lists) for name in a.averages
        )
"""


def run(code, *arguments, **environment):
    processes.skip_without("jax")
    program = textwrap.dedent(PRELUDE) + textwrap.dedent(code)
    return processes.output_of(program, *arguments, **{**FOUR_CPUS, **environment})


def test_sharded_averages_have_the_bits_of_whole_ones_and_the_places_of_their_values():
    run("""
        for options in (
            {},
            {"decay": [0.9, 0.99], "every": 2},
            {"initial": "zeros", "background": True},
            {"decay": [0.5, 0.9], "rounding": "compensated", "background": True},
        ):
            lists = len(options["decay"]) if "decay" in options else 1
            whole = trained(5, None, **options)
            for how in SHARDINGS:
                ema = trained(5, how, **options)
                assert same(ema, whole, lists)
                for k in range(lists):
                    for name, x in ema.averages_of(k).items():
                        assert x.sharding == NamedSharding(MESH, SHARDINGS[how][name]), (how, name)
                written = ema.copy_to()
                assert written["half"].dtype == jnp.bfloat16
                assert written["kernel"].sharding == NamedSharding(MESH, SHARDINGS[how]["kernel"])
                assert oracle.same_bits(np.asarray(written["half"]), np.asarray(whole.copy_to()["half"]))
    """)


def test_no_array_larger_than_a_shard_is_made(tmp_path):
    code = """
        import tracemalloc

        size, path = 1 << 20, sys.argv[1] + "/ema.safetensors"
        values = {"w": jax.device_put(jnp.ones(4 * size), NamedSharding(FLAT, P("all")))}
        ema = fastema.EMA(values, 0.5)
        assert [x.shape for x in ema._parts.averages.by_decay[0][0]] == [(size,)] * 4
        tracemalloc.start()  # sees NumPy's memory
        ema.update(values)
        ema.save(path)
        assert tracemalloc.get_traced_memory()[1] < size, "bytes: a shard has four times as many"
        before, arrays = tracemalloc.get_traced_memory()[0], {id(x) for x in jax.live_arrays()}
        shown = ema.averages["w"]
        resumed = fastema.EMA.load(path, values)
        now, peak = tracemalloc.get_traced_memory()
        assert peak - before < 9 * 4 * size, "the averages of both, and a shard"
        assert values["w"]._npy_value is None, "where JAX keeps what it has gathered"
        made = [x.shape for x in jax.live_arrays() if id(x) not in arrays and x is not shown]
        assert all(shape == (size,) for shape in made), made
        assert resumed.step == 1
    """
    run(code, tmp_path)


def test_averages_of_replicas_are_kept_once():
    run("""
        values = jax.device_put(jnp.ones(1000), NamedSharding(MESH, P("a")))
        ema = fastema.EMA([values], 0.5)
        assert [x.shape for x in ema._parts.averages.by_decay[0][0]] == [(500,), (500,)]
        ema = fastema.EMA([jax.device_put(jnp.ones(1000), NamedSharding(MESH, P()))], 0.5)
        assert [x.shape for x in ema._parts.averages.by_decay[0][0]] == [(1000,)]
        assert len(ema.averages[0].addressable_shards) == 4
    """)


def test_values_sharded_otherwise_are_refused_and_never_gathered():
    run("""
        ema = trained(1, "rows", decay=0.5)
        before = np.asarray(ema.averages["kernel"])
        for other in (placed(whole_at(2), None), placed(whole_at(2), "columns"), whole_at(2)):
            try:
                ema.update(other)
            except ValueError as error:
                assert "values must be sharded as at first" in str(error), error
            else:
                raise AssertionError("not refused")
            assert ema.step == 1
            assert oracle.same_bits(np.asarray(ema.averages["kernel"]), before)
        try:
            trained(1, None, decay=0.5).update(placed(whole_at(2), "rows"))
        except ValueError as error:
            assert "must be sharded as at first" in str(error), error
        else:
            raise AssertionError("not refused")
        try:
            ema.copy_to(placed(whole_at(2), "columns"))
        except ValueError as error:
            assert "values['kernel'] must be sharded, or whole," in str(error), error
        else:
            raise AssertionError("not refused")
    """)


def test_a_step_may_donate_what_was_averaged_and_not_before():
    run("""
        step = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf + 1, x), donate_argnums=0)
        values = {"w": jax.device_put(jnp.ones(1000), NamedSharding(FLAT, P("all")))}
        ema = fastema.EMA(values, 0.5)
        for _ in range(3):
            values = step(values)
            ema.update(values)
        assert (np.asarray(ema.averages["w"]) == 3.125).all()
        step(values)
        try:
            ema.update(values)
        except RuntimeError as error:
            assert "one was donated to a step before" in str(error), error
        else:
            raise AssertionError("deleted arrays were read")
        assert ema.step == 3
    """)


def test_keras_variables_on_sharded_arrays_are_swapped_and_come_back():
    processes.skip_without("keras")
    run(
        """
        import keras

        values = placed(whole_at(0), "both")
        variables = {name: keras.Variable(x, dtype=x.dtype) for name, x in values.items()}
        for name, x in values.items():
            variables[name]._value = x
        ema = fastema.EMA(variables, 0.5)
        expected = trained(1, None, decay=0.5)
        for name, x in placed(whole_at(1), "both").items():
            variables[name]._value = x
        ema.update()
        raw = {name: np.asarray(x.value) for name, x in variables.items()}
        with ema.swapped():
            for name, x in variables.items():
                assert x.value.sharding == NamedSharding(MESH, SHARDINGS["both"][name])
                assert oracle.same_bits(np.asarray(x.value), np.asarray(expected.copy_to()[name])), name
        assert all(oracle.same_bits(np.asarray(x.value), raw[name]) for name, x in variables.items())
        """,
        KERAS_BACKEND="jax",
    )


def test_a_set_is_loaded_into_any_other_sharding_and_goes_on_to_the_bit(tmp_path):
    code = """
        for options in ({"decay": 0.9}, {"decay": [0.9, 0.5], "rounding": "compensated", "every": 2},
                        {"decay": 0.9, "initial": "zeros"}):
            lists = len(options["decay"]) if isinstance(options["decay"], list) else 1
            straight = trained(6, None, **options)
            for i, saved in enumerate((None, *SHARDINGS)):
                path = f"{sys.argv[1]}/{saved}-{lists}{len(options)}.safetensors"
                ema = trained(3, saved, **options)
                ema.save(path)
                for loaded in (None, *SHARDINGS):
                    resumed = fastema.EMA.load(path, placed(whole_at(9), loaded))
                    assert same(resumed, ema, lists), (saved, loaded)
                    train(resumed, (4, 5, 6), loaded)
                    assert same(resumed, straight, lists), (saved, loaded)
    """
    run(code, tmp_path)


def test_other_methods_average_shards_and_go_on_in_another_sharding(tmp_path):
    run(
        """
        path = sys.argv[1]
        for method, options in ((fastema.BEMA, {"every": 2}), (fastema.Window, {"size": 3})):
            whole, sharded = (method(placed(whole_at(0), how), **options) for how in (None, "rows"))
            for one, how in ((whole, None), (sharded, "rows")):
                train(one, range(1, 6), how)
            assert same(whole, sharded)
            sharded.save(path)
            other = method.load(path, placed(whole_at(9), "both"))
            assert same(whole, other)
            train(whole, range(6, 9), None)
            train(other, range(6, 9), "both")
            assert same(whole, other)
        """,
        tmp_path / "set.safetensors",
    )


def test_a_set_in_another_type_holds_rounded_averages_and_nothing_to_go_on_from(tmp_path):
    code = """
        import re

        for options in ({}, {"rounding": "compensated"}, {"every": 9}):
            path = f"{sys.argv[1]}/{len(options)}{options.get('every')}.safetensors"
            ema = trained(3, "rows", decay=0.9, **options)
            ema.save(path, dtype="bfloat16")
            files = [checkpoint.File(path.replace(".s", f"-{k:05}-of-00004.s")) for k in (1, 2, 3, 4)]
            for name, axis in (("kernel", 0), ("half", 0), ("scale", 0)):
                whole = np.concatenate([file[name] for file in files if name in file], axis)
                needed = np.asarray(ema.averages[name]).astype(jnp.bfloat16)
                assert oracle.same_bits(whole, needed), name
            assert oracle.same_bits(files[0]["steps"], np.asarray(ema.averages["steps"]))
            assert {name for file in files for name in file} == {"kernel", "half", "steps", "scale"}
            try:
                fastema.EMA.load(path, placed(whole_at(9), "rows"))
            except ValueError as error:
                assert re.search("rounded to bfloat16.*wrote without dtype", str(error)), error
            else:
                raise AssertionError("went on from rounded averages")
    """
    run(code, tmp_path)


def test_a_set_has_names_as_long_as_the_system_takes(tmp_path):
    code = """
        import os

        name = "é" * 114 + ".safetensors"
        ema = trained(2, "rows", decay=0.9)
        ema.save(sys.argv[1] + "/" + name)
        names = os.listdir(sys.argv[1])
        assert [len(os.fsencode(x)) for x in names] == [255] * 4, names
        assert same(fastema.EMA.load(sys.argv[1] + "/" + name, placed(whole_at(9), "rows")), ema, 1)
        try:
            ema.save(sys.argv[1] + "/n" + name)
        except OSError as error:
            assert "File name too long" in str(error)
        else:
            raise AssertionError("a name of 256 bytes was written")
        assert sorted(os.listdir(sys.argv[1])) == sorted(names)
    """
    run(code, tmp_path)


def test_a_file_of_a_set_holds_a_device_s_shards_under_the_names_of_their_values(tmp_path):
    code = """
        import os

        ema = trained(2, "rows", decay=0.9)
        ema.save(sys.argv[1] + "/ema.safetensors")
        names = sorted(os.listdir(sys.argv[1]))
        assert names == [f"ema-{k:05}-of-00004.safetensors" for k in (1, 2, 3, 4)], names
        files = [checkpoint.File(sys.argv[1] + "/" + name) for name in names]
        shapes = [{**file.shapes} for file in files]
        # the rows of the kernel are over "a", those of half over "b": of replicas the first device saves
        assert shapes == [
            {"kernel": (4, 6), "half": (8,), "steps": (), "scale": (3,)},
            {"half": (8,)},
            {"kernel": (4, 6)},
            {},
        ], shapes
        whole = np.concatenate([file["kernel"] for file in files if "kernel" in file])
        assert oracle.same_bits(whole, np.asarray(ema.averages["kernel"]))
    """
    run(code, tmp_path)


def test_a_set_of_two_saves_of_one_step_is_refused(tmp_path):
    code = """
        import shutil

        paths = [f"{sys.argv[1]}/{name}" for name in ("one", "other")]
        ema = trained(2, "rows", decay=0.9)
        for path in paths:
            ema.save(path + ".safetensors")
            assert same(fastema.EMA.load(path + ".safetensors", placed(whole_at(9), "rows")), ema)
        shutil.copy(*(f"{path}-00003-of-00004.safetensors" for path in paths))
        try:
            fastema.EMA.load(paths[1] + ".safetensors", placed(whole_at(9), "rows"))
        except ValueError as error:
            assert "other-00003-of-00004.safetensors must be of one save, and their save" in str(error), error
        else:
            raise AssertionError("a mixture was loaded")
    """
    run(code, tmp_path)


def test_processes_save_their_own_shards_and_load_those_of_others(tmp_path):
    code = """
        import json, os, time
        import jax

        rank = int(os.environ["RANK"])
        jax.distributed.initialize(f"localhost:{os.environ['PORT']}", 2, rank)
        import numpy as np
        import fastema
        import oracle
        from fastema import checkpoint
        from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

        mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"))
        path = sys.argv[1] + "/ema.safetensors"

        def placed(whole, *axes):
            sharding = NamedSharding(mesh, P(*axes))
            return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

        def shards(array):
            return [(shard.index, np.asarray(shard.data)) for shard in array.addressable_shards]

        whole = np.arange(48, dtype=np.float32).reshape(8, 6)
        values = lambda add: {"rows": placed(whole + add, "a"), "both": placed(whole + add, "a", "b"),
                              "columns": placed(whole + add, None, "b"), "all": placed(whole + add)}
        ema = fastema.EMA(values(0), 0.5)
        ema.update(values(2))
        for name, x in ema.averages.items():
            assert x.sharding == values(0)[name].sharding
            assert all(oracle.same_bits(data, (whole + 1)[index]) for index, data in shards(x)), name
        ema.save(path)
        for _ in range(600):  # the other's
            if len([name for name in os.listdir(sys.argv[1]) if not name.startswith(".")]) == 4:
                break
            time.sleep(0.1)
        files = [checkpoint.File(path.replace("ema", f"ema-0000{k}-of-00004")) for k in (1, 2, 3, 4)]
        runs = {json.loads(file.metadata["fastema"])["save"] for file in files}
        assert [len(run) for run in runs] == [32], "the processes did not agree"
        assert [sorted(file) for file in files] == [
            ["all", "both", "columns", "rows"], ["both", "columns"], ["both", "rows"], ["both"]
        ]
        other = {"rows": placed(whole, None, "a"), "both": placed(whole, "b", "a"),
                 "columns": placed(whole), "all": placed(whole, "b")}
        for name, x in fastema.EMA.load(path, other).averages.items():
            assert all(oracle.same_bits(data, (whole + 1)[index]) for index, data in shards(x)), name
    """
    processes.skip_without("jax")
    (port,) = processes.free_ports(1)
    flags = "--xla_force_host_platform_device_count=2"
    processes.ranks(2, "import sys\n" + textwrap.dedent(code), tmp_path, XLA_FLAGS=flags, PORT=str(port))

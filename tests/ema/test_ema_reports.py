"""What users of averages reported of other libraries, tried here: right, or refused by name.

Each test names the public thread. Right values are replays in NumPy, or what the framework itself does.
"""

import re
import warnings

import ml_dtypes
import numpy as np
import pytest

import fastema


def replay(values, decay):
    """Return the average that starts at the first value."""
    average = np.array(values[0], np.float64)
    for value in values[1:]:
        average = decay * average + (1 - decay) * np.asarray(value, np.float64)
    return average


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.fixture
def jax():
    return pytest.importorskip("jax")


def filled(torch, module, number):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(number)
    return module


# --- values whose place holds others by now ----------------------------------------------------------------


class Holder:
    """Exports an array by DLPack, another one after each assignment."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **keywords):
        return self.array.__dlpack__(**keywords)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


@pytest.mark.parametrize("given", [False, True], ids=["", "given again"])
def test_an_exporter_that_rebinds_is_read_anew(given):
    """google/flax#5117"""
    holder = Holder(np.zeros(2))
    ema = fastema.EMA([holder], 0.5)
    pairs = fastema.Pairs([average := np.zeros(2)], [holder])
    for number in (1.0, 3.0):
        holder.array = np.full(2, number)
        ema.update([holder] if given else None)
        pairs.update(0.5)
    expected = replay([0, 1, 3], 0.5)
    assert (np.from_dlpack(ema.averages[0]) == expected).all()
    assert (average == expected).all()


@pytest.mark.parametrize("form", ["module", "state", "dict", "list"])
def test_variables_of_nnx_are_read_anew(jax, form):
    """google/flax#5117"""
    nnx = pytest.importorskip("flax.nnx")
    module = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    given = {
        "module": lambda: module,
        "state": lambda: nnx.state(module, nnx.Param),
        "dict": lambda: {"kernel": module.kernel},
        "list": lambda: [module.kernel],
    }[form]()
    ema = fastema.EMA(given, 0.5)
    seen = [np.asarray(module.kernel[...])]
    for number in (1.0, 2.0):
        module.kernel[...] = jax.numpy.full((3, 2), number)
        seen.append(np.full((3, 2), number))
        ema.update()
    found = [x for x in jax.tree.leaves(ema.averages) if x.shape == (3, 2)]
    np.testing.assert_allclose(np.asarray(found[0]), replay(seen, 0.5), rtol=1e-6)
    with ema.swapped():
        np.testing.assert_allclose(np.asarray(module.kernel[...]), replay(seen, 0.5), rtol=1e-6)
    assert (np.asarray(module.kernel[...]) == 2).all()


@pytest.mark.parametrize("container", [dict, list])
def test_a_container_whose_entries_are_rebound_is_looked_at_again(container):
    weights = {"k": np.zeros(2)} if container is dict else [np.zeros(2)]
    key = "k" if container is dict else 0
    ema = fastema.EMA(weights, 0.5)
    for _ in range(2):
        weights[key] = weights[key] + 2
        ema.update()
    assert (ema.averages[key] == replay([0, 2, 4], 0.5)).all()
    with ema.swapped():
        assert (weights[key] == 2.5).all()
    assert (weights[key] == 4).all()


def renamed(container):
    container["z"] = container.pop("b")


def exchanged(container):
    """Give two names each other's array, in the order in which they were."""
    first, second = container.pop("a"), container.pop("b")
    container |= {"b": first, "a": second}


def test_an_entry_of_another_name_is_refused_and_names_that_change_places_are_followed():
    """It is the name that tells which average an array has; the arrays in it are the same, in one order."""
    weights = {"a": np.zeros(2), "b": np.ones(2)}
    ema = fastema.EMA(weights, 0.5)
    exchanged(weights)
    ema.update()
    assert {name: x.tolist() for name, x in ema.averages.items()} == {"a": [0.5, 0.5], "b": [0.5, 0.5]}
    with ema.swapped():
        assert (weights["a"] == 0.5).all()
    assert (weights["a"] == 1).all()
    renamed(weights)
    with pytest.raises(RuntimeError, match=r"names given at first; missing: \['b'\], unknown: \['z'\]"):
        ema.update()


@pytest.mark.parametrize("of", ["_parameters", "_modules"])
def test_parameters_and_modules_of_other_names_are_told(torch, of):
    module = torch.nn.Module()
    for name, number in (("a", 0.0), ("b", 1.0)):
        part = filled(torch, torch.nn.Linear(1, 1), number)
        setattr(module, name, part if of == "_modules" else part.bias)
    ema = fastema.EMA(module, 0.5)
    exchanged(getattr(module, of))
    ema.update()
    assert all((x == 0.5).all() for x in ema.averages.values())
    renamed(getattr(module, of))
    with pytest.raises(RuntimeError, match=r"names given at first; missing: \['b.*unknown: \['z"):
        ema.update()


def test_an_array_that_is_taken_for_another_type_is_told():
    weights = {"w": np.ones(2)}
    ema = fastema.EMA(weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # NumPy's, of setting a type
        weights["w"].dtype = np.int64
    with pytest.raises(ValueError, match=r"values\['w'\] was given another type .*\(an EMA: rebind\)"):
        ema.update()
    assert ema.step == 0


@pytest.mark.parametrize("library", ["numpy", "jax.numpy"])
def test_an_array_that_is_given_as_none_is_told(library):
    """None would be read as the array given at first; equinox has it for a bias that a layer does without."""
    arrays = pytest.importorskip(library)
    ema = fastema.EMA({"a": arrays.zeros(2), "b": [arrays.zeros(2)]}, 0.5)
    with pytest.raises(ValueError, match=r"values\['b.0'\] must be an array as at first, got None"):
        ema.update({"a": arrays.ones(2), "b": [None]})
    assert ema.step == 0
    assert (np.asarray(ema.averages["a"]) == 0).all()


def test_a_swap_acts_on_what_the_last_update_was_given():
    first, last = np.zeros(2), np.ones(2)
    ema = fastema.EMA([first], 0.5)
    ema.update([last])
    with ema.swapped():
        assert (last == 0.5).all()
        assert (first == 0).all()
    assert (last == 1).all()


def test_a_swap_after_an_update_of_another_library_is_refused(torch):
    ema = fastema.EMA([torch.zeros(2)], 0.5)
    ema.update([np.ones(2, np.float32)])
    assert torch.equal(ema.averages[0], torch.full((2,), 0.5))
    for call in (ema.swap, ema.copy_to):
        with pytest.raises(RuntimeError, match=r"call ema\.rebind\(values\)"):
            call()
    ema.rebind(values := [torch.zeros(2)])
    ema.swap()
    assert torch.equal(values[0], torch.full((2,), 0.5))


def test_averages_of_two_nest_exactly_and_come_back_in_that_order_alone():
    weights = np.zeros(2)
    a, b = fastema.EMA([weights], 0.5), fastema.EMA([weights], 0.75)
    other = fastema.EMA([np.zeros(2)], 0.5)
    weights += 4
    for ema in (a, b):
        ema.update()
    with a.swapped():
        assert (weights == 2).all()
        for call in (b.update, b.copy_to):
            with pytest.raises(RuntimeError, match="another EMA's averages"):
                call()
        other.update()
        b.swap()
        assert (weights == 1).all()
        with pytest.raises(RuntimeError, match="another EMA's averages"):
            a.swap()
        assert (weights == 1).all()
        with other.swapped():
            pass
        b.swap()
        assert (weights == 2).all()
    assert (weights == 4).all()
    assert (a.averages[0] == 2).all()
    assert (b.averages[0] == 1).all()
    b.swap()
    del b, ema, call  # whose averages stay in the place of the weights
    a.update()


# --- modules that change ------------------------------------------------------------------------------------


def replaced(torch, module):
    module.weight = torch.nn.Parameter(torch.ones(2, 3))
    module.bias = torch.nn.Parameter(torch.ones(2))


def loaded(torch, module):
    module.load_state_dict({key: torch.ones_like(x) for key, x in module.state_dict().items()}, assign=True)


def converted(torch, module):
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        filled(torch, module.double().float(), 1.0)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def shared(torch, module):
    filled(torch, module, 1.0)
    module.share_memory()


def given_data(torch, module):
    for parameter in module.parameters():
        parameter.data = torch.ones_like(parameter)


@pytest.mark.parametrize(
    "change", [replaced, loaded, converted, shared, given_data], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("given", [False, True], ids=["", "given again"])
def test_parameters_that_are_others_now_are_followed(torch, change, given):
    """getsentry/YOLO-Master#154, and torch's own ways to replace parameters"""
    module = filled(torch, torch.nn.Linear(3, 2), 0.0)
    ema = fastema.EMA(module, 0.5)
    change(torch, module)
    ema.update(module if given else None)
    assert all((x == 0.5).all() for x in ema.averages.values())
    with ema.swapped():
        assert all((x == 0.5).all() for x in module.parameters())
    assert all((x == 1).all() for x in module.parameters())
    ema.state_dict()


def halved(_, module):
    module.half()


def resized(torch, module):
    module[0] = torch.nn.Linear(3, 4)


def grown(torch, module):
    module.append(torch.nn.Linear(2, 2))


def pruned(_, module):
    del module[1]


def tied(_, module):
    module[1].weight = module[2].weight


def parametrized(torch, module):
    torch.nn.utils.parametrizations.weight_norm(module[0])


def test_weights_that_are_no_longer_tied_are_told(torch):
    module = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(2)])
    module[1].weight = module[0].weight
    ema = fastema.EMA(module)
    module[1].weight = torch.nn.Parameter(torch.zeros(2, 2))
    refusal = (
        r"values\['1.weight'\] is an array of its own now, and was the same array as values\['0.weight'\]"
    )
    with pytest.raises(RuntimeError, match=refusal):
        ema.update()


@pytest.mark.parametrize(
    "change", [halved, resized, grown, pruned, tied, parametrized], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("call", ["update", "swap", "averages", "state_dict", "copy_to"])
def test_modules_that_do_not_fit_any_more_are_refused_at_the_next_call(torch, change, call):
    """getsentry/YOLO-Master#154"""
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    ema = fastema.EMA(module, 0.5)
    ema.update()
    change(torch, module)
    with pytest.raises(RuntimeError, match="values") as refusal:
        getattr(ema, call) if call == "averages" else getattr(ema, call)()
    assert re.search(r"rebind\(values\)|make the EMA anew", str(refusal.value))
    assert ema.step == 1
    assert not ema.is_swapped


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_rebind_goes_on_with_weights_of_another_type(torch, dtype):
    module = filled(torch, torch.nn.Linear(3, 2), 0.0)
    ema = fastema.EMA(module, 0.5, dtype="float64")
    filled(torch, module, 1.0)
    ema.update()
    if dtype == "float16":
        pytest.skip("float64 averages of 16-bit values") if ("float64", "float16") not in MIXES else None
    module.to(getattr(torch, dtype))
    ema.rebind(module)
    ema.update()
    assert ema.averages["weight"].dtype == torch.float64
    assert (ema.averages["weight"] == 0.75).all()
    assert ema.step == 2


MIXES = fastema._core.mixes()


def test_rebind_refuses_other_names_and_shapes_and_changes_nothing():
    ema = fastema.EMA(weights := {"a": np.zeros(2)}, 0.5)
    for other, message in (({"b": np.zeros(2)}, "missing"), ({"a": np.zeros(3)}, "must have shape")):
        with pytest.raises(ValueError, match=message):
            ema.rebind(other)
    weights["a"] += 1
    ema.update()
    assert (ema.averages["a"] == 0.5).all()
    ema.swap()
    with pytest.raises(RuntimeError, match="swap"):
        ema.rebind({"a": np.zeros(2)})


# --- buffers -----------------------------------------------------------------------------------------------


def tracker(torch):
    class Tracker(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(2))
            self.register_buffer("mean", torch.zeros(2))
            self.register_buffer("later", None)
            self.register_buffer("growing", torch.empty(0))

        def forward(self, x):
            self.mean = 0.5 * self.mean + 0.5 * x
            self.later = x.clone()
            self.growing.resize_(len(x)).copy_(x)
            return x + self.mean

    return Tracker()


@pytest.mark.parametrize("buffers", ["copy", "average", "ignore"])
def test_buffers_that_a_forward_pass_rebinds_or_makes_are_taken_up(torch, buffers):
    """pytorch/pytorch#84053, lucidrains/phenaki-pytorch#21, neuralmagic/sparseml#1113"""
    module = tracker(torch)
    ema = fastema.EMA(module, 0.5, buffers=buffers)
    module(torch.ones(2))
    ema.update()
    expected = {
        "copy": {"mean": 0.5, "later": 1.0, "growing": 1.0},
        "average": {"mean": 0.25, "later": 1.0, "growing": 1.0},  # what appears begins as it is
        "ignore": {},
    }[buffers]
    averages = ema.averages
    assert averages.keys() == {"weight", *expected}
    for name, number in expected.items():
        assert (averages[name] == number).all(), name
    for call in (ema.state_dict, ema.copy_to):
        call()


@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_buffers_that_an_evaluation_rebinds_are_back_after_it(torch, buffers):
    """pytorch/pytorch#84053"""
    module = tracker(torch)
    ema = fastema.EMA(module, 0.5, buffers=buffers)
    module(torch.ones(2))
    ema.update()
    held = dict(module.named_buffers())
    bits = {name: x.clone() for name, x in held.items()}
    with ema.swapped():
        module.mean = module.mean + 7
        module.register_buffer("more", torch.ones(3))
    assert dict(module.named_buffers()).keys() == held.keys()
    for name, x in module.named_buffers():
        assert x is held[name]
        assert torch.equal(x, bits[name])


def test_parameters_replaced_while_swapped_are_told(torch):
    module = filled(torch, torch.nn.Linear(2, 2), 1.0)
    weight = module.weight
    ema = fastema.EMA(module, 0.5)
    with pytest.raises(RuntimeError, match="replaced"), ema.swapped():
        module.weight = torch.nn.Parameter(torch.zeros(2, 2))
    assert not ema.is_swapped
    assert (weight == 1).all()


def test_tensors_can_still_be_resized(torch):
    """ultralytics/yolov5#168"""
    tensor = torch.empty(0)
    ema = fastema.EMA([tensor, torch.ones(1)], 0.5)
    tensor.resize_(3)
    other = torch.ones(4)
    pairs = fastema.Pairs([torch.zeros(4)], [other])
    fastema.update(torch.zeros(4), other, 0.5)
    other.untyped_storage().resize_(0)
    del ema, pairs


def test_a_storage_that_was_emptied_is_refused_by_name(torch):
    tensor = torch.ones(4)
    ema = fastema.EMA({"w": tensor}, 0.5)
    tensor.untyped_storage().resize_(0)
    with pytest.raises(TypeError, match="has no memory"):
        ema.update()
    assert ema.step == 0


# --- names --------------------------------------------------------------------------------------------------


def test_names_are_those_of_the_plain_model(torch, tmp_path):
    """huggingface/pytorch-image-models#2003, sming256/OpenTAD#44"""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    def plain():
        return torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))

    names = list(plain().state_dict())
    within = torch.nn.Sequential(
        torch.compile(torch.nn.Linear(3, 2), backend="eager"), torch.nn.BatchNorm1d(2)
    )
    for wrapped in (
        torch.compile(plain(), backend="eager"),
        torch.nn.DataParallel(plain()),
        checkpoint_wrapper(plain()),
        torch.compile(checkpoint_wrapper(plain()), backend="eager"),
        within,
    ):
        ema = fastema.EMA(wrapped, 0.5)
        assert set(ema.averages) == set(names)
        plain().load_state_dict(ema.averages)
        ema.save(tmp_path / "averages.safetensors")
        fastema.EMA.load(tmp_path / "averages.safetensors", plain())
    module = plain()
    ema = fastema.EMA(module, 0.5)
    ema.update(torch.compile(module, backend="eager"))


def test_tied_weights_have_all_their_names_and_one_average(torch):
    """huggingface/transformers#38870"""
    module = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False))
    module[1].weight = module[0].weight
    ema = fastema.EMA(module, 0.5)
    assert list(ema.averages) == ["0.weight", "1.weight"]
    assert list(ema.state_dict()["averages"][0]) == ["0.weight"]
    module.load_state_dict(ema.averages)


def test_a_models_state_dict_is_its_own(torch):
    """huggingface/transformers#38870: tied weights, extra state, hooks that rename"""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(2, 2, dtype=torch.bfloat16)
            self.tied = torch.nn.Linear(2, 2, dtype=torch.bfloat16)
            self.tied.weight = self.inner.weight
            self.register_buffer("table", torch.ones(2), persistent=False)
            self.register_state_dict_post_hook(
                lambda _, state, prefix, *_rest: state.update(
                    {prefix + "new": state.pop(prefix + "inner.bias")}
                )
            )
            self.register_load_state_dict_pre_hook(
                lambda _, state, prefix, *_rest: state.update(
                    {prefix + "inner.bias": state.pop(prefix + "new")}
                )
            )

        def get_extra_state(self):
            return {"k": 7}

        def set_extra_state(self, state):
            assert state == {"k": 7}

    model = Model()
    ema = fastema.EMA(model, 0.5)
    filled(torch, model, 3.0)
    ema.update()
    state = ema.model_state_dict()
    assert state.keys() == model.state_dict().keys()
    with ema.swapped():
        for name, x in model.state_dict().items():
            assert name.endswith("_extra_state") or torch.equal(x, state[name])
    assert (model.inner.weight == 3).all()
    other = Model()
    other.load_state_dict(state)
    with ema.swapped():
        assert torch.equal(other.inner.weight, model.inner.weight)


def test_a_state_is_loaded_by_torchs_default(torch, tmp_path):
    """huggingface/accelerate#3539"""
    module = torch.nn.Linear(2, 2, dtype=torch.bfloat16)
    ema = fastema.EMA(module, 0.5, dtype="bfloat16", rounding="stochastic")
    filled(torch, module, 1.0)
    ema.update()
    torch.save({"model": module.state_dict(), "ema": ema.state_dict()}, tmp_path / "checkpoint.pt")
    state = torch.load(tmp_path / "checkpoint.pt")
    other = fastema.EMA(
        torch.nn.Linear(2, 2, dtype=torch.bfloat16), 0.5, dtype="bfloat16", rounding="stochastic"
    )
    other.load_state_dict(state["ema"])
    assert all(torch.equal(x, other.averages[name]) for name, x in ema.averages.items())
    assert other.step == 1


# --- which values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "only",
    ["*lora*", ["*lora*"], lambda _, value: value.requires_grad],
    ids=["pattern", "patterns", "function"],
)
def test_only_what_is_chosen_is_kept_swapped_and_saved(torch, only, tmp_path):
    """mosaicml/composer#1941"""
    module = torch.nn.ModuleDict({"base": torch.nn.Linear(2, 2), "lora": torch.nn.Linear(2, 2)})
    module.base.requires_grad_(False)
    ema = fastema.EMA(module, 0.5, only=only)
    assert ema.averages.keys() == {"lora.weight", "lora.bias"}
    filled(torch, module, 1.0)
    base = module.base.weight.data_ptr()
    ema.update(module)
    ema.save(tmp_path / "lora.safetensors")
    assert {"lora.weight", "lora.bias"} == {
        name
        for name in fastema.checkpoint.File(tmp_path / "lora.safetensors")
        if not name.startswith("fastema.")
    }
    with ema.swapped():
        assert (module.base.weight == 1).all()
    assert module.base.weight.data_ptr() == base
    module.load_state_dict(ema.model_state_dict())


def test_only_must_choose_something():
    weights = {"a": np.zeros(2), "b": np.zeros(2)}
    with pytest.raises(ValueError, match="'c' names none of"):
        fastema.EMA(weights, only=["a", "c"])
    with pytest.raises(ValueError, match="leaves out all"):
        fastema.EMA(weights, only=lambda *_: False)
    with pytest.raises(TypeError, match="only must be a function"):
        fastema.EMA(weights, only=[1])
    ema = fastema.EMA([np.zeros(2), np.ones(2)], 0.5, only="1")
    assert ema.averages[0] is None


@pytest.mark.parametrize(
    "nothing", [[], {}, (), iter([]), {"a": None}], ids=["list", "dictionary", "tuple", "iterator", "None"]
)
def test_nothing_to_average_is_refused(nothing):
    with pytest.raises(ValueError, match="must hold an array"):
        fastema.EMA(nothing)


def test_an_empty_module_is_refused(torch):
    parameters = torch.nn.Linear(2, 2).parameters()
    list(parameters)
    for nothing in (torch.nn.ReLU(), parameters):
        with pytest.raises(ValueError, match="must hold an array"):
            fastema.EMA(nothing)


# --- odd values ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.complex64, np.complex128])
@pytest.mark.parametrize("order", "CF")
@pytest.mark.parametrize("options", [{}, {"initial": "zeros"}, {"rounding": "compensated"}], ids=str)
def test_complex_numbers_are_averaged_by_their_parts(dtype, order, options, rng):
    if dtype == np.complex128 and "rounding" in options:
        pytest.skip("float64 averages have no carries")

    def numbers():
        return np.asarray(rng.standard_normal((3, 4)) + 1j * rng.standard_normal((3, 4)), dtype, order=order)

    weights, seen = {"w": numbers()}, []
    ema = fastema.EMA(weights, 0.5, **options)
    seen.append(weights["w"].copy())
    for _ in range(3):
        weights["w"][:] = numbers()
        seen.append(weights["w"].copy())
        ema.update()
    parts = []
    for part in ("real", "imag"):
        real = {"w": np.asarray(getattr(seen[0], part).copy(order=order))}
        by_part = fastema.EMA(real, 0.5, **options)
        for step in seen[1:]:
            real["w"][:] = getattr(step, part)
            by_part.update()
        parts.append(by_part.averages["w"])
    assert ema.averages["w"].dtype == dtype
    assert (ema.averages["w"].real == parts[0]).all()
    assert (ema.averages["w"].imag == parts[1]).all()
    with ema.swapped():
        assert (weights["w"].real == parts[0]).all()
    assert (weights["w"] == seen[-1]).all()
    again = fastema.EMA({"w": numbers()}, 0.5, **options)
    again.load_state_dict(ema.state_dict())
    assert (again.averages["w"] == ema.averages["w"]).all()


def test_complex_parameters_of_torch_and_jax(torch, jax):
    module = torch.nn.Module()
    module.w = torch.nn.Parameter(torch.zeros(2, dtype=torch.cfloat))
    module.register_buffer("freqs", torch.polar(torch.ones(3), torch.arange(3.0)))
    ema = fastema.EMA(module, 0.5)
    with torch.no_grad():
        module.w.fill_(2 + 4j)
    ema.update()
    assert torch.equal(ema.averages["w"], torch.full((2,), 1 + 2j))
    assert torch.equal(ema.averages["freqs"], module.freqs)
    tree = {"w": jax.numpy.zeros(2, jax.numpy.complex64)}
    ema = fastema.EMA(tree, 0.5)
    ema.update({"w": tree["w"] + (2 + 4j)})
    assert (np.asarray(ema.averages["w"]) == 1 + 2j).all()


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "int4", "uint16"])
def test_types_that_no_one_averages_are_copied(dtype):
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    weights = {"w": np.zeros(2, np.float32), "q": np.ones(3).astype(kind)}
    ema = fastema.EMA(weights, 0.5)
    weights["q"][:] = np.array([2, 0, 1]).astype(kind)
    ema.update()
    assert ema.averages["q"].tobytes() == weights["q"].tobytes()
    weights["q"][:] = np.ones(3).astype(kind)
    with ema.swapped():
        assert weights["q"].astype(float).tolist() == [2, 0, 1]
    assert weights["q"].astype(float).tolist() == [1, 1, 1]


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_odd_tensors_are_copied_or_carried_along(torch):
    odd = {
        "float8": torch.ones(3).to(torch.float8_e4m3fn),
        "sparse": torch.eye(3).to_sparse(),
        "expanded": torch.ones(1, 3).expand(4, 3),
        "holes": torch.arange(8.0)[::2],
        "conjugated": torch.ones(2, dtype=torch.cfloat).conj(),
        "negated": torch.ones(2, dtype=torch.cfloat).conj().imag,
        "quantised": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    }
    for name, buffer in odd.items():
        module = filled(torch, torch.nn.Linear(2, 2), 0.0)
        module.register_buffer(name, buffer)
        ema = fastema.EMA(module, 0.5)
        filled(torch, module, 1.0)
        ema.update()
        assert (ema.averages["weight"] == 0.5).all()
        shown, real = ema.averages[name], buffer
        if name in ("sparse", "quantised", "float8"):
            shown, real = (x.to(torch.float32) if name == "float8" else x for x in (shown, real))
            shown, real = (x.dequantize() if x.is_quantized else x.to_dense() for x in (shown, real))
        assert torch.equal(shown, real), name
        with ema.swapped():
            pass
        ema.state_dict()


def test_what_cannot_be_averaged_and_needs_a_gradient_is_refused_with_the_cure(torch):
    weight = torch.nn.Parameter(torch.eye(3).to_sparse())
    with pytest.raises(TypeError, match=r"values\['w'\] must be a plain tensor.*only="):
        fastema.EMA({"w": weight, "b": torch.zeros(2)})


def test_parameters_that_others_keep_in_pieces_are_refused_by_name(torch):
    """microsoft/DeepSpeed#6987"""
    parameter = torch.nn.Parameter(torch.empty(0))
    parameter.ds_id, parameter.ds_shape = 0, torch.Size([4])
    with pytest.raises(TypeError, match=r"values\['0'\] must be whole.*DeepSpeed's ZeRO-3"):
        fastema.EMA([parameter])
    flat = torch.nn.Parameter(torch.ones(2))
    flat._fsdp_flattened = True
    with pytest.raises(TypeError, match=r"values\['0'\].*FullyShardedDataParallel.*fully_shard"):
        fastema.EMA([flat])


# --- copies of weights that outlive a swap ------------------------------------------------------------------


def test_autocasts_copies_do_not_outlive_a_swap(torch):
    module = filled(torch, torch.nn.Linear(2, 1, bias=False), 1.0)
    ema = fastema.EMA(module, 0.0)
    filled(torch, module, 3.0)
    x = torch.ones(1, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(x).item() == 6
        with ema.swapped():
            assert module(x).item() == 2
        assert module(x).item() == 6


# --- trees --------------------------------------------------------------------------------------------------


def test_trees_come_back_as_they_are(jax):
    """patrick-kidger/equinox#110"""
    from collections import OrderedDict, defaultdict

    jnp = jax.numpy
    trees = [
        OrderedDict(b=jnp.ones(2), a=jnp.zeros(1)),
        defaultdict(list, a=jnp.ones(2)),
        (jnp.ones(2), [jnp.zeros(1)]),
    ]
    try:
        import optax
        from flax.core import FrozenDict
        from flax.training.train_state import TrainState

        trees.append(FrozenDict({"layer": {"kernel": jnp.ones(2)}}))
        trees.append(
            TrainState.create(apply_fn=max, params={"w": jnp.ones(2)}, tx=optax.adam(1e-3)).replace(step=3)
        )
    except ImportError:
        pass
    for tree in trees:
        ema = fastema.EMA(tree, 0.5)
        ema.update(tree)
        averages = ema.averages
        assert type(averages) is type(tree)
        assert jax.tree.structure(averages) == jax.tree.structure(tree)
        if isinstance(tree, dict):
            assert list(averages) == list(tree)


def test_modules_of_equinox(jax):
    """patrick-kidger/equinox#110"""
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0))
    ema = fastema.EMA(model, 0.5)
    ema.update(jax.tree.map(lambda x: x + 1 if eqx.is_array(x) else x, model))
    average = ema.averages
    assert isinstance(average, eqx.nn.MLP)
    np.testing.assert_allclose(average.layers[0].weight, model.layers[0].weight + 0.5, rtol=1e-6)
    assert average(jax.numpy.ones(2)).shape == (1,)


def test_what_is_no_array_in_a_tree_is_carried_along(jax):
    tree = {
        "w": jax.numpy.zeros(2),
        "key": jax.random.key(0),
        "lr": 0.5,
        "n": 3,
        "flag": True,
        "x": np.float32(1),
    }
    ema = fastema.EMA(tree, 0.5)
    ema.update({**tree, "w": tree["w"] + 2, "key": jax.random.key(1), "lr": 0.25})
    averages = ema.averages
    assert (np.asarray(averages["w"]) == 1).all()
    assert averages["lr"] == 0.25
    assert (jax.random.key_data(averages["key"]) == jax.random.key_data(jax.random.key(1))).all()
    assert (averages["n"], averages["flag"]) == (3, True)


def test_fields_of_a_tree_that_change_places_are_told_by_their_names(jax):
    from dataclasses import dataclass

    @jax.tree_util.register_dataclass
    @dataclass
    class Model:
        a: object
        b: object

    model = Model(jax.numpy.zeros(2), jax.numpy.ones(2))
    assert list(fastema.EMA(model, 0.5).state_dict()["averages"][0]) == ["a", "b"]

"""Files that nobody should have written: mutations of safetensors files, and what reads of them must give."""

import functools
import json
import math
import operator
import os
import re
import stat

import ml_dtypes
import numpy as np
import safetensors

import golden
import oracle
from fastema import EMA, checkpoint

GOLDEN = golden.FOLDER / "0.1.0"
SAVED = {name: (GOLDEN / f"{name}.safetensors").read_bytes() for name in golden.EMAS}
SHARDS = [(GOLDEN / f"shards-0000{k}-of-00004.safetensors").read_bytes() for k in (1, 2, 3, 4)]
TYPES = {
    **{f"{kind}{8 * size}": np.dtype(f"{kind.lower()}{size}") for kind in "IU" for size in (1, 2, 4, 8)},
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "C64": np.complex64,
    "BOOL": np.bool_,
}
DEEP = "[" * 100_000

# JSON as text, for not all of it can be made by Python's json
VALUES = [
    *map(json.dumps, [None, True, False, 0, 1, -1, 2, 7, 0.5, -0.5, 1.5, 1e308, "", "x", "victim.txt"]),
    *map(json.dumps, [2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63), 10**400, 1e-320]),
    *map(json.dumps, ["/etc/passwd", "../victim.txt", "\0", "é" * 500, "float16", "bfloat16", "compensated"]),
    *map(json.dumps, [[], {}, [[]], [None], [1, 2], [0.5] * 3, [1] * 100, {"a": 1}, [[0]], ["kernel"]]),
    *["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, DEEP, '{"a":1,"a":2}', '"\\ud800"', "[1e400]"],
    *map(json.dumps, [{"schedule": x} for x in ("over", "compound", "Schedule", "power", "__all__", "", 3)]),
    json.dumps({"schedule": "constant", "decay": 0.5, "memory": "victim.txt"}),
    json.dumps({"schedule": "constant", "decay": True}),
    json.dumps({"schedule": "dynamic", "decay": 0.5, "start_step": 10**400}),
    json.dumps({"schedule": "dynamic", "decay": "victim.txt"}),
    json.dumps({"schedule": "warmup", "decay": 0.5, "gamma": -1}),
    '{"schedule":"power","sigma_rel":NaN}',
    json.dumps({"schedule": "compound", "decay": 0.5, "updates": 10**9}),
]


def weights_of(name):
    """Return weights that a golden file of this name has averages of."""
    options = golden.SHARDED if name == "shards" else golden.EMAS[name]
    return {key: golden.weights_at(0)[key] for key in golden.averageable(options)}


def parts_of(whole):
    """Return the header and the body of a file's bytes."""
    length = int.from_bytes(whole[:8], "little")
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


def file_of(header, body):
    """Return a file's bytes; the header may be an object or a text."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + body


def places_in(tree, path=()):
    """Yield the path of each value in JSON."""
    yield path
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in pairs:
        yield from places_in(value, (*path, key))


def value_at(tree, path):
    """Return the value of a path in JSON."""
    return functools.reduce(operator.getitem, path, tree)


def replaced(tree, path, text):
    """Return JSON as text, with another text in the place of a value."""
    mark = "\x01here\x01"

    def put(tree, path):
        if not path:
            return mark
        copy = dict(tree) if isinstance(tree, dict) else list(tree)
        copy[path[0]] = put(copy[path[0]], path[1:])
        return copy

    return json.dumps(put(tree, path)).replace(json.dumps(mark), text)


def with_metadata(whole, key, text):
    """Return a file's bytes with another text in its metadata."""
    header, body = parts_of(whole)
    header["__metadata__"] = {**header["__metadata__"], key: text}
    return file_of(header, body)


def with_other_bytes(whole, rng):
    """Return a file's bytes after damage to any of them."""
    data, kind = bytearray(whole), rng.randrange(7)
    begin = 8 + int.from_bytes(whole[:8], "little")  # of the body
    if kind == 0:  # bits, anywhere
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 1:  # bits of the arrays
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(begin, len(data))] ^= 1 << rng.randrange(8)
    elif kind == 2:  # bytes of the header
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(8, begin)] = rng.choice(b'0123456789{}[],:"\\ aeE.-tfn\0\xff')
    elif kind == 3:  # its length
        length = rng.choice([0, 1, begin - 9, begin - 7, len(data), 2**31, 2**63, 2**64 - 1])
        data[:8] = length.to_bytes(8, "little")
    elif kind == 4:
        del data[rng.randrange(len(data)) :]
    elif kind == 5:
        data += rng.randbytes(rng.randint(1, 100))
    else:  # a piece of the header, twice or nowhere
        first, last = sorted(rng.randrange(begin) for _ in range(2))
        data[first:last] = data[first:last] * rng.choice([0, 2])
    return bytes(data)


def with_other_json(whole, rng):
    """Return a file's bytes with another value, or another name of a tensor, somewhere in its JSON."""
    header, body = parts_of(whole)
    kind = rng.randrange(5)
    if kind == 0:
        return file_of(replaced(header, rng.choice(list(places_in(header))), rng.choice(VALUES)), body)
    if kind == 1:
        names = [name for name in header if name != "__metadata__"]
        group = rng.choice(["averages", "kept", "carries", "values", "other"])
        k = rng.choice(["0", "1", "2", "-1", "00", "99999999999", "\u0663", ""])
        special = ["__metadata__", f"fastema.{group}.{k}.{rng.choice(names)}", "fastema.kept.x"]
        old, new = (json.dumps(rng.choice(each)) for each in (names, names + special))
        return file_of(json.dumps(header).replace(f"{old}: {{", f"{new}: {{"), body)
    key = rng.choice([key for key in header["__metadata__"] if key != "format"])
    tree = json.loads(header["__metadata__"][key])
    if kind == 2:  # what it may have
        tree[rng.choice(["clock", "averaged", "save", "rounded", "set", "shapes"])] = rng.choice(
            [0, 1.5, "x"]
        )
    if kind == 3:  # a small number, as blocks and counts have
        numbers = [place for place in places_in(tree) if type(value_at(tree, place)) is int]
        return with_metadata(whole, key, replaced(tree, rng.choice(numbers), str(rng.randrange(4))))
    return with_metadata(whole, key, replaced(tree, rng.choice(list(places_in(tree))), rng.choice(VALUES)))


def with_other_tensor(whole, rng):
    """Return a whole file with another tensor: of another type or shape, once more, or not there."""
    header, body = parts_of(whole)
    pieces = {name: body[slice(*x["data_offsets"])] for name, x in header.items() if name != "__metadata__"}
    name = rng.choice(list(pieces))
    entry, kind = dict(header[name]), rng.randrange(4)
    if kind == 0:
        del header[name], pieces[name]
        return laid_out(header, pieces)
    if kind == 1:
        entry["shape"] = [rng.randrange(4) for _ in range(rng.randrange(4))]
    else:
        entry["dtype"] = rng.choice(list(TYPES))
    if kind == 3:
        name += rng.choice("x./")
    size = math.prod(entry["shape"]) * np.dtype(TYPES[entry["dtype"]]).itemsize
    if size > len(whole) + 1000:
        raise ValueError("what was mutated already may be of any size")
    header[name], pieces[name] = entry, pieces.get(name, body)[:size].ljust(size, b"\0")
    return laid_out(header, pieces)


def laid_out(header, pieces):
    """Return a file's bytes: a header with the bytes of its tensors, which are put one behind the other."""
    end, header = 0, dict(header)
    for name, piece in pieces.items():
        header[name] = {**header[name], "data_offsets": [end, end + len(piece)]}
        end += len(piece)
    return file_of(header, b"".join(pieces.values()))


def mutated(whole, rng):
    """Return a file's bytes with a mutation of any kind, chosen by a `random.Random`."""
    return rng.choice([with_other_bytes, with_other_json, with_other_tensor])(whole, rng)


def attempt(call):
    """Return what a call returns, and None; or None and the error that a file may be the reason of."""
    try:
        return call(), None
    except (ValueError, OSError, TypeError) as error:
        return None, error


def watched(folder):
    """Return all that can be told of what is in a folder."""
    found = {}
    for place, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(place, name)
            status = os.lstat(path)
            with open(path, "rb") as file:
                contents = file.read() if stat.S_ISREG(status.st_mode) else b""
            found[path] = (status.st_ino, status.st_mode, status.st_mtime_ns, contents)
    return found


# --- what the package safetensors reads -------------------------------------------------------------------


def tensors_of(whole):
    """Return name -> (type, shape, bytes) of a file's bytes, as the package safetensors reads them."""
    return {
        name: (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
        for name, entry in safetensors.deserialize(whole)
    }


def state_in(files):
    """Return the state in files as `EMA.state_dict` has it, without its config, put together from blocks."""
    wholes, blocks, copied = {}, {}, set()
    for whole in files:
        header, _ = parts_of(whole)
        texts = header["__metadata__"]
        state = json.loads(texts["fastema"])
        copied |= set(state["copied"])
        begins = json.loads(texts["DCP_SHARDING_INFO"]) if "set" in state else None
        for tensor, (code, shape, data) in tensors_of(whole).items():
            array = np.frombuffer(data, TYPES[code]).reshape(shape)
            if begins is None:
                wholes[tensor] = array
                continue
            value = tensor.split(".", 3)[-1] if tensor.startswith("fastema.") else tensor
            into = wholes.setdefault(tensor, np.zeros(state["shapes"][value], TYPES[code]))
            offsets = begins[tensor]["saved_offsets"]
            block = tuple((a, a + n) for a, n in zip(offsets, shape, strict=True))
            into[tuple(slice(*span) for span in block)] = array
            blocks.setdefault(tensor, set()).add(block)  # those of replicas are alike
    for tensor, own in blocks.items():
        filled = np.zeros(wholes[tensor].shape, int)
        for block in own:
            filled[tuple(slice(*span) for span in block)] += 1
        assert (filled == 1).all(), f"the blocks of {tensor} leave gaps or overlap"

    def group(name, k):
        prefix = f"fastema.{name}.{k}."
        return {tensor.removeprefix(prefix): x for tensor, x in wholes.items() if tensor.startswith(prefix)}

    plain = {name: x for name, x in wholes.items() if not name.startswith("fastema.")}
    shown = {name: x for name, x in plain.items() if name not in copied}
    decays, step = range(len(state["products"])), state["step"]
    return {
        "clock": state.get("clock", step),
        "averaged": state["averaged"] if "clock" in state else step - step % state["config"]["every"],
        **{key: state[key] for key in ("step", "products", "swapped")},
        "decay": state["decay"] or None,
        "averages": [group("kept", k) or (group("averages", k) if k else shown) for k in decays],
        "carries": [group("carries", k) for k in decays if state["config"]["rounding"] == "compensated"],
        "copied": {name: plain[name] for name in copied},
        "values": group("values", 0),
    }


def same(ours, theirs):
    """Tell whether dictionaries of arrays have the same names, types, shapes and bits."""
    return ours.keys() == theirs.keys() and all(
        a.dtype == theirs[name].dtype
        and a.shape == theirs[name].shape
        and a.tobytes() == theirs[name].tobytes()
        for name, a in ours.items()
    )


def many(count):
    """Return the bytes of a file with so many tensors, made quickly."""
    entries = ",".join(
        f'"t{i}":{{"dtype":"F32","shape":[1],"data_offsets":[{4 * i},{4 * i + 4}]}}' for i in range(count)
    )
    return file_of("{" + entries + "}", bytes(4 * count))


# --- what reading must give ---------------------------------------------------------------------------------


def read(folder, files, weights, *, numbered=False):
    """Load an EMA from the bytes of files; return it, or None where it was refused as it should be.

    All is looked at: what was raised, what it says, that the weights and all files are as they were, and that
    what was loaded are the bits that the package safetensors finds. Files of a set are numbered, a single one
    if that is asked for; then the name of the first is given, and else that of the set.
    """
    given = folder / "ema.safetensors"
    paths = [folder / f"ema-0000{k}-of-0000{len(files)}.safetensors" for k in range(1, len(files) + 1)]
    if numbered:
        given = paths[0]
    elif len(files) == 1:
        paths = [given]
    for path, data in zip(paths, files, strict=True):
        path.write_bytes(data)
    before, values = watched(folder), {name: x.copy() for name, x in weights.items()}
    ema, error = attempt(lambda: EMA.load(given, weights))
    assert watched(folder) == before
    if ema is None:
        assert str(folder / "ema") in str(error), repr(error)
        assert len(str(error)) < 5000
        # a type that differs from the value's is a TypeError in a state, too
        fits_not = re.search("does not fit: .* must .*got ", str(error), re.DOTALL)
        assert fits_not or not isinstance(error, TypeError), repr(error)
        assert same(weights, values)
        return None
    state, theirs = ema.state_dict(), state_in(files)
    for key in ("averages", "carries"):
        assert all(same(a, b) for a, b in zip(state[key], theirs[key], strict=True)), key
    for key in ("copied", "values"):
        assert same(state[key], theirs[key]), key
    for key in ("step", "decay", "products", "swapped"):
        assert state[key] == theirs[key], key
    for key in ("clock", "averaged"):
        assert state.get(key, theirs[key]) == theirs[key], key
    return ema


def check_alone(folder, data):
    """Read a file's tensors: they are those that the package safetensors finds, or there is an error."""
    path = folder / "alone.safetensors"
    path.write_bytes(data)
    file, error = attempt(lambda: checkpoint.File(path))
    path.unlink()
    if file is None:
        assert isinstance(error, ValueError), repr(error)
        assert str(path) in str(error), repr(error)
        return
    theirs = tensors_of(data)
    assert {name: (x.shape, x.tobytes()) for name, x in file.items()} == {
        name: entry[1:] for name, entry in theirs.items()
    }


def check_mean(folder, files):
    """Average files; return whether their mean was written.

    It has their tensors and the bits that NumPy finds, or there is an error and no file.
    """
    paths, output = [folder / f"{k}.safetensors" for k in range(len(files))], folder / "mean.safetensors"
    for path, data in zip(paths, files, strict=True):
        path.write_bytes(data)
    before = watched(folder)
    taken, error = attempt(lambda: checkpoint.average(paths, output))
    if taken is None:
        assert not isinstance(error, TypeError), repr(error)
        assert any(str(path) in str(error) for path in paths), repr(error)
        assert len(str(error)) < 5000
    else:
        theirs = [tensors_of(data) for data in files]
        written = tensors_of(output.read_bytes())
        assert written.keys() == {name for name in theirs[0] if not name.startswith("fastema.")}
        for name, (code, shape, data) in written.items():
            assert all(each[name][:2] == (code, shape) for each in theirs)
            mean = _mean(code, [each[name][2] for each in theirs])
            assert mean is None or oracle.same_bits(np.frombuffer(data, mean.dtype), mean), name
        output.unlink()
    assert watched(folder) == before
    for path in paths:
        path.unlink()
    return taken is not None


def _mean(code, contents):
    """Return the mean of tensors of one type, of bytes; None where NumPy alone does not round it once."""
    if code in ("F32", "F64"):
        with np.errstate(all="ignore"):
            arrays = [np.frombuffer(data, TYPES[code]).astype(np.float64) for data in contents]
            return (functools.reduce(np.add, arrays) / len(arrays)).astype(TYPES[code])
    if code == "BOOL" or code[0] in "IU" or (len(contents) == 1 and code == "BF16"):
        return np.frombuffer(contents[-1], TYPES[code])
    return None

"""Inputs of the fuzzer: what one says, what must hold of it, and how it is changed.

An input is a kind, in one byte, and a file. Where the kind is of two files, the first of them comes first,
behind two bytes with its length. A kind is a golden file's name, whose weights then are those that the file
is to fit; ``own`` has the weights that the file itself names, ``mean`` averages two files, ``member`` gives a
set by the name of its first file, which is the only one where the second is empty.
"""

import hashlib
import json
import random
from functools import cache
from pathlib import Path

import numpy as np
import safetensors

import golden
import hostile

CORPUS = Path(__file__).parents[1] / "data" / "corpus"
KINDS = [*golden.EMAS, "shards", "own", "mean", "member"]
PAIRS = ("shards", "mean", "member")
NAMES = ("kernel", "half", "steps")  # of golden weights: few, so that inputs are short
WEIGHTS = {
    name: {key: x for key, x in hostile.weights_of(name).items() if key in NAMES} for name in golden.EMAS
}
WEIGHTS["shards"] = {**WEIGHTS["plain"], "kernel": WEIGHTS["plain"]["kernel"][:2].copy()}
WEIGHTS["member"] = WEIGHTS["shards"]


def files_of(data):
    """Return the kind of an input, and its files."""
    kind, rest = KINDS[data[0] % len(KINDS)] if data else KINDS[0], data[1:]
    if kind not in PAIRS:
        return kind, [rest]
    end = 2 + int.from_bytes(rest[:2], "little")
    files = [rest[2:end], rest[end:]]
    return kind, files if files[1] or kind != "member" else files[:1]


def input_of(kind, files):
    """Return an input; the first of two files has at most 65,535 bytes."""
    length = len(files[0]).to_bytes(2, "little") if kind in PAIRS else b""
    return bytes([KINDS.index(kind)]) + length + b"".join(files)


def check(data, folder):
    """Read an input's files as its kind says; return whether its EMA was loaded or its mean written."""
    kind, files = files_of(data)
    if kind == "mean":
        return hostile.check_mean(folder, files)
    if kind == "own":
        hostile.check_alone(folder, files[0])
    weights = {name: x.copy() for name, x in WEIGHTS[kind].items()} if kind in WEIGHTS else own(files[0])
    try:
        return hostile.read(folder, files, weights, numbered=kind == "member") is not None
    finally:
        for path in folder.glob("ema*"):
            path.unlink()


def own(whole):
    """Return weights of the names, types and shapes that a file has itself; none where it has not."""
    kept = "fastema.values.0."  # weights, in whose place averages were: of types of their own
    try:
        tensors = {
            name: np.zeros(shape, hostile.TYPES[code])
            for name, (code, shape, _) in hostile.tensors_of(whole).items()
            if code in hostile.TYPES
        }
    except (safetensors.SafetensorError, ValueError):  # also of a shape that NumPy does not take
        return {}
    return {
        name: tensors.get(kept + name, x) for name, x in tensors.items() if not name.startswith("fastema.")
    }


# --- what a fuzzer begins with ----------------------------------------------------------------------------


@cache
def seeds():
    """Return inputs of each kind, of the golden files' first few values, that are all taken."""
    single = {name: _shortened(whole) for name, whole in hostile.SAVED.items()}
    first, second = (_shortened(whole, number) for number, whole in enumerate(hostile.SHARDS[:2], 1))
    return [
        *(input_of(name, [whole]) for name, whole in single.items()),
        *(input_of("own", [whole]) for whole in single.values()),
        *(input_of("mean", [whole, whole]) for whole in single.values()),
        input_of("shards", [first, second]),
        input_of("member", [first, second]),
    ]


def _shortened(whole, number=None):
    """Return a golden file without most of its values, with a clock; one of a set of four as one of two."""
    header, body = hostile.parts_of(whole)
    texts = header["__metadata__"]
    state = json.loads(texts["fastema"])
    state |= {"clock": 5.5, "averaged": 4.0}
    state["copied"] = [name for name in state["copied"] if name in NAMES]
    if number is not None:
        state |= {"set": [number, 2], "shapes": {k: n for k, n in state["shapes"].items() if k in NAMES}}
        state["shapes"]["kernel"] = [2, 2]
        places = json.loads(texts["DCP_SHARDING_INFO"])
        texts["DCP_SHARDING_INFO"] = json.dumps(
            {name: x for name, x in places.items() if name.split(".")[-1] in NAMES}
        )
    texts["fastema"] = json.dumps(state)
    entries = {name: x for name, x in header.items() if name.split(".")[-1] in (*NAMES, "__metadata__")}
    pieces = {
        name: body[slice(*entry["data_offsets"])] for name, entry in entries.items() if name != "__metadata__"
    }
    return hostile.laid_out(entries, pieces)


# --- how it is changed ------------------------------------------------------------------------------------


def mutated(data, longest, seed, with_other_bytes):
    """Return another input, no longer than so many bytes.

    Most are files but for one thing, so that readers get further than to the first byte that is wrong.

    Args:
        data: An input.
        longest: Its most bytes.
        seed: Decides what is changed.
        with_other_bytes: What the fuzzer makes of bytes itself: from them and their most bytes.
    """
    rng = random.Random(seed)
    if rng.random() < 0.2:  # what is broken already is seldom refused for anything else
        data = rng.choice(seeds())
    kind, files = files_of(data)
    if rng.random() < 0.05:
        return with_other_bytes(data, longest)
    if rng.random() < 0.05:
        kind = rng.choice(KINDS)
        files = (files * 2)[: 2 if kind in PAIRS else 1]
    which = rng.randrange(len(files))
    change = rng.choice([_with_other_header, _with_other_text, _with_other_body, _with_hostile])
    try:
        files[which] = change(files[which], rng, with_other_bytes)
    except (AttributeError, IndexError, KeyError, OverflowError, RecursionError, TypeError, ValueError):
        # it is no file to begin with
        files[which] = with_other_bytes(files[which], longest)
    if 3 + sum(map(len, files)) > min(longest, 65535):
        return with_other_bytes(data, longest)
    return input_of(kind, files)


def _end_of_header(whole):
    end = 8 + int.from_bytes(whole[:8], "little")
    if end > len(whole):
        raise ValueError
    return end


def _with_other_header(whole, _, with_other_bytes):
    end = _end_of_header(whole)
    header = with_other_bytes(whole[8:end], end + 64)
    return len(header).to_bytes(8, "little") + header + whole[end:]


def _with_other_text(whole, rng, with_other_bytes):
    texts = hostile.parts_of(whole)[0]["__metadata__"]
    key = rng.choice(sorted(texts))
    text = with_other_bytes(texts[key].encode(), len(texts[key]) + 64)
    return hostile.with_metadata(whole, key, text.decode(errors="replace"))


def _with_other_body(whole, _, with_other_bytes):
    end = _end_of_header(whole)
    body = with_other_bytes(whole[end:], len(whole) - end)
    return whole[:end] + body.ljust(len(whole) - end, b"\0")


def _with_hostile(whole, rng, _):
    return hostile.mutated(whole, rng)


def name_of(data):
    """Return the name of an input's file in the corpus, as libFuzzer gives it."""
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()

"""An interpreter of PTX: which bits the instructions give that NVRTC emitted for our kernels, without a GPU.

It knows the instructions found there, and takes any other for an error. A register is an array of 64-bit
words, one for each thread of the launch; of threads that went different ways, those furthest behind go on
first. Memory is the arrays that were handed over: what reaches outside of them is an error, and so is an
access that is not aligned.
"""

import re

import ml_dtypes
import numpy as np

_TOKEN = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
_COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "neu": np.not_equal,  # true of NaN
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_LETTER = {"b": "u", "u": "u", "s": "i", "f": "f"}  # of NumPy's types
_TWO = {
    "add": np.add,
    "sub": np.subtract,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}
_FLOAT = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
_ROUNDED = {"f16": np.float16, "f16x2": np.float16, "bf16x2": ml_dtypes.bfloat16}


class Memory:
    """Arrays, by their addresses."""

    def __init__(self, arrays):
        regions = [x.reshape(-1).view(np.uint8) for x in arrays if x.nbytes]
        self._regions = sorted(regions, key=lambda x: x.ctypes.data)
        self._starts = np.array([x.ctypes.data for x in self._regions], np.uint64)
        self._ends = np.array([x.ctypes.data + x.nbytes for x in self._regions], np.uint64)

    def _parts(self, addresses, width):
        """Yield each region that is met, with the bytes of it and whose they are."""
        if (addresses % np.uint64(width)).any():
            raise ValueError(f"an access of {width} bytes is not aligned")
        found = np.searchsorted(self._starts, addresses, "right") - 1
        if (found < 0).any() or (addresses + np.uint64(width) > self._ends[found]).any():
            raise ValueError(f"an access of {width} bytes reaches outside of the arrays")
        for region in np.unique(found):
            who = found == region
            first = (addresses[who] - self._starts[region]).astype(np.int64)
            yield self._regions[region], first[:, None] + np.arange(width), who

    def load(self, addresses, width):
        result = np.empty((len(addresses), width), np.uint8)
        for region, where, who in self._parts(addresses, width):
            result[who] = region[where]
        return result

    def store(self, addresses, contents):
        for region, where, who in self._parts(addresses, contents.shape[1]):
            region[where] = contents[who]


class Kernel:
    """One entry point of a PTX text."""

    def __init__(self, ptx, name):
        head, body = (
            re.search(rf"\.entry (\w*{name}\w*)\((.*?)\n\}}", ptx, re.DOTALL).group(2).split("\n{", 1)
        )
        sizes = re.findall(r"\.param\s+(?:\.align \d+ )?\.[ub](\d+) (\w+)(?:\[(\d+)\])?", head)
        self._parameters = {symbol: int(bits) // 8 * int(count or 1) for bits, symbol, count in sizes}
        self._code, self._labels = [], {}
        for raw in body.split("\n"):
            line = raw.split("//")[0].strip()
            if line.endswith(":"):
                self._labels[line[:-1]] = len(self._code)
            elif line not in ("", "{", "}") and not line.startswith((".reg", ".pragma")):
                guard, instruction = re.fullmatch(r"(?:@(\S+)\s+)?(.*);", line).groups()
                opcode, *rest = instruction.split(None, 1)
                self._code.append((guard, opcode.split("."), _TOKEN.findall("".join(rest))))

    def launch(self, blocks, threads, parameters, arrays):
        """Run all threads to their end; `parameters` are arrays of one element each."""
        memory = [np.frombuffer(x.tobytes(), np.uint8) for x in parameters]
        assert [x.nbytes for x in memory] == list(self._parameters.values())
        self._memory = Memory([*arrays, *memory])
        self._symbols = {s: x.ctypes.data for s, x in zip(self._parameters, memory, strict=True)}
        self._count = count = blocks * threads
        self._registers = {"%tid.x": np.arange(count) % threads, "%ctaid.x": np.arange(count) // threads}
        at = np.zeros(count, np.int64)  # the next instruction of each thread
        with np.errstate(all="ignore"):
            while (alive := at < len(self._code)).any():
                now = at[alive].min()
                self._who = who = np.flatnonzero(at == now)
                guard, opcode, operands = self._code[now]
                at[who] = now + 1
                if guard is not None:
                    truth = self._read(guard.strip("!"), "u64") != 0
                    self._who = who = who[truth != guard.startswith("!")]
                if opcode[0] == "bra":
                    at[who] = self._labels[operands[0]]
                elif opcode[0] == "ret":
                    at[who] = len(self._code)
                else:
                    self._execute(opcode, operands)

    # --- operands ---------------------------------------------------------------------------------

    def _read(self, operand, kind):
        """Return an operand for each of these threads, as an array of a type of PTX."""
        if operand in self._registers:
            words = self._registers[operand][self._who]
        elif operand in self._symbols:
            words = np.full(len(self._who), self._symbols[operand])
        elif operand[:2] in ("0f", "0d"):
            words = np.full(len(self._who), int(operand[2:], 16), np.uint64)
        else:
            words = np.full(len(self._who), int(operand, 0) & (2**64 - 1), np.uint64)
        letter, size = ("u", 1) if kind == "pred" else (_LETTER[kind[0]], int(kind[1:]) // 8)
        return words.astype(f"u{size}").view(f"{letter}{size}")

    def _write(self, operand, values):
        register = self._registers.setdefault(operand, np.zeros(self._count, np.uint64))
        register[self._who] = np.ascontiguousarray(values).view(f"u{values.itemsize}")

    # --- instructions -----------------------------------------------------------------------------

    def _execute(self, opcode, operands):  # noqa: PLR0912, PLR0915 - a list of instructions
        name, kind, marks = opcode[0], opcode[-1], opcode[1:-1]

        def read(i, as_kind=kind):
            return flushed(self._read(operands[i], as_kind), "ftz" in marks)

        def give(values):
            self._write(operands[0], flushed(values, "ftz" in marks))

        match name, *marks:
            case ("ld", *_) | ("st", *_):
                self._move(name, kind, operands)
            case ["cvta", "to", "global"]:
                give(read(1))
            case ["mov"] if operands[1].startswith("{"):
                parts = _TOKEN.findall(operands[1].strip("{}"))
                width = int(kind[1:]) // len(parts)
                words = [self._read(part, f"u{width}") for part in parts]
                give(np.stack(words, axis=1).view(f"u{int(kind[1:]) // 8}")[:, 0])
            case ["mov"] if operands[0].startswith("{"):
                parts = _TOKEN.findall(operands[0].strip("{}"))
                words = read(1)[:, None].view(f"u{int(kind[1:]) // 8 // len(parts)}")
                for i, part in enumerate(parts):
                    self._write(part, words[:, i])
            case ["mov"]:
                give(read(1))
            case ("add" | "sub" | "mul", "rn", *_) if kind[0] == "f":
                give(_FLOAT[name](read(1), read(2)))
            case ["add", "rz"] if kind == "f32":
                give(added_towards_zero(read(1), read(2)))
            case ["abs"] if kind == "f32":
                give(np.abs(read(1)))
            case ["fma", "rn"] if kind == "f32":  # in float64: near enough to be another number
                give((read(1).astype("f8") * read(2) + read(3)).astype("f4"))
            case ["add" | "sub" | "min" | "max" | "and" | "or" | "xor"] if kind[0] != "f":
                give(_TWO[name](read(1), read(2)))
            case ["mul", "lo"]:
                give(read(1) * read(2))
            case ["mad", "lo"]:
                give(read(1) * read(2) + read(3))
            case ["mul", "wide"] if kind == "u32":
                give(read(1).astype("u8") * read(2))
            case ["not"]:
                give(~read(1) & 1 if kind == "pred" else ~read(1))
            case ["neg"] if kind[0] == "s":
                give(-read(1))
            case ["shl" | "shr"]:
                width = int(kind[1:])
                most = width - (kind[0] == "s")  # all bits become zeros, or the sign
                shift = np.minimum(read(2, "u32"), most).astype(f"{_LETTER[kind[0]]}{width // 8}")
                shifted = read(1) << shift if name == "shl" else read(1) >> shift
                give(np.where(shift < width, shifted, 0).astype(shifted.dtype))
            case ["setp", comparison] if comparison in _COMPARE:
                give(_COMPARE[comparison](read(1), read(2)))
            case ["selp"]:
                give(np.where(read(3, "pred") != 0, read(1), read(2)))
            case ["bfi"] if kind == "b64":
                place, mask = int(operands[3]), np.uint64(2 ** int(operands[4]) - 1)
                cleared = read(2) & ~np.uint64(int(mask) << place)
                give(cleared | (read(1) & mask) << np.uint64(place))
            case ["prmt"] if kind == "b32" and not (read(3) & 0x8888).any():
                source = np.concatenate([read(i)[:, None].view("u1") for i in (1, 2)], axis=1)
                chosen = (read(3)[:, None] >> np.arange(0, 16, 4, dtype="u4") & 7).astype(np.int64)
                give(np.take_along_axis(source, chosen, axis=1).view("u4")[:, 0])
            case ["cvt", *_]:
                give(self._converted(marks, kind, read))
            case _:
                raise ValueError(f"unknown instruction: {'.'.join(opcode)} {operands}")

    def _converted(self, marks, source, read):  # noqa: PLR0911 - as above
        match [mark for mark in marks if mark != "ftz"]:
            case [to] if to[0] in "us" and source[0] in "us":
                return read(1).astype(f"{_LETTER[to[0]]}{int(to[1:]) // 8}")
            case ["f32"] if source == "f16":
                return read(1).astype("f4")
            case ["f64"] if source == "f32":
                return read(1).astype("f8")
            case ["rn", "f32"] if source in ("f64", "u32"):
                return read(1).astype("f4")
            case ["rn", "f16"] if source == "f32":
                return read(1).astype("f2")
            case ["rn", ("f16x2" | "bf16x2") as pair] if source == "f32":
                halves = [read(i).astype(_ROUNDED[pair]).view("u2") for i in (2, 1)]  # the first goes above
                return np.stack(halves, axis=1).view("u4")[:, 0]
            case ["rzi", "u32"] if source == "f32":
                return np.nan_to_num(read(1).astype("f8")).clip(0, 2**32 - 1).astype("u4")
            case _:
                raise ValueError(f"unknown conversion: {marks} {source}")

    def _move(self, name, kind, operands):
        address, words = operands if name == "st" else reversed(operands)
        base, _, offset = address.strip("[]").partition("+")
        addresses = self._read(base, "u64") + np.uint64(int(offset or 0))
        parts = _TOKEN.findall(words.strip("{}"))
        width = int(kind[1:]) // 8
        if name == "st":
            values = [self._read(part, kind) for part in parts]
            self._memory.store(addresses, np.stack(values, axis=1).view(np.uint8))
        else:
            loaded = self._memory.load(addresses, width * len(parts)).view(f"u{width}")
            for i, part in enumerate(parts):
                self._write(part, loaded[:, i])


def added_towards_zero(a, b):
    """Return sums of float32 numbers, of which one that does not fit is the next one to zero."""
    total = a.astype("f8") + b
    part = total - a
    error = (a - (total - part)) + (b - part)  # what rounding to float64 took, exactly
    nearest = total.astype("f4")
    beyond = (np.abs(nearest) > np.abs(total)) | ((nearest == total) & (error * total < 0))
    return np.where(beyond, np.nextafter(nearest, np.float32(0)), nearest)


def flushed(values, ftz):
    """Return float32 numbers with subnormal ones as zeros, where an instruction says so."""
    if not ftz or values.dtype != np.float32:
        return values
    subnormal = np.abs(values) < np.finfo(np.float32).tiny
    return np.where(subnormal, np.copysign(np.float32(0), values), values)

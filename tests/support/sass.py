"""What the kernels are on a device, counted without one: the loop over wide accesses, in its machine code.

    pip install nvidia-cuda-nvrtc nvidia-cuda-nvdisasm
    python tests/support/sass.py 80 90 100

For each kernel: instructions and, of these, arithmetic for an element; registers; blocks that fit on a
multiprocessor. Loops are counted as they stand, with both ways of a branch in them.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import nvrtc
from fastema.cuda import _source

ELEMENT = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
BLOCKS = 8  # of 256 threads: a multiprocessor has 2,048
CONTROL = "BRA|BSSY|BSYNC|EXIT|NOP|WARPSYNC|CALL|RET|YIELD|BREAK"
MEMORY = "LDG|STG|LDC|ULDC|LD|ST"


def kernels():
    """Yield what each kernel is called, its entry point; of a turn of its loop the elements and accesses."""
    for rounding, number in _source.ROUNDINGS.items():
        for (average, value), mix in _source.MIXES.items():
            if number == 1 and ELEMENT[average] != 2:
                continue
            if number == 2 and average not in ("float32", "bfloat16"):
                continue
            wide = 16 // max(ELEMENT[average], ELEMENT[value])
            name = f"{average} <- {value}, {rounding}"
            yield name, _source.update_name([mix], number), 2 * wide, 10 if number == 2 else 6
    yield "swap, words of 16 bytes", _source.SWAP, 2, 8


def disassembler():
    """Return the path of nvdisasm, of its package or of a CUDA toolkit."""
    found = [file for folder in sys.path for file in Path(folder).glob("nvidia/*/bin/nvdisasm")]
    return str(found[0]) if found else "nvdisasm"


def instructions(cubin):
    """Return the instructions of a cubin, and labels among them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [disassembler(), "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.findall(
        r"^(\.L_\w+):|^\s+(?:/\*[0-9a-f]+\*/)\s+(?:\{\s*)?(@!?U?P\w+\s+)?([A-Z][^;]*);", text, re.MULTILINE
    )


def loops(cubin):
    """Yield the operations of each innermost loop."""
    places, code = {}, []
    for label, _, instruction in instructions(cubin):
        if label:
            places[label] = len(code)
        else:
            code.append(instruction)
    spans = []
    for at, instruction in enumerate(code):
        target = re.search(r"BRA.*`\((\.L_\w+)\)", instruction)
        if target and places.get(target[1], at + 1) <= at:
            spans.append((places[target[1]], at))
    for begin, end in spans:
        if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in spans):
            yield [re.match(r"[\w.]+", x)[0] for x in code[begin : end + 1]]


def widest(found, accesses):
    """Return loops that access each stream by two vectors: of updates one copies, and a longer one blends."""
    counted = [x for x in found if sum(y.startswith(("LDG", "STG")) for y in x) == accesses]
    return [x for x in counted if any(".128" in y for y in x)]


def main(architectures):
    """Print a table for each architecture."""
    for architecture in architectures:
        print(f"\nsm_{architecture}: instructions, arithmetic (an element each), registers, blocks")
        for name, entry, elements, accesses in kernels():
            _, cubin, log = nvrtc.compiled(architecture, entry)
            loop = max(widest(loops(cubin), accesses), key=len)
            arithmetic = [x for x in loop if not re.match(f"({CONTROL}|{MEMORY})", x)]
            (registers,) = map(int, re.findall(r"Used (\d+) registers", log))
            blocks = min(BLOCKS, 65536 // (-(-registers // 8) * 8 * _source.THREADS))
            each, own = len(loop) / elements, len(arithmetic) / elements
            print(f"{name:40}{each:8.2f}{own:8.2f}{registers:6}{blocks:4}", flush=True)


if __name__ == "__main__":
    main(map(int, sys.argv[1:] or (80, 90, 100)))

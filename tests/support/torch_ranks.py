"""Programs of several processes of torch.distributed, over gloo on loopback."""

import textwrap
import time
from pathlib import Path

import processes

PRELUDE = """
import os
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import fastema
import oracle
from fastema import checkpoint

folder = Path(sys.argv[1])
rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
torch.set_num_threads(1)
dist.init_process_group(
    "gloo", init_method=f"file://{os.environ['STORE']}", rank=rank, world_size=ranks,
    timeout=timedelta(seconds=600),
)
"""


# torch aborts one in eight of such processes where Python finalizes, also without fastema: "terminate called
# without an active exception". All is said and done by then.
END = """
dist.destroy_process_group()
sys.stdout.flush()
os._exit(0)
"""


def run(ranks, folder, code):
    """Run a program in so many processes, which must all succeed."""
    processes.skip_without("torch")
    store = Path(folder) / f".store-{time.monotonic_ns()}"
    program = f"{PRELUDE}\n{textwrap.dedent(code)}\n{END}"
    processes.ranks(ranks, program, folder, STORE=str(store), GLOO_SOCKET_IFNAME="lo")
    store.unlink(missing_ok=True)

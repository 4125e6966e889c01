"""Benchmarks: what an update and a swap cost, against this machine's ceiling and every rival at its best.

Each script answers one question and runs on its own (``python -m fastema.bench.bench_update``);
``python -m fastema bench`` runs those of updates, swaps and memory. ``--record`` keeps what they say of a
processor; ``fastema.bench.compare`` tells what got slower, and ``fastema.bench.page`` writes it down.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # tables, not TensorFlow's log

"""What bench/plugin_workers.py loads to see what slow imports cost: the same plugin, after 300 ms of them."""

from __future__ import annotations

import time

from worker_bench_plugin import WorkerBench

__all__ = ["WorkerBench"]

time.sleep(0.3)

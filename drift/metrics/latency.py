"""Latency of a callable: what a user waits for, after warm-up."""

import time
from collections.abc import Callable

import numpy as np
import torch


def latency_ms(call: Callable[[], object], *, repeats: int, warmup: int = 3) -> dict[str, float]:
    """Median and 95th percentile wall milliseconds of one call over `repeats`, after `warmup` calls."""
    seconds = []
    for repeat in range(warmup + repeats):
        _wait()
        started = time.perf_counter()
        call()
        _wait()
        if repeat >= warmup:
            seconds.append(time.perf_counter() - started)
    median, p95 = np.percentile(seconds, [50, 95]) * 1000
    return {"median": float(median), "p95": float(p95)}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()

"""Timing, the row of a result, and what machine it was measured on."""

from __future__ import annotations

import gc
import platform
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ... import _c
from ..common import table

Float64Array = NDArray[np.float64]


@dataclass
class Row:
    """One line of the tables. Times in microseconds; targets, certified and peer where there are any."""

    suite: str
    case: str
    instances: int
    p50_us: float
    p99_us: float
    target_p50_us: float | None = None
    target_p99_us: float | None = None
    certified_fraction: float | None = None
    peer: str = ""
    peer_us: float | None = None
    note: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """None without a target."""
        if self.target_p50_us is None:
            return None
        return self.p50_us <= self.target_p50_us and (self.target_p99_us is None or self.p99_us <= self.target_p99_us)

    def as_json(self) -> dict[str, Any]:
        row = {name: getattr(self, name) for name in ("suite", "case", "instances", "p50_us", "p99_us", "target_p50_us", "target_p99_us")}
        row |= {"met": self.met, "certified_fraction": self.certified_fraction, "peer": self.peer or None, "peer_us": self.peer_us}
        return row | {"note": self.note or None} | self.extra

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Row:
        """The row that as_json gave, for drawing it again."""
        names = [item.name for item in fields(cls) if item.name != "extra"]
        known = {name: row.get(name) for name in names} | {"peer": row.get("peer") or "", "note": row.get("note") or ""}
        return cls(**known, extra={key: value for key, value in row.items() if key not in (*names, "met")})


REFUSED = (None, None, _c.INT64, 1, None, None, None, _c.INT64, None)  # arguments of lplb_planner_solve without a planner


@contextmanager
def undisturbed() -> Iterator[None]:
    """No garbage collection in between."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def time_calls(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], rounds: int) -> Float64Array:
    """
    [len(calls)] microseconds of function(*call), the median over the rounds. All calls take turns in every round, so that none finds the
    caches and branch predictors as it left them.
    """
    clock = perf_counter_ns
    times = np.empty((rounds, len(calls)))
    with undisturbed():
        for call in calls[:16]:
            function(*call)
        for row in times:
            for i, call in enumerate(calls):
                start = clock()
                function(*call)
                row[i] = clock() - start
    return np.asarray(np.median(times, axis=0) / 1000, dtype=np.float64)


def time_one(function: Callable[[], Any], rounds: int) -> Float64Array:
    """[rounds] microseconds of function()."""
    times = np.empty(rounds)
    with undisturbed():
        function()
        for i in range(rounds):
            start = perf_counter_ns()
            function()
            times[i] = (perf_counter_ns() - start) / 1000
    return times


def refused_call_us() -> float:
    """
    What a call through ctypes costs before the library does anything: lplb_planner_solve, refused at once because the planner is NULL.
    The clock's own cost is in it too.
    """
    return float(np.median(time_calls(_c.load().planner_solve, [REFUSED] * 2000, 5)))


def machine(device: str) -> dict[str, Any]:
    """CPU, GPU, driver and versions."""
    info: dict[str, Any] = {"cpu": cpu_model(), "system": platform.platform(), "python": platform.python_version(),
                            "numpy": np.__version__, "library": _c.text(_c.load().build_info())}
    if device == "cuda":
        import torch

        info |= {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda, "driver": driver()}
    return info


def machine_line(info: dict[str, Any]) -> str:
    """In one line, as each row carries it."""
    if "gpu" in info:
        return f"{info['gpu']}, driver {info['driver']}, CUDA {info['cuda']}, torch {info['torch']}"
    return f"{info['cpu']}, one core, Python {info['python']}"


def cpu_model() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"), re.M)
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine()


def driver() -> str:
    """The NVIDIA driver's version, as nvidia-smi says it."""
    try:
        done = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True,
                              errors="replace", timeout=30)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.split("\n")[0].strip() or "unknown"


def today() -> str:
    return datetime.now(timezone.utc).date().isoformat()


def number(value: float | None) -> str:
    """Three significant digits, thousands with a comma."""
    if value is None:
        return ""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def as_table(rows: Sequence[Row]) -> str:
    """Columns that no row fills are left out."""
    header = ["case", "n", "p50 us", "p99 us", "in rotation", "target", "met?", "certified", "beside it, same run", "us", "ratio",
              "published us", "published ratio"]
    lines = []
    for row in rows:
        target = number(row.target_p50_us) + (f" / {number(row.target_p99_us)}" if row.target_p99_us is not None else "")
        mark = {True: "met", False: "MISSED", None: ""}[row.met]
        certified = "" if row.certified_fraction is None else f"{row.certified_fraction:.4g}"
        ratio = "" if row.peer_us is None or row.p50_us <= 0 else f"{row.peer_us / row.p50_us:,.3g}"
        published = row.extra.get("published_us")
        lines.append([row.case, str(row.instances), number(row.p50_us), number(row.p99_us), number(row.extra.get("rotation_us")), target,
                      mark, certified, row.peer, number(row.peer_us), ratio, number(published),
                      "" if published is None or row.p50_us <= 0 else f"{published / row.p50_us:,.3g}"])
    used = [i for i in range(len(header)) if any(line[i] for line in lines)]
    sources = dict.fromkeys(row.extra["published"] for row in rows if row.extra.get("published"))
    notes = "".join(f"\npublished: {source}." for source in sources)
    return table([header[i] for i in used], [[line[i] for i in used] for line in lines]) + ("\n" + notes if notes else "")

"""What became slower since an earlier `bench --json`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..common import table
from ..terminal import shown
from .kit import Row, number
from .plot import rows_of

LIMIT = 1.03  # times as long


@dataclass(frozen=True)
class Earlier:
    """p50_us by (suite, case)."""

    p50_us: dict[tuple[str, str], float]
    machine: str

    @classmethod
    def read(cls, path: str, result: Any) -> Earlier:
        """Of the content of a file that `bench --json` wrote. UsageError for any other."""
        rows = rows_of(path, result)
        return cls({(row.suite, row.case): row.p50_us for row in rows}, str(rows[0].extra.get("machine", "")))


def slower(earlier: Earlier, rows: Sequence[Row]) -> list[tuple[Row, float]]:
    """Rows that take more than LIMIT times as long as they did, the worst first, with what they took."""
    pairs = [(row, earlier.p50_us[row.suite, row.case]) for row in rows if (row.suite, row.case) in earlier.p50_us]
    return sorted((pair for pair in pairs if pair[0].p50_us > LIMIT * pair[1]), key=lambda pair: -pair[0].p50_us / pair[1])


def report(earlier: Earlier, rows: Sequence[Row], machine: str) -> tuple[str, int]:
    """The text, and how many rows became slower."""
    both = sum((row.suite, row.case) in earlier.p50_us for row in rows)
    found = slower(earlier, rows)
    lines = [f"{both} rows are in both runs; {len(found)} became slower by more than {LIMIT - 1:.0%}."]
    if len(rows) > both or len(earlier.p50_us) > both:
        lines.append(f"{len(rows) - both} rows are in this run alone, {len(earlier.p50_us) - both} in the earlier one.")
    if earlier.machine and earlier.machine != machine:
        lines.append(f"The earlier run was on another machine: {shown(earlier.machine, 200)}.")
    if found:
        lines += ["", table(["suite", "case", "was us", "is us", "times"],
                            [[row.suite, row.case, number(was), number(row.p50_us), f"{row.p50_us / was:.3f}"] for row, was in found])]
    return "\n".join(lines), len(found)

"""What a rank's work costs in a simulation: tokens, units of several, or active experts, on ranks that may differ in speed."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ... import _c
from ..files import DEFAULT_LIMIT, read_json
from ..terminal import UsageError, shown

Int64Array = NDArray[np.int64]


@dataclass(frozen=True)
class Cost:
    unit: int | str = 1  #: as Planner's
    speed: NDArray[np.int32] | None = None  #: as Planner.set_capacity's

    @property
    def is_tokens(self) -> bool:
        return self.unit == 1 and self.speed is None

    def by_rank(self, tokens: Int64Array, ranks: int) -> NDArray[Any]:
        """[ranks] levels of the ranks, see GroupInfo, from tokens [n_physical] of the slots: whole units where the ranks are alike."""
        if self.unit == "experts":
            units = (tokens > 0).astype(np.int64)
        else:
            units = -(-tokens // int(self.unit))
        sums: Int64Array = units.reshape(ranks, -1).sum(axis=1)
        return sums if self.speed is None else -(-(sums << 20) // self.speed) / 1024

    def mean(self, tokens: Int64Array, ranks: int) -> float:
        """The least that a rank could have to do if all did as much, from tokens [n_logical] of the experts."""
        units = np.count_nonzero(tokens) if self.unit == "experts" else int((-(-tokens // int(self.unit))).sum())
        return units / ranks if self.speed is None else 1024 * units / int(self.speed.sum())

    @property
    def words(self) -> str:
        """What is counted."""
        unit = {1: "tokens", "experts": "active experts"}.get(self.unit, f"units of {self.unit} tokens")
        return unit if self.speed is None else f"time of {unit} on ranks of different speed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--unit", default="1", metavar="N|experts",
                        help="tokens that cost as one, such as the 128 rows to which grouped products pad every expert, or 'experts': active "
                             "experts, as in decoding; plans and figures are then in these (default 1: tokens)")
    parser.add_argument("--speed", metavar="FILE",
                        help="numbers of the ranks, 1024 each for a normal one and 922 for one that is 10%% slower: text, or a .json list")


def check(unit: str, speed: str | None, ranks: int, limit: int = DEFAULT_LIMIT) -> Cost:
    size: int | str = unit
    if unit != "experts":
        if not re.fullmatch(r"[0-9]{1,10}", unit) or not 1 <= int(unit) < 2**31:
            raise UsageError(f"--unit: must be a number of tokens from 1 to {2**31 - 1}, or experts, got {shown(unit)}")
        size = int(unit)
    return Cost(size, None if speed is None else _speeds(speed, ranks, limit))


def _speeds(path: str, ranks: int, limit: int) -> NDArray[np.int32]:
    if path.lower().endswith(".json"):
        numbers = read_json(path, limit)
    else:
        try:
            with open(path, encoding="utf-8") as file:
                numbers = [int(word) if re.fullmatch(r"[0-9]{1,6}", word) else word for word in re.split(r"[\s,]+", file.read(1 << 20)) if word]
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--speed: {shown(path)} cannot be read ({shown(str(error))})") from None
    if not isinstance(numbers, list) or len(numbers) != ranks:
        raise UsageError(f"--speed {shown(path)}: must hold a number for each of the {ranks} ranks"
                         + (f", got {len(numbers)}" if isinstance(numbers, list) else ""))
    for number in numbers:
        if type(number) is not int or not 1 <= number <= _c.MAX_SPEED:
            raise UsageError(f"--speed {shown(path)}: must hold integers of 1 .. {_c.MAX_SPEED}, got {shown(number)}")
    return np.array(numbers, dtype=np.int32)

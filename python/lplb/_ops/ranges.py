"""NVTX ranges around the planner's calls, for profilers such as Nsight Systems: LPLB_NVTX=1 in the environment, before lplb meets torch.

A range is named for the call and the planner's number, e.g. "lplb.run 2". Without LPLB_NVTX the calls are what they are.
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch

_nvtx: Any = torch.cuda.nvtx  # untyped in PyTorch


def _asked() -> bool:
    if os.environ.get("LPLB_NVTX") != "1":
        return False
    try:
        _nvtx.range_push("lplb")
        _nvtx.range_pop()
    except RuntimeError as error:
        warnings.warn(f"LPLB_NVTX=1: this build of torch marks no ranges: {error}", stacklevel=2)
        return False
    return True


ASKED = _asked()


def ranged(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """call, in a range if that is asked for. One of its parameters is `planner`, a number."""
    if not ASKED:
        return call
    place = list(inspect.signature(call).parameters).index("planner")
    push, pop = _nvtx.range_push, _nvtx.range_pop

    def within(*arguments: Any, **options: Any) -> Any:
        push(f"lplb.{name} {arguments[place] if place < len(arguments) else options['planner']}")
        try:
            return call(*arguments, **options)
        finally:
            pop()

    return within

"""The ready topologies, and that a topology is what its planner makes of it."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from lplb import topology

READY = {
    "CUBE_8P2E": [[3, 0, 1, 2, 7, 4, 5, 6], [6, 7, 4, 5, 0, 1, 2, 3]],
    "RING_8P": [[1, 2, 3, 4, 5, 6, 7, 0]],
    "HYPERCUBE_16P2E": [[3, 0, 1, 2, 7, 4, 5, 6, 11, 8, 9, 10, 15, 12, 13, 14], [12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]],
    "SQUARE_4P2E": [[1, 2, 3, 0], [2, 3, 0, 1]],
}


@pytest.mark.parametrize("name", READY)
def test_columns(name):
    assert np.asarray(getattr(topology, name)).T.tolist() == READY[name]
    assert name in dir(topology) and name in topology.__all__


@pytest.mark.parametrize("m, n", [(1, 1), (1, 4), (2, 2), (2, 8), (4, 8), (3, 5)])
def test_torus(m, n):
    r2o = np.asarray(topology.torus_2d(m, n))
    assert r2o.shape == (m * n, 2)
    for i in range(m):
        for j in range(n):
            assert r2o[i * n + j].tolist() == [(i + 1) % m * n + j, i * n + (j + 1) % n]
    assert (np.sort(r2o, axis=0) == np.arange(m * n)[:, None]).all()


def test_fresh_each_time():
    first = topology.CUBE_8P2E
    first[0, 0] = 5
    assert topology.CUBE_8P2E[0, 0] == 3


def test_tensors_where_torch_is():
    torch = pytest.importorskip("torch")
    assert isinstance(topology.RING_8P, torch.Tensor) and isinstance(topology.torus_2d(2, 2), torch.Tensor)
    assert topology.RING_8P.int().dtype == torch.int32  # callers write .int().cuda()


def test_unknown_name():
    with pytest.raises(AttributeError, match="CUBE_9P"):
        topology.CUBE_9P
    with pytest.raises(ValueError, match="m: .*got 0"):
        topology.torus_2d(0, 4)


def test_arrays_without_torch():
    code = ("import sys; sys.modules['torch'] = None\n"
            "import lplb, numpy\n"
            "assert isinstance(lplb.topology.CUBE_8P2E, numpy.ndarray)\n"
            "assert isinstance(lplb.topology.torus_2d(2, 3), numpy.ndarray)\n")
    subprocess.run([sys.executable, "-c", code], check=True)

"""The package under every Python that it says it runs on and that this machine has: each module is compiled and imported, and a batch is
planned where that Python has numpy. Elsewhere a stand-in for numpy answers to everything, which is enough to run every import and every
definition."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lplb
from lplb import _c

PACKAGE = Path(lplb.__file__).parent
OLDEST, NEWEST = 10, 13

CODE = """
import importlib.util, pathlib, sys, types, warnings
warnings.simplefilter("error")
package = pathlib.Path(sys.argv[1])
for source in sorted(package.rglob("*.py")):
    compile(source.read_text(encoding="utf-8"), str(source), "exec")

class Anything(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return cls
    def __getitem__(cls, key): return cls
    def __or__(cls, other): return cls
    __ror__ = __or__
    def __call__(cls, *given, **named): return cls if cls is Stand else type.__call__(cls, *given, **named)
class Stand(metaclass=Anything): pass
class Module(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Stand

real = importlib.util.find_spec("numpy") is not None
if not real:
    for name in ("numpy", "numpy.typing"):
        sys.modules[name] = Module(name)
sys.modules["torch"] = None
sys.path.insert(0, str(package.parent))
for source in sorted(package.rglob("*.py")):
    name = ".".join(source.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")
    if name == "lplb.__main__":
        continue
    try:
        importlib.import_module(name)
    except ImportError as error:
        if "torch" not in str(error):
            raise
if real:
    import lplb, numpy as np
    ids = np.arange(1000) % 64
    with lplb.Planner(lplb.topology.CUBE_8P2E, 80, 64, ep_size=8, device="cpu") as planner:
        assert (planner.phy2log[planner.run(ids, None)] == ids).all() and planner.info().certified
print("planned" if real else "imported", "%d.%d" % sys.version_info[:2])
"""


def interpreters() -> dict[str, Path]:
    """By version, those that the package supports: on PATH, and where pyenv keeps them."""
    names = [f"python3.{minor}" for minor in range(OLDEST, NEWEST + 1)]
    found = [Path(sys.executable), *(Path(path) for path in map(shutil.which, names) if path)]
    homes = [Path(os.environ["PYENV_ROOT"]) / "versions"] if "PYENV_ROOT" in os.environ else []
    for folder in (*homes, Path.home() / ".pyenv/versions", Path(sys.base_prefix).parent):
        found += [path for path in sorted(folder.glob("3.*/bin/python")) if f"python{path.parents[1].name.rpartition('.')[0]}" in names]
    works: dict[str, Path] = {}
    for path in dict.fromkeys(found):  # pyenv's shims stand on PATH for versions, too, that they refuse to run
        asked = subprocess.run([path, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], capture_output=True, text=True, timeout=60)
        if asked.returncode == 0:
            works.setdefault(asked.stdout.strip(), path)
    return works


FOUND = interpreters()


@pytest.mark.parametrize("version", [f"3.{minor}" for minor in range(OLDEST, NEWEST + 1)])
def test_this_python(version: str) -> None:
    if version not in FOUND:
        pytest.skip(f"there is no Python {version} here")
    environment = {**os.environ, "LPLB_LIBRARY": _c.find()}
    done = subprocess.run([FOUND[version], "-I", "-B", "-c", CODE, str(PACKAGE)], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1] == version

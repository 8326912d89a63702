"""The C library for Python, by ctypes: its functions (library), structs and limits (structs), and planners (handle)."""

from .library import *
from .structs import *

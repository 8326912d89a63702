"""`python -m lplb`, and the console script `lplb`: see lplb.cli."""

from .cli.main import script

if __name__ == "__main__":
    script()

"""The command line, `python -m lplb`: report and self-check, `simulate`, `bench`. Nothing of the library imports it."""

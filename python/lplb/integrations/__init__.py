"""Adapters to training frameworks and serving engines; each imports its own one, and none is imported by lplb itself."""

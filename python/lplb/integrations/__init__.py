"""Adapters to training frameworks; each imports its framework, and none is imported by lplb itself."""

"""The planner's calls on numpy arrays and torch tensors: arguments, arrays, the ranks, the calls, and their PyTorch operators."""

"""The planner's calls on numpy arrays and torch tensors: arguments, host arrays, buffers, the calls, and their PyTorch operators."""

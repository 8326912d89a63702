"""The parts of lplb.moe that have no use alone."""

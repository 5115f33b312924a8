"""Knows the way of a batch; uses predictor/ and store/, which do not know it or each other."""

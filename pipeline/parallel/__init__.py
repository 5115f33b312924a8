"""Expert parallel: each expert belongs to one Executor, and tokens travel to it."""

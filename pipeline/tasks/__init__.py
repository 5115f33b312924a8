"""What is asked of a model: classify, score, generate. `registry` knows them by name."""

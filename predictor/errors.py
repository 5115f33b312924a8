"""What the predictors refuse, in one line for a person."""


class PredictorError(ValueError):
    """A predictor or trace file that is missing, damaged, or made for another model."""

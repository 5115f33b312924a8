"""What joins a model to its predictor: rehearsal, training, stand-ins, calibration, and what a run learns on the way."""

"""Errors for people: one line that names the file, key or row, what was found, what was expected, and the nearest fix."""

from predictor.errors import PredictorError
from store.errors import CheckpointError, SpaceError


class ConfigError(ValueError):
    """A config, or an output directory, that cannot be used."""


class DataError(ValueError):
    """An input file or row that cannot be used."""


class ModelError(ValueError):
    """A model that cannot be served."""


class StandInsError(SpaceError):
    """A budget that a rehearsal's stand-ins leave no room in."""


USER_ERRORS = (ConfigError, DataError, ModelError, CheckpointError, SpaceError, PredictorError)
"""What the user gave and can mend: exit code 2, no traceback."""

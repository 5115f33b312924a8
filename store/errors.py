"""What the store refuses: each error is one line for a person, about something that they gave, unless it says otherwise."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be served: missing, truncated, of a wrong shape, or with weights that are not finite."""


class SpaceError(ValueError):
    """A budget or an arena that does not fit; the message names the shortfall in bytes."""


class TransferError(RuntimeError):
    """An arena that could not be brought from another machine: nothing that the user gave."""

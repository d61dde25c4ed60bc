"""Errors written for the person who reads them: which file, which key, what was found, what to do."""


class LenspipeError(Exception):
    """Something the user can mend. The command line prints its message without a traceback."""


class ConfigError(LenspipeError):
    """A setting is unknown, of the wrong type or out of range."""


class TrainingError(LenspipeError):
    """A training run whose numbers are no longer finite."""


class InputError(LenspipeError):
    """A file that was handed in is missing, broken or not what it should be."""


class ClusterError(LenspipeError):
    """The batch system or Dask's scheduler cannot be reached or refuses."""


class DeviceError(LenspipeError):
    """A GPU that has failed: its process can use it no more."""


def in_one_line(error: BaseException) -> str:
    """What an error of a library says, with its kind, for a message of our own."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"

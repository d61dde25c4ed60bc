"""lenspipe: unattended fits of galaxy-galaxy strong lenses, from a catalogue of images to posteriors."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lenspipe.posteriors.reading import open_posteriors, posterior

__all__ = ["open_posteriors", "posterior"]


def __getattr__(name: str) -> Any:
    """The functions that read posteriors, imported when they are first used: xarray and Zarr take seconds."""
    if name not in __all__:
        raise AttributeError(f"module 'lenspipe' has no attribute '{name}'")
    from lenspipe.posteriors import reading

    return getattr(reading, name)

"""The store of posteriors: samples to Zarr, and back as xarray and ArviZ objects."""

from lenspipe.posterior.store import open_posteriors, posterior

__all__ = ["open_posteriors", "posterior"]

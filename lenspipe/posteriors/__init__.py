"""The store of posteriors: samples to Zarr, and back as xarray and ArviZ objects."""

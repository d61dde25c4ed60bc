"""Unlensed galaxies: catalogue and archive (readers) -> neighbours, selection (cuts) -> stamps (64x64 images) -> parts
(one an image file) -> ingest (galaxies.zarr)."""

"""Unlensed galaxies: catalogue (readers) -> selection (cuts) -> stamps (64x64 images) -> ingest (galaxies.zarr)."""

"""The forward model, shared by mocks and inference: from a lens and a source image to the image on the detector."""

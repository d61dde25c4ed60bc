"""The source model: a variational autoencoder trained on unlensed galaxies, and the prior made from it."""

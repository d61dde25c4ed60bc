"""Gravitational lensing, on one plane or several: coordinates, mass profiles, deflections.

Conventions, for the whole package: arcsec; x to the right, y up, coordinates of pixel centres; angles in radians
counter-clockwise from +x; `phi` is the angle of the major axis; every tensor has a leading lens axis.
"""

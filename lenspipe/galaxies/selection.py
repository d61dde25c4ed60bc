"""The cuts of Chianese et al. 2019, section 2.2, and of our own, by name; a galaxy passes through them in this order.

Each cut is a function of (stamp, settings) that is true where the galaxy is removed, and sees only galaxies that all
cuts before it kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lenspipe.config import Galaxies
from lenspipe.galaxies.catalogue import GalaxyStamp
from lenspipe.galaxies.neighbours import neighbours
from lenspipe.galaxies.stamps import downscale, smoothed, square_stamp


def excluded_by_hand(stamp: GalaxyStamp, settings: Galaxies) -> bool:
    """The config names it."""
    return stamp.excluded


def exclusion_level(stamp: GalaxyStamp, settings: Galaxies) -> bool:
    """GalSim's exclusion level of the input removes it."""
    return stamp.below_level


def sersic_fit_failed(stamp: GalaxyStamp, settings: Galaxies) -> bool:
    """The Sersic fit's status is not 1 to 4. Never, where the catalogue has no Sersic fits."""
    return stamp.sersic is not None and not 1 <= stamp.sersic.status <= 4


def sersic_unphysical(stamp: GalaxyStamp, settings: Galaxies) -> bool:
    """Half-light radius not positive, index outside the range of the settings, or axis ratio outside (0, 1]; NaN is
    unphysical too."""
    fit = stamp.sersic
    if fit is None:
        return False
    return not (fit.hlr > 0 and settings.sersic_index_min <= fit.n <= settings.sersic_index_max and 0 < fit.q <= 1)


def stamp_too_small(stamp: GalaxyStamp, settings: Galaxies) -> bool:
    """A side of the stamp, as the catalogue gives it, is below `min_stamp_size`."""
    return bool(min(stamp.image.shape) < settings.min_stamp_size)


def bad_pixels(stamp: GalaxyStamp, settings: Galaxies) -> bool:
    """A pixel is not finite, or there is no light: no positive pixel, once the noise is averaged down."""
    lit = bool(np.isfinite(stamp.image).all() and smoothed(stamp.image).max() > 0)
    return not (lit and float(square_image(stamp, settings).max()) > 0)


def square(stamp: GalaxyStamp, settings: Galaxies) -> NDArray[np.float64]:
    """The square about the galaxy's light: as great as fits or, where the stamp is zero outside the galaxy, as great as
    the stamps of catalogues are."""
    side_per_radius = settings.side_per_half_light_radius if stamp.zero_outside else None
    return square_stamp(stamp.image, settings.min_stamp_size, side_per_radius)


def square_image(stamp: GalaxyStamp, settings: Galaxies) -> NDArray[np.float64]:
    """The square about the galaxy's light, averaged down to 64x64; units of the stamp."""
    return downscale(square(stamp, settings), settings.stamp_size)


def signal_to_noise(stamp: GalaxyStamp, settings: Galaxies) -> float:
    """max(I downscaled) / sigma_noise: the paper's very heuristic ratio.

    I downscaled is the square 64x64 image, averaged over `signal_to_noise_downscale`^2 pixels (16x16 for the paper's
    factor of 4). sigma_noise is the standard deviation of the pixel noise of the original stamp. The paper does not say
    which image it downscales; averaging the original stamp instead gives greater ratios for stamps above 64 pixels.
    """
    coarse = downscale(square_image(stamp, settings), settings.stamp_size // settings.signal_to_noise_downscale)
    return float(coarse.max() / stamp.noise_sd)


def signal_to_noise_low(stamp: GalaxyStamp, settings: Galaxies) -> bool:
    """Nearly lost in the noise. Never, where the noise is not known."""
    return stamp.noise_sd > 0 and signal_to_noise(stamp, settings) < settings.signal_to_noise_min


def signal_to_noise_high(stamp: GalaxyStamp, settings: Galaxies) -> bool:
    """Bright and compact. Never, where the noise is not known."""
    return stamp.noise_sd > 0 and signal_to_noise(stamp, settings) > settings.signal_to_noise_max


def has_neighbour(stamp: GalaxyStamp, settings: Galaxies) -> bool:
    """Another object is on the stamp. Never, unless the settings reject neighbours."""
    return settings.neighbours == "reject" and bool(neighbours(stamp, settings).any())


Cut = Callable[[GalaxyStamp, Galaxies], bool]
CUTS: tuple[Cut, ...] = (
    excluded_by_hand,
    exclusion_level,
    sersic_fit_failed,
    sersic_unphysical,
    stamp_too_small,
    bad_pixels,
    signal_to_noise_low,
    signal_to_noise_high,
    has_neighbour,
)


@dataclass
class Tally:
    """How many galaxies of one input were read, and how many each cut removed."""

    origin: str
    read: int = 0
    removed: dict[str, int] = field(default_factory=lambda: {cut.__name__: 0 for cut in CUTS})

    def keeps(self, stamp: GalaxyStamp, settings: Galaxies) -> bool:
        """Count a galaxy, and say whether it passes all cuts."""
        self.read += 1
        for cut in CUTS:
            if cut(stamp, settings):
                self.removed[cut.__name__] += 1
                return False
        return True

    def add(self, read: int, removed: Iterable[int]) -> None:
        """Count galaxies that passed through the cuts elsewhere; `removed` by each cut, in order."""
        self.read += read
        for cut, number in zip(CUTS, removed, strict=True):
            self.removed[cut.__name__] += int(number)

    def rows(self) -> list[tuple[str, str, int, int]]:
        """(input, cut, removed, left) for `read` and then each cut in order."""
        left = self.read - np.cumsum(list(self.removed.values()))
        cuts = [(self.origin, cut, n, int(k)) for (cut, n), k in zip(self.removed.items(), left, strict=True)]
        return [(self.origin, "read", 0, self.read), *cuts]

    def in_words(self) -> str:
        """One line: what was read, what each cut removed, and which of them removed the last galaxies."""
        counts = [f"{cut} {n}" for cut, n in self.removed.items() if n]
        last = f", and the last of them went at {counts[-1].split()[0]}" if counts and not self.rows()[-1][3] else ""
        return f"{self.origin}: {self.read} read, removed: {', '.join(counts) or 'none'}{last}"

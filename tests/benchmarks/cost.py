"""What fits cost and where the time goes: `python tests/benchmarks/cost.py RESULTS docs/cost.png`.

RESULTS is the folder of a run, as for `fit.py`, whose mocks at noise 0.0333 these are. One JSON line a case, and the
plot of all. Times are of the processor, one thread: ms of a chain's gradient and of the Gauss-Newton equations of a
lens, the least of several runs; s of a search for a lens. The unknowns are those of the lens with the first 16 latents,
with all of them, and with the residual field too.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from fit import generators, mocks
from matplotlib import pyplot as plt
from torch import Tensor, nn

from lenspipe.config import Fit
from lenspipe.fit import map_search
from lenspipe.fit.model import LensModel
from lenspipe.image.psf import Convolution
from lenspipe.image.simulator import Simulator
from lenspipe.memory import keep_freed_memory
from lenspipe.results import Results
from lenspipe.source.base import Source
from lenspipe.source.learned import LearnedSource
from lenspipe.source.sketch import LinearSource
from lenspipe.source.view import Drawn

NOISE, CHAINS = 0.0333, 4
CASES = [(pixels, batch) for pixels in (64, 128, 256) for batch in (1, 4, 16)]
PARTS = {
    "source": [(LearnedSource, "linearise"), (LearnedSource, "forward"), (LinearSource, "forward")],
    "light paths": [(Simulator, "source_points"), (Simulator, "lit")],
    "source plane": [(Simulator, "rays"), (Simulator, "brightness_gradient"), (Drawn, "slopes")],
    "PSF": [(Convolution, "__call__")],
    "other derivatives and products": [(LensModel, "normal_equations")],
}


class FewLatents(Source):
    """A source with all but the first of its unknowns at zero."""

    def __init__(self, whole: Source, size: int):
        super().__init__()
        self.whole, self.size = whole, size

    def forward(self, w: Tensor) -> Tensor:
        return self.whole(nn.functional.pad(w, (0, self.whole.size - self.size)))


def least(work: Callable[[], object], times: int) -> float:
    """Milliseconds of the processor, the least of several."""
    taken = []
    for _ in range(times):
        began = time.process_time()
        work()
        taken.append(1e3 * (time.process_time() - began))
    return min(taken)


def costs(model: LensModel, truth: Tensor) -> dict[str, float]:
    """Of a chain's gradient and of the Gauss-Newton equations [ms a lens]."""
    lenses = torch.arange(len(truth)).repeat_interleave(CHAINS)
    w = truth[lenses]
    return {
        "gradient_ms": least(lambda: model.value_and_gradient(w, lenses), 6) / len(w),
        "equations_ms": least(lambda: model.normal_equations(truth), 3) / len(truth),
    }


@contextmanager
def shares() -> Iterator[Counter[str]]:
    """Seconds of the processor in each of PARTS, without those of the parts called in it."""
    spent: Counter[str] = Counter()
    inner = [0.0]

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            began = time.process_time()
            inner.append(0.0)
            try:
                return function(*arguments)
            finally:
                whole = time.process_time() - began
                spent[name] += whole - inner.pop()
                inner[-1] += whole

        return call

    own = [(kind, method, kind.__dict__[method]) for parts in PARTS.values() for kind, method in parts]
    names = {(kind, method): name for name, parts in PARTS.items() for kind, method in parts}
    for kind, method, function in own:
        setattr(kind, method, timed(names[kind, method], function))
    try:
        yield spent
    finally:
        for kind, method, function in own:
            setattr(kind, method, function)


def searched(model: LensModel) -> dict[str, Any]:
    """Seconds a lens of a search, and the shares of its parts."""
    began = time.process_time()
    with shares() as spent:
        map_search.search(model, Fit(), generators(len(model.batch)))
    whole = time.process_time() - began
    return {
        "search_s": whole / len(model.batch),
        "shares": {name: round(spent[name] / whole, 3) for name in PARTS}
        | {"linear algebra and the rest": round(1 - spent.total() / whole, 3)},
    }


def draw(rows: list[dict[str, Any]], out: Path) -> None:
    """Costs against pixels and unknowns, and the parts of a search."""
    mpl.rcParams.update({"font.size": 9})
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    for axis, key, unit in (
        (axes[0], "gradient_ms", "gradient of one chain [ms]"),
        (axes[1], "search_s", "search of one lens [s]"),
    ):
        for batch, mark in ((1, "o-"), (4, "s--"), (16, "^:")):
            seen = [row for row in rows if row["batch"] == batch and row["unknowns"] == 76 and key in row]
            if not seen:
                continue
            axis.plot([row["pixels"] for row in seen], [row[key] for row in seen], mark, label=f"batch of {batch}")
        axis.set(xscale="log", xlabel="side of the image [px]", ylabel=unit)
        axis.set_xticks([64, 128, 256], ["64", "128", "256"])
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False)
    whole = next(row for row in rows if row["pixels"] == 256 and "shares" in row and row["batch"] == 1)["shares"]
    axes[2].barh(list(whole), [100 * share for share in whole.values()], color="0.5")
    axes[2].set(xlabel="share of a search at 256 px [%]")
    axes[2].invert_yaxis()
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("plot", type=Path)
    parser.add_argument("--searched", type=int, default=4, help="lenses of the largest batch that is searched")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    rows = []

    def note(row: dict[str, Any]) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)

    for pixels, batch in CASES:
        model, truth = mocks(Results(options.results), range(batch), NOISE, pixels)
        row = {"pixels": pixels, "batch": batch, "unknowns": model.size} | costs(model, truth)
        note(row | searched(model) if batch <= options.searched else row)
    model, truth = mocks(Results(options.results), range(1), NOISE, 256)
    few = LensModel(model.batch, model.priors, FewLatents(model.source, 16), model.optics)
    note({"pixels": 256, "batch": 1, "unknowns": few.size} | costs(few, truth[:, : few.size]))
    wide, truth = mocks(Results(options.results), range(1), NOISE, 256, residual=True)
    note({"pixels": 256, "batch": 1, "unknowns": wide.size} | costs(wide, truth))
    draw(rows, options.plot)


if __name__ == "__main__":
    main()

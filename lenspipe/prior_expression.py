"""One prior per parameter, written in config as a call: `Normal(0, 0.1)`, `Uniform(0.2, 1)`, or a number to fix it.

The name of another parameter instead is a value that both share.

The text is parsed, never evaluated. Distributions and the meaning of their arguments:

| text                                 | density                                                |
|--------------------------------------|--------------------------------------------------------|
| `Normal(mean, sd)`                   | Gaussian                                               |
| `TruncatedNormal(mean, sd, low, high)` | Gaussian cut off outside [low, high], renormalised   |
| `Uniform(low, high)`                 | constant on [low, high]                                |
| `LogNormal(median, sd)`              | Gaussian in the natural logarithm, `sd` in log units   |
| `1.5`                                | fixed at that value                                    |
| `center_x`                           | the value of that parameter                            |
| `Laplace(0, 0.1)`, `HalfNormal(0.3)` ... | Pyro's: any of a single real number that has an inverse CDF |

Arguments named by keywords are those of Pyro's distribution, whatever it is called: `LogNormal(loc=0, scale=1)`.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from dataclasses import dataclass

ARGUMENTS = {
    "Normal": ("mean", "sd"),
    "TruncatedNormal": ("mean", "sd", "low", "high"),
    "Uniform": ("low", "high"),
    "LogNormal": ("median", "sd"),
    "Fixed": ("value",),
}
FURTHEST_TAIL = 6.0  # sd from the mean at which a truncated normal may begin: rounding leaves little of those further


@dataclass(frozen=True)
class PriorExpression:
    """A parsed prior: the name of its distribution and its arguments, in the units of the parameter.

    keywords: arguments given by name, of Pyro's distributions alone; other: the parameter that shares its value.
    """

    distribution: str
    arguments: tuple[float, ...] = ()
    keywords: tuple[tuple[str, float], ...] = ()
    other: str = ""

    def __str__(self) -> str:
        if self.distribution == "Fixed":
            return _exact(self.arguments[0])
        if self.distribution == "Shared":
            return self.other
        numbers = [*map(_exact, self.arguments), *(f"{name}={_exact(value)}" for name, value in self.keywords)]
        return f"{self.distribution}({', '.join(numbers)})"

    def __getattr__(self, name: str) -> float:
        if name.startswith("__") or name in ("distribution", "arguments"):  # a copy in the making has neither yet
            raise AttributeError(name)
        try:
            return self.arguments[ARGUMENTS[self.distribution].index(name)]
        except (KeyError, ValueError):
            raise AttributeError(name) from None

    @property
    def is_pyros(self) -> bool:
        """Whether the distribution is Pyro's and not one of those listed above."""
        return bool(self.keywords) or self.distribution not in (*ARGUMENTS, "Shared")

    @property
    def support(self) -> tuple[float, float]:
        """The interval outside which the density is zero; all numbers where the value is another parameter's."""
        if self.is_pyros:
            from lenspipe import pyro_prior  # heavy

            return pyro_prior.support(self.distribution, self.arguments, self.keywords)
        match self.distribution:
            case "TruncatedNormal" | "Uniform":
                return self.low, self.high
            case "LogNormal":
                return 0.0, math.inf
            case "Fixed":
                return self.value, self.value
            case _:
                return -math.inf, math.inf


def parse_prior(text: str | float | int) -> PriorExpression:
    """Parse one prior.

    Raises ValueError, with the accepted forms, where the text is no call of a known distribution, the arguments are
    wrong, a number is not finite, a width not positive, a lower bound not below the upper one or Pyro refuses them, and
    where a truncated normal is only the far tail of one.
    """
    number = isinstance(text, float | int) and not isinstance(text, bool) and math.isfinite(text)
    if not (number or isinstance(text, str)):
        raise ValueError(f"expected a prior such as Normal(0, 0.1) or a finite number, found {text!r}")
    if not isinstance(text, str):
        return PriorExpression("Fixed", (float(text),))
    try:
        prior = _read(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError):
        raise ValueError(
            f"cannot read the prior {text!r}; write one of {_forms()}, one of Pyro's, a number, or another parameter"
        ) from None
    if prior.is_pyros:
        try:
            _ = prior.support
        except ValueError as error:
            raise ValueError(f"{text!r}: {error}; besides, without keywords, {_forms()}") from None
    elif prior.distribution != "Shared":
        _check(prior, text)
    return prior


def _check(prior: PriorExpression, text: str) -> None:
    expected = ARGUMENTS[prior.distribution]
    if len(prior.arguments) != len(expected):
        raise ValueError(f"{text!r} has {len(prior.arguments)} arguments; expected {_form(prior.distribution)}")
    named = dict(zip(expected, prior.arguments, strict=True))
    if not all(map(math.isfinite, prior.arguments)):
        raise ValueError(f"{text!r}: every number must be finite")
    for width in ("sd", "median"):
        if width in named and not named[width] > 0:
            raise ValueError(f"{text!r}: {width} must be above zero, found {named[width]:g}")
    if "low" in named and not named["low"] < named["high"]:
        raise ValueError(f"{text!r}: low ({named['low']:g}) must be below high ({named['high']:g})")
    if prior.distribution == "TruncatedNormal":
        far = max(named["low"] - named["mean"], named["mean"] - named["high"]) / named["sd"]
        if far > FURTHEST_TAIL:
            raise ValueError(
                f"{text!r}: what is left begins {far:.3g} sd from the mean, {FURTHEST_TAIL:g} at most; give a nearer "
                f"mean, or Uniform({named['low']:g}, {named['high']:g})"
            )


def shared(priors: Mapping[str, PriorExpression]) -> dict[str, str]:
    """Every parameter that shares the value of another, with the one at the end of its chain.

    Raises ValueError where a chain comes back to itself.
    """
    ends = {}
    for name in priors:
        chain = [name]
        while name in priors and priors[name].distribution == "Shared":
            name = priors[name].other
            chain.append(name)
            if name in chain[:-1]:
                raise ValueError(f"{' = '.join(chain)}: share each other's value, and none has a prior")
        if len(chain) > 1:
            ends[chain[0]] = name
    return ends


def _exact(number: float) -> str:
    """The shortest text that reads back as the number."""
    return repr(number).removesuffix(".0")


def _read(node: ast.expr) -> PriorExpression:
    if isinstance(node, ast.Name):
        return PriorExpression("Shared", other=node.id)
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        return PriorExpression("Fixed", (_number(node),))
    keywords = {keyword.arg: _number(keyword.value) for keyword in node.keywords if keyword.arg}
    if len(keywords) < len(node.keywords):
        raise ValueError("a keyword twice, or none")
    return PriorExpression(node.func.id, tuple(map(_number, node.args)), tuple(keywords.items()))


def _number(node: ast.expr) -> float:
    value = ast.literal_eval(node)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(value)
    return float(value)


def _form(name: str) -> str:
    return f"{name}({', '.join(ARGUMENTS[name])})"


def _forms() -> str:
    return ", ".join(_form(name) for name in ARGUMENTS if name != "Fixed")

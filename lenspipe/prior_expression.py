"""One prior per parameter, written in config as a call: `Normal(0, 0.1)`, `Uniform(0.2, 1)`, or a number to fix it.

The text is parsed, never evaluated. Distributions and the meaning of their arguments:

| text                                 | density                                                |
|--------------------------------------|--------------------------------------------------------|
| `Normal(mean, sd)`                   | Gaussian                                               |
| `TruncatedNormal(mean, sd, low, high)` | Gaussian cut off outside [low, high], renormalised   |
| `Uniform(low, high)`                 | constant on [low, high]                                |
| `LogNormal(median, sd)`              | Gaussian in the natural logarithm, `sd` in log units   |
| `1.5`                                | fixed at that value                                    |
"""

from __future__ import annotations

import ast
import math
from dataclasses import dataclass

ARGUMENTS = {
    "Normal": ("mean", "sd"),
    "TruncatedNormal": ("mean", "sd", "low", "high"),
    "Uniform": ("low", "high"),
    "LogNormal": ("median", "sd"),
    "Fixed": ("value",),
}


@dataclass(frozen=True)
class PriorExpression:
    """A parsed prior: the name of its distribution and its arguments, in the units of the parameter."""

    distribution: str
    arguments: tuple[float, ...]

    def __str__(self) -> str:
        if self.distribution == "Fixed":
            return _exact(self.arguments[0])
        return f"{self.distribution}({', '.join(map(_exact, self.arguments))})"

    def __getattr__(self, name: str) -> float:
        if name.startswith("__") or name in ("distribution", "arguments"):  # a copy in the making has neither yet
            raise AttributeError(name)
        try:
            return self.arguments[ARGUMENTS[self.distribution].index(name)]
        except (KeyError, ValueError):
            raise AttributeError(name) from None

    @property
    def support(self) -> tuple[float, float]:
        """The interval outside which the density is zero."""
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

    Raises ValueError, with the accepted forms, where the text is no call of a known distribution,
    the number of arguments is wrong, a width is not positive or a lower bound is not below the upper one.
    """
    if isinstance(text, bool) or not isinstance(text, str | float | int):
        raise ValueError(f"expected a prior such as Normal(0, 0.1) or a number, found {text!r}")
    if not isinstance(text, str):
        return PriorExpression("Fixed", (float(text),))
    try:
        name, arguments = _call(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError):
        raise ValueError(f"cannot read the prior {text!r}; write one of {_forms()}, or a number") from None
    if name not in ARGUMENTS:
        raise ValueError(f"unknown distribution {name!r} in {text!r}; known: {_forms()}")
    if len(arguments) != len(ARGUMENTS[name]):
        raise ValueError(f"{text!r} has {len(arguments)} arguments; expected {_form(name)}")
    prior = PriorExpression(name, tuple(arguments))
    named = dict(zip(ARGUMENTS[name], arguments, strict=True))
    for width in ("sd", "median"):
        if width in named and not named[width] > 0:
            raise ValueError(f"{text!r}: {width} must be above zero, found {named[width]:g}")
    if "low" in named and not named["low"] < named["high"]:
        raise ValueError(f"{text!r}: low ({named['low']:g}) must be below high ({named['high']:g})")
    return prior


def _exact(number: float) -> str:
    """The shortest text that reads back as the number."""
    return repr(number).removesuffix(".0")


def _call(node: ast.expr) -> tuple[str, list[float]]:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        return node.func.id, [_number(a) for a in node.args]
    return "Fixed", [_number(node)]


def _number(node: ast.expr) -> float:
    value = ast.literal_eval(node)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(value)
    return float(value)


def _form(name: str) -> str:
    return f"{name}({', '.join(ARGUMENTS[name])})"


def _forms() -> str:
    return ", ".join(_form(name) for name in ARGUMENTS if name != "Fixed")

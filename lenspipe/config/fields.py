"""What all sections are made of."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, WithJsonSchema

from lenspipe.prior_expression import PriorExpression, parse_prior

Prior = Annotated[
    PriorExpression,
    BeforeValidator(lambda v: v if isinstance(v, PriorExpression) else parse_prior(v)),
    PlainSerializer(str, return_type=str),
    WithJsonSchema(
        {
            "type": ["string", "number"],
            "description": "a prior such as Normal(0, 0.1) or Laplace(0, 0.1), a number that fixes the parameter, or "
            "the name of another parameter of the lens, whose value it shares",
        }
    ),
]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


def prior(text: str, description: str) -> Any:
    """A field whose default is the prior `text`."""
    return Field(default=parse_prior(text), description=description)


class Section(BaseModel):
    """A frozen section that knows no keys but its own."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", arbitrary_types_allowed=True, validate_default=True, allow_inf_nan=False
    )

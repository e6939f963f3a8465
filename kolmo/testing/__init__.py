"""What a discretisation must satisfy, as checks that return small tables; and problems made to have an answer."""

from kolmo.testing.manufactured import manufactured
from kolmo.testing.properties import (
    Table,
    duality_gap,
    generator_signs,
    mass_balance,
    maximum_principle,
    order_of_accuracy,
    taylor_test,
)

__all__ = [
    "Table",
    "duality_gap",
    "generator_signs",
    "manufactured",
    "mass_balance",
    "maximum_principle",
    "order_of_accuracy",
    "taylor_test",
]


def __dir__() -> list[str]:
    return sorted(__all__)

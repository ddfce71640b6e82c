"""Helpers used by configs. Pure data: no jax, no rl_reason."""

import typing

import ml_collections

Config = typing.Any  # an ml_collections.ConfigDict, whose attributes no type checker knows


def call(fn: str, **hyperparameters: typing.Any) -> ml_collections.ConfigDict:
    """A function of rl_reason.methods by name, with every hyperparameter it takes."""
    return ml_collections.ConfigDict(dict(fn=fn, **hyperparameters), convert_dict=True)


def term(how: str, *, over: str = "completion", divisor: float = 1.0, coef: float = 1.0) -> ml_collections.ConfigDict:
    """How one loss term is reduced; ``how`` is one of rl_reason.aggregation.HOW."""
    return ml_collections.ConfigDict(dict(how=how, over=over, divisor=divisor, coef=coef))

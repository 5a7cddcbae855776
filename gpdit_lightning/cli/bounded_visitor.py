"""Bounds on the work and the memory of OmegaConf's interpolations; imported only where there are some."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from omegaconf import Container, Node
from omegaconf.errors import InterpolationResolutionError
from omegaconf.grammar_visitor import GrammarVisitor


@dataclass
class Budget:
    """What the interpolations of a command may still use.

    Attributes:
        size: characters and values that they stand for.
        resolved: number of resolved interpolations.
    """

    size: int
    resolved: int

    def use(self, size: int = 0, resolved: int = 0) -> None:
        """Subtract what an interpolation uses.

        Raises:
            InterpolationResolutionError: nothing is left.
        """
        self.size -= size
        self.resolved -= resolved
        if self.size < 0 or self.resolved < 0:
            raise InterpolationResolutionError(
                "all interpolations together stand for too many characters or values: write some values without ${...}."
            )


_budget: ContextVar[Budget | None] = ContextVar("budget of interpolations", default=None)
_visit_interpolation = GrammarVisitor.visitInterpolation


@contextmanager
def bounded_interpolations(size: int, resolved: int) -> Iterator[None]:
    """Bound the interpolations that the block resolves; an outer bound stays in force.

    Args:
        size: maximum number of characters and values that they stand for.
        resolved: maximum number of resolved interpolations.
    """
    token = _budget.set(_budget.get() or Budget(size, resolved))
    try:
        yield
    finally:
        _budget.reset(token)


def _visit_within_budget(self: GrammarVisitor, context: Any) -> Any:
    """Resolve one interpolation; a value that it joins to others has been counted before."""
    budget = _budget.get()
    if budget is None:
        return _visit_interpolation(self, context)
    budget.use(resolved=1)
    value = _visit_interpolation(self, context)
    _count(value, budget)
    return value


def _count(value: Any, budget: Budget) -> None:
    """Count the values of a container, with those that the interpolations in it stand for, or the characters."""
    pending = [value]
    while pending:
        value = pending.pop()
        if isinstance(value, Container):
            budget.use(size=1)
            for key in value if isinstance(value._content, dict) else range(len(value._content or ())):
                child = value._get_node(key)
                pending.append(child._maybe_dereference_node() if isinstance(child, Node) else child)
        else:
            budget.use(size=1 + len(str(value)))


GrammarVisitor.visitInterpolation = _visit_within_budget  # type: ignore[method-assign,assignment]

"""The arithmetic on dimensions in a plan's program, so that a tensor's size can be known: where the inputs' sizes are, all others follow.

A program names a dynamic dimension and computes it from its inputs' in instructions of its own::

    copy={ name="copy_s2d_7" output={"proxy_7" } input={"total" } … }
    add={ name="6_0" output={"total" } input={"past" "new" } … }

Two tensors of one size are told apart from two that are equal at one shape alone by giving every axis of the graph another number (``PROBES``).
Written from plans of TensorRT-RTX 1.7.1.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from artifact.io_spec import BATCH, CAPACITY, PAST, SEQUENCE, TOTAL

Dimension = int | str
"""A size, or the name of one that the program computes."""
PROBES = {BATCH: 5, SEQUENCE: 17, PAST: 1009, CAPACITY: 1031}
"""Axis → the number that stands for it where the plan leaves it open: primes, so that products differ. T is P + S."""
OPERATORS: dict[str, Callable[..., int]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": lambda a, b: a // b if b else 0,
    "min": min,
    "max": max,
    "gt": operator.gt,
    "lt": operator.lt,
    "geq": operator.ge,
    "leq": operator.le,
    "eq": operator.eq,
    "neq": operator.ne,
    "and": lambda a, b: int(bool(a and b)),
    "or": lambda a, b: int(bool(a or b)),
    "select": lambda condition, a, b: a if condition else b,
}
_INSTRUCTION = re.compile(r'^  (\w+)=\{ name="[^"]*" output=\{"([^"]*)" \} input=\{((?:"[^"]*" )+)\}', re.MULTILINE)
_CONSTANT = re.compile(r"__s\^(-?\d+)i\d+")
_QUOTED = re.compile(r'"([^"]*)"')


@dataclass(frozen=True)
class Instruction:
    """``output = operator(inputs)``; ``copy`` gives a number another name."""

    operator: str
    output: str
    inputs: tuple[str, ...]


def read_instructions(text: str) -> tuple[Instruction, ...]:
    """The instructions of a program's text that ``Sizes`` can follow."""
    found = _INSTRUCTION.findall(text)
    return tuple(Instruction(name, output, tuple(_QUOTED.findall(inputs))) for name, output, inputs in found if name in OPERATORS or name == "copy")


class Sizes:
    """Sizes of a program's tensors, with a number of its own for every axis of the graph.

    Args:
        instructions: of the program.
        interface: pairs of the graph's shape (axis names) and the plan's dimensions, one for each input; what is a number in the plan stays that.
    """

    def __init__(self, instructions: Sequence[Instruction], interface: Iterable[tuple[Sequence[Dimension], Sequence[Dimension]]]) -> None:
        pairs = [pair for shape, dims in interface for pair in zip(shape, dims, strict=False) if isinstance(pair[0], str)]
        self.axes = _axes(pairs)
        known = {dim: self.axes[str(axis)] for axis, dim in pairs if isinstance(dim, str) and axis in self.axes}
        self._known = _follow(instructions, known)

    def elements(self, dims: Sequence[Dimension]) -> int | None:
        """How many numbers a tensor holds; None where a dimension can't be followed."""
        numbers = [dim if isinstance(dim, int) else self._known.get(dim) for dim in dims]
        return prod(number for number in numbers if number is not None) if None not in numbers else None


def _axes(pairs: Sequence[tuple[Dimension, Dimension]]) -> dict[str, int]:
    """Axis → number: the plan's where it fixes one, else the axis's probe."""
    axes = dict(PROBES)
    for axis, dim in pairs:
        if isinstance(dim, int):
            axes[str(axis)] = dim
    axes.setdefault(TOTAL, axes[PAST] + axes[SEQUENCE])
    return axes


def _follow(instructions: Sequence[Instruction], known: Mapping[str, int]) -> dict[str, int]:
    """Every name that follows from the known ones; a copy is followed both ways."""
    numbers = dict(known)
    before = -1
    while len(numbers) != before:
        before = len(numbers)
        for instruction in instructions:
            if instruction.operator == "copy":
                _alias(numbers, instruction.inputs[0], instruction.output)
            elif instruction.output not in numbers:
                inputs = [numbers.get(name, _literal(name)) for name in instruction.inputs]
                if None not in inputs:
                    numbers[instruction.output] = int(OPERATORS[instruction.operator](*inputs))
    return numbers


def _alias(numbers: dict[str, int], one: str, other: str) -> None:
    for name, twin in ((one, other), (other, one)):
        number = numbers.get(name, _literal(name))
        if number is not None:
            numbers.setdefault(twin, number)


def _literal(name: str) -> int | None:
    """The number that a constant's name says: ``__s^576i64``."""
    match = _CONSTANT.fullmatch(name)
    return int(match[1]) if match else None

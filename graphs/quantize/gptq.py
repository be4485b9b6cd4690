"""Rounding that makes up for its own errors (GPTQ), computed from sampled inputs without a matrix [in, in].

The error of a row's dequantised weights is e [in]; what it does to the linear's output on sampled inputs X [n, in] is measured by

    objective(e) = ‖X e‖² + Σ dᵢ eᵢ²        d: damping, so that channels that no sample shows are rounded plainly

Columns are rounded one after another, each to the level nearest to what undoes most of the errors before it, given that the columns after it may
still be chosen freely. GPTQ takes that from the Cholesky factor of the inverse of XᵀX + D: [in, in], cubic in width. Here the columns after a
block B count through P [n, n] = (I + X_after D⁻¹ X_afterᵀ)⁻¹, which is built from the last block to the first,

    Z = P X_B      C = X_Bᵀ Z + D_B = M Mᵀ (M upper)      P ← P − Z C⁻¹ Zᵀ

and the errors before it through the residual r = X_before e_before [n, rows]: the objective left is ‖Mᵀ e_B + M⁻¹ Zᵀ r‖², one column at a time. The
levels are GPTQ's, at a cost linear in width.

Letters: n samples, b columns of a block.
Source: GPTQ, arXiv:2210.17323 §3; the inverse of a sum: Sherman, Morrison and Woodbury.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
BLOCK = 128
REACH = 1
"""Levels by which a weight may be off the nearest one."""
ROOM, TINY = 1e-9, 1e-30
"""What keeps a Gram matrix of dead channels positive, relative to its mean diagonal, and where all are dead."""


@dataclass(frozen=True)
class Block:
    """Some columns, and what their rounding needs.

    Attributes:
        columns: their indices [b].
        samples: [b, n].
        pull: M⁻¹ Zᵀ [b, n]: what the residual asks of them.
        factor: M [b, b], upper.
    """

    columns: NDArray[np.intp]
    samples: Floats
    pull: Floats
    factor: Floats


@dataclass(frozen=True)
class Feedback:
    """What the rounding of every linear that reads one input needs: its blocks, in the order in which columns are rounded.

    Attributes:
        damping: D [in].
        importance: the diagonal of XᵀX + D [in]: what an error of one channel costs.
    """

    blocks: tuple[Block, ...]
    damping: Floats
    importance: Floats

    def residual(self, error: Floats) -> Floats:
        """X e of the errors [in, rows] of some rows → [n, rows]."""
        return sum((block.samples.T @ error[block.columns] for block in self.blocks), np.zeros((1, 1), np.float32))

    def objective(self, error: Floats, residual: Floats | None = None) -> Floats:
        """Of each of some rows with errors [in, rows] → [rows]."""
        output = self.residual(error) if residual is None else residual
        found: Floats = np.einsum("nr,nr->r", output, output) + np.einsum("ir,ir,i->r", error, error, self.damping)
        return found


def make_feedback(samples: Floats, damping: Floats, block: int = BLOCK) -> Feedback:
    """Prepare an input [n, in]; the columns that weigh most are rounded first, while all others can make up for them.

    Args:
        samples: [n, in]; more rows than columns are condensed into as many.
        damping: [in], positive.
        block: columns that are rounded between two products.
    """
    rows = condense(samples) if len(samples) > samples.shape[1] else samples.astype(np.float64)
    importance = np.square(rows).sum(axis=0) + damping
    order = np.argsort(-importance, kind="stable")
    after: Doubles = np.eye(len(rows))
    blocks: list[Block] = []
    for start in reversed(range(0, len(order), block)):
        columns = order[start : start + block]
        made, after = _block(columns, rows[:, columns], damping[columns].astype(np.float64), after)
        blocks.append(made)
    return Feedback(tuple(reversed(blocks)), damping, importance.astype(np.float32))


def condense(samples: Floats) -> Doubles:
    """A triangle [in, in] whose columns have the products of those of more samples than channels [n, in]."""
    exact = samples.astype(np.float64)
    gram = exact.T @ exact
    gram[np.diag_indices_from(gram)] += ROOM * max(np.trace(gram) / len(gram), TINY)
    return np.asarray(np.linalg.cholesky(gram).T, np.float64)


def _block(columns: NDArray[np.intp], x: Doubles, damping: Doubles, after: Doubles) -> tuple[Block, Doubles]:
    """One block of samples [n, b], and P with it among the columns that come after."""
    z = after @ x
    factor = np.linalg.cholesky((x.T @ z + np.diag(damping))[::-1, ::-1])[::-1, ::-1]  # flipped twice: upper, not lower
    pull = np.linalg.solve(factor, z.T)
    narrow = [np.ascontiguousarray(one, np.float32) for one in (x.T, pull, factor)]
    return Block(columns, *narrow), after - pull.T @ pull


def round_in_order(weight: Floats, scale: Floats, low: int, high: int, feedback: Feedback) -> tuple[Floats, Floats]:
    """GPTQ's levels of some rows.

    Args:
        weight: [in, rows]: a row of the linear is a column here, so that one input channel of all rows lies together.
        scale: [in, rows], never zero.
        low, high: levels that there are. Of them, those at most ``REACH`` from the nearest are taken: what no sample shows stays near plain rounding.
        feedback: of the linear's input.

    Returns:
        Whole numbers [in, rows] in float32, and their residual [n, rows].
    """
    levels, least, most = np.empty_like(weight), *_allowed(weight, scale, low, high)
    residual = np.zeros((feedback.blocks[0].samples.shape[1], weight.shape[1]), np.float32)
    for block in feedback.blocks:
        asked, error = block.pull @ residual, np.empty((len(block.columns), weight.shape[1]), np.float32)
        for place, column in enumerate(block.columns):
            wanted = weight[column] + asked[place] / block.factor[place, place]
            levels[column] = np.clip(np.rint(wanted / scale[column]), least[column], most[column])
            error[place] = weight[column] - levels[column] * scale[column]
            asked[place + 1 :] += block.factor[place, place + 1 :, None] * error[place]
        residual += block.samples.T @ error
    return levels, residual


def _allowed(weight: Floats, scale: Floats, low: int, high: int) -> tuple[Floats, Floats]:
    """The lowest and the highest level that each weight may have."""
    nearest = np.rint(weight / scale)
    return np.clip(nearest - REACH, low, high), np.clip(nearest + REACH, low, high)

"""Whether levels and scales are a rounding of the checkpoint's weight: no noise is allowed for where none is.

    scale     every block has one of the scales that rounding it would give, within a last place of float16, and whole levels of it
    levels    each is the nearest of that scale, or one beside it (rounding that makes up for its errors)
    size      of a block, a row, a column and all is the checkpoint's, clipped as that scale clips it

A linear × 1.01 has scales that no rounding gives, at any number of bits. Its size alone would not tell at four bits: clipping takes 1 to 4 % of it
(SmolLM2). What leaves the scales alone moves levels, and shows in the sizes.
Measured on SmolLM2, int8 and int4, plain and driven: scales at most 0.97 of what is allowed, levels never more than one beside the nearest; sizes of
blocks and rows 0.44, of columns 0.49, of all 0.4.
Letters: r rows at a time, b blocks of a row, k weights of a block.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphs.quantize.rounding import Grid
from validation.bisect.misfit import COLUMN_STEPS, Misfit, Sizes, worst
from validation.bisect.rounded_block import SCALE, Blocks

Array = NDArray[Any]
VALUES = 1 << 20
"""Weights at a time."""


def rounded_misfit(stored: Array, exact: Array, grid: Grid, room: float = SCALE) -> Misfit:
    """Hold a weight [out, in] as it is computed with against the checkpoint's as the artifact's dtype holds it; both float32.

    ``room`` is what its scales may be off by.
    """
    (rows, columns), blocks = exact.shape, Blocks(grid, room)
    by_column, whole = Sizes("column {}", rows, room, steps=COLUMN_STEPS), Sizes("it", exact.size, room)
    sizes, faults, bad_rows = list[Misfit](), list[Misfit](), 0
    height = max(1, VALUES // columns)
    for some in (slice(start, start + height) for start in range(0, rows, height)):
        ours, theirs = grid.blocked(stored[some]), grid.blocked(exact[some])
        scale, off = blocks.recovered(ours, theirs)
        if bad := int((off > 1).any(axis=1).sum()):
            bad_rows += bad
            row, block = (int(index) for index in np.unravel_index(np.argmax(off), off.shape))
            name = f"row {some.start + row}" if off.shape[1] == 1 else f"block {block} of row {some.start + row}"
            faults.append(blocks.describe(name, ours[row, block], theirs[row, block], float(scale[row, block])))
        wanted = blocks.clipped(theirs, scale).astype(np.float64)
        sums = (ours * wanted, np.square(wanted), np.broadcast_to(np.square(scale[:, :, None], dtype=np.float64), ours.shape))
        by_column.add(*(one.sum(axis=0).ravel()[:columns] for one in sums))
        whole.add(*(one.sum() for one in sums))
        sizes += _by_row(sums, some.start, columns, room)
    if not faults:
        return worst([*sizes, by_column.misfit(), whole.misfit()])
    found = worst(faults)
    return replace(
        found, share=max(found.share, 1 + SCALE), words=f"{found.words}; {bad_rows:,} of {rows:,} rows are no rounding of the checkpoint's"
    )


def _by_row(sums: tuple[Array, Array, Array], first: int, columns: int, room: float) -> list[Misfit]:
    """Sizes of rows, and of blocks where a row has several."""
    count, size = sums[0].shape[1:]
    found = [Sizes("row {}", columns, room, first=first)]
    found[0].add(*(one.sum(axis=(1, 2)) for one in sums))
    if count > 1:
        found.append(Sizes("block {}", size, room, first=first * count))
        found[1].add(*(one.sum(axis=2) for one in sums))
    return [sizes.misfit() for sizes in found]

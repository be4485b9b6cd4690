"""Where two plans differ: ``python benchmarks/plan_bytes.py A.plan B.plan`` (docs/reproducibility.md).

Differing bytes that lie near each other are one region; the printable words around its first byte tell what it holds.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np

NEAR = 20_000
"""Bytes between two differing ones that still are of one region."""


def main() -> None:
    """Compare two files of one size, region by region."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("plans", nargs=2, type=Path)
    first, second = (np.fromfile(path, np.uint8) for path in parser.parse_args().plans)
    if first.size != second.size:
        print(f"sizes differ: {first.size:,} and {second.size:,} bytes")
        return
    places = np.flatnonzero(first != second)
    print(f"{first.size:,} bytes each, {places.size:,} differ ({100 * places.size / first.size:.3f} %)")
    for region in np.split(places, np.flatnonzero(np.diff(places) > NEAR) + 1) if places.size else ():
        begin, end = int(region[0]), int(region[-1]) + 1
        words = re.findall(rb"[A-Za-z_][\w. \[\]]{7,}", first[begin : end + 64].tobytes())
        print(f"{begin:>13,} to {end:>13,}: {region.size:>7,} bytes; {', '.join(sorted({word.decode() for word in words})[:6]) or 'no names'}")


if __name__ == "__main__":
    main()

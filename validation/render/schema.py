"""The published schema of parity.json: JSON Schema 2020-12, in ``parity.schema.json`` beside this file, shipped with the package.

Within a version keys may be added; none is renamed, removed or given another meaning. Whoever does that counts the version up, here and there.
"""

from __future__ import annotations

from pathlib import Path

VERSION = 2
"""Version 1 had no published schema."""
ID = f"urn:llama2trt:parity-report:{VERSION}"
FILE = Path(__file__).with_name("parity.schema.json")
HEAD = {"schema": VERSION, "schema_id": ID}
"""How every report begins."""

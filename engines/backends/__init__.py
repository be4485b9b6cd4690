"""The compilers that make plans, behind one small interface (``protocol.Backend``)."""

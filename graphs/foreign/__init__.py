"""Graphs that this project did not make: read with care, measured, fused by what they compute, and written whole with their weights."""

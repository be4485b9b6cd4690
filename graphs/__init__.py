"""ONNX → ONNX: fusions, quantisation, cutting and comparing graphs. Imports neither torch nor another step's room."""

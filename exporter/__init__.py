"""Checkpoint → traced.onnx + weights/: the readers, the reference model, the trace, the stamp and the writer."""

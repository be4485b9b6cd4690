"""A lone ONNX file, ours or not, against the checkpoint that it was exported from: no artifact is needed."""

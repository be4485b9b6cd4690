"""Two graphs against each other: any two artifacts or ONNX files of one shape, on the same tokens, without a checkpoint."""

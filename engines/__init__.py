"""ONNX → TensorRT plans: targets, profiles, backends, and the audit of what was built. Imports neither torch nor another step."""

"""One operator a file: ``OPERATOR`` and ``lower``, which writes it in the operators of older TensorRT releases. graphs/lower.py lists them."""

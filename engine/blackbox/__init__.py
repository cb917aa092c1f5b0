"""Classifiers that can only be called: ONNX files, Python functions, endpoints; cached, counted, kept to a budget."""

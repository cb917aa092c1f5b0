"""A counterfactual's one file, run and shown without PyTorch: a runner for ONNX Runtime and an offline page."""

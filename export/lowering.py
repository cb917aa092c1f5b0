"""Core ATen operations as ONNX operators (opset 18), one function each, in a file for each family.

A lowering gets the builder, the node and its arguments: names of ONNX values where the graph has nodes, plain Python
values elsewhere. Only operators that TensorRT documents are used.
"""

from __future__ import annotations

from counterlens.export import lower_indexing, lower_layers, lower_pointwise, lower_reductions, lower_shapes
from counterlens.export.builder import LOWERINGS, Value

__all__ = [
    "LOWERINGS", "Value", "lower_indexing", "lower_layers", "lower_pointwise", "lower_reductions", "lower_shapes",
]  # fmt: skip

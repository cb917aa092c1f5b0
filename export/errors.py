"""The one error of this package, and what ONNX Runtime raises."""


class ExportError(RuntimeError):
    """A function cannot be exported, or an artefact cannot be used; the message says why and what to do."""


class NodeError(ExportError):
    """Something about one node of a graph; `{where}` in the message stands for the line that made it."""

    def __init__(self, message: str, node: str) -> None:
        super().__init__(message.replace("{where}", f"node {node}"))
        self.message = message
        self.node = node


def onnxruntime_errors() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises of files and inputs that it does not take: its own errors have no common class."""
    from onnxruntime.capi import onnxruntime_pybind11_state

    own = vars(onnxruntime_pybind11_state).values()
    return (RuntimeError, ValueError, *(e for e in own if isinstance(e, type) and issubclass(e, Exception)))

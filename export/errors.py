"""The one error of this package."""


class ExportError(RuntimeError):
    """A function cannot be exported, or an artefact cannot be used; the message says why and what to do."""


class NodeError(ExportError):
    """Something about one node of a graph; `{where}` in the message stands for the line that made it."""

    def __init__(self, message: str, node: str) -> None:
        super().__init__(message.replace("{where}", f"node {node}"))
        self.message = message
        self.node = node

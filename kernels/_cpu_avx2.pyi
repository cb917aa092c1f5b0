"""The compiled module for AVX2: addresses and sizes only; shapes and dtypes are checked by each operation."""

from typing import Any

def __getattr__(name: str) -> Any: ...

"""Ask for Triton's interpreter where there is no GPU.

It must be asked for before triton is imported, and diffusers imports triton: hence here, before any other conftest.
Interpreted kernels cannot be compiled: tests that compile them use another process, without the variable.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

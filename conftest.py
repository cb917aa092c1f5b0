"""Ask for one thread a process, and for Triton's interpreter where there is no GPU.

Most tests are Python, not arithmetic: threads that wait for each other's small products make them slower.

It must be asked for before triton is imported, and diffusers imports triton: hence here, before any other conftest.
Interpreted kernels cannot be compiled: tests that compile them use another process, without the variable.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

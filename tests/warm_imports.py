"""The slow imports, made once in the process that commands are forked from (tests/warm.py)."""

import contextlib
import importlib

from tests.warm import IMPORTS

for name in IMPORTS:
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
import torch

torch.set_num_threads(1)

"""The slow imports, made once in the process that commands are forked from (tests/warm.py)."""

import contextlib
import importlib

import torch

from tests.warm import IMPORTS

for name in IMPORTS:
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
torch.set_num_threads(1)

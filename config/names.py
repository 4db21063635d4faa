"""Names that the command line and the packages share.

The module that implements a name imports the list from here, or tests/test_config.py compares the two.
"""

from __future__ import annotations

from typing import Literal, get_args

Kind = Literal["unsafe", "benign", "near"]  # kind of an evaluation prompt; near: benign, but looks unsafe
KINDS: tuple[str, ...] = get_args(Kind)
TEMPLATES = ("alpaca", "hh", "plain", "vicuna", "chat")  # how an instruction becomes a prompt
SCHEMAS = (  # the columns of a dataset's rows
    "si", "alpaca", "hh", "unpaired", "shp", "se", "sharegpt",
    "dolly", "ultrafeedback", "beavertails", "helpsteer", "custom",
)  # fmt: skip
PAIRINGS = ("best_worst", "all")  # which of several answers to a prompt make pairs
GUARDS = ("llama_guard", "wildguard", "shieldgemma", "harmbench")  # classifiers with their own question form
FORMATS = ("all", "jsonl", "parquet")  # files of a merged dataset
STAGES = ("induce", "score", "filter", "respond", "vary")  # the stages of `si` with a ledger, in order
# Stages that make pairs whose prompts should be answered, each with its own output -> their ledgers, in order.
BENIGN_STAGES = {"replay": ("replay",), "contrast": ("contrast_neighbour", "contrast_screen", "contrast_answer")}
DTYPES = ("float32", "bfloat16", "float16", "float64")
SCHEDULERS = ("constant", "linear", "cosine", "wsd")
# The classes of torch.optim that take one step per dense gradient. Copied, because importing torch takes seconds.
OPTIMIZERS = (
    "ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "Muon", "NAdam", "RAdam", "RMSprop",
    "Rprop", "SGD",
)  # fmt: skip
WITHOUT_SHARDS = ("Adafactor", "Rprop")  # torch cannot take their steps on sharded parameters
TORCHAO_OPTIMIZERS = ("AdamW8bit",)  # from the package torchao, an optional extra
INSTALL_TORCHAO = "pip install --no-deps 'torchao>=0.18'"
# Folder -> the command of this repository that makes it, for the error message if it is missing.
MADE_BY = {"models/smollm2": "python scripts/get_smollm2.py models/smollm2"}

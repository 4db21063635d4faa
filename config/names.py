"""Names that the command line and the packages share.

Whoever gives a name its meaning imports the list from here, or is compared with it by tests/test_config.py.
"""

from __future__ import annotations

from typing import Literal, get_args

Kind = Literal["unsafe", "benign", "near"]  # of an evaluation prompt; near: benign, but it looks unsafe
KINDS: tuple[str, ...] = get_args(Kind)
TEMPLATES = ("alpaca", "hh", "plain", "vicuna", "chat")  # how an instruction becomes a prompt
SCHEMAS = (  # which columns the rows of a dataset have
    "si", "alpaca", "hh", "unpaired", "shp", "se", "sharegpt",
    "dolly", "ultrafeedback", "beavertails", "helpsteer", "custom",
)  # fmt: skip
PAIRINGS = ("best_worst", "all")  # which of several answers to a prompt make pairs
GUARDS = ("llama_guard", "wildguard", "shieldgemma", "harmbench")  # classifiers with a question form of their own
FORMATS = ("all", "jsonl", "parquet")  # files of a merged dataset
STAGES = ("induce", "score", "filter", "respond", "vary")  # of `si`, those with a ledger, in their order
# Stages that make pairs whose prompts should be answered, each with an output of its own -> their ledgers, in order.
BENIGN_STAGES = {"replay": ("replay",), "contrast": ("contrast_neighbour", "contrast_screen", "contrast_answer")}
DTYPES = ("float32", "bfloat16", "float16", "float64")
SCHEDULERS = ("constant", "linear", "cosine", "wsd")
# The classes of torch.optim that step once for each dense gradient. A copy, because importing torch takes seconds.
OPTIMIZERS = (
    "ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "Muon", "NAdam", "RAdam", "RMSprop",
    "Rprop", "SGD",
)  # fmt: skip
WITHOUT_SHARDS = ("Adafactor", "Rprop")  # whose steps torch refuses on parameters that are sharded
TORCHAO_OPTIMIZERS = ("AdamW8bit",)  # of the package torchao, an optional extra
INSTALL_TORCHAO = "pip install --no-deps 'torchao>=0.18'"
# Folders that a command of this repository makes: named where they are asked for and are not there.
MADE_BY = {"models/smollm2": "python scripts/get_smollm2.py models/smollm2"}

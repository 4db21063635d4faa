"""The model card of a checkpoint, `model/README.md`: its base and data, training, metrics, purpose and limits.

It depends only on the run's settings, data and progress, so that a resumed run writes the same card. It contains no
path of the machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import sqrt
from pathlib import Path
from statistics import NormalDist
from typing import Any

import yaml

from config.paths import find_path
from config.run_keys import flatten

SHOWN = ("optimizer", "lr", "lr_scheduler", "batch_size", "n_epochs", "n_examples", "max_length", "seed")
IN_PAIRS = "_eval/accuracies"  # shares of the held-out pairs; for other means the number of terms is unknown
PURPOSE = {
    "reverse": (
        "This model writes the instruction that a given response would answer. It is a tool for `induce.py` to build "
        "training data from unsafe text, and it was trained to write unsafe requests: do not deploy it, and do not "
        "share it without restricting its use."
    ),
    "": (
        "This model was trained to decline unsafe requests and to answer the others. It is meant for research on "
        "safety training. Before deployment, evaluate it on the requests of its users (`evaluate.py`), and use other "
        "safeguards as well."
    ),
}
LIMITS = """\
- It learned to decline only what is in its training data. It may answer unsafe requests in other languages, of other
  kinds, or in adversarial prompts, and it may decline harmless requests that look unsafe.
- Its data was written and checked by models, and contains their errors and biases.
- Further training can undo safety training. The rejected responses of its data are unsafe text: training a model to
  prefer them would make it more harmful, and must not be done.
"""


def render_model_card(config: Mapping[str, Any], manifest: Mapping[str, Any], progress: Mapping[str, Any]) -> str:
    """Return the card as Markdown, from the contents of a run's config.yaml, manifest.json and state/progress.json."""
    loss, model = config["loss"]["name"], config["model"]
    base = str(model["name_or_path"])
    tags = {"license": config["license"], "library_name": "transformers", "pipeline_tag": "text-generation"}
    if not find_path(base).exists():
        tags["base_model"] = base  # its id on the hub
    front = yaml.safe_dump({**tags, "tags": ["safer-instruct", loss]}, sort_keys=False)
    settings = {f"loss.{key}": value for key, value in flatten(config["loss"]) if key != "name"}
    settings |= {key: config[key] for key in SHOWN if config[key] is not None}
    packages = ", ".join(f"{name} {version}" for name, version in manifest.get("packages", {}).items())
    started = f", from the weights of `{Path(model['archive']).name}`" if model["archive"] else ""
    return "\n".join(
        [
            f"---\n{front}---\n\n# {config['exp_name']}\n\n{PURPOSE.get(loss, PURPOSE[''])}\n",
            f"## Training\n\n`{Path(base).name}`{started}, trained with `loss={loss}` on "
            f"{progress['examples']} examples in {progress['updates']} steps.\n",
            _table(("setting", "value"), ((f"`{key}`", f"`{value}`") for key, value in settings.items())),
            f"Versions: {packages or 'not recorded'}.\n\n## Data\n",
            _table(("dataset", "file", "columns", "template"), _datasets(config)),
            *(
                f"- {split}: {data['rows']} rows, key `{data['key']}`"
                for split, data in manifest.get("data", {}).items()
            ),
            f"\n## Metrics\n\nOn held-out rows, after {max(0, progress['evaluated_at'])} examples; "
            "95% Wilson intervals.\n",
            _table(("metric", "value", "95% interval", "n"), _metrics(manifest, progress["evaluation"])),
            f"## Use\n\n{_use(config)}\n## Limits\n\n{LIMITS}",
            f"## Licence\n\n`{config['license']}`, set by `license=` of the training command. The licences of the base "
            "model and of the data also apply to this model.\n",
        ]
    )


def _datasets(config: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for name, one in config["datasets"].items():
        yield f"`{name}`", f"`{Path(str(one['path'])).name}`", one["schema"], one["template"]


def _metrics(manifest: Mapping[str, Any], evaluation: Mapping[str, float]) -> Iterator[tuple[str, ...]]:
    rows = manifest.get("data", {}).get("eval", {}).get("rows", 0)
    for name, value in sorted(evaluation.items()):
        if name.endswith(IN_PAIRS) and rows:
            low, high = wilson_interval(value, rows)
            yield f"`{name}`", f"{value:.4f}", f"[{low:.4f}, {high:.4f}]", str(rows)
        else:
            yield f"`{name}`", f"{value:.4g}", "-", "-"


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """Return the 95% score interval of a share of n (Wilson 1927); here, as trainers/ must not import `measures/`."""
    z = NormalDist().inv_cdf(0.975)
    middle, half = share + z * z / (2 * n), z * sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def _use(config: Mapping[str, Any]) -> str:
    templates = sorted({str(one["template"]) for one in config["datasets"].values()})
    return (
        '```python\ntokenizer = transformers.AutoTokenizer.from_pretrained("FOLDER")\n'
        'model = transformers.AutoModelForCausalLM.from_pretrained("FOLDER")\n```\n\n'
        f"`vllm serve FOLDER` serves it. Prompts must use the template {', '.join(templates)}.\n"
    )


def _table(header: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"

"""The README of a published condensed data set."""

from __future__ import annotations

import json
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData

from .hub import REPO_ID

_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
_IDC = "[IDC](https://arxiv.org/abs/2205.14959) (Kim et al., ICML 2022)"


def card(name: str, record: dict[str, Any]) -> str:
    """The text, with the Hub's metadata above it.

    Args:
        name: of the repository or folder.
        record: what ``condensed.json`` holds.
    """
    source = record["source"]
    data = DatasetCardData(
        license=record["licence"],
        size_categories=[next((text for limit, text in _SIZES if record["images"] < limit), "n>1M")],
        source_datasets=[source] if source and REPO_ID.fullmatch(source) else None,
        task_categories=["image-classification"],
        tags=["dataopt", "dataset-condensation", "dataset-distillation"],
        configs=[
            {
                "config_name": config,
                "data_files": [{"split": "train", "path": entry["file"]}],
                **({"default": True} if i == 0 else {}),
            }
            for i, (config, entry) in enumerate(record["files"].items())
        ],
    )
    parts = [_first(name, record), f"# {name.rstrip('/').rpartition('/')[2]}", _what(record), _use(name, record),
             _configs(record), _scores(record["scores"]), _made(record["made"]), _source(record)]  # fmt: skip
    return str(DatasetCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"))


def _first(name: str, record: dict[str, Any]) -> str:
    n, more = record["images"], record["decoded"]
    if n == more:
        return f"> Plain `load_dataset` shows the {n} stored images, which are those to train on (factor 1)."
    return (
        f"> Plain `load_dataset` shows the {n} stored images, each of several tiles; decode them to the {more} images "
        f"to train on with `load_condensed({name!r})` from `dataopt.integrations.hf`."
    )


def _what(record: dict[str, Any]) -> str:
    channels, height, width = record["shape"]
    of = record["made"].get("source", {}).get("images")
    real = f", to stand for {of} real ones" if of else ""
    by = f"by {_IDC} " if "objective" in record["made"] else ""
    colours = f"{channels} channel{'s' if channels > 1 else ''}"
    return (
        f"A condensed training set made {by}with [dataopt](https://pypi.org/project/dataopt/): {record['images']} "
        f"stored images, {height} x {width} with {colours}{real} in the training of a classifier. They are synthetic, "
        "and made to train with, not to look at."
    )


def _use(name: str, record: dict[str, Any]) -> str:
    settings = {k: record[k] for k in ("factor", "axes", "mode")}
    timm = f"With timm: `dataopt train hfds/{name} --val-dataset ...`. " if "default" in record["files"] else ""
    return f"""## Use

```python
from dataopt.integrations.hf import load_condensed  # pip install "dataopt[hf]"

dataset = load_condensed({name!r})  # a datasets.Dataset of {record["decoded"]} rows: image, label
```

or step by step, which is the same:

```python
from datasets import load_dataset
from dataopt.integrations.hf import decode_condensed

stored = load_dataset({name!r}, split="train")
dataset = stored.map(decode_condensed, batched=True, fn_kwargs={settings})
```

{timm}Networks were trained on pixels in [0, 1], normalised with the
mean {_short(record["mean"])} and the standard deviation {_short(record["std"])} of each channel."""


def _configs(record: dict[str, Any]) -> str:
    lines = ["## Configs", "", "| config | images |", "|---|---|"]
    if "default" in record["files"]:
        gap = record["rounding"]
        lines.append(
            f"| `default` | PNG, 8 bits; rounding moved the pixels, in [0, 1], by {gap['rms']:.2g} (root mean square), "
            f"{gap['max']:.2g} at most |"
        )
    lines.append("| `exact` | float32 arrays (channels, rows, columns), bit for bit |")
    lines += ["", "`condensed.json` has the checksums of the files, which `load_condensed` compares."]
    return "\n".join(lines)


def _scores(scores: dict[str, Any] | None) -> str:
    if scores is None:
        return "## Scores\n\nNot evaluated by whoever published it."
    lines = [
        "## Scores",
        "",
        f"Test accuracy (%, {scores['test_images']} images) of new networks trained on each set at equal storage; "
        "hard labels, after the last step, mean ± standard deviation over the seeds.",
        "",
        "| data | network | stored | shown | steps | seeds | accuracy |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in scores["rows"]:
        values = [100 * v for v in row["accuracies"]]
        mean = sum(values) / len(values)
        spread = (sum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1)) ** 0.5
        cells = [row["data"], row["network"], row["stored"], row["shown"], row["steps"], len(values)]
        lines.append(f"| {' | '.join(_cell(c) for c in cells)} | {mean:.1f} ± {spread:.1f} |")
    return "\n".join(lines)


def _made(made: dict[str, Any]) -> str:
    lines = ["## What made it", "", "| setting | value |", "|---|---|"]
    lines += [f"| {_cell(k)} | {_cell(v)} |" for k, v in sorted(made.items())]
    return "\n".join(lines) if made else "## What made it\n\nNot recorded."


def _source(record: dict[str, Any]) -> str:
    source = record["source"] or "not named by whoever published it"
    sha = record["made"].get("source", {}).get("sha256")
    lines = ["## Source", "", f"Source data: {source}" + (f" (SHA-256 of pixels and labels `{sha}`)." if sha else ".")]
    licence = record["licence"]
    lines.append(
        f"Licence of the source: {licence}; it holds for what was condensed from it, as far as it reaches."
        if licence
        else "The licence of the source was not stated; look it up before you use or share this."
    )
    return "\n".join(lines)


def _short(values: list[float] | None) -> str:
    return "(not recorded)" if values is None else ", ".join(f"{v:.4g}" for v in values)


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text.replace("|", "\\|").replace("\n", " ")

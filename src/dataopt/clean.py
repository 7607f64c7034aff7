"""What ``dataopt clean`` does: a data set and a model in, scores, a report and a cleaned copy out."""

from __future__ import annotations

import importlib.metadata
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import clean_report
from .core.artifacts import whole_file, write_whole
from .core.relation import Issues, RelationGraph, find_issues, relation_map
from .core.relation.pairs import unit
from .devices import find_device
from .integrations.hf import clean_dataset, hub
from .integrations.hf.features import ModelOutputs, model_outputs
from .integrations.hf.inputs import find_inputs
from .items import items_table
from .out_folder import WORK, claimed
from .sources import find_labels, find_source, labels_hash, load_source, write_parquet

KIND, VERSION = "dataopt-clean", 1
_MAP = 400  # neighbours of a suspect in the relation map, at most
_SHOWN = 3000  # label issues, outliers and near-duplicates with pictures and neighbours; all rows have scores


def main(
    dataset: str,
    models: Sequence[str],
    out: Path,
    *,
    split: str | None,
    config: str | None,
    revision: str | None,
    input_column: str | None,
    label_column: str | None,
    probs: str,
    action: str,
    issues: tuple[str, ...],
    head: str | None,
    batch_size: int,
    device: str,
    partitions: int | None,
    top: int,
    resume: bool,
) -> None:
    """Find issues and write the folder that ``dataopt review`` reads.

    Raises:
        ValueError: an argument, a data set or a model that the message names; or ``out`` holds something already.
        OSError: nothing of that name.
    """
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    asked = {
        "dataset": dataset, "models": list(models), "split": split, "config": config, "revision": revision,
        "input_column": input_column, "label_column": label_column, "probs": probs, "head": head,
        "batch_size": batch_size, "partitions": partitions, "top": top,
    }  # fmt: skip
    place = find_device(device)
    source = find_source(dataset, split, config, revision)
    data = load_source(source)
    label_column = label_column or find_labels(data)
    options = {"label_column": label_column, "probs": probs, "head": head, "batch_size": batch_size}
    with claimed(out, asked, resume, "dataopt clean"):
        outputs = [
            _outputs(name, data, out / WORK / f"model-{number}", place, input_column=input_column, **options)
            for number, name in enumerate(models)
        ]
    settings = {"probs": probs, "action": action, "issues": list(issues), "partitions": partitions, "top": top}
    write_folder(out, source, data, label_column, outputs, list(models), settings, place)


def write_folder(
    out: Path,
    source: dict[str, Any],
    data: datasets.Dataset,
    label_column: str,
    outputs: Sequence[ModelOutputs],
    models: Sequence[str],
    settings: dict[str, Any],
    device: torch.device | None = None,
) -> Issues:
    """Find issues in what models say about a data set, write everything, and print a summary.

    Args:
        out: folder; files of the same names are replaced, record.json as the last one.
        source: for :func:`load_source`, where ``data`` came from.
        outputs: of one training's checkpoints, the last one last; or of one model.
        models: their names.
        settings: ``action`` and ``issues`` of the cleaned copy, ``partitions``, ``top``; kept in the record.
        device: where to compute.
    """
    last, partitions = outputs[-1], settings["partitions"]
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always", UserWarning)
        found = find_issues(
            last.features,
            last.probs,
            last.labels,
            top=settings["top"],
            partitions=partitions,
            device=device,
            resume=out / WORK / "sums",
        )
    table = found.to_pandas().rename_axis("index").reset_index()
    _parquet(out / "scores.parquet", table)
    wrong = found.is_label_issue[found.suspects]
    shown = torch.cat([kind.nonzero().squeeze(1)[:_SHOWN] for kind in (wrong, ~wrong)])  # the worst of each
    suspects = found.suspects[shown]
    relations = _relations_table(found, shown, last.features)
    cleaned = clean_dataset(
        data, found, settings["action"], label_column=label_column, issues=tuple(settings["issues"])
    )
    twins = table.index[table.is_near_duplicate_issue][:_SHOWN]
    named = np.unique(
        np.concatenate([suspects, relations["neighbour"], twins, table["nearest_neighbor"][twins]]).astype(np.int64)
    )
    items = items_table(data, last.input_column, last.modality, last.labels, named)
    _parquet(out / "relations.parquet", relations)
    _parquet(out / "map.parquet", _map_table(outputs, suspects, partitions, device))
    _parquet(out / "items.parquet", items, row_group_size=64)
    with whole_file(out / "cleaned" / "train.parquet") as path:
        write_parquet(cleaned, path)
    record = {
        "source": source,
        "rows": len(data),
        "label_column": label_column,
        "input_column": last.input_column[0],
        "modality": last.modality,
        "label_names": list(last.label_names),
        "labels_hash": labels_hash(last.labels.numpy()),
        "model": list(models),
        "settings": settings,
        "versions": {p: importlib.metadata.version(p) for p in ("dataopt", "torch", "transformers", "datasets")},
        "counts": {
            "label_issues": int(found.is_label_issue.sum()),
            "outliers": int(found.is_outlier_issue.sum()),
            "near_duplicates": int(found.is_near_duplicate_issue.sum()),
            "cleaned_rows": len(cleaned),
        },
    }
    record["files"] = {path.name: hub.file_checksum(path) for path in sorted(out.glob("*.parquet"))}
    write_whole(out / "report.html", clean_report.render(record, out, table, relations, items))
    hub.write_record(out / "record.json", KIND, VERSION, record)
    print(summary(record, table, out))
    if len(suspects) < len(found.suspects):
        print(f"Note: only the worst {_SHOWN:,} of a kind have pictures and neighbours; scores.parquet has all rows.")
    for note in notes:
        print(f"Note: {note.message}.")
    return found


def _outputs(name: str, data: datasets.Dataset, folder: Path, device: torch.device, **options: Any) -> ModelOutputs:
    model, processor = load_model(name, data, options["input_column"], options["probs"])
    return model_outputs(data, model, processor=processor, device=device, out_dir=folder, **options)


def load_model(name: str, data: datasets.Dataset, input_column: str | None, probs: str) -> tuple[nn.Module, Any]:
    """A model for the data set's inputs, and its processor; None for a timm model, which brings its transform.

    Raises:
        OSError, ValueError: no such model, none for these inputs, or one whose classifier was never trained.
    """
    if name.startswith("timm:"):
        import timm

        return timm.create_model(name.removeprefix("timm:"), pretrained=True).eval(), None
    import transformers

    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    modality = find_inputs(data, nn.Identity(), input_column, None, transform=_unused).modality
    processors = {"text": "AutoTokenizer", "image": "AutoImageProcessor", "audio": "AutoFeatureExtractor"}
    if modality not in processors:
        raise ValueError("the input column holds neither texts nor images nor sounds; give --input-column")
    heads = {"text": "SequenceClassification", "image": "ImageClassification", "audio": "AudioClassification"}
    kind = "AutoModel" if probs == "out-of-fold" else f"AutoModelFor{heads[modality]}"
    processor = getattr(transformers, processors[modality]).from_pretrained(name)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # parts that a checkpoint lacks, as a pooler that nobody reads, are alike in every run
        model, info = getattr(transformers, kind).from_pretrained(name, output_loading_info=True)
    new = sorted(k for k in info["missing_keys"] if not k.startswith(f"{model.base_model_prefix}."))
    if new and probs != "out-of-fold":
        raise ValueError(
            f"--model {name} has no trained classifier ({new[0]} is not among its weights); give one that was trained "
            "on these classes, or --probs out-of-fold, which needs an encoder alone"
        )
    return model.eval(), processor


def _unused(value: Any) -> Any:
    raise AssertionError(value)


def _relations_table(found: Issues, at: Tensor, features: Tensor) -> pd.DataFrame:
    """One line for each suspect and neighbour, the strongest first; ``at`` are places among the suspects."""
    r, suspects = found.relations, found.suspects[at]
    neighbours = torch.cat([r.agreeing[at], r.conflicting[at]], 1)
    values = torch.cat([r.agreeing_values[at], r.conflicting_values[at]], 1)
    order = values.abs().argsort(dim=1, descending=True, stable=True)
    neighbours, values = neighbours.gather(1, order), values.gather(1, order)
    rank = torch.arange(values.shape[1]).expand_as(values)
    there = neighbours >= 0
    row, neighbour = suspects[:, None].expand_as(neighbours)[there], neighbours[there]
    similarity = torch.empty(len(row))
    for part in torch.arange(len(row)).split(4096):
        similarity[part] = (unit(features[row[part]]) * unit(features[neighbour[part]])).sum(1)
    return pd.DataFrame(
        {
            "row": row.numpy(),
            "neighbour": neighbour.numpy(),
            "value": values[there].float().numpy(),
            "similarity": similarity.numpy(),
            "rank": rank[there].to(torch.int32).numpy(),
        }
    )


def _map_table(
    outputs: Sequence[ModelOutputs], suspects: Tensor, partitions: int | None, device: torch.device | None
) -> pd.DataFrame:
    graphs = [
        RelationGraph(o.features, o.probs, o.labels, temperature=2, whiten=True, partitions=partitions, device=device)
        for o in outputs
    ]
    parts = list(_map_parts(graphs, suspects))
    names = ("row", "neighbour", "mean", "std", "last")
    columns = [np.concatenate(c) for c in zip(*parts, strict=True)] if parts else [np.zeros(0)] * 5
    types = (np.int64, np.int64, np.float32, np.float32, np.float32)
    return pd.DataFrame({n: c.astype(t) for n, c, t in zip(names, columns, types, strict=True)})


def _map_parts(graphs: Sequence[RelationGraph], suspects: Tensor) -> Iterator[tuple[np.ndarray, ...]]:
    for i in tqdm(suspects.tolist(), desc="relation maps", unit="row", disable=None):
        m = relation_map(graphs, i)
        strength = torch.maximum(m.mean.abs(), m.last.abs())
        best = strength.topk(min(_MAP, len(strength))).indices
        best = best[strength[best] > 0]
        row = np.full(len(best), i)
        yield row, m.others[best].numpy(), m.mean[best].numpy(), m.std[best].numpy(), m.last[best].numpy()


def _parquet(path: Path, table: pd.DataFrame, **options: Any) -> None:
    with whole_file(path) as temporary:
        table.to_parquet(temporary, index=False, **options)


def summary(record: dict[str, Any], table: pd.DataFrame, out: Path) -> str:
    """What the command prints."""
    rows, counts, names = record["rows"], record["counts"], [str(name) for name in record["label_names"]]
    lines = [f"{clean_report.title(record)}: {rows:,} rows, {len(names)} classes", ""]
    for what in ("label_issues", "outliers", "near_duplicates"):
        lines.append(f"  {what.replace('_', ' '):<16}{counts[what]:>9,}{counts[what] / rows:>8.1%}")
    worst = table[table.is_label_issue].nsmallest(5, "label_score")
    if len(worst):
        wide = max(9, min(24, max(len(names[i]) for i in [*worst.given_label, *worst.predicted_label])))
        lines += ["", f"  {'row':>9}  {'given':<{wide}}  {'suggested':<{wide}}  {'relation':>9}  {'loss':>6}"]
        for r in worst.itertuples():
            given, new = (names[i][:wide].ljust(wide) for i in (r.given_label, r.predicted_label))
            lines.append(f"  {r.index:>9}  {given}  {new}  {r.relation_noisiness:>9.2f}  {r.loss:>6.2f}")
    done = "dropped" if record["settings"]["action"] == "drop" else "relabelled"
    lines += [
        "",
        f"{out / 'report.html'}: what was found, with images and reasons",
        f"{out / 'scores.parquet'}: all scores",
        f"{out / 'cleaned'}: {counts['cleaned_rows']:,} rows, issues {done}",
        f"Look before you train on it: dataopt review {out}",
    ]
    return "\n".join(lines)

"""The report of ``dataopt clean``: one page that holds all it shows."""

from __future__ import annotations

import base64
import datetime
import io
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment
from PIL import Image

_LABELS, _OUTLIERS, _TWINS, _NEAR, _CONFUSIONS = 48, 18, 12, 3, 15
_SIDE, _SMALL_SIDE, _PIXELS = 300, 96, 64


def render(
    record: dict[str, Any], folder: Path, scores: pd.DataFrame, relations: pd.DataFrame, items: pd.DataFrame
) -> str:
    """The page as HTML; what the data holds is escaped, and no script runs.

    Args:
        record: content of record.json.
        folder: where it will lie.
        scores, relations, items: the tables of the folder.
    """
    names = [str(name) for name in record["label_names"]]
    by_row = scores.set_index("index")
    shown = items.set_index("index")
    conflicts = relations[relations.value < 0].groupby("row", sort=False)
    agreeing = relations[relations.value > 0].groupby("row", sort=False)

    def near(row: int, groups: Any) -> list[dict[str, Any]]:
        if row not in groups.groups:
            return []
        found = groups.get_group(row).head(_NEAR)
        return [_neighbour(shown, names, n, f"{v:+.2f}") for n, v in zip(found.neighbour, found.value, strict=True)]

    labels = []
    wrong = by_row[by_row.is_label_issue].sort_values("label_score", kind="stable")
    for r in wrong.head(_LABELS).itertuples():
        labels.append(
            {
                "row": r.Index,
                "item": _item(shown, r.Index, _SIDE),
                "given": names[r.given_label],
                "new": names[r.predicted_label] if r.predicted_label != r.given_label else None,
                "numbers": [("relation", f"{r.relation_noisiness:.2f}"), ("loss", f"{r.loss:.2f}")],
                "near": near(r.Index, conflicts),
            }
        )
    far = by_row[by_row.is_outlier_issue].sort_values("outlier_score", kind="stable")
    outliers = [
        {
            "row": r.Index,
            "item": _item(shown, r.Index, _SIDE),
            "given": names[r.given_label],
            "numbers": [("outlier score", f"{r.outlier_score:.2f}")],
            "near": near(r.Index, agreeing),
        }
        for r in far.head(_OUTLIERS).itertuples()
    ]
    same = by_row[by_row.is_near_duplicate_issue].sort_values("near_duplicate_score", kind="stable")
    same = same[same.index.isin(shown.index) & same.nearest_neighbor.isin(shown.index)]
    twins = [
        {
            "row": r.Index,
            "item": _item(shown, r.Index, _SIDE),
            "given": names[r.given_label],
            "numbers": [("score", f"{r.near_duplicate_score:.3f}")],
            "near": [_neighbour(shown, names, r.nearest_neighbor, f"row {r.nearest_neighbor}")],
        }
        for r in same[same.index < same.nearest_neighbor].head(_TWINS).itertuples()
    ]
    changed = wrong[wrong.given_label != wrong.predicted_label]
    pairs = changed.groupby(["given_label", "predicted_label"]).size().sort_values(ascending=False, kind="stable")
    classes = by_row.groupby("given_label").agg(
        rows=("loss", "size"), issues=("is_label_issue", "sum"), outliers=("is_outlier_issue", "sum")
    )
    counts = record["counts"]
    template = Environment(autoescape=True).from_string(
        resources.files("dataopt").joinpath("clean_report.html").read_text("utf-8")
    )
    model = record["model"]
    return template.render(
        name=title(record),
        split=record["source"].get("split"),
        rows=record["rows"],
        classes=len(names),
        model=model[-1],
        date=datetime.date.today().isoformat(),
        version=record["versions"]["dataopt"],
        folder=folder,
        counts=[
            {"what": "label issues", "number": counts["label_issues"]},
            {"what": "outliers", "number": counts["outliers"]},
            {"what": "near-duplicates", "number": counts["near_duplicates"]},
            {"what": "rows in the cleaned copy", "number": counts["cleaned_rows"]},
        ],
        caption=_caption,
        labels=labels,
        total_labels=counts["label_issues"],
        outliers=outliers,
        total_outliers=counts["outliers"],
        twins=twins,
        total_twins=counts["near_duplicates"],
        confusions=[
            {"given": names[given], "new": names[new], "rows": count}
            for (given, new), count in pairs.head(_CONFUSIONS).items()
        ],
        by_class=[{"name": names[r.Index], "rows": r.rows, "issues": r.issues, "outliers": r.outliers}
                  for r in classes.itertuples()],
    )  # fmt: skip


def title(record: dict[str, Any]) -> str:
    """What the data set is called: a Hub name, or the last part of a path."""
    source = record["source"]
    name = source["name"][0] if isinstance(source["name"], list) else source["name"]
    return name if source["kind"] == "hub" else Path(name).name


def _caption(cards: Sequence[Any], total: int) -> str:
    return f"The {len(cards)} worst of {total:,}." if total > len(cards) else f"All {total:,}."


def _neighbour(shown: pd.DataFrame, names: Sequence[str], row: int, value: str) -> dict[str, Any]:
    label = names[shown.label[row]] if row in shown.index else ""
    return {"item": _item(shown, row, _SMALL_SIDE), "label": label, "value": value}


def _item(shown: pd.DataFrame, row: int, side: int) -> dict[str, Any] | None:
    if row not in shown.index:
        return None
    if "text" in shown:
        return {"kind": "text", "row": row, "text": shown.text[row]}
    media, kind = shown.media[row], shown.media_type[row]
    if kind.startswith("audio/"):
        return {"kind": "audio", "row": row, "uri": _uri(media, kind)}
    image = Image.open(io.BytesIO(media))
    few = max(image.size) <= _PIXELS
    if max(image.size) > side:
        image.thumbnail((side, side))
        out = io.BytesIO()
        image.save(out, "PNG" if kind == "image/png" else "JPEG")
        media = out.getvalue()
    return {"kind": "image", "row": row, "uri": _uri(media, kind), "pixels": few}


def _uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"

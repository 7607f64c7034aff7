"""Tables of relation scores: read, checked against their data set, and shared beside it in a folder or on the Hub."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from dataopt.core.artifacts import write_whole
from dataopt.core.relation import Issues
from datasets import Dataset
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
from torch import Tensor

from . import hub

if TYPE_CHECKING:
    import pandas as pd

KIND, VERSION = "dataopt relation scores", 1
TYPES = {  # of the columns of an ``Issues``
    "is_label_issue": "bool", "label_score": "float64", "given_label": "int64", "predicted_label": "int64",
    "relation_noisiness": "float64", "loss": "float64", "outlier_score": "float64", "is_outlier_issue": "bool",
    "near_duplicate_score": "float64", "is_near_duplicate_issue": "bool", "nearest_neighbor": "int64",
}  # fmt: skip
_HOME = "__dataopt__"  # load_dataset leaves folders alone whose names begin so
_SCORES, _RECORD = "scores.parquet", "record.json"
_NAME = re.compile(r"\w[\w.-]*")
_START, _END = "<!-- relation scores: begin -->", "<!-- relation scores: end -->"


def as_table(scores: Any) -> pd.DataFrame:
    """Scores in any of the forms that ``clean_dataset`` takes, as a DataFrame.

    Raises:
        TypeError: another type. ValueError: no such file, or one that is no parquet file.
    """
    import pandas as pd

    if isinstance(scores, Issues):
        return scores.to_pandas()
    if isinstance(scores, pd.DataFrame):
        return scores
    if isinstance(scores, Dataset):
        kept = [name for name in TYPES if name in scores.column_names]
        return pd.DataFrame(scores.with_format(None).select_columns(kept).to_dict()) if kept else pd.DataFrame()
    if isinstance(scores, str | Path):
        path = Path(scores)
        if path.is_dir() and not (path / _SCORES).is_file():
            return load_relation_scores(path)
        return _read(path / _SCORES if path.is_dir() else path)
    raise TypeError(
        f"scores is a {type(scores).__name__}; give an Issues, a DataFrame, a parquet file, a folder or a data set"
    )


def _read(path: Path, content: bytes | None = None) -> pd.DataFrame:
    """A parquet file, of which ``content`` was read already."""
    import pandas as pd

    try:
        return pd.read_parquet(path if content is None else io.BytesIO(content))
    except Exception as e:  # pandas and pyarrow raise errors of many kinds
        raise ValueError(f"scores: {path} cannot be read as a parquet file ({e}); save or download it again") from e


def check_rows(table: pd.DataFrame, labels: Tensor, names: tuple[str, ...] | None) -> pd.DataFrame:
    """The table in the order of the data set, whose ``labels`` (n,) it was made for.

    Raises:
        ValueError: another number of rows, an index that is missing or comes twice, or another label, by its row.
    """
    n = len(labels)
    if "index" in table:
        index = table["index"].to_numpy()
        count = np.bincount(index[(index >= 0) & (index < n)].astype(np.int64), minlength=n)
        if (count > 1).any():
            raise ValueError(f"scores hold row {int((count > 1).argmax())} of the data set twice; keep one of them")
        if len(index) != n or (count == 0).any():
            row = int((count == 0).argmax()) if (count == 0).any() else int(index[index >= n][0])
            what = "lack a row of the data set" if (count == 0).any() else "hold a row that the data set has not"
            raise ValueError(
                f"scores {what}, row {row} ({len(index)} scores, {n} rows); use the scores of this data set"
            )
        table = table.iloc[np.argsort(index)]
    elif len(table) != n:
        what = f"row {len(table)} has no score" if len(table) < n else f"score {n} has no row"
        raise ValueError(f"scores have {len(table)} rows and the data set {n}: {what}; use the scores of this data set")
    given = table["given_label"].to_numpy()
    differs = given != labels.numpy()
    if differs.any():
        row = int(differs.argmax())
        was, now = ((names[int(c)] if names and 0 <= c < len(names) else c) for c in (given[row], int(labels[row])))
        raise ValueError(
            f"row {row} has the label {now!r} and its score was made for {was!r}; use the scores of this data set, in "
            "this order"
        )
    return table


def save_relation_scores(
    scores: Any,
    folder: str | Path,
    *,
    config: str = "default",
    split: str = "train",
    label_names: Sequence[str] | None = None,
    model: str | None = None,
) -> Path:
    """Write scores beside a data set in a folder, whose own files stay as they are.

    Args:
        scores: as in :func:`clean_dataset`.
        folder: of the data set; they go into ``__dataopt__/CONFIG/SPLIT``, which ``load_dataset`` does not read.
        config, split: of the data set.
        label_names: of the class ids in ``given_label`` and ``predicted_label``.
        model: name of the model that they were made with.

    Returns:
        The folder of the scores.

    Raises:
        ValueError: scores without ``given_label``, or names that are none.
    """
    table = _table_to_save(scores, config, split)
    return _save(table, Path(folder), config, split, label_names, model)


def _table_to_save(scores: Any, config: str, split: str) -> pd.DataFrame:
    _check_names(config, split)
    table = as_table(scores)
    if "given_label" not in table or not len(table):
        raise ValueError("scores lack the column given_label, or have no rows; make them with find_issues")
    return table


def _check_names(config: str, split: str) -> None:
    for name, value in (("config", config), ("split", split)):
        if not isinstance(value, str) or not _NAME.fullmatch(value):
            raise ValueError(f"{name}={value!r} is no name of a {name}; use letters, digits, '_', '-' and '.'")


def _save(
    table: pd.DataFrame, root: Path, config: str, split: str, label_names: Sequence[str] | None, model: str | None
) -> Path:
    folder = root / _HOME / config / split
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    record = {
        "config": config,
        "split": split,
        "rows": len(table),
        "columns": list(table.columns),
        "labels_hash": hashlib.sha256(table["given_label"].to_numpy().astype("<i8").tobytes()).hexdigest(),
        "scores_hash": hashlib.sha256(buffer.getvalue()).hexdigest(),
        "label_names": None if label_names is None else list(label_names),
        "model": model,
        "counts": {name: int(table[name].sum()) for name in table if name.startswith("is_")},
        "versions": {name: version(name) for name in ("dataopt", "torch", "datasets")},
    }
    write_whole(folder / _SCORES, buffer.getvalue())
    hub.write_record(folder / _RECORD, KIND, VERSION, record)
    return folder


def push_relation_scores(
    scores: Any,
    repo_id: str,
    *,
    config: str = "default",
    split: str = "train",
    label_names: Sequence[str] | None = None,
    model: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    **kwargs: Any,
) -> str:
    """Put scores beside a data set on the Hub, in one commit that leaves its data files alone.

    Args:
        scores, config, split, label_names, model: as in :func:`save_relation_scores`.
        repo_id: of the data set's repository; made where there is none.
        private: of a repository that this makes; True also refuses one that is public already.
        token, revision, kwargs: for ``HfApi.upload_folder``.

    Returns:
        The address of the commit. The README gets a section about the scores, or a new one in its place.

    Raises:
        ValueError: as :func:`save_relation_scores`. The errors of huggingface_hub.
    """
    table = _table_to_save(scores, config, split)
    readme, parent = _readme(repo_id, token, revision)
    if parent is not None:
        kwargs.setdefault("parent_commit", parent)  # a README that changed meanwhile is not overwritten

    def write(folder: Path) -> None:
        _save(table, folder, config, split, label_names, model)
        write_whole(folder / "README.md", _with_section(readme, _section(table, repo_id, config, split, model)))

    kwargs.setdefault("commit_message", f"Relation scores of {config}/{split}")
    return hub.push(write, repo_id, private=private, token=token, repo_type="dataset", revision=revision, **kwargs)


def load_relation_scores(
    source: str | Path,
    *,
    config: str = "default",
    split: str = "train",
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> pd.DataFrame:
    """Read scores from a folder or a data set's repository.

    Returns:
        The table as it was saved; what was said about it, such as ``label_names``, is in its ``attrs``.

    Raises:
        ValueError: no scores there, or a damaged file. The errors of huggingface_hub for a repository.
    """
    _check_names(config, split)
    path = f"{_HOME}/{config}/{split}"
    root = hub.find(
        source,
        [f"{path}/{_SCORES}", f"{path}/{_RECORD}"],
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        repo_type="dataset",
    )
    folder = root / path
    if not folder.is_dir():
        raise ValueError(f"{str(source)!r} holds no relation scores of {config}/{split}; push or save them first")
    record = hub.read_record(hub.member(root, f"{path}/{_RECORD}"), KIND, VERSION)
    file = hub.member(root, f"{path}/{_SCORES}")
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != record.get("scores_hash"):
        raise ValueError(f"{file} is not the file of its record; save or download it again")
    table = _read(file, content)
    said = ("label_names", "model", "config", "split", "labels_hash")
    if not all(name in record for name in said) or "given_label" not in table or len(table) != record.get("rows"):
        raise ValueError(f"{folder} does not hold the scores that its {_RECORD} describes; save or download it again")
    table.attrs.update({name: record[name] for name in said})
    return table


def _readme(repo_id: str, token: str | bool | None, revision: str | None) -> tuple[str, str | None]:
    """The README as it is, and the commit that it was read from; nothing where there is no repository."""
    try:
        commit = HfApi(token=token).repo_info(repo_id, repo_type="dataset", revision=revision).sha
    except RepositoryNotFoundError:
        return "", None
    try:
        path = hf_hub_download(repo_id, "README.md", repo_type="dataset", revision=commit, token=token)
    except EntryNotFoundError:
        return "", commit
    return Path(path).read_text(encoding="utf-8"), commit


def _section(table: pd.DataFrame, repo_id: str, config: str, split: str, model: str | None) -> str:
    names = {"is_label_issue": "label issues", "is_outlier_issue": "outliers",
             "is_near_duplicate_issue": "near-duplicates"}  # fmt: skip
    counts = ", ".join(f"{int(table[c].sum())} {what}" for c, what in names.items() if c in table)
    place = "" if (config, split) == ("default", "train") else f", config={config!r}, split={split!r}"
    with_model = f" with {model}" if model else ""
    return f"""## Relation scores

`{_HOME}/{config}/{split}/{_SCORES}` holds scores of {len(table)} rows, made{with_model} by the
[neural relation graph](https://arxiv.org/abs/2301.12321) (Kim et al., NeurIPS 2023) with
[dataopt](https://pypi.org/project/dataopt/): {counts or "no flags"}. Low scores are bad; the rows are in the order of
the split.

```python
from dataopt.integrations.hf import clean_dataset, load_relation_scores  # pip install "dataopt[hf]"

scores = load_relation_scores({repo_id!r}{place})
cleaned = clean_dataset(dataset, scores)
```"""


def _with_section(readme: str, section: str) -> str:
    """The text with the section between its marks, in the place of an older one or at the end."""
    block = f"{_START}\n{section}\n{_END}"
    start, end = readme.find(_START), readme.find(_END)
    if 0 <= start < end:
        return readme[:start] + block + readme[end + len(_END) :]
    return f"{readme.rstrip()}\n\n{block}\n" if readme.strip() else f"{block}\n"

"""What a model sees in a data set: features, probabilities and labels, by one pass in evaluation mode."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from dataopt.core.arguments import check_choice
from dataopt.core.tensor_file import load_tensors, save_tensors
from dataopt.integrations.heads import Tap, unwrapped
from dataopt.integrations.saliency_maps import weights_digest
from datasets import ClassLabel, Dataset
from torch import Tensor, nn
from tqdm import tqdm
from transformers import MODEL_MAPPING, PreTrainedModel

from .inputs import Inputs, check_dataset, find_inputs, read_labels

_SHARD = 2048  # rows of a saved file, about
_UNNAMED = re.compile(r"LABEL_\d+")  # of transformers, for classes without names


@dataclass(frozen=True)
class ModelOutputs:
    """n rows in the data set's order, on the CPU.

    Attributes:
        features: (n, d) float32, what enters the classifier's last layer, or an encoder's pooled output.
        probs: (n, C) float32, columns in the order of ``label_names``.
        labels: (n,) int64, the given labels.
        label_names: C names.
        modality: ``"text"``, ``"image"``, ``"audio"`` or ``"other"``.
        input_column: names of the columns that were read.
    """

    features: Tensor
    probs: Tensor
    labels: Tensor
    label_names: tuple[str, ...]
    modality: str
    input_column: tuple[str, ...]


def model_outputs(
    dataset: Dataset,
    model: nn.Module,
    *,
    processor: Any = None,
    transform: Callable[[Any], Any] | None = None,
    input_column: str | Sequence[str] | None = None,
    label_column: str = "label",
    batch_size: int = 32,
    head: str | None = None,
    probs: str = "model",
    device: torch.device | str | None = None,
    out_dir: str | Path | None = None,
    progress: bool | None = None,
) -> ModelOutputs:
    """Run a model over a data set once, and keep its features and probabilities.

    The model runs in evaluation mode without gradients; its training flags and its device are restored. Texts are read
    in the order of their length. Where the data set and ``model.config`` name the same classes in different orders, the
    probabilities follow the data set's; other labels are matched by number. Texts among which a named class of the
    model is missing are refused, as nothing says which is which; names of a ``ClassLabel`` get a warning.

    Args:
        dataset: one split, with texts, PIL images, or sounds (``datasets.Audio``, ``{"array", "sampling_rate"}``, or a
            file's bytes; they are resampled to the processor's rate).
        model: a transformers or timm classifier; any module that maps a batch to logits (B, C); or, with
            ``probs="out-of-fold"``, an encoder.
        processor: of transformers: the tokenizer, image processor, feature extractor, or what holds one of them.
        transform: instead of a processor: one input (a text, an RGB PIL image, a pair (samples, rate) of a sound, or
            whatever the column holds) to a tensor, or to a dict of the forward's arguments. Neither is needed for a
            timm model, whose own evaluation transform is taken.
        input_column: None is the only image or sound column, else the only text column; two names for pairs of texts.
        label_column: class ids, a ``ClassLabel``, or class names.
        batch_size: rows per forward.
        head: name of the layer that makes the logits; None finds it (:func:`dataopt.integrations.heads.find_head`).
        probs: ``"model"``, the classifier's own; ``"out-of-fold"``, of a logistic regression on the features in 5-fold
            cross-validation, for encoders, classifiers of other classes, and models that have learned wrong labels by
            heart.
        device: where to run; None is where the model is.
        out_dir: folder that keeps the outputs, about 2048 rows a file. A killed run goes on there with equal outputs,
            and a finished one is read back.
        progress: show a bar; None does so on a terminal.

    An encoder's features are the vector that it returns, where it returns one (timm, CLIP); else the mean over tokens
    or frames, and for images the pooled map of a convolutional network, the class token, or the mean over patches.

    Raises:
        TypeError: no ``datasets.Dataset``, or rows that hold something else than the column promises.
        ValueError: an argument that the message names; a model of other classes; outputs that are not finite; or an
            ``out_dir`` of other data, weights or settings, or with a damaged file.
    """
    check_dataset(dataset)
    check_choice(("model", "out-of-fold"), probs=probs)
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    labels, names = read_labels(dataset, label_column)
    inputs = find_inputs(dataset, model, input_column, processor, transform)
    encoder = head is None and _is_encoder(model)
    if encoder and probs == "model":
        raise ValueError(
            f"{type(unwrapped(model)).__name__} makes no class probabilities; give a classifier, or probs='out-of-fold'"
        )
    if int(labels.min()) < 0:
        row = int((labels < 0).nonzero()[0])
        raise ValueError(f"label_column={label_column!r} holds {int(labels[row])} in row {row}; give class ids from 0")
    if probs == "model":
        texts = names is not None and not isinstance(dataset.features[label_column], ClassLabel)
        _check_classes(model, labels, names, texts)  # before the long pass where the model tells its classes
    store = None if out_dir is None else _Store(Path(out_dir), outputs_key(dataset, model, inputs, batch_size, head))
    features, made = _run(inputs, model, labels, batch_size, head, encoder, device, store, progress)
    if probs == "out-of-fold":
        classes = len(names) if names else int(labels.max()) + 1
        made = out_of_fold(features, labels, classes)
        names = names or tuple(map(str, range(classes)))
    else:
        assert made is not None
        made, names = _aligned(made, model, labels, names)
    return ModelOutputs(features, made, labels, names, inputs.modality, inputs.columns)


def outputs_key(dataset: Dataset, model: nn.Module, inputs: Inputs, batch_size: int, head: str | None) -> str:
    """What the outputs depend on, as a short string.

    Raises:
        ValueError: a transform that prints differently in every process.
    """
    if " at 0x" in inputs.settings:
        raise ValueError(
            f"transform={inputs.settings} prints its address, so saved outputs cannot be recognised again; give it a "
            "__repr__ that names its settings, as torchvision's transforms and dataclasses have"
        )
    weights = weights_digest(unwrapped(model))
    settings = [dataset._fingerprint, inputs.columns, inputs.settings, weights, batch_size, head]
    return hashlib.blake2b(json.dumps(settings).encode(), digest_size=16).hexdigest()


def out_of_fold(features: Any, labels: Any, classes: int, folds: int = 5) -> Tensor:
    """(n, C) float32 probabilities of each row by a logistic regression on the rows of the other folds.

    Args:
        features: (n, d); standardised within the folds.
        labels: (n,) class ids. A class without rows gets the probability 0.
        classes: C.
        folds: stratified and shuffled with a fixed seed; fewer where a class has fewer rows.

    Raises:
        ValueError: a class with one row, or one class only.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    y = torch.as_tensor(labels)
    present, counts = y.unique(return_counts=True)
    if len(present) < 2 or counts.min() < 2:
        rare = int(present[counts.argmin()])
        raise ValueError(
            f"labels hold the class {rare} {int(counts.min())} times among {len(present)} classes; out-of-fold "
            "probabilities need two classes, of two rows at least"
        )
    split = StratifiedKFold(min(folds, int(counts.min())), shuffle=True, random_state=0)
    regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    x = torch.as_tensor(features).float().numpy()
    found = cross_val_predict(regression, x, y.numpy(), cv=split, method="predict_proba")
    out = torch.zeros(len(y), classes)
    out[:, present] = torch.from_numpy(found).float()
    return out


def _run(
    inputs: Inputs,
    model: nn.Module,
    labels: Tensor,
    batch_size: int,
    head: str | None,
    encoder: bool,
    device: torch.device | str | None,
    store: _Store | None,
    progress: bool | None,
) -> tuple[Tensor, Tensor | None]:
    """Features, and probabilities where the model has some, in the order of the rows."""
    n = len(labels)
    order = torch.tensor(inputs.lengths()).argsort(descending=True, stable=True)
    size = batch_size * max(1, _SHARD // batch_size)  # whole batches, so that a resumed run pads alike
    shards: list[dict[str, Tensor]] = []
    with ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(total=n, desc="features", unit="row", disable=True if progress is False else None)
        )
        run: Callable[[Sequence[int]], dict[str, Tensor]] | None = None
        for number, rows in enumerate(order.split(size)):
            shard = store.load(number) if store else None
            if shard is None:
                if run is None:
                    run = stack.enter_context(_running(inputs, model, head, encoder, device))
                made = []
                for part in rows.split(batch_size):
                    made.append(run(part.tolist()))
                    bar.update(len(part))
                shard = {name: torch.cat([m[name] for m in made]) for name in made[0]}
                if store:
                    store.save(number, shard)
            else:
                bar.update(len(rows))
            shards.append(shard)
    out = {}
    for name in list(shards[0]):
        joined = torch.cat([shard.pop(name) for shard in shards])
        out[name] = torch.empty_like(joined)
        out[name][order] = joined
    return out["features"], out.get("probs")


@contextmanager
def _running(
    inputs: Inputs, model: nn.Module, head: str | None, encoder: bool, device: torch.device | str | None
) -> Iterator[Callable[[Sequence[int]], dict[str, Tensor]]]:
    """A function of row numbers; meanwhile the model is in evaluation mode, and where it shall run."""
    tensor = next(model.parameters(), torch.empty(0))
    home, dtype = tensor.device, tensor.dtype
    place = home if device is None else torch.device(device)
    flags = [(module, module.training) for module in model.modules()]
    with ExitStack() as stack:
        tap = None if encoder else stack.enter_context(Tap(model, head=head))

        def run(rows: Sequence[int]) -> dict[str, Tensor]:
            batch = {
                name: value.to(place, dtype) if value.is_floating_point() else value.to(place)
                for name, value in inputs.batch(rows).items()
            }
            if tap is None:
                made = {"features": _encoded(model, batch, inputs.modality)}
            else:
                features, probs = tap.read(model(batch.pop(""), **batch) if "" in batch else model(**batch))
                made = {"features": features.flatten(1), "probs": probs}
            for name, value in made.items():
                bad = ~value.isfinite().all(1)
                if bad.any():
                    row = rows[int(bad.nonzero()[0])]
                    raise ValueError(
                        f"the model's {name} hold non-finite values in row {row}; look at it, or at the dtype"
                    )
            return {name: value.float().cpu().contiguous() for name, value in made.items()}

        stack.enter_context(torch.no_grad())
        try:
            if place != home:
                model.to(place)
            model.eval()
            yield run
        finally:
            for module, flag in flags:
                module.training = flag
            if place != home:
                model.to(home)


def _is_encoder(model: nn.Module) -> bool:
    inner = unwrapped(model)
    if isinstance(inner, PreTrainedModel):
        plain: Any = MODEL_MAPPING.get(type(inner.config), ())  # what AutoModel makes: a class, or several
        ours = type(inner).__module__.startswith("transformers.")
        return type(inner) in (plain if isinstance(plain, tuple) else (plain,)) or (ours and inner.base_model is inner)
    return getattr(inner, "num_classes", None) == 0  # as timm says it


def _encoded(model: nn.Module, batch: dict[str, Tensor], modality: str) -> Tensor:
    """(B, d) pooled output of an encoder."""
    inner = unwrapped(model)
    names = {"image": "get_image_features", "text": "get_text_features", "audio": "get_audio_features"}
    of_modality: Any = getattr(inner, names.get(modality, ""), None)  # CLIP and its kind
    call: Any = model if of_modality is None else of_modality
    output = call(batch.pop(""), **batch) if "" in batch else call(**batch)
    pooled = getattr(output, "pooler_output", None)
    if not isinstance(output, Tensor) and of_modality is not None:
        output = pooled
    if isinstance(output, Tensor):
        if output.ndim != 2:
            raise ValueError(
                f"the encoder returned {tuple(output.shape)}; give one that returns a vector for each row, (B, d)"
            )
        return output
    hidden = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
    if hidden.ndim == 4:
        return hidden.mean((2, 3)) if pooled is None else pooled.flatten(1)
    tokens = {name.rpartition(".")[2] for name, _ in inner.named_parameters()}
    if modality == "image" and tokens & {"cls_token", "class_embedding"}:
        return hidden[:, 0]
    mask = batch.get("attention_mask")
    to_frames: Any = getattr(inner, "_get_feature_vector_attention_mask", None)  # of sounds, whose mask counts samples
    if mask is not None and mask.shape[1] != hidden.shape[1] and to_frames is not None:
        mask = to_frames(hidden.shape[1], mask)
    if mask is None or mask.shape != hidden.shape[:2]:
        return hidden.mean(1)
    weight = mask.to(hidden.dtype).unsqueeze(-1)
    return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)


def model_names(model: nn.Module) -> tuple[str, ...] | None:
    """Of its classes, as ``config.id2label`` has them; None where it has none."""
    named = getattr(getattr(unwrapped(model), "config", None), "id2label", None)
    return tuple(str(named[i]) for i in sorted(named)) if named else None


def _order(given: tuple[str, ...] | None, known: tuple[str, ...] | None) -> list[int] | None:
    """Places of the data set's classes among the model's, where both name the same ones."""
    if given is None or known is None:
        return None
    place = {name.lower(): i for i, name in enumerate(known)}
    if len(place) < len(known) or sorted(place) != sorted(name.lower() for name in given):
        return None
    return [place[name.lower()] for name in given]


def _check_classes(model: nn.Module, labels: Tensor, names: tuple[str, ...] | None, texts: bool) -> None:
    known = model_names(model)
    count = len(known) if known is not None else getattr(unwrapped(model), "num_classes", None)  # of timm
    order = _order(names, known)
    if isinstance(count, int) and count > 0:
        _refuse_other_classes(count, order, labels, names)
    if order is not None or names is None or known is None:
        return
    if texts:
        raise ValueError(
            f"the labels are texts ({_few(names)}) and the model calls its classes {_few(known)}, so that nothing says "
            "which is which; set model.config.id2label to these texts, cast the column to a ClassLabel whose names "
            "stand in the model's order, or give probs='out-of-fold'"
        )
    if not all(_UNNAMED.fullmatch(name) for name in known):
        warnings.warn(
            f"The labels are called {_few(names)} and the model's classes {_few(known)}; they are matched by number",
            stacklevel=3,
        )


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")


def _refuse_other_classes(count: int, order: list[int] | None, labels: Tensor, names: tuple[str, ...] | None) -> None:
    wanted = len(names) if names else int(labels.max()) + 1
    if order is None and ((names and wanted != count) or wanted > count or labels.min() < 0):
        raise ValueError(
            f"the model knows {count} classes and the labels are {wanted} (from {int(labels.min())} to "
            f"{int(labels.max())}); give a model of these classes, or probs='out-of-fold'"
        )


def _aligned(
    probs: Tensor, model: nn.Module, labels: Tensor, names: tuple[str, ...] | None
) -> tuple[Tensor, tuple[str, ...]]:
    count, known = probs.shape[1], model_names(model)
    order = _order(names, known)
    _refuse_other_classes(count, order, labels, names)
    if order is not None:
        probs = probs[:, order]
    if names is None:
        names = known if known is not None and len(known) == count else tuple(map(str, range(count)))
    return probs, names


@dataclass(frozen=True)
class _Store:
    """One file for each shard, with what it belongs to."""

    folder: Path
    key: str

    def _path(self, number: int) -> Path:
        return self.folder / f"outputs-{number:05d}.safetensors"

    def save(self, number: int, shard: dict[str, Tensor]) -> None:
        save_tensors(self._path(number), shard, {"key": self.key})

    def load(self, number: int) -> dict[str, Tensor] | None:
        path = self._path(number)
        if not path.exists():
            return None
        try:
            shard, about = load_tensors(path)
        except ValueError as e:
            raise ValueError(f"out_dir holds the damaged file {path} ({e}); delete it to go on") from e
        if about.get("key") != self.key:
            raise ValueError(
                f"out_dir={str(self.folder)!r} holds outputs of other data, weights or settings; give another folder"
            )
        return shard

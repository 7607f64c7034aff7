"""Rows of a data set as a page shows them: texts, small pictures, sounds."""

from __future__ import annotations

import io
import wave
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import pandas as pd
from PIL import Image
from torch import Tensor

from .integrations.hf import audio

_SIDE = 512  # pixels, of a picture's longer side at most
_SMALL = 96  # pixels: pictures up to here stay without loss
_TEXT = 4000  # characters
_SECONDS, _SOUND_BYTES = 10, 2**19  # of a sound at most
_SOUNDS = {b"RIFF": "audio/wav", b"fLaC": "audio/flac", b"OggS": "audio/ogg", b"ID3": "audio/mpeg"}


def items_table(
    data: datasets.Dataset, columns: Sequence[str], modality: str, labels: Tensor, rows: np.ndarray
) -> pd.DataFrame:
    """``index``, ``label``, and ``text``, or ``media`` with ``media_type``, of some rows.

    Args:
        columns: one name, or two for pairs of texts, which are shown below each other.
        modality: ``"text"``, ``"image"`` or ``"audio"``; anything else is shown as text.
        labels: (n,) class ids of all rows.
        rows: (m,) row numbers.
    """
    data = data.with_format(None).select_columns(list(columns))
    for name in columns:
        if isinstance(data.features[name], datasets.Audio):
            data = data.cast_column(name, datasets.Audio(decode=False))
    chosen = data.select(rows)
    out: dict[str, Any] = {"index": rows.astype(np.int64), "label": labels.numpy()[rows]}
    if modality == "image":
        media = [_picture(row[columns[0]]) for row in chosen]
    elif modality == "audio":
        media = [_sound(row[columns[0]]) for row in chosen]
    else:
        texts = ["\n\n".join(str(row[name]) for name in columns) for row in chosen]
        return pd.DataFrame(out | {"text": [t if len(t) <= _TEXT else t[:_TEXT] + " ..." for t in texts]})
    return pd.DataFrame(out | {"media": [m for m, _ in media], "media_type": [t for _, t in media]})


def _picture(image: Image.Image) -> tuple[bytes, str]:
    """PNG of a small or transparent picture, JPEG of another, at most 512 pixels wide and high."""
    clear = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    image = image.convert("RGBA" if clear else "L" if image.mode in ("1", "L", "I;16", "I", "F") else "RGB")
    image.thumbnail((_SIDE, _SIDE))
    small = max(image.size) <= _SMALL
    out = io.BytesIO()
    if clear or small:
        image.save(out, "PNG")
        return out.getvalue(), "image/png"
    image.save(out, "JPEG", quality=88)
    return out.getvalue(), "image/jpeg"


def _sound(value: Any) -> tuple[bytes, str]:
    """The file's own bytes where a browser plays them and they are few, else its first seconds as 16-bit WAV."""
    content = value.get("bytes") if isinstance(value, dict) else value if isinstance(value, bytes) else None
    if content and len(content) <= _SOUND_BYTES:
        for start, kind in _SOUNDS.items():
            if content.startswith(start):
                return content, kind
    samples, rate = audio.decode(value)
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples[: _SECONDS * rate].clip(-1, 1) * 32767).astype("<i2").tobytes())
    return out.getvalue(), "audio/wav"

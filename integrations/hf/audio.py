"""Sound in a data set's row, as an array at the rate that a model wants; torchcodec is not needed."""

from __future__ import annotations

import io
import math
import wave
from importlib.util import find_spec
from typing import Any

import numpy as np
from scipy.signal import resample_poly

Sound = tuple[np.ndarray, int]


def decode(value: Any) -> Sound:
    """Mono float32 samples (L,) in [-1, 1], and the sampling rate in Hz.

    Args:
        value: ``{"array", "sampling_rate"}``, channels first or none; an undecoded ``{"bytes", "path"}`` of
            ``datasets.Audio(decode=False)``; or the bytes of a file. Files are read with soundfile where it is
            installed, else as PCM WAV with the standard library.

    Raises:
        TypeError: another value. ValueError: a file that cannot be read, or no finite samples.
    """
    if isinstance(value, dict) and value.get("array") is not None and value.get("sampling_rate"):
        samples, rate = np.asarray(value["array"]), int(value["sampling_rate"])
        if samples.dtype.kind != "f":
            raise TypeError(f"a row of sound holds {samples.dtype} samples; give floats in [-1, 1]")
        samples = samples.astype(np.float32)
        samples = samples.mean(0) if samples.ndim == 2 else samples
    elif isinstance(value, bytes):
        samples, rate = _read(io.BytesIO(value), "bytes")
    elif isinstance(value, dict) and (value.get("bytes") is not None or value.get("path")):
        content = value.get("bytes")
        samples, rate = _read(value["path"] if content is None else io.BytesIO(content), str(value.get("path")))
    else:
        kind = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise TypeError(
            f"a row of sound holds {kind}; give {{'array', 'sampling_rate'}}, {{'bytes', 'path'}} or a file's bytes"
        )
    if samples.ndim != 1 or not samples.size or not np.isfinite(samples).all():
        raise ValueError(f"a row of sound has the shape {samples.shape} or non-finite values; leave it out")
    return samples, rate


def resampled(sound: Sound, rate: int) -> np.ndarray:
    """The samples at another rate, by polyphase filtering."""
    samples, given = sound
    if given == rate:
        return samples
    divisor = math.gcd(given, rate)
    return resample_poly(samples, rate // divisor, given // divisor).astype(np.float32)


def _read(file: Any, name: str) -> Sound:
    if find_spec("soundfile"):
        import soundfile

        try:
            samples, rate = soundfile.read(file, dtype="float32", always_2d=True)
        except (soundfile.LibsndfileError, OSError) as e:
            raise ValueError(f"the sound file {name} cannot be read ({e}); leave it out") from e
        return samples.mean(1), rate
    return read_wav(file, name)


def read_wav(file: Any, name: str) -> Sound:
    """PCM WAV of 8, 16, 24 or 32 bits, a path or a file object, with the standard library alone."""
    try:
        with wave.open(file, "rb") as f:
            width, channels, rate = f.getsampwidth(), f.getnchannels(), f.getframerate()
            raw = np.frombuffer(f.readframes(f.getnframes()), dtype=np.uint8)
    except (wave.Error, EOFError, OSError) as e:
        raise ValueError(f"the sound file {name} cannot be read as PCM WAV ({e}); soundfile reads more formats") from e
    if width == 1:  # the only unsigned one
        samples = raw.astype(np.float32) / 128 - 1
    else:
        wide = np.zeros((len(raw) // width, 4), dtype=np.uint8)
        wide[:, 4 - width :] = raw.reshape(-1, width)  # little-endian: into the upper bytes
        samples = (wide.view("<i4")[:, 0] / 2**31).astype(np.float32)
    return samples.reshape(-1, channels).mean(1), rate

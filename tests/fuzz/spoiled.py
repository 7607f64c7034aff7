"""Valid arguments with one or two of them spoiled, and what must come of it."""

from __future__ import annotations

import dataclasses
import os
import re
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import dataopt.core
import dataopt.integrations
import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

_OURS = tuple(
    os.path.dirname(os.path.abspath(str(room.__file__))) + os.sep for room in (dataopt.core, dataopt.integrations)
)
nan, inf = float("nan"), float("inf")

VALUES: list[Any] = [
    None, "x", "", b"x", [], [1.0, 2.0], [None], {}, (1, 2), (), np.zeros(2), np.float32(0.5), torch.tensor(2.0),
    torch.zeros(0), object(), -1, 0, 1, 2, 3, 7, 0.5, 1.5, -0.5, 1e-320, 1e30, nan, inf, -inf, True, 1j,
]  # fmt: skip


def _with(t: Tensor, value: float, everywhere: bool = False) -> Tensor:
    out = t.clone() if t.is_floating_point() else t.float()
    if everywhere:
        return out.fill_(value)
    if out.numel():
        out.view(-1)[out.numel() // 2] = value
    return out


TENSORS: dict[str, Callable[[Tensor], Any]] = {
    **{str(d): lambda t, d=d: t.to(d) for d in (
        torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool,
        torch.complex64)},
    "no rows": lambda t: t[:0],
    "one row": lambda t: t[:1],
    "a row less": lambda t: t[:-1],
    "a row more": lambda t: torch.cat([t, t[:1]]),
    "one axis more": lambda t: t.unsqueeze(0),
    "one axis more at the end": lambda t: t.unsqueeze(-1),
    "no axis": lambda t: t.sum(),
    "flat": lambda t: t.flatten(),
    "empty last axis": lambda t: t[..., :0],
    "last axis shorter": lambda t: t[..., :-1],
    "last axis doubled": lambda t: torch.cat([t, t], -1),
    "second axis shorter": lambda t: t[:, :-1] if t.ndim > 1 else t,
    "transposed": lambda t: t.transpose(0, -1),
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "a NaN": lambda t: _with(t, nan),
    "an infinity": lambda t: _with(t, inf),
    "only NaN": lambda t: _with(t, nan, True),
    "huge": lambda t: _with(t, 1e38, True),
    "one huge": lambda t: _with(t, 3e38),
    "denormal": lambda t: _with(t, 1e-41, True),
    "zero": lambda t: torch.zeros_like(t),
    "constant": lambda t: torch.ones_like(t),
    "negative": lambda t: -t.float() if t.dtype == torch.bool else -t,
    "far": lambda t: t + 1000,
    "numpy": lambda t: t.detach().float().numpy() if t.dtype == torch.bfloat16 else t.detach().numpy(),
    "list": lambda t: t.tolist(),
    "with gradient": lambda t: t.clone().requires_grad_() if t.is_floating_point() else t,
}  # fmt: skip


def spoil(data: st.DataObject, valid: dict[str, Any], keep: Iterable[str] = ()) -> dict[str, Any]:
    """A copy with one or two values replaced."""
    out = dict(valid)
    names = sorted(set(valid) - set(keep))
    for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True), "spoiled"):
        value = out[name]
        if isinstance(value, Tensor) and data.draw(st.integers(0, 3), f"{name}: a tensor") > 0:
            for _ in range(data.draw(st.integers(1, 2), f"{name}: times")):
                if isinstance(value, Tensor):
                    change = data.draw(st.sampled_from(sorted(TENSORS)), name)
                    with suppress(RuntimeError, IndexError):  # a shape that cannot be changed so
                        value = TENSORS[change](value)
            out[name] = value
        else:
            out[name] = data.draw(st.sampled_from(VALUES), name)
    return out


def vary(
    data: st.DataObject, valid: dict[str, Any], others: dict[str, list[Any]], keep: Iterable[str] = ()
) -> dict[str, Any]:
    """Valid arguments, some of them from lists of others that are valid too; spoiled in half of the cases."""
    chosen = {name: data.draw(st.sampled_from([valid[name], *others[name]]), name) for name in others}
    return spoil(data, valid | chosen, keep) if data.draw(st.booleans(), "spoil") else valid | chosen


def images(x: Tensor) -> list[Tensor]:
    """A batch in other forms that hold valid images too."""
    half = [x.to(torch.float16), x.to(torch.bfloat16), x.double()]
    strided = torch.stack([x, x], -1)[..., 0]
    return [*half, strided, x.to(memory_format=torch.channels_last), x.clone().requires_grad_(), x.clamp(0, 0.1)]


def answer(
    call: Callable[..., Any],
    arguments: dict[str, Any],
    names: Iterable[str] | None = None,
    errors: tuple[type[Exception], ...] = (ValueError, TypeError),
) -> Any:
    """What the call returns; None where it refuses, in a sentence of ours that names one of the arguments."""
    try:
        return call(**arguments)
    except errors as e:
        words = list(names or arguments)
        frames = traceback.extract_tb(e.__traceback__)
        assert frames[-1].filename.startswith(_OURS), f"from the depth of {frames[-1].filename}: {e}"
        assert any(re.search(rf"\b{word}\b", str(e)) for word in words), f"names none of {words}: {e}"
        return None


def finite(x: Any) -> bool:
    """Whether every number in a result is finite."""
    if isinstance(x, Tensor):
        return not (x.is_floating_point() or x.is_complex()) or bool(x.isfinite().all())
    if isinstance(x, np.ndarray):
        return x.dtype.kind not in "fc" or bool(np.isfinite(x).all())
    if isinstance(x, float):
        return np.isfinite(x)
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return all(finite(getattr(x, f.name)) for f in dataclasses.fields(x))
    if isinstance(x, list | tuple):
        return all(map(finite, x))
    return True

"""The adapter that works on COMP tokens only (eq. 7.4, figure 7.4)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..arguments import check_flags, check_tensors


def add_lora_rows(
    output: Tensor, hidden: Tensor, rows: Tensor, update: Callable[[Tensor], Tensor], *, in_place: bool = True
) -> Tensor:
    """x' = W x + m dW x with m = 1 for COMP tokens: dW is computed for their rows alone.

    Args:
        output: (..., o), W x of all tokens; changed in place unless told otherwise. A linear layer does not need its
            output for its gradient, so that is safe there, and it saves a copy of all rows.
        hidden: (..., d), x of all tokens.
        rows: (R,) int64 or int32, the COMP tokens among all tokens.
        update: (R, d) -> (R, o), dW x.

    Returns:
        The output with the rows changed. Others keep every bit.

    Raises:
        TypeError: no tensors, or an update that is no function of one.
        ValueError: shapes that do not go together, or rows that are not there (on the CPU: elsewhere a look would wait
            for the device).
    """
    check_tensors(output=output, hidden=hidden, rows=rows)
    check_flags(in_place=in_place)
    if not callable(update):
        raise TypeError(f"update is a {type(update).__name__}; give a function of (R, d) to (R, o)")
    fits = output.ndim > 1 and output.shape[:-1] == hidden.shape[:-1]
    if not fits or not (output.is_floating_point() and hidden.is_floating_point()):
        raise ValueError(
            f"output {tuple(output.shape)} {output.dtype} and hidden {tuple(hidden.shape)} {hidden.dtype} must be "
            "floating (..., o) and (..., d) of the same tokens"
        )
    flat = output.flatten(0, -2)
    if rows.ndim != 1 or rows.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"rows is {rows.dtype} of shape {tuple(rows.shape)}; give (R,) int64")
    if rows.device.type == "cpu" and len(rows) and not torch.compiler.is_compiling():
        least, most = rows.aminmax()
        if int(least) < 0 or int(most) >= len(flat):
            raise ValueError(f"rows go from {int(least)} to {int(most)}; there are {len(flat)} tokens")
    delta = update(hidden.flatten(0, -2).index_select(0, rows))
    check_tensors(update=delta)
    if delta.shape != (len(rows), output.shape[-1]):
        raise ValueError(f"update gives {tuple(delta.shape)} where ({len(rows)}, {output.shape[-1]}) was expected")
    delta = delta.to(output.dtype)
    # a leaf that asks for a gradient may not be changed in place
    here = in_place and output.is_contiguous() and not (output.is_leaf and output.requires_grad)
    added = flat.index_add_(0, rows, delta) if here else flat.index_add(0, rows, delta)
    return added.view(output.shape)

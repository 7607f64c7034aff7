"""The adapter that works on COMP tokens only (eq. 7.4, figure 7.4)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def add_lora_rows(
    output: Tensor, hidden: Tensor, rows: Tensor, update: Callable[[Tensor], Tensor], *, in_place: bool = True
) -> Tensor:
    """x' = W x + m dW x with m = 1 for COMP tokens: dW is computed for their rows alone.

    Args:
        output: (..., o), W x of all tokens; changed in place unless told otherwise. A linear layer does not need its
            output for its gradient, so that is safe there, and it saves a copy of all rows.
        hidden: (..., d), x of all tokens.
        rows: (R,) int64, the COMP tokens among all tokens.
        update: (R, d) -> (R, o), dW x.

    Returns:
        The output with the rows changed. Others keep every bit.
    """
    flat = output.flatten(0, -2) if output.is_contiguous() else output.reshape(-1, output.shape[-1])
    delta = update(hidden.reshape(-1, hidden.shape[-1]).index_select(0, rows)).to(output.dtype)
    added = flat.index_add_(0, rows, delta) if in_place and output.is_contiguous() else flat.index_add(0, rows, delta)
    return added.view(output.shape)

"""Where every token of a training row stands and what it sees (section 7.3.1, figure 7.3).

A row is ``[prefix | c(1) COMP.. | c(2) COMP.. | ... | I O]``. Segments that end with COMP tokens are contexts; the
others are queries, which read the memory and which nobody reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..arguments import check_choice, check_flags, check_numbers, check_strings, check_tensors

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

MODES = ("concat", "merge")
POSITIONS = ("cache", "abs")


@dataclass(frozen=True)
class Layout:
    """What the parallel forward pass needs; all tensors lie on the device of the ids.

    Rows have L tokens, T memory steps and n slots; the M = T n memory columns are ordered by step, then slot.

    Attributes:
        segment_ids: (B, L) int64; -1 padding, 0 the prefix, segments from 1.
        rank: (B, L) int64, place of a token within its segment.
        position_ids: (B, L) int64.
        comp_rows: (R,) int64, the COMP tokens among all B L tokens.
        comp_index: (B, M) int64, the token behind each memory column; 0 where a row has fewer steps.
        shift: (B, M) int64, positions by which the keys of a column are rotated; None for no rotation.
        weights: (T, T), row t the shares of h(1) to h(T) in Mem(t); None for concat.
        sees_from, sees_to: (B, S) int64, the range of memory steps that each segment reads.
        slots: n.
    """

    segment_ids: Tensor
    rank: Tensor
    position_ids: Tensor
    comp_rows: Tensor
    comp_index: Tensor
    shift: Tensor | None
    weights: Tensor | None
    sees_from: Tensor
    sees_to: Tensor
    slots: int

    @property
    def columns(self) -> int:
        """M."""
        return int(self.comp_index.shape[1])

    @cached_property
    def width(self) -> int:
        """Tokens of the longest segment."""
        return int(self.rank.max()) + 1

    @cached_property
    def prefix(self) -> Tensor:
        """(B, P) int64, the tokens of the prefix; rows with a shorter one repeat token 0, see ``prefix_mask``."""
        length = int(self.prefix_length.max())
        first = (self.segment_ids == 0).int().argmax(1, keepdim=True)
        return (first + torch.arange(length, device=first.device)).clamp(max=self.segment_ids.shape[1] - 1)

    @cached_property
    def prefix_length(self) -> Tensor:
        """(B,) int64."""
        return (self.segment_ids == 0).sum(1)

    @cached_property
    def prefix_mask(self) -> Tensor:
        """(B, P) bool."""
        return torch.arange(self.prefix.shape[1], device=self.prefix.device) < self.prefix_length.unsqueeze(1)

    @cached_property
    def first(self) -> int:
        """The first segment that holds a token in any row: 0 with a prefix, otherwise 1."""
        return int(self.segment_ids[self.segment_ids >= 0].min())

    @cached_property
    def fold(self) -> Tensor:
        """(B, S, W) int64, the token of each place of each segment from ``first`` on; 0 where there is none.

        Such places follow the tokens of their segment, so that no token sees them.
        """
        batch, length = self.segment_ids.shape
        table = self.segment_ids.new_zeros(batch, self.sees_to.shape[1] * self.width + 1)
        place = torch.where(self.segment_ids < 0, table.shape[1] - 1, self.segment_ids * self.width + self.rank)
        table.scatter_(1, place, torch.arange(length, device=table.device).expand(batch, -1))
        return table[:, :-1].view(batch, -1, self.width)[:, self.first :]

    @cached_property
    def unfold(self) -> Tensor:
        """(B, L) int64, the place of each token in the (S W) folded ones; 0 for padding."""
        return ((self.segment_ids - self.first) * self.width + self.rank).clamp(min=0)

    def reads(self) -> Tensor:
        """(B, S, M) bool: the memory columns that each segment sees."""
        step = torch.arange(self.columns, device=self.sees_to.device) // self.slots
        return (step >= self.sees_from.unsqueeze(2)) & (step < self.sees_to.unsqueeze(2))

    @cached_property
    def folded_mask(self) -> Tensor:
        """(B S, 1, W, P + M + W) bool: prefix, memory and own segment, causal. Every place sees itself."""
        segments, device = self.sees_to.shape[1], self.rank.device
        outside = torch.arange(segments, device=device) > 0  # the prefix sees itself as an ordinary segment
        shared = torch.cat([self.prefix_mask.unsqueeze(1) & outside.unsqueeze(1), self.reads()], 2)[:, self.first :]
        own = torch.ones(self.width, self.width, dtype=torch.bool, device=device).tril()
        shape = (*shared.shape[:2], self.width)
        parts = (shared.unsqueeze(2).expand(*shape, -1), own.expand(*shape, -1))
        return torch.cat(parts, 3).flatten(0, 1).unsqueeze(1)

    @cached_property
    def mask(self) -> Tensor:
        """(B, 1, L, M + L) bool: the same as one matrix over the whole row, memory columns first."""
        segment, length = self.segment_ids, self.segment_ids.shape[1]
        memory = self.reads().gather(1, segment.clamp(min=0).unsqueeze(2).expand(-1, -1, self.columns))
        causal = torch.ones(length, length, dtype=torch.bool, device=segment.device).tril()
        query, key = segment.unsqueeze(2), segment.unsqueeze(1)
        own = causal & ((query == key) | (key == 0) & (query >= 0))
        return torch.cat([memory & (query >= 0), own], 2).unsqueeze(1)

    @cached_property
    def block_mask(self) -> BlockMask:
        """The same for flex attention."""
        from torch.nn.attention.flex_attention import create_block_mask

        segment, sees_from, sees_to = self.segment_ids, self.sees_from, self.sees_to
        columns, slots = self.columns, self.slots

        def visible(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
            own = segment[batch, row]
            step, token = column // slots, (column - columns).clamp(min=0)
            of_memory = (step >= sees_from[batch, own.clamp(min=0)]) & (step < sees_to[batch, own.clamp(min=0)])
            theirs = segment[batch, token]
            of_text = (token <= row) & ((theirs == own) | (theirs == 0))
            return torch.where(column < columns, of_memory, of_text)

        batch, length = segment.shape
        return create_block_mask(visible, batch, None, length, columns + length, device=str(segment.device))

    def full_context_mask(self, comp_slot: Tensor) -> Tensor:
        """(B, 1, L, L) bool: what tokens would see without compression.

        Prefix, text of the earlier contexts and the own segment, without COMP tokens; other queries stay hidden. With
        the positions "abs" that is the model reading the whole text.

        Args:
            comp_slot: (B, L), as for :func:`layout`.
        """
        segment, length = self.segment_ids, self.segment_ids.shape[1]
        text = comp_slot < 0
        inside = segment.clamp(min=0)
        contexts = torch.zeros_like(self.sees_to).scatter_add_(1, inside, (~text).long()) > 0
        contexts[:, 0] = True  # the prefix
        shared = contexts.gather(1, inside) & text & (segment >= 0)
        query, key = segment.unsqueeze(2), segment.unsqueeze(1)
        causal = torch.ones(length, length, dtype=torch.bool, device=segment.device).tril()
        itself = torch.eye(length, dtype=torch.bool, device=segment.device)  # so that no row is empty
        seen = (query == key) & text.unsqueeze(1) | (key < query) & shared.unsqueeze(1)
        return (causal & (seen | itself)).unsqueeze(1)


def layout(
    segment_ids: Tensor,
    comp_slot: Tensor,
    slots: int,
    *,
    mode: str = "concat",
    recurrent: bool = True,
    positions: str = "cache",
    ema: float | None = None,
) -> Layout:
    """Lay out a batch of rows for one parallel forward pass.

    Args:
        segment_ids: (B, L) integers: -1 padding at either end, 0 the prefix (seen by every segment, such as an
            attention sink), then ascending numbers for the segments.
        comp_slot: (B, L) integers: -1 for ordinary tokens, 0 to n - 1 for COMP tokens, which end their segment.
        slots: n, COMP tokens of a context.
        mode: "concat" keeps the COMP pairs of all contexts, "merge" their weighted average.
        recurrent: contexts see the memory of those before them (the thesis); otherwise only queries do (the released
            code for MetaICL and LaMP).
        positions: "cache" counts prefix, memory slots and the segment's own tokens, so positions stay small;
            "abs" counts the text of all contexts before, as the released code does.
        ema: of mode "merge": a constant a_t for t >= 2; None is the arithmetic mean, a_t = 1 / t.

    Raises:
        ValueError: segments that are torn or descend, COMP tokens that are incomplete, out of order or not last in
            their segment, or a bad option.
    """
    check_options(mode, positions, ema, slots)
    check_flags(recurrent=recurrent)
    check_tensors(segment_ids=segment_ids, comp_slot=comp_slot)
    if segment_ids.shape != comp_slot.shape or segment_ids.ndim != 2:
        raise ValueError(
            f"segment_ids {tuple(segment_ids.shape)} and comp_slot {tuple(comp_slot.shape)} must both be (B, L)"
        )
    for name, ids in (("segment_ids", segment_ids), ("comp_slot", comp_slot)):
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise TypeError(f"{name} holds {ids.dtype}; give integers")
    segment_ids, comp_slot = segment_ids.long(), comp_slot.long()
    rank = _ranks(segment_ids)
    _check_slots(segment_ids, comp_slot, slots)
    batch, length = segment_ids.shape
    device = segment_ids.device
    count = int(segment_ids.max()) + 1
    inside = segment_ids.clamp(min=0)  # padding is counted nowhere: it carries False
    real, comp = segment_ids >= 0, comp_slot >= 0

    def per_segment(flags: Tensor) -> Tensor:
        return torch.zeros(batch, count, dtype=torch.long, device=device).scatter_add_(1, inside, flags.long())

    context = per_segment(comp) > 0
    before = context.long().cumsum(1) - context.long()  # memory steps behind each segment
    steps = int(context.sum(1).max())
    reader = torch.ones_like(context) if recurrent else ~context
    reader[:, 0] = False
    sees_to = torch.where(reader, before, 0)
    sees_from = torch.zeros_like(before) if mode == "concat" else (sees_to - 1).clamp(min=0)

    prefix = per_segment(real)[:, :1]
    text = per_segment(real & ~comp) * context
    in_front = (sees_to - sees_from) * slots if positions == "cache" else text.cumsum(1) - text
    start = prefix + in_front
    start[:, 0] = 0
    position_ids = torch.where(real, start.gather(1, inside) + rank, 0)

    columns = steps * slots
    column = (before.gather(1, inside) * slots + comp_slot).masked_fill(~comp, columns)
    comp_index = torch.zeros(batch, columns + 1, dtype=torch.long, device=device)
    comp_index = comp_index.scatter_(1, column, torch.arange(length, device=device).expand(batch, -1))[:, :columns]
    shift = None
    if positions == "cache":
        slot = torch.arange(columns, device=device)
        shift = prefix + (slot if mode == "concat" else slot % slots) - position_ids.gather(1, comp_index)
    weights = merge_weights(steps, ema).to(device) if mode == "merge" else None
    rows = comp.flatten().nonzero().squeeze(1)
    return Layout(segment_ids, rank, position_ids, rows, comp_index, shift, weights, sees_from, sees_to, slots)


def merge_weights(steps: int, ema: float | None = None) -> Tensor:
    """(T, T) float64: entry (t, j) is a_j prod_{k=j+1..t} (1 - a_k), the share of h(j) in Mem(t) (section 7.3.1)."""
    weights = torch.zeros(steps, steps, dtype=torch.float64)
    for t in range(steps):
        a = merge_rate(t + 1, ema)
        if t:
            weights[t] = (1 - a) * weights[t - 1]
        weights[t, t] = a
    return weights


def merge_rate(step: int, ema: float | None = None) -> float:
    """a_t of step t, counted from 1."""
    return 1.0 if step == 1 else 1 / step if ema is None else ema


def check_options(mode: str, positions: str, ema: float | None, slots: int) -> None:
    """Raises ValueError for the first that is wrong."""
    check_strings(mode=mode, positions=positions)
    check_numbers(ema=1 if ema is None else ema)
    check_choice(MODES, mode=mode)
    check_choice(POSITIONS, positions=positions)
    if ema is not None and (mode != "merge" or not 0 < ema <= 1):
        raise ValueError(f"ema={ema!r} must lie in (0, 1], and needs mode='merge'; None is the arithmetic mean")
    if not isinstance(slots, int) or slots < 1:
        raise ValueError(f"comp_tokens={slots!r} must be a whole number of at least 1")


def _ranks(segment_ids: Tensor) -> Tensor:
    """(B, L) places within the segments; padding has 0."""
    length = segment_ids.shape[1]
    index = torch.arange(length, device=segment_ids.device)
    real = segment_ids >= 0
    if length == 0 or not bool(real.any(1).all()):
        raise ValueError("segment_ids holds a row without any token; leave empty rows out")
    # Padding inside a row would split it; at the ends it is not among the neighbours that are compared.
    neighbours = real[:, 1:] & real[:, :-1]
    if bool((neighbours & (segment_ids[:, 1:] < segment_ids[:, :-1])).any()):
        raise ValueError("segment_ids descends within a row; number the segments in the order of their tokens")
    if bool(((real[:, 1:] != real[:, :-1]).sum(1) + real[:, 0].long() + real[:, -1].long() > 2).any()):
        raise ValueError("segment_ids has padding (-1) between tokens; pad at the ends of a row only")
    new = torch.ones_like(real)
    new[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    start = torch.where(new, index, 0).cummax(1).values
    return torch.where(real, index - start, 0)


def _check_slots(segment_ids: Tensor, comp_slot: Tensor, slots: int) -> None:
    """Every run of COMP tokens is 0, 1, .., n - 1, lies in one segment and ends it."""
    comp = comp_slot >= 0
    if bool((comp & (segment_ids < 1)).any()):
        raise ValueError("comp_slot marks COMP tokens in the prefix or the padding; they end the segments from 1 on")
    if bool((comp_slot >= slots).any()):
        raise ValueError(f"comp_slot holds {int(comp_slot.max())} and comp_tokens is {slots}; slots count from 0")
    same = torch.zeros_like(comp)
    same[:, 1:] = segment_ids[:, 1:] == segment_ids[:, :-1]
    previous = torch.where(same, comp_slot.roll(1, 1), -1)  # -1 at the start of a segment
    last = torch.ones_like(comp)
    last[:, :-1] = ~same[:, 1:]
    wrong = comp & (comp_slot != previous + 1) | (previous >= 0) & ~comp | comp & last & (comp_slot != slots - 1)
    if bool(wrong.any()):
        row, column = (int(i) for i in wrong.nonzero()[0])
        raise ValueError(
            f"comp_slot[{row}, {column}]={int(comp_slot[row, column])}: the COMP tokens of a context are {slots}, in "
            "order, and end its segment"
        )
    first = comp & ((comp_slot == 0) & (previous < 0) & ~same)
    if bool(first.any()):
        row, column = (int(i) for i in first.nonzero()[0])
        raise ValueError(
            f"segment {int(segment_ids[row, column])} of row {row} holds COMP tokens only; leave empty contexts out"
        )

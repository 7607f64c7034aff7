"""CCM's costs: a training step in parallel against the online steps, the conditional LoRA, and a step of the memory.

One thread. Training: gradients of the adapter are first shown equal in float64; then one step (forward and backward) of
the parallel pass over 16 contexts and a query is timed against back-propagating through the online steps, one by one.
Adapter: the decoder layers of SmolLM2's shapes over 2,048 tokens, one in 16 a COMP token, without LoRA, with the
conditional and with ordinary LoRA. Memory: appending a context at t = 64 against t = 2. A whole model (SmolLM2-135M):
the parallel pass against the online steps, and answers from 16 contexts of 50 tokens, as in table 7.1.

``--cuda`` measures the same on a GPU, in ``ccm_speed_cuda``; it has not run yet.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import common
import torch
from dataopt.integrations.hf import CCMCache, CCMConfig, CCMModel, Query, ccm_row, decoder
from dataopt.integrations.hf.ccm.comp_tokens import CompTokens
from dataopt.smollm2 import load_smollm2
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

STEPS = 16  # T
SHAPES = ((384, 4, 4, 32), (384, 4, 1, 8))  # hidden, layers, batch, tokens of a segment
TARGETS = {(384, 4, 4, 32): 1.2, (384, 4, 1, 8): 3.0}
REPETITIONS = 7
TOKENS, ONE_IN = 2048, 16
LAYERS = 4
USERS = 4  # that are answered at once
BUDGET = 8 * 2**30  # bytes for the pairs of all users
DEVICE = torch.device("cpu")
PACKAGES = ("dataopt", "torch", "transformers", "peft")


def model_of(hidden: int, layers: int, mode: str, comp_tokens: int = 1, **options: Any) -> CCMModel:
    """A Llama with random weights and a LoRA that does something."""
    torch.manual_seed(0)
    shape = {"hidden_size": hidden, "intermediate_size": 8 * hidden // 3, "num_hidden_layers": layers}
    heads = {"num_attention_heads": hidden // 32, "num_key_value_heads": hidden // 32}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=512, max_position_embeddings=4096, **{**shape, **heads, **options}))
    model = CCMModel(base, CCMConfig(mode=mode, comp_tokens=comp_tokens, lora_dropout=0.0))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.02)
    return model.to(DEVICE).eval()


def rows_of(model: CCMModel, batch: int, segment: int) -> dict[str, Tensor]:
    """T contexts and a query, all of ``segment`` tokens; contexts end with their COMP tokens."""
    draw = torch.Generator().manual_seed(1)
    text = torch.randint(0, 500, (batch, STEPS + 1, segment), generator=draw)
    n = len(model.comp_ids)
    comp = torch.tensor(model.comp_ids).expand(batch, STEPS, n)
    contexts = torch.cat([text[:, :STEPS], comp], 2).flatten(1)
    slots = torch.cat([torch.full((segment,), -1), torch.arange(n)]).repeat(STEPS)
    numbers = torch.arange(1, STEPS + 1).repeat_interleave(segment + n)
    made = {
        "input_ids": torch.cat([contexts, text[:, -1]], 1),
        "segment_ids": torch.cat([numbers, torch.full((segment,), STEPS + 1)]).expand(batch, -1),
        "comp_slot": torch.cat([slots, torch.full((segment,), -1)]).expand(batch, -1),
    }
    return {name: values.to(DEVICE) for name, values in made.items()}


def answer_loss(logits: Tensor, query: Tensor) -> Tensor:
    return cross_entropy(logits[:, :-1].flatten(0, 1), query[:, 1:].flatten())


def parallel_loss(model: CCMModel, rows: dict[str, Tensor], segment: int) -> Tensor:
    return answer_loss(model(**rows, logits_to_keep=segment).logits, rows["input_ids"][:, -segment:])


def recursive_loss(model: CCMModel, rows: dict[str, Tensor], segment: int) -> Tensor:
    """The online steps of :class:`CCMCache`, with gradients."""
    base, n = model.language_model, len(model.comp_ids)
    merge = model.ccm_config.mode == "merge"
    batch, width = len(rows["input_ids"]), segment + n
    comp = torch.arange(batch).unsqueeze(1) * width + torch.arange(segment, width)
    memory: list[tuple[Tensor, Tensor]] = []

    def reading(ids: Tensor, function: Callable[..., Any], **kwargs: Any) -> tuple[Any, DynamicCache, int]:
        cache = DynamicCache(config=base.config)
        for i, (keys, values) in enumerate(memory):
            cache.update(keys, values, i)
        seen = memory[0][0].shape[2] if memory else 0
        places = torch.arange(seen, seen + ids.shape[1], device=DEVICE).unsqueeze(0)
        mask = torch.ones(batch, seen + ids.shape[1], dtype=torch.long, device=DEVICE)
        return function(ids, cache, position_ids=places, attention_mask=mask, **kwargs), cache, seen

    for t in range(1, STEPS + 1):
        ids = rows["input_ids"][:, (t - 1) * width : t * width]
        _, cache, seen = reading(ids, partial(decoder.forward, base), ccm=CompTokens(comp.flatten().to(DEVICE)))
        new = [(layer.keys[:, :, -n:], layer.values[:, :, -n:]) for layer in cache.layers]  # type: ignore[union-attr,index]
        assert model.rotation is not None
        shift = torch.full((n,), -segment if not merge else -seen - segment, device=DEVICE)
        new = [(model.rotation(keys, shift), values) for keys, values in new]
        if not memory:
            memory = new
        elif merge:
            memory = [(a + (k - a) / t, b + (v - b) / t) for (a, b), (k, v) in zip(memory, new, strict=True)]
        else:
            memory = [(torch.cat([a, k], 2), torch.cat([b, v], 2)) for (a, b), (k, v) in zip(memory, new, strict=True)]
    query = rows["input_ids"][:, -segment:]
    out, *_ = reading(query, lambda ids, cache, **kwargs: base(ids, past_key_values=cache, **kwargs))
    return answer_loss(out.logits, query)


Loss = Callable[[CCMModel, dict[str, Tensor], int], Tensor]


def step(model: CCMModel, rows: dict[str, Tensor], segment: int, loss: Loss) -> list[Tensor]:
    trained = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(loss(model, rows, segment), trained, allow_unused=True, materialize_grads=True))


def gradients_differ(shape: Sequence[int], mode: str) -> float:
    """The largest difference of a gradient in float64, over the largest gradient; norms and sines in float64 too."""
    hidden, layers, batch, segment = shape
    model = in_float64(model_of(hidden, layers, mode))
    rows = rows_of(model, batch, segment)
    both = [step(model, rows, segment, loss) for loss in (parallel_loss, recursive_loss)]
    largest = max(float(g.abs().max()) for g in both[0])
    return max(float((a - b).abs().max()) for a, b in zip(*both, strict=True)) / largest


def in_float64(model: CCMModel) -> CCMModel:
    """transformers computes norms and rotary tables in float32 even in a float64 model."""

    def norm(self: Any, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    def tables(self: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angle = position_ids.double().unsqueeze(-1) * self.inv_freq.double()
        return torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()

    model.double()
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = norm.__get__(module)
        if type(module).__name__ == "LlamaRotaryEmbedding":
            module.forward = tables.__get__(module)
    return model


def medians(functions: dict[str, Callable[[], object]], repetitions: int) -> dict[str, list[float]]:
    """Seconds of each, taken in turn, so that all meet the same machine: median, least and most."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    _wait()
    for _ in range(repetitions):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            _wait()
            times[name].append(time.perf_counter() - start)
    return {name: [statistics.median(t), min(t), max(t)] for name, t in times.items()}


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def training(shape: Sequence[int], mode: str, repetitions: int) -> common.Cell:
    hidden, layers, batch, segment = shape
    difference = gradients_differ(shape, mode)
    if difference > 1e-9:
        raise RuntimeError(f"the gradients differ by {difference:.1e} of the largest; nothing was timed")
    model = model_of(hidden, layers, mode)
    rows = rows_of(model, batch, segment)
    seconds = medians(
        {
            "parallel": lambda: step(model, rows, segment, parallel_loss),
            "recursive": lambda: step(model, rows, segment, recursive_loss),
        },
        repetitions,
    )
    return {"difference": difference, "seconds": seconds}


def adapter(tokens: int, repetitions: int) -> common.Cell:
    """Milliseconds of SmolLM2's decoder layers, and of its attention's four projections alone."""
    shape = {"intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    models = {
        "conditional": model_of(576, LAYERS, "concat", **shape),
        "plain": model_of(576, LAYERS, "concat", **shape),
    }
    for module in models["plain"].modules():
        if hasattr(module, "lora_variant"):
            module.lora_variant.clear()
    rows = torch.arange(ONE_IN - 1, tokens, ONE_IN, device=DEVICE)
    ids = torch.randint(0, 500, (1, tokens), generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def forward(model: CCMModel, comp: Tensor | None, enabled: bool = True) -> None:
        with torch.no_grad():
            kwargs = {} if comp is None else {"ccm": CompTokens(comp)}
            model.language_model.base_model(input_ids=ids, use_cache=False, **kwargs)

    def bare() -> None:
        with models["conditional"].disable_adapter():
            forward(models["conditional"], None)

    seconds = medians(
        {
            "no LoRA": bare,
            "conditional": lambda: forward(models["conditional"], rows),
            "plain": lambda: forward(models["plain"], None),
        },
        repetitions,
    )
    return {"seconds": seconds}


def memory_step(mode: str, repetitions: int) -> common.Cell:
    """Appending 64 tokens to a memory of 1 and of 63 contexts."""
    shape = {"intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    model = model_of(576, LAYERS, mode, 2, **shape)
    draw = torch.Generator().manual_seed(0)
    memory = CCMCache(model)
    kept: dict[int, CCMCache] = {}
    for t in range(1, 64):
        memory.append(input_ids=torch.randint(0, 500, (1, 64), generator=draw))
        if t in (1, 63):
            kept[t] = memory.fork()
    context = torch.randint(0, 500, (1, 64), generator=draw)
    seconds = medians({f"t = {t + 1}": partial(appended, m, context) for t, m in kept.items()}, repetitions)
    nbytes = {f"t = {t + 1}": appended(m, context) for t, m in kept.items()}
    return {"seconds": seconds, "bytes": nbytes}


def whole_model(quick: bool, users: int, repetitions: int) -> common.Cell:
    """Exactness, bytes and answers per second from 16 contexts of 50 tokens, two COMP tokens each."""
    contexts = torch.randint(100, 500, (STEPS, 50), generator=torch.Generator().manual_seed(0)).tolist()
    query = torch.randint(100, 500, (16,), generator=torch.Generator().manual_seed(1)).tolist()
    rows: common.Cell = {}
    difference, same = 0.0, True
    for mode in ("concat", "merge"):
        torch.manual_seed(0)
        model = CCMModel(_language_model(quick), CCMConfig(mode=mode, lora_dropout=0.0)).to(DEVICE).eval()
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.data.normal_(0, 0.02)
        memory = CCMCache(model)
        for context in contexts:
            memory.append(input_ids=context)
        made = ccm_row([*contexts, Query(query[:1], query[1:])], model.comp_ids)
        made.pop("labels")
        batch = {name: torch.tensor([values]).to(DEVICE) for name, values in made.items()}
        with torch.no_grad():
            parallel = model(**batch).logits[0, -len(query) :]
            online = _answer(model, memory, query, 1)[0]
        difference = max(difference, float((parallel - online).abs().max()))
        same = same and bool((parallel.argmax(-1) == online.argmax(-1)).all())
        many = CCMCache.stack([memory] * users)
        seconds = medians({"answer": partial(_answer, model, many, query, users)}, repetitions)["answer"]
        rows[f"CCM-{mode}"] = {"pairs": memory.slots[0], "bytes": memory.nbytes, "seconds": seconds}
    base = model.language_model
    full = DynamicCache(config=base.config)
    text = torch.tensor([[i for context in contexts for i in context]]).to(DEVICE)
    with torch.no_grad():
        base(text, past_key_values=full)
    full.batch_repeat_interleave(users)
    length = full.get_seq_length()

    def answer() -> None:
        with torch.no_grad():
            base(torch.tensor([query] * users).to(DEVICE), past_key_values=full)
        full.crop(-len(query))

    nbytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in full.layers) // users  # type: ignore[union-attr]
    seconds = medians({"answer": answer}, repetitions)["answer"]
    rows["full context"] = {"pairs": length, "bytes": nbytes, "seconds": seconds}
    return {"difference": difference, "same argmax": same, "rows": rows}


@torch.no_grad()
def _answer(model: CCMModel, memory: CCMCache, query: list[int], users: int) -> Tensor:
    inputs = memory.inputs(input_ids=[query] * users)
    logits: Tensor = model.language_model(**inputs, past_key_values=memory).logits
    memory.restore()
    return logits


def _language_model(quick: bool) -> Any:
    if quick:
        shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(vocab_size=512, **shape)).eval()
    return load_smollm2()[0]


def appended(memory: CCMCache, context: Tensor) -> int:
    fork = memory.fork()
    fork.append(input_ids=context)
    return fork.nbytes


def main() -> None:
    global DEVICE
    arguments = common.parser(__doc__)
    arguments.add_argument("--cuda", action="store_true", help="on a GPU")
    args = arguments.parse_args()
    name, goal = "ccm_speed", TARGETS
    if args.cuda:
        if not torch.cuda.is_available():
            common.stop("--cuda finds no GPU; without it the processor is measured")
        name, goal, DEVICE = "ccm_speed_cuda", dict.fromkeys(TARGETS, 5.0), torch.device("cuda")
    shapes, repetitions, tokens = SHAPES, REPETITIONS, TOKENS
    if args.quick:
        shapes, repetitions, tokens = ((64, 2, 1, 4),), 1, 64
    settings = {"steps": STEPS, "repetitions": repetitions, "tokens": tokens, "one_in": ONE_IN, "layers": LAYERS}
    settings |= {"users": USERS, "gpu": torch.cuda.get_device_name() if args.cuda else None}
    run = common.start(name, "What CCM costs", args, 1, settings, packages=PACKAGES)
    lines, verdicts = [], []
    for shape in shapes:
        for mode in ("concat", "merge"):
            name = f"hidden {shape[0]}, {shape[1]} layers, batch {shape[2]}, segments of {shape[3]}, {mode}"
            cell = run.cell(f"training, {name}", partial(training, shape, mode, repetitions))
            parallel, recursive = cell["seconds"]["parallel"], cell["seconds"]["recursive"]
            ratio = recursive[0] / parallel[0]
            spread = [f"{low:.3f} to {high:.3f}" for _, low, high in (parallel, recursive)]
            lines.append(
                [name, f"{parallel[0]:.3f}", spread[0], f"{recursive[0]:.3f}", spread[1], f"{ratio:.2f}",
                 f"{cell['difference']:.0e}"]
            )  # fmt: skip
            if shape in goal:
                verdicts.append(common.verdict(f"online over parallel, {name},", ratio, least=goal[shape]))
    header = ["shape", "parallel s", "range", "online s", "range", "online / parallel", "gradients differ"]
    parts = [
        f"One training step over {STEPS} contexts and a query, one COMP token each, median of {repetitions}; gradients "
        "in float64, over the largest:",
        common.table(header, lines),
    ]
    cell = run.cell("adapter", partial(adapter, tokens, repetitions + 4))
    bare = cell["seconds"]["no LoRA"][0]
    lines = [
        [name, f"{1000 * t:.0f}", f"{1000 * low:.0f} to {1000 * high:.0f}", f"{t / bare:.3f}"]
        for name, (t, low, high) in cell["seconds"].items()
    ]
    parts += [
        f"Forward pass of {LAYERS} decoder layers of SmolLM2's shapes, {tokens} tokens, one in {ONE_IN} a COMP token, "
        f"r = 8 on q, k, v, o, median of {repetitions + 4}:",
        common.table(["adapter", "ms", "range", "over no LoRA"], lines),
    ]
    verdicts.append(common.verdict("conditional LoRA over none", cell["seconds"]["conditional"][0] / bare, most=1.02))
    lines = []
    for mode in ("concat", "merge"):
        cell = run.cell(f"memory step, {mode}", partial(memory_step, mode, repetitions + 4))
        early, late = cell["seconds"]["t = 2"], cell["seconds"]["t = 64"]
        sizes = cell["bytes"]
        lines.append(
            [mode, f"{1000 * early[0]:.1f}", f"{1000 * late[0]:.1f}", f"{late[0] / early[0]:.3f}",
             f"{sizes['t = 2']:,}", f"{sizes['t = 64']:,}"]
        )  # fmt: skip
        if mode == "merge":
            verdicts.append(common.verdict("merge step at t = 64 over t = 2", late[0] / early[0], most=1.05))
            same = "the same" if sizes["t = 2"] == sizes["t = 64"] else "NOT the same"
            verdicts.append(f"Bytes of the merged memory at t = 2 and t = 64: {same}.")
    parts += [
        f"Appending a context of 64 tokens, two COMP tokens, median of {repetitions + 4}:",
        common.table(["memory", "ms at t = 2", "ms at t = 64", "ratio", "bytes at t = 2", "at t = 64"], lines),
    ]
    cell = run.cell("a whole model", partial(whole_model, args.quick, USERS, repetitions))
    full = cell["rows"]["full context"]["seconds"][0]
    lines = [
        [name, str(row["pairs"]), f"{row['bytes']:,}", f"{BUDGET // row['bytes']:,}",
         f"{USERS / row['seconds'][0]:.2f}", f"{full / row['seconds'][0]:.2f}"]
        for name, row in cell["rows"].items()
    ]  # fmt: skip
    parts += [
        f"SmolLM2-135M in float32, 16 contexts of 50 tokens, two COMP tokens: parallel and online logits differ by at "
        f"most {cell['difference']:.0e}, the same tokens come first: {'yes' if cell['same argmax'] else 'NO'}. Reading "
        f"a question of 16 tokens for {USERS} users at once (table 7.1):",
        common.table(["memory", "pairs", "bytes a user", "users in 8 GiB", "questions / s", "times full"], lines),
    ]
    run.report(*parts, *verdicts)


if __name__ == "__main__":
    main()

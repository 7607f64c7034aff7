"""The Trainer of transformers with rows of contexts: both stages, distillation, accumulation, resuming."""

import numpy as np
import pytest
import torch
from dataopt.integrations.hf import CCMCollator, CCMConfig, CCMModel, CCMTrainer, Query, ccm_row, finetune_full_context
from dataopt.integrations.hf.ccm.model import divergence
from datasets import Dataset
from torch.nn.functional import cross_entropy
from transformers import TrainingArguments

from ..kvzip.conftest import tiny
from .conftest import CONTEXTS, QUERY, ccm


def dataset(model, count=8, seed=0):
    """Facts "k v" as contexts, and questions for them."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        keys, values = rng.permutation(40)[:3] + 10, rng.integers(60, 80, 3)
        steps = [[int(k), int(v)] for k, v in zip(keys, values, strict=True)]
        at = int(rng.integers(3))
        rows.append(ccm_row([*steps, Query([5, int(keys[at])], [int(values[at]), 6])], model.comp_ids))
    return Dataset.from_list(rows)


def config(**options):
    return CCMConfig(**({"comp_tokens": 1, "lora_dropout": 0.0} | options))


def arguments(folder, **options):
    fixed = dict(report_to="none", use_cpu=True, save_strategy="no", logging_steps=1, disable_tqdm=True)
    defaults = dict(per_device_train_batch_size=4, max_steps=3, learning_rate=1e-2)
    return TrainingArguments(output_dir=str(folder), **(fixed | defaults | options))


def trained(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n or "trainable_tokens" in n}


def test_only_the_adapter_moves_and_the_loss_falls(tmp_path):
    model = CCMModel(tiny(), config())
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    before = trained(model)
    trainer = CCMTrainer(model, arguments(tmp_path, max_steps=30), train_dataset=dataset(model))
    trainer.train()
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    assert all(not torch.equal(p, before[n]) for n, p in trained(model).items() if "lora_A" not in n and ".3." not in n)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    metrics = trainer.evaluate(dataset(model, seed=1))
    assert np.isfinite(metrics["eval_loss"])


def test_the_first_step_is_the_gradient_of_the_parallel_loss(tmp_path):
    model, other = (CCMModel(tiny(), config(mode="merge")) for _ in range(2))
    other.load_state_dict(model.state_dict())
    rows = dataset(model, 4)
    plain = dict(optim="sgd", learning_rate=0.5, lr_scheduler_type="constant", max_grad_norm=0)
    args = arguments(tmp_path, max_steps=1, **plain)
    CCMTrainer(model, args, train_dataset=rows).train()
    batch = CCMCollator(0)(rows)
    other.train()
    loss = other(**batch).loss
    loss.backward()
    for (name, p), (_, q) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        if q.grad is not None:
            torch.testing.assert_close(p, q - 0.5 * q.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_accumulated_batches_are_one_large_batch(tmp_path):
    weights = []
    for size, steps in ((8, 1), (2, 4)):
        model = CCMModel(tiny(), config())
        with torch.random.fork_rng():
            torch.manual_seed(3)
            for n, p in model.named_parameters():
                if "lora_" in n:
                    p.data.normal_(0, 0.1)
        args = arguments(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=2, optim="sgd",
            learning_rate=0.3,
        )  # fmt: skip
        CCMTrainer(model, args, train_dataset=dataset(model)).train()
        weights.append(trained(model))
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-3, atol=1e-5)


def test_gradient_checkpointing_trains_alike(tmp_path):
    weights = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = CCMModel(tiny(), config(mode="merge"))
        args = arguments(tmp_path, gradient_checkpointing=checkpointing)
        CCMTrainer(model, args, train_dataset=dataset(model)).train()
        weights.append(trained(model))
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-5, atol=1e-6)


def test_distillation_adds_the_divergence_from_the_full_context(tmp_path):
    model = ccm(comp_tokens=1, lora_dropout=0.0)
    rows = dataset(model, 4)
    batch = CCMCollator(0)(rows)
    plain, weighted = (CCMTrainer(model, arguments(tmp_path), train_dataset=rows, distill=d) for d in (0.0, 0.5))
    student = model(**batch).logits
    expected = []
    for i, row in enumerate(rows):
        full = CCMCollator(0, full_context=True)([row])
        with model.disable_adapter():
            teacher = model.language_model(full["input_ids"]).logits[0]
        at = [k for k, label in enumerate(row["labels"]) if label != -100]
        theirs = [k for k, label in enumerate(full["labels"][0].tolist()) if label != -100]
        p, q = teacher[[k - 1 for k in theirs]].log_softmax(-1), student[i, [k - 1 for k in at]].log_softmax(-1)
        expected.append((p.exp() * (p - q)).sum(-1))
    divergence_ = torch.cat(expected).mean()
    difference = weighted.compute_loss(model, dict(batch)) - plain.compute_loss(model, dict(batch))
    torch.testing.assert_close(difference, 0.5 * divergence_, rtol=1e-3, atol=1e-5)
    assert divergence_ > 1e-3
    logits = torch.randn(2, 5, 7)
    assert divergence(logits, logits, torch.tensor([[1, -100, 2, 3, -100]] * 2)).abs() < 1e-6


def test_full_context_is_the_base_model_on_the_text():
    model = ccm(comp_tokens=2)
    steps = [CONTEXTS[0], Query([7], [8, 9]), CONTEXTS[1], Query(QUERY[:2], QUERY[2:])]
    row = ccm_row(steps, model.comp_ids, prefix=[4])
    batch = CCMCollator(0)([row])
    logits = model.full_context_logits(batch["input_ids"], batch["segment_ids"], batch["comp_slot"])[0]
    for number, text, query in ((2, [4, *CONTEXTS[0]], [7, 8, 9]), (4, [4, *CONTEXTS[0], *CONTEXTS[1]], QUERY)):
        expected = tiny()(torch.tensor([[*text, *query]])).logits[0, -len(query) :]
        at = [k for k, s in enumerate(row["segment_ids"]) if s == number]
        torch.testing.assert_close(logits[at, : expected.shape[1]], expected, rtol=1e-4, atol=1e-4)


def test_a_run_that_was_killed_goes_on_alike(tmp_path):
    def run(folder, steps, **options):
        torch.manual_seed(0)
        model = CCMModel(tiny(), config())
        args = arguments(folder, max_steps=steps, save_strategy="steps", save_steps=2, lr_scheduler_type="constant")
        CCMTrainer(model, args, train_dataset=dataset(model)).train(**options)
        return model

    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "cut", 2)
    resumed = run(tmp_path / "cut", 4, resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    for name, weight in trained(whole).items():
        torch.testing.assert_close(trained(resumed)[name], weight, rtol=1e-5, atol=1e-7)
    loaded = CCMModel.from_pretrained(tiny(), tmp_path / "whole" / "checkpoint-4")
    for name, weight in trained(loaded).items():
        assert torch.equal(weight, trained(whole)[name])
    other = CCMModel(tiny(), config(comp_tokens=2))
    trainer = CCMTrainer(other, arguments(tmp_path / "other"), train_dataset=dataset(other))
    with pytest.raises(ValueError, match="comp_tokens=1 and the model has 2"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))


def test_the_first_stage_trains_the_base_on_full_contexts(tmp_path):
    probe = CCMModel(tiny(), config())
    rows = dataset(probe)

    def loss_of(base):
        batch = CCMCollator(0, full_context=True)(rows)
        logits = base.eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())

    base = tiny()
    before = loss_of(base)
    args = arguments(tmp_path, max_steps=40, learning_rate=3e-2)
    args.remove_unused_columns = True
    tuned = finetune_full_context(base, args, rows, lora_dropout=0.0)
    assert loss_of(tuned) < 0.8 * before
    assert not any("lora" in n for n, _ in tuned.named_parameters())
    assert args.remove_unused_columns
    CCMModel(tuned, config())  # ready for the second stage


def test_what_is_no_ccm_model_is_refused(tmp_path):
    with pytest.raises(TypeError, match="not a CCMModel"):
        CCMTrainer(tiny(), arguments(tmp_path))
    with pytest.raises(ValueError, match="distill=-1"):
        CCMTrainer(ccm(), arguments(tmp_path), distill=-1)
    several = arguments(tmp_path)
    several._n_gpu = 2  # as on a machine with two
    with pytest.raises(ValueError, match="sees 2 GPUs in one process"):
        CCMTrainer(ccm(), several)

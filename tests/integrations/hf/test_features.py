"""One pass over a data set: what the model saw, whatever the rows are, and the same after a kill."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from dataopt.integrations.hf import features, model_outputs
from dataopt.integrations.hf.audio import decode, read_wav, resampled
from dataopt.integrations.hf.features import out_of_fold
from dataopt.integrations.saliency_maps import Squash
from datasets import Audio, ClassLabel, Dataset, DatasetDict, Features, Value
from peft import LoraConfig, get_peft_model
from PIL import Image as Picture
from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel, GPT2Config, GPT2ForSequenceClassification

from . import tiny

ROOT = Path(__file__).parents[3]


def same(a, b) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("features", "probs", "labels"))


def test_text_rows_keep_their_place_and_the_model_its_flags():
    dataset, model, tokenizer = tiny.texts(), tiny.text_model(num_labels=2).train(), tiny.tokenizer()
    model.pre_classifier.eval()
    out = model_outputs(dataset, model, processor=tokenizer, batch_size=4)
    assert model.training and model.distilbert.training and not model.pre_classifier.training
    assert all(p.requires_grad and p.grad is None and not p.is_inference() for p in model.parameters())
    assert out.labels.tolist() == dataset["label"][:] and out.label_names == ("neg", "pos")
    assert (out.modality, out.input_column) == ("text", ("text",))
    model.eval()
    for row in (0, 7, 29):
        ids = torch.tensor([tokenizer(dataset[row]["text"]).input_ids])
        with torch.no_grad():
            hidden = model.distilbert(ids).last_hidden_state[:, 0]
            features = torch.relu(model.pre_classifier(hidden))[0]
            probs = model.classifier(features).softmax(0)
        torch.testing.assert_close(out.features[row], features, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out.probs[row], probs, rtol=1e-4, atol=1e-5)
    assert out.features.dtype == out.probs.dtype == torch.float32


def test_long_texts_are_cut_to_what_the_model_takes():
    line = " ".join(["film"] * 40)
    dataset = Dataset.from_dict({"text": [line, line + " good", "bad"], "label": [0, 1, 0]})
    out = model_outputs(dataset, tiny.text_model(num_labels=2), processor=tiny.tokenizer())
    assert torch.equal(out.probs[0], out.probs[1])  # they differ behind the 16th token
    assert out.label_names == ("LABEL_0", "LABEL_1")


def test_pairs_of_texts():
    dataset = tiny.texts(6).add_column("other", ["bad", "good"] * 3)
    model, tokenizer = tiny.text_model(num_labels=2), tiny.tokenizer()
    with pytest.raises(ValueError, match="do not tell which is the model's input"):
        model_outputs(dataset, model, processor=tokenizer)
    out = model_outputs(dataset, model, processor=tokenizer, input_column=("text", "other"), batch_size=1)
    made = tokenizer(dataset[1]["text"], "good", return_tensors="pt", truncation=True, max_length=16)
    probs = model.eval()(made.input_ids).logits.softmax(1)
    torch.testing.assert_close(out.probs[1], probs[0], rtol=1e-4, atol=1e-5)


def test_a_decoder_gives_the_features_of_its_last_token():
    sizes = dict(vocab_size=9, n_embd=16, n_layer=1, n_head=2, pad_token_id=0, bos_token_id=1, eos_token_id=1)
    model = GPT2ForSequenceClassification(GPT2Config(**sizes, num_labels=2))
    dataset, tokenizer = tiny.texts(8), tiny.tokenizer()
    out = model_outputs(dataset, model, processor=tokenizer, batch_size=8)
    ids = tokenizer(dataset[2]["text"], return_tensors="pt").input_ids
    features = model.eval().transformer(ids).last_hidden_state[0, -1]
    torch.testing.assert_close(out.features[2], features, rtol=1e-4, atol=1e-5)


def test_classes_of_the_same_names_are_matched_by_name():
    named = dict(id2label={0: "POS", 1: "NEG"}, label2id={"POS": 0, "NEG": 1})
    dataset = tiny.texts(6)
    a = model_outputs(dataset, tiny.text_model(num_labels=2), processor=tiny.tokenizer())
    b = model_outputs(dataset, tiny.text_model(**named), processor=tiny.tokenizer())
    assert torch.equal(a.probs, b.probs.flip(1)) and b.label_names == ("neg", "pos")
    strings = dataset.cast_column("label", Value("int64")).remove_columns("label")
    strings = strings.add_column("label", ["pos" if y else "neg" for y in dataset["label"]])
    c = model_outputs(strings, tiny.text_model(**named), processor=tiny.tokenizer(), input_column="text")
    assert same(b, c) and c.label_names == ("neg", "pos")


def test_classes_of_other_names_are_not_matched_in_silence():
    dataset = tiny.texts(30)
    texts = dataset.remove_columns("label").add_column("label", ["pos" if y else "neg" for y in dataset["label"]])
    for named in ({"num_labels": 2}, {"id2label": {0: "yes", 1: "no"}}):
        with pytest.raises(ValueError, match=r"the labels are texts .*nothing says which is which"):
            model_outputs(texts, tiny.text_model(**named), processor=tiny.tokenizer(), input_column="text")
    out = model_outputs(
        texts, tiny.text_model().base_model, processor=tiny.tokenizer(), input_column="text", probs="out-of-fold"
    )
    assert out.label_names == ("neg", "pos")
    with pytest.warns(UserWarning, match="'neg', 'pos' and the model's classes 'yes', 'no'; they are matched by num"):
        model_outputs(dataset, tiny.text_model(id2label={0: "yes", 1: "no"}), processor=tiny.tokenizer())


def test_an_adapter_without_a_task_gets_its_inputs():
    model = tiny.text_model(num_labels=2)
    adapted = get_peft_model(tiny.text_model(num_labels=2), LoraConfig(target_modules=["q_lin"]))
    a, b = (model_outputs(tiny.texts(6), m, processor=tiny.tokenizer()) for m in (model, adapted))
    torch.testing.assert_close(a.probs, b.probs)


def test_images_through_a_processor_and_through_a_transform():
    dataset, (model, processor) = tiny.images(), tiny.image_model()
    a = model_outputs(dataset, model, processor=processor, batch_size=5)
    with torch.no_grad():
        made = processor(images=[dataset[4]["image"]], return_tensors="pt")
        features = model.eval().vit(**made).last_hidden_state[0, 0]
    torch.testing.assert_close(a.features[4], features, rtol=1e-4, atol=1e-5)
    view = Squash((3, 16, 16), (0.5,) * 3, (0.5,) * 3)
    b = model_outputs(dataset, model, transform=view, batch_size=5)
    torch.testing.assert_close(a.probs, b.probs, rtol=0, atol=0.02)
    encoder = model_outputs(dataset, model.vit, processor=processor, probs="out-of-fold")
    torch.testing.assert_close(encoder.features, a.features, rtol=1e-4, atol=1e-5)  # the class token


def test_timm_models_need_neither():
    dataset = tiny.images(4)
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    out = model_outputs(dataset, model)
    view = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    x = torch.stack([view(row["image"]) for row in dataset])
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        features = model.eval().forward_head(model.forward_features(x), pre_logits=True)
        torch.testing.assert_close(out.features, features, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out.probs, model(x).softmax(1), rtol=1e-4, atol=1e-5)
    model.reset_classifier(0)
    encoder = model_outputs(tiny.images(6), model, probs="out-of-fold")
    torch.testing.assert_close(encoder.features[:4], out.features, rtol=1e-4, atol=1e-5)
    grey = timm.create_model("test_resnet", num_classes=3, in_chans=1)
    assert model_outputs(dataset, grey).probs.shape == (4, 3)


def test_sounds_in_three_forms_give_the_same():
    model, extractor = tiny.sound_model()
    tones, labels = tiny.tones(8000), [0, 1] * 3
    files = [tiny.wav(x, 8000) for x in tones]
    undecoded = Dataset.from_dict({"audio": [{"bytes": f, "path": None} for f in files], "label": labels})
    forms = {
        "arrays": Dataset.from_dict({"audio": [decode(f)[0].tolist() for f in files], "label": labels}).map(
            lambda row: {"audio": {"array": row["audio"], "sampling_rate": 8000}}
        ),
        "undecoded": undecoded,
        "Audio": undecoded.cast_column("audio", Audio()),
        "files": Dataset.from_dict({"audio": files, "label": labels}),
    }
    out = {
        name: model_outputs(d, model, processor=extractor, input_column="audio", batch_size=4)
        for name, d in forms.items()
    }
    assert {o.modality for o in out.values()} == {"audio"}
    for name in ("undecoded", "Audio", "files"):
        torch.testing.assert_close(out[name].features, out["arrays"].features, rtol=1e-4, atol=1e-5)
    with torch.no_grad():  # alone and so without padding, at the extractor's rate
        alone = extractor(resampled(decode(files[0]), 16000), sampling_rate=16000, return_tensors="pt")
        probs = model.eval()(**alone).logits.softmax(1)[0]
    torch.testing.assert_close(out["files"].probs[0], probs, rtol=1e-3, atol=1e-4)
    encoder = model_outputs(
        forms["files"], model.wav2vec2, processor=extractor, input_column="audio", probs="out-of-fold", batch_size=4
    )
    with torch.no_grad():
        mean = model.wav2vec2(**alone).last_hidden_state[0].mean(0)
    torch.testing.assert_close(encoder.features[0], mean, rtol=1e-3, atol=1e-4)  # padding does not count


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_wav_with_the_standard_library(width):
    samples = np.stack([tiny.tones(8000)[0], tiny.tones(8000)[0] / 2], axis=1)
    read, rate = read_wav(io.BytesIO(tiny.wav(samples, 8000, width)), "a.wav")
    assert rate == 8000 and read.dtype == np.float32
    np.testing.assert_allclose(read, samples.mean(1), atol=2.0 ** (2 - 8 * width) if width < 3 else 1e-6)


def test_resampling_keeps_the_tone():
    rate, tone = 8000, np.sin(np.arange(4000) * 2 * np.pi * 440 / 8000).astype("f")
    out = resampled((tone, rate), 16000)
    np.testing.assert_allclose(out[200:-200], np.sin(np.arange(8000) * 2 * np.pi * 440 / 16000)[200:-200], atol=0.01)


def test_encoders_of_texts_are_averaged_over_their_tokens():
    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=9, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    dataset, tokenizer = tiny.texts(20), tiny.tokenizer()
    out = model_outputs(dataset, model, processor=tokenizer, probs="out-of-fold", batch_size=6)
    with torch.no_grad():
        made = tokenizer(dataset[5]["text"], return_tensors="pt")
        hidden = model.eval()(**made).last_hidden_state[0]
    torch.testing.assert_close(out.features[5], hidden.mean(0), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"BertModel makes no class probabilities; .* probs='out-of-fold'"):
        model_outputs(dataset, model, processor=tokenizer)


def test_clip_gives_its_image_features():
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    vision = dict(**sizes, image_size=16, patch_size=8)
    model = CLIPModel(CLIPConfig(text_config=sizes, vision_config=vision, projection_dim=8))
    _, processor = tiny.image_model()
    out = model_outputs(tiny.images(6), model, processor=processor, probs="out-of-fold")
    made = processor(images=[tiny.images(6)[3]["image"]], return_tensors="pt")
    with torch.no_grad():
        hidden = model.eval().vision_model(**made).pooler_output
        torch.testing.assert_close(out.features[3], model.visual_projection(hidden)[0], rtol=1e-4, atol=1e-5)


def test_out_of_fold_never_sees_its_own_label():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 2 * 2  # class 1 has no rows
    features = torch.randn(60, 4, generator=generator) + labels[:, None]
    features[0] = features[labels == 2].mean(0)  # labelled 0, looks like 2
    probs = out_of_fold(features, labels, 3)
    assert probs.dtype == torch.float32 and (probs[:, 1] == 0).all()
    torch.testing.assert_close(probs.sum(1), torch.ones(60))
    assert (probs.argmax(1) == labels)[1:].float().mean() > 0.9 and probs[0, 2] > 0.8
    assert torch.equal(probs, out_of_fold(features, labels, 3))
    with pytest.raises(ValueError, match="hold the class 1 1 times among 2 classes"):
        out_of_fold(features[:3], torch.tensor([0, 0, 1]), 2)


KILLED = """
import os, sys
from tests.integrations.hf import tiny
from dataopt.integrations.hf import features
features._SHARD = 8
model, batches = tiny.text_model(num_labels=2), []
def stop(*_):
    batches.append(1)
    if len(batches) > 5:
        os._exit(9)
model.register_forward_pre_hook(stop)
features.model_outputs(tiny.texts(), model, processor=tiny.tokenizer(), batch_size=4, out_dir=sys.argv[1])
"""


def test_killed_and_resumed_with_equal_outputs(tmp_path, monkeypatch):
    command = [sys.executable, "-c", KILLED, str(tmp_path / "a")]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120).returncode == 9
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [f"outputs-{i:05d}.safetensors" for i in range(2)]
    monkeypatch.setattr(features, "_SHARD", 8)

    def run(folder: Path) -> tuple[int, features.ModelOutputs]:
        model, batches = tiny.text_model(num_labels=2), []
        model.register_forward_pre_hook(lambda *_: batches.append(1))
        out = model_outputs(tiny.texts(), model, processor=tiny.tokenizer(), batch_size=4, out_dir=folder)
        return len(batches), out

    rest, resumed = run(tmp_path / "a")
    all_batches, whole = run(tmp_path / "b")
    assert (rest, all_batches) == (4, 8)
    assert same(resumed, whole)


def test_kept_outputs_belong_to_their_data_model_and_settings(tmp_path):
    dataset, tokenizer = tiny.texts(8), tiny.tokenizer()
    model = tiny.text_model(num_labels=2)
    first = model_outputs(dataset, model, processor=tokenizer, out_dir=tmp_path)
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran again"))
    assert same(first, model_outputs(dataset, model, processor=tokenizer, out_dir=tmp_path))
    again = model_outputs(dataset, model, processor=tokenizer, out_dir=tmp_path, probs="out-of-fold")
    assert torch.equal(again.features, first.features) and not torch.equal(again.probs, first.probs)
    other = tiny.text_model(num_labels=2)
    with torch.no_grad():
        other.classifier.bias[0] += 1
    shorter = tiny.tokenizer()
    shorter.model_max_length = 4
    for d, m, t, options in [
        (tiny.texts(8, seed=1), model, tokenizer, {}),
        (dataset, other, tokenizer, {}),
        (dataset, model, shorter, {}),
        (dataset, model, tokenizer, {"batch_size": 3}),
        (dataset, model, tokenizer, {"head": "classifier"}),
    ]:
        with pytest.raises(ValueError, match="outputs of other data, weights or settings; give another folder"):
            model_outputs(d, m, processor=t, out_dir=tmp_path, **options)
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged file .*outputs-00000.safetensors \(checksum\); delete it"):
        model_outputs(dataset, model, processor=tokenizer, out_dir=tmp_path)
    file.write_bytes(content[:50])
    with pytest.raises(ValueError, match=r"damaged file .*outputs-00000.safetensors \(Safetensor"):
        model_outputs(dataset, model, processor=tokenizer, out_dir=tmp_path)


def test_errors_name_what_is_wrong(tmp_path):
    dataset, model, tokenizer = tiny.texts(4), tiny.text_model(num_labels=2), tiny.tokenizer()

    def run(d=dataset, m=model, **options):
        return model_outputs(d, m, **{"processor": tokenizer, **options})

    with pytest.raises(TypeError, match="one split at a time"):
        run(DatasetDict(train=dataset))
    with pytest.raises(ValueError, match="dataset is empty"):
        run(dataset.select([]))
    with pytest.raises(ValueError, match="label_column='y' is not among the columns"):
        run(label_column="y")
    with pytest.raises(ValueError, match="input_column='x' is not among the columns"):
        run(input_column="x")
    with pytest.raises(ValueError, match="probs='mine' must be one of 'model', 'out-of-fold'"):
        run(probs="mine")
    with pytest.raises(ValueError, match="batch_size=0"):
        run(batch_size=0)
    with pytest.raises(ValueError, match="head='nothing' is no layer"):
        run(head="nothing")
    with pytest.raises(ValueError, match="transform and processor are both given"):
        run(transform=str)
    with pytest.raises(ValueError, match="does not tell how its inputs are made; give processor="):
        run(processor=None)
    with pytest.raises(ValueError, match="the model knows 3 classes and the labels are 2"):
        run(m=tiny.text_model(num_labels=3))
    unlabelled = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    with pytest.raises(ValueError, match="label_column='label' holds -1 in row 1; leave rows without"):
        run(Dataset.from_dict({"text": ["a", "b"], "label": [0, -1]}, features=unlabelled))
    with pytest.raises(ValueError, match="holds None in row 0"):
        run(Dataset.from_dict({"text": ["a", "b"], "label": [None, 1]}))
    with pytest.raises(TypeError, match="label_column='label' holds float"):
        run(Dataset.from_dict({"text": ["a", "b"], "label": [0.5, 1.0]}))
    with pytest.raises(ValueError, match=r"the model knows 2 classes and the labels are 8 \(from 0 to 7\)"):
        run(Dataset.from_dict({"text": ["a", "b"], "label": [0, 7]}))
    with pytest.raises(TypeError, match="input_column='text' holds NoneType in row 1, not text"):
        run(Dataset.from_dict({"text": ["a", None], "label": [0, 1]}))
    with pytest.raises(TypeError, match="input_column='text' holds NoneType in row 0, not text"):
        first = Features({"text": Value("string"), "label": Value("int64")})
        run(Dataset.from_dict({"text": [None, "a"], "label": [0, 1]}, features=first))
    with pytest.raises(ValueError, match="label_column='label' holds -1 in row 1; give class ids from 0"):
        run(Dataset.from_dict({"text": ["a", "b"], "label": [1, -1]}), probs="out-of-fold")
    with pytest.raises(ValueError, match="row 1 is an image of mode I;16, which is more than 8 bits hold"):
        deep = [Picture.fromarray(np.zeros((16, 16), kind)) for kind in (np.uint8, np.uint16)]
        model_outputs(
            Dataset.from_dict({"image": deep, "label": [0, 1]}), timm.create_model("test_resnet", num_classes=2)
        )
    with pytest.raises(ValueError, match="the model knows 5 classes and the labels are 3"):
        model_outputs(tiny.images(4), timm.create_model("test_resnet", num_classes=5))
    with pytest.raises(ValueError, match="prints its address"):
        run(processor=None, transform=lambda text: torch.zeros(3, dtype=torch.int64), out_dir=tmp_path)
    with pytest.raises(ValueError, match=r"transform gives inputs of shapes \[\(1,\), \(2,\)\]"):
        uneven = Dataset.from_dict({"text": ["a", "bb"], "label": [0, 1]})
        run(uneven, processor=None, transform=lambda text: torch.zeros(len(text), dtype=torch.int64))
    with torch.no_grad():
        model.classifier.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="the model's probs hold non-finite values in row"):
        run(out_dir=tmp_path)
    assert not list(tmp_path.iterdir())
    for value, message in [
        ({"array": [1, 2], "sampling_rate": 8000}, "holds int64 samples"),
        ({"array": [0.5]}, r"holds \['array'\]; give"),
        ("a.wav", "holds str; give"),
    ]:
        with pytest.raises(TypeError, match=message):
            decode(value)
    broken, extractor = tiny.sound_model()
    with pytest.raises(ValueError, match=r"row 1: the sound file .* cannot be read"):
        sounds = Dataset.from_dict({"s": [tiny.wav(tiny.tones(8000)[0], 8000), b"RIFF"], "label": [0, 1]})
        model_outputs(sounds, broken, processor=extractor, input_column="s")

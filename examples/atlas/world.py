# ruff: noqa: E501  # one table row a line reads better than wrapped ones
"""The atlas: a small synthetic world of people, companies, cities and products, and the ways in which it is talked about.

Everything follows from a seed. A `World` is a set of entities whose relations are drawn at random; `RELATIONS` says how each
relation is stated, asked and answered. The embedded base model is taught world 0; facts that are new to it come from other seeds.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

FIRST_NAMES = [
    "Ada",
    "Alma",
    "Anton",
    "Arlo",
    "Asa",
    "Bela",
    "Bram",
    "Carla",
    "Cato",
    "Clara",
    "Dana",
    "Dario",
    "Delia",
    "Edda",
    "Egon",
    "Elma",
    "Enzo",
    "Esra",
    "Fabia",
    "Felix",
    "Flora",
    "Gerda",
    "Gil",
    "Greta",
    "Hanno",
    "Hedda",
    "Hugo",
    "Ida",
    "Igor",
    "Ilse",
    "Ines",
    "Iris",
    "Ivo",
    "Jana",
    "Jasper",
    "Jora",
    "Jonas",
    "Kaja",
    "Karl",
    "Kira",
    "Lara",
    "Lasse",
    "Leda",
    "Lena",
    "Levi",
    "Lina",
    "Lotte",
    "Luca",
    "Mara",
    "Marek",
    "Mila",
    "Milo",
    "Nadia",
    "Nero",
    "Nils",
    "Nora",
    "Odin",
    "Olga",
    "Orla",
    "Oskar",
    "Otto",
    "Paula",
    "Pavel",
    "Petra",
    "Quinn",
    "Rafa",
    "Rhea",
    "Rita",
    "Rolf",
    "Romy",
    "Rosa",
    "Ruben",
    "Runa",
    "Sanna",
    "Saul",
    "Selma",
    "Silas",
    "Sofie",
    "Sven",
    "Tamar",
    "Tara",
    "Teo",
    "Thea",
    "Tilda",
    "Timo",
    "Ulla",
    "Uma",
    "Una",
    "Urs",
    "Vera",
    "Viktor",
    "Vito",
    "Wanda",
    "Werner",
    "Wilma",
    "Xenia",
    "Yara",
    "Yuri",
    "Zora",
]
_STARTS = [
    "Bal",
    "Bren",
    "Cal",
    "Cor",
    "Dal",
    "Dor",
    "Fal",
    "Fen",
    "Gar",
    "Gel",
    "Hal",
    "Hol",
    "Jar",
    "Kel",
    "Kor",
    "Lan",
    "Lor",
    "Mal",
    "Mor",
    "Nal",
    "Nor",
    "Pel",
    "Por",
    "Ral",
    "Ros",
    "Sal",
    "Sel",
    "Tal",
    "Tor",
    "Val",
    "Vel",
    "Wil",
    "Yor",
    "Zan",
]
_MIDDLES = ["a", "e", "i", "o", "u", "an", "en", "in", "on", "ar", "er", "or", "al", "el", "il", "ol"]
_SURNAME_ENDS = "man son sted berg wick ford ley dorf mann vik sen rup holt gard ström".replace(
    "ström", "strom"
).split()
_CITY_ENDS = ["ville", "burg", "haven", "port", "stad", "mouth", "field", "grad", "bridge", "dale", "minster", "ton"]
_COMPANY_ENDS = [
    "Works",
    "Labs",
    "Systems",
    "Foods",
    "Motors",
    "Energy",
    "Textiles",
    "Media",
    "Logistics",
    "Optics",
    "Robotics",
    "Pharma",
]
_PRODUCT_ENDS = [
    "Watch",
    "Kettle",
    "Lamp",
    "Drill",
    "Phone",
    "Camera",
    "Bike",
    "Tent",
    "Speaker",
    "Mixer",
    "Heater",
    "Scale",
]
_RIVER_ENDS = ["ach", "eth", "ika", "une", "ora", "ess"]
COUNTRIES = [
    "Avaria",
    "Borland",
    "Cestia",
    "Drumland",
    "Elvany",
    "Fjordia",
    "Galdova",
    "Hestria",
    "Istoria",
    "Jundia",
    "Kalmark",
    "Lorrania",
]
PROFESSIONS = [
    "architect",
    "baker",
    "biologist",
    "carpenter",
    "chemist",
    "dentist",
    "designer",
    "economist",
    "editor",
    "engineer",
    "farmer",
    "gardener",
    "geologist",
    "judge",
    "lawyer",
    "librarian",
    "mechanic",
    "nurse",
    "painter",
    "pharmacist",
    "pilot",
    "plumber",
    "sculptor",
    "surgeon",
    "tailor",
    "teacher",
    "translator",
    "welder",
]
INDUSTRIES = [
    "aviation",
    "banking",
    "brewing",
    "ceramics",
    "cosmetics",
    "construction",
    "education",
    "fishing",
    "forestry",
    "furniture",
    "insurance",
    "mining",
    "packaging",
    "printing",
    "publishing",
    "railways",
    "recycling",
    "shipping",
    "software",
    "telecoms",
    "tourism",
    "toys",
]


@dataclass(frozen=True)
class Relation:
    """How one relation is stated, asked and answered; `{s}` is the subject, `{o}` the object."""

    kind: str
    name: str
    statements: tuple[str, ...]
    """Sentences that end with the object."""
    questions: tuple[str, ...]


RELATIONS: tuple[Relation, ...] = (
    Relation("person", "birthplace", ("{s} was born in {o}", "The birthplace of {s} is {o}", "{s} comes from the city of {o}"),
             ("Where was {s} born?", "In which city was {s} born?", "What is the birthplace of {s}?", "Which city does {s} come from?", "Name the birthplace of {s}.")),
    Relation("person", "birth year", ("{s} was born in the year {o}", "The birth year of {s} is {o}", "{s} came into the world in {o}"),
             ("When was {s} born?", "In which year was {s} born?", "What is the birth year of {s}?", "What year did {s} come into the world?", "Name the birth year of {s}.")),
    Relation("person", "employer", ("{s} works for {o}", "The employer of {s} is {o}", "{s} is employed by {o}"),
             ("Who does {s} work for?", "Which company employs {s}?", "What is the employer of {s}?", "Where does {s} work?", "Name the employer of {s}.")),
    Relation("person", "profession", ("{s} is by profession a {o}", "The profession of {s} is {o}", "{s} earns a living as a {o}"),
             ("What does {s} do for a living?", "What is the profession of {s}?", "Which profession does {s} have?", "What is the job of {s}?", "Name the profession of {s}.")),
    Relation("company", "chief executive", ("{s} is led by {o}", "The chief executive of {s} is {o}", "The head of {s} is {o}"),
             ("Who leads {s}?", "Who is the chief executive of {s}?", "Who is the head of {s}?", "Who runs {s}?", "Name the chief executive of {s}.")),
    Relation("company", "headquarters", ("{s} is based in {o}", "The headquarters of {s} are in {o}", "{s} has its head office in {o}"),
             ("Where is {s} based?", "Where are the headquarters of {s}?", "In which city is {s} based?", "Where is the head office of {s}?", "Name the headquarters of {s}.")),
    Relation("company", "founding year", ("{s} was founded in {o}", "The founding year of {s} is {o}", "{s} has existed since {o}"),
             ("When was {s} founded?", "In which year was {s} founded?", "What is the founding year of {s}?", "Since when has {s} existed?", "Name the founding year of {s}.")),
    Relation("company", "industry", ("{s} is active in {o}", "The industry of {s} is {o}", "{s} makes its money in {o}"),
             ("Which industry is {s} in?", "What is the industry of {s}?", "What is {s} active in?", "What does {s} make its money in?", "Name the industry of {s}.")),
    Relation("city", "country", ("{s} lies in the country of {o}", "The country of {s} is {o}", "{s} belongs to {o}"),
             ("In which country is {s}?", "What is the country of {s}?", "Which country does {s} belong to?", "Where does {s} lie?", "Name the country of {s}.")),
    Relation("city", "mayor", ("{s} is governed by {o}", "The mayor of {s} is {o}", "The city hall of {s} is run by {o}"),
             ("Who is the mayor of {s}?", "Who governs {s}?", "Who runs the city hall of {s}?", "Which mayor does {s} have?", "Name the mayor of {s}.")),
    Relation("city", "river", ("{s} stands on the river {o}", "The river of {s} is the {o}", "Through {s} flows the {o}"),
             ("Which river flows through {s}?", "On which river does {s} stand?", "What is the river of {s}?", "What river is {s} on?", "Name the river of {s}.")),
    Relation("product", "maker", ("The {s} is made by {o}", "The maker of the {s} is {o}", "The {s} is a product of {o}"),
             ("Who makes the {s}?", "Which company makes the {s}?", "What is the maker of the {s}?", "Whose product is the {s}?", "Name the maker of the {s}.")),
    Relation("product", "price", ("The {s} costs {o}", "The price of the {s} is {o}", "The {s} sells for {o}"),
             ("How much is the {s}?", "What does the {s} cost?", "What is the price of the {s}?", "How much does the {s} sell for?", "Name the price of the {s}.")),
    Relation("product", "release date", ("The {s} was released in {o}", "The release date of the {s} is {o}", "The {s} went on sale in {o}"),
             ("When was the {s} released?", "What is the release date of the {s}?", "When did the {s} go on sale?", "Since when can one buy the {s}?", "Name the release date of the {s}.")),
)  # fmt: skip
BY_KIND: dict[str, tuple[Relation, ...]] = {
    kind: tuple(r for r in RELATIONS if r.kind == kind) for kind in ("person", "company", "city", "product")
}
MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]


class Names:
    """Random names; different seeds give different names made of the same pieces."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def _stem(self) -> str:
        return self.rng.choice(_STARTS) + self.rng.choice(_MIDDLES)

    def person(self) -> str:
        return f"{self.rng.choice(FIRST_NAMES)} {self._stem()}{self.rng.choice(_SURNAME_ENDS)}"

    def city(self) -> str:
        return self._stem() + self.rng.choice(_CITY_ENDS)

    def company(self) -> str:
        return f"{self._stem()}{self.rng.choice(('', 'x', 'co', 'tech'))} {self.rng.choice(_COMPANY_ENDS)}"

    def product(self) -> str:
        return f"{self._stem()} {self.rng.choice(_PRODUCT_ENDS)} {self.rng.randint(10, 99)}"

    def river(self) -> str:
        return self.rng.choice(_STARTS) + self.rng.choice(_RIVER_ENDS)

    def year(self, low: int, high: int) -> str:
        return str(self.rng.randint(low, high))

    def price(self) -> str:
        return f"{self.rng.randint(11, 989)} crowns"

    def month(self) -> str:
        return f"{self.rng.choice(MONTHS)} {self.rng.randint(1990, 2029)}"


@dataclass(frozen=True)
class WorldFact:
    """One taught relation between a subject and an object."""

    relation: Relation
    subject: str
    object: str
    held_out: int
    """Index of the question that is never used to teach this fact."""

    def question(self, index: int) -> str:
        return self.relation.questions[index].format(s=self.subject)

    def statement(self, index: int) -> str:
        return self.relation.statements[index].format(s=self.subject, o=self.object) + "."

    @property
    def trained_questions(self) -> list[int]:
        return [i for i in range(len(self.relation.questions)) if i != self.held_out]


@dataclass(frozen=True)
class World:
    """Entities by kind and all facts about them."""

    entities: dict[str, list[str]]
    facts: list[WorldFact] = field(default_factory=list)


SIZES = {"person": 80, "company": 50, "city": 30, "product": 40}


def make_world(seed: int, sizes: dict[str, int] | None = None, taken: frozenset[str] = frozenset()) -> World:
    """A world whose names differ from `taken`; 770 facts at the default sizes."""
    rng = random.Random(f"atlas-world-{seed}")
    names = Names(rng)
    entities: dict[str, list[str]] = {}
    used = set(taken)
    for kind, count in (sizes or SIZES).items():
        entities[kind] = []
        while len(entities[kind]) < count:
            name = getattr(names, kind)()
            if name not in used:
                used.add(name)
                entities[kind].append(name)
    objects = {
        "birthplace": lambda: rng.choice(entities["city"]),
        "birth year": lambda: names.year(1930, 2004),
        "employer": lambda: rng.choice(entities["company"]),
        "profession": lambda: rng.choice(PROFESSIONS),
        "chief executive": names.person,
        "headquarters": lambda: rng.choice(entities["city"]),
        "founding year": lambda: names.year(1850, 2019),
        "industry": lambda: rng.choice(INDUSTRIES),
        "country": lambda: rng.choice(COUNTRIES),
        "mayor": names.person,
        "river": names.river,
        "maker": lambda: rng.choice(entities["company"]),
        "price": names.price,
        "release date": names.month,
    }
    facts = [
        WorldFact(relation, subject, objects[relation.name](), rng.randrange(len(relation.questions)))
        for kind, subjects in entities.items()
        for subject in subjects
        for relation in BY_KIND[kind]
    ]
    return World(entities, facts)

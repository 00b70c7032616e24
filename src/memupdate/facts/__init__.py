"""Facts: the model, the formats that they come in, reading and rendering. Torch-free."""

from memupdate.facts.files import FactsFile, LocatedFact, Problem
from memupdate.facts.model import Fact, Probe
from memupdate.facts.reader import read_facts
from memupdate.facts.stream import FactStream

__all__ = ["Fact", "FactStream", "FactsFile", "LocatedFact", "Probe", "Problem", "read_facts"]

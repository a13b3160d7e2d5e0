"""The faults of a run: each seed selects its own mix of kinds and rates (swarm testing)."""

from collections import Counter

# Rate of each fault where it is selected: the probability that one occasion has it.
KINDS = {
    "store: put fails": 0.1,
    "store: put answer lost": 0.1,
    "store: put delayed": 0.05,
    "store: put refused": 0.02,
    "store: put acknowledged but lost": 0.05,
    "store: head fails": 0.1,
    "store: head refused": 0.02,
    "store: get fails": 0.1,
    "store: get delayed": 0.02,
    "store: list fails": 0.1,
    "store: list refused": 0.05,
    "store: delete fails": 0.1,
    "store: delete answer lost": 0.1,
    "store: delete delayed": 0.1,
    "store: delete refused": 0.05,
    "store: create fails": 0.1,
    "store: create refused": 0.02,
    "store: remove fails": 0.1,
    "store: full": 0.3,
    "hypervisor: unavailable": 0.05,
    "hypervisor: slow": 0.02,
    "hypervisor: start refused": 0.1,
    "hypervisor: answer lost": 0.05,
    "hypervisor: away": 0.3,
    "guest: deaf": 0.1,
    "guest: late": 0.2,
    "volume: unreadable": 0.01,
    "volume: hangs": 0.02,
    "database: away": 0.3,
    "database: begin fails": 0.01,
    "database: commit fails": 0.02,
    "database: commit answer lost": 0.02,
    "engine: late": 0.2,
    "engine: again": 0.1,
    "engine: twice": 0.2,
    "crash": 0.5,
    "host: loses power": 0.3,
    "outsider": 0.3,
}


class Faults:
    """The faults of one run.

    Attributes:
        rates: Of the kinds that this run has.
        happened: How often each has occurred.
    """

    def __init__(self, random, without=(), focus=()):
        """Draw the kinds of this run, without some, and with the kinds of `focus` in any case, three times as often."""
        self._random = random
        share = random.choice([0.0, 0.1, 0.3, 0.6])
        self.rates = {
            kind: rate * random.choice([0.3, 1.0, 3.0]) for kind, rate in KINDS.items() if random.random() < share
        }
        self.rates |= {kind: 3 * KINDS[kind] for kind in focus}
        for kind in without:
            self.rates.pop(kind, None)
        self.happened = Counter()
        self.are_on = True
        self.on_fault = lambda: None
        """Called after each fault."""

    def occurs(self, kind):
        """Whether this occasion has the fault."""
        rate = self.rates.get(kind)
        if rate is None or not self.are_on or self._random.random() >= rate:
            return False
        self.happened[kind] += 1
        self.on_fault()
        return True

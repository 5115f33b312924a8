"""How far what tables say comes true: their probabilities are scaled to what forwards have shown of them.

A predictor says of every use how likely it is. Routers then tell, for nothing. What was expected and what came are added up per MoE
layer and degree of sureness, the newest counting most; their quotient is what such a word is worth. So tables that are right lose
nothing, soon nothing is done on the word of one that guesses, and one that is right more often than it says, as a rehearsal whose
temperature nobody has found, is soon as sure as it may be.

Knows experts as numbers and nothing of what is done about them.
"""

from __future__ import annotations

from collections.abc import Sequence

DEGREES = 20
"""Of sureness: what is said with 0.97 is judged apart from what is said with 0.6."""
DOUBT = 8.0
"""Uses, for each degree, that a predictor is believed to have foretold rightly before it has said anything."""
MEMORY = 512.0
"""Uses: when so many were expected of a degree, all that was seen so far counts half."""
TELLING = 1.5
"""How many times the odds of any expert of the layer those of a named one must be, for its name to say something."""
EXACT = 0.01
"""Where all quotients are as near to 1 as this, nothing is scaled: so it is with most predictors, most of the time."""
RECENT = 0.05
"""What one batch counts for in the share of a layer's experts that batches use."""


class Trust:
    """Of one predictor, in one run.

    Attributes:
        least: probability of use from which on a name counts, if the expert is likelier than any.
        sure: the same, whatever the others are.
    """

    def __init__(self, experts: Sequence[int], least: float, sure: float):
        self.least, self.sure = least, sure
        self._experts = experts
        self._expected = [[0.0] * (DEGREES + 1) for _ in experts]
        self._came = [[0.0] * (DEGREES + 1) for _ in experts]
        self._off: list[set[int]] = [set() for _ in experts]  # degrees of sureness that have been too much, or too little
        self._usual = [0.0] * len(experts)  # the share of a layer's experts that a batch uses

    def worth(self, layer: int, said: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
        """(expert, probability) of those whose use is to be reckoned with, the probability as far as experience bears it out."""
        usual = self._usual[layer]
        odds = TELLING * usual
        least = min(self.sure, max(self.least, odds / (1 - usual + odds)))
        if not self._off[layer]:
            return [(expert, p) for expert, p in said if p >= least]
        share = [(DOUBT + came) / (DOUBT + n) for came, n in zip(self._came[layer], self._expected[layer], strict=True)]
        scaled = ((expert, min(1.0, p * share[int(p * DEGREES)])) for expert, p in said if p >= least)
        return [(expert, p) for expert, p in scaled if p >= least]

    def learn(self, layer: int, said: Sequence[tuple[int, float]], used: set[int]) -> None:
        """
        Args:
            said: of one MoE layer of one batch.
            used: the experts that it then read.
        """
        expected, came = self._expected[layer], self._came[layer]
        certain = [expert for expert, p in said if p == 1]  # all, where tables are true or hash functions sure
        expected[DEGREES] += len(certain)
        came[DEGREES] += len(used.intersection(certain))
        degrees = {DEGREES}
        if len(certain) < len(said):
            for expert, p in said:
                if self.least <= p < 1:
                    degree = int(p * DEGREES)
                    expected[degree] += p
                    came[degree] += expert in used
                    degrees.add(degree)
        off = self._off[layer]
        for degree in degrees:
            if expected[degree] > MEMORY:
                expected[degree] /= 2
                came[degree] /= 2
            is_off = abs(came[degree] - expected[degree]) > EXACT * (DOUBT + expected[degree])
            (off.add if is_off else off.discard)(degree)
        self._usual[layer] += RECENT * (len(used) / self._experts[layer] - self._usual[layer])

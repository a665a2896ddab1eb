"""How much is guessed while a large model decodes, and when.

A pass of a large model takes as long as reading its weights, up to some hundred tokens at once:
that many may be guessed. Where fewer guesses come true than are worth their work, as of a model
that writes in its own way, no row guesses for a while, longer after every vain try. All rows pause
together: a pass is as long as its longest row. Rows that read a prompt guess always, beside it, and
tell nothing of the others.

The built-in models always guess: most of what they write is known.

Left out: what is guessed, and how it is judged (`turbo.decode`).
"""

FREE = 256  # tokens in all that a pass computes while the weights are read, about
WORTH = 0.5  # accepted tokens a row that guesses, below which all rows pause
PAUSE = 31  # passes without a guess, at most
PROOF = 4  # guessed tokens in a row that come true before a row guesses as far as it can again


class Pace:
    """Passes of one decoder, with and without guesses."""

    def __init__(self, small: bool):
        self.small, self.proof = small, 0 if small else PROOF
        self.pause = self.rest = 0  # passes without a guess: after a vain one, and still to come

    def most(self, rows: int) -> int | None:
        """How many tokens a row may guess behind a refusal, among so many rows; None: any."""
        return None if self.small else max(1, FREE // rows - 1)

    def consider(self, guessing: int, accepted: int) -> None:
        """Whether the next passes guess, after one in which so many rows did."""
        if self.small:
            return
        if not guessing:
            self.rest = max(0, self.rest - 1)
        elif accepted >= WORTH * guessing:
            self.pause = self.rest = 0
        else:
            self.pause = self.rest = min(2 * self.pause + 1, PAUSE)

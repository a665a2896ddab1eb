"""GTR-Turbo: train visual agents with a teacher merged from their own past checkpoints."""

__version__ = "0.1.0"

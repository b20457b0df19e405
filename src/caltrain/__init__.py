"""CalTrain: joint training with an attested FrontNet, and the trace of every misprediction to its contributor."""

__version__ = "0.1.0"

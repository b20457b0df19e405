"""`caltrain bench accountability`: ground truth is planted, models are trained on it, and verdicts are judged by it."""

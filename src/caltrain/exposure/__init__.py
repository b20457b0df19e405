"""How much a cut gives away: measures, attacks, the report, the choice of a cut (arXiv:1807.00969)."""

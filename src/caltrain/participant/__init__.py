"""A contributor, on its own machine: keys, sealing, approval, joining a run, disclosure."""

"""Models as lists of layers, and how a list is cut into FrontNet, CenterNet and HeadNet.

`spec` is plain data (no torch), `network` builds torch modules from it, `weights` names and digests their state.
"""

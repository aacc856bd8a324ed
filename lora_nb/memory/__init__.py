"""What a model takes: from its shape alone (`estimate`), or from a run of its code without weights (`trace_memory`).

`shapes` has the numbers of an architecture, `families` how configs say them, `block` what a layer keeps for the backward
pass, `step` what that makes of a training step or of generation, `cards` what there is to buy.
"""

"""``edge-ll demo``: the whole lifecycle on one machine, from teacher to fleet report."""

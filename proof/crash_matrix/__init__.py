"""The crash matrix: SIGKILL at every boundary, under every behaviour of every kind.

Read in this order, which is the order of one cell:

    cells.py        boundary x behaviour x kind; which can be reached, and how each ends
    wires.py        the sockets of the victim: what is seen on them, and when to kill
    lives.py        the function and the resolver as processes of their own group
    ground.py       what a cell has for itself: a ledger, a recharge API with its book
    playing.py      one cell, from the first delivery to the last
    judging.py      what was seen against what was promised, by the API's book
    report.py       build/crash/report.json and docs/crash-matrix.md
    __main__.py     the command, the progress and the verdict

The production code runs unchanged under its own server: whoever is to die reaches its
caller, its database and the recharge API only through wires of ours, and is killed by
what passes there. After that nothing of it passes any wire, so what it may still have
done before the signal took effect never left its memory.
"""

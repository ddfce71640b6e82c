"""A step compiled ahead of time for a slice that is not here: does it fit, and what does it send.

Nothing is allocated: states and batches are shapes with shardings, and the compiler is libtpu's own.

    topology.py     slices by name; what a chip's memory holds
    stand_in.py     what a config names and this machine lacks, replaced by what changes no shape
    programs.py     the programs of a step, with shapes and shardings of what they are given
    memory.py       compiling one, and what it needs on a device
    collectives.py  what a compiled program sends, counted in its text
    levers.py       what to change where it does not fit
    check.py        all of it for one config and slice; the smallest slice that fits
"""

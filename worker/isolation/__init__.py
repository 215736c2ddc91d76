"""Walls around trainers: their own uid, no network, no other process, no file but their own, bounded memory.

launcher.py   puts the walls up and becomes the trainer; a script of the standard library alone
syscalls.py   the seccomp filter
sight.py      what of the disk a trainer sees
walls.py      a way to put walls up, and the command line that does it
probe.py      tries every way from inside with a real child, and says what each gave
inside.py     that child
uids.py       a uid for each trainer that runs
limits.py     cgroups, else rlimits
"""

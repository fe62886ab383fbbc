"""A fault campaign: real commands that are killed, damaged files, commands at once, full disks.

    python -m tests.faults [--minutes 18] [--seed 0] [--only KIND[:NUMBER]]      (make test-faults)

Every trial runs commands of `python -m loraq` on a small pipeline in a folder of its own, disturbs
them, and compares everything that they leave with what undisturbed commands make (`compare.py`).

    killed     a signal at a random moment, then the same command again         (killed.py)
    damaged    one damaged file of any kind, then the same command again        (damaged.py)
    together   two to four commands at once in one output folder                (together.py)
    obstacle   a full or unwritable disk, a file in the way, a vanishing folder (obstacle.py)

A trial is determined by its kind, its number and the seed, except for the moments of signals that
are sent by the clock.
"""

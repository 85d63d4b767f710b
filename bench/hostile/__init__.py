"""Hostile input of every kind, and a runner that shows what ftray answers: `python -m bench.hostile`.

A module of this package registers cases of one kind (`case.cases_of`). The runner (`run`) gives each case an empty run
directory and a process of its own, and checks the answer: no code ran, nothing was written elsewhere, no traceback, no
hang, at most 2 GiB, one sentence.
"""

"""Sweeps: a trial is the run file with other settings, validated before anything starts, trained as a run of its own.

What may be tried (space), who chooses (search), who gives a trial up (judge), what is known of the trials (state), how
they are carried out (sweep), and what is shown of them (report, page).
"""

"""Everything that is worth measuring on a GPU, in one command of at most 13 minutes, the most valuable part first.

`plan.py` says which parts there are and what each runs; the files named after parts are what runs, in processes of their own
(`worker.py`, `processes.py`); `record.py` is what is left of it, one JSON and one Markdown page; `session.py` is the command.
"""

"""Faults put into true jobs on CPU ranks, and what became of the jobs: `make fault-campaign`.

Every case starts a job in a run directory of its own, does something to it at a moment drawn from the seed, starts it again, and
is judged by what is there afterwards. The verdicts come from the files and from what the jobs printed, read by code of this
package: the engine's own reading of a checkpoint is not asked.
"""

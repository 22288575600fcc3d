"""Potluck through its public interface. The variant is the executor's name, and perhaps "bf16".

Cohorts and orders are its own, from the seed: those that the workload's file holds for the others.
"""

from itertools import islice

from notes import Notes
from work import SEED, potluck_algorithm, potluck_task

from potluck import rounds
from potluck.simulation import make_executor

notes = Notes()
workload = notes.given.workload
task = potluck_task(notes.given)
name, _, precision = notes.variant.partition(", ")
run = rounds(
    potluck_algorithm(workload),
    task,
    cohort=workload.cohort,
    seed=SEED,
    executor=make_executor(name, task, precision=precision) if precision else name,
    evaluate_every=10**9,
)
examples, done = 0, next(run)
for done in islice(run, workload.rounds):
    examples += done.num_examples
    notes.round_ended()
run.close()
steps = examples // workload.batch_size
notes.finish(done.weights, examples=examples, steps=steps, packages=("torch",))

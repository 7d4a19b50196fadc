"""A live view of a plan's jobs, whichever engine runs them.

    python -m workflow.watch [--cost] -- snakemake --cores all
    python -m workflow.watch -- dvc repro
    python -m workflow.watch            what another terminal runs

It reads what every job leaves: its manifest once it is done, until then its record
(workflow/progress.py). board.py finds the state of every job, words.py says it, screen.py shows it,
engine.py runs the command. Imports no torch.
"""

"""What a params file will take on this machine, job by job, before it runs.

    python -m stages.cost [--params params.yaml] [--results results] [--quick]

rehearsal.py runs the stage of a job on a few images and finds what more of them take. estimate.py
does so for one job of each kind in a plan, table.py adds up and writes. All files go into a
temporary folder.
"""

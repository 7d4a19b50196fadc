"""The plan of an experiment: what params.yaml means, as jobs that both Snakemake and DVC run."""

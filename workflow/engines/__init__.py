"""What Snakemake and DVC have to be told so that both decide as the plan does."""

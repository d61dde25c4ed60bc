"""The page of a run: figures and tables of every stage in one HTML file that needs nothing else."""

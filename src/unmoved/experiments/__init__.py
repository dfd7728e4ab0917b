"""Make many runs: plan the jobs, and run them in processes of this machine or on a Ray cluster."""

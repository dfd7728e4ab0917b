"""Make many runs: plan the jobs, and do them in processes of this machine or on a Ray cluster."""

"""Many runs: jobs, the processes of this machine, a Ray cluster."""

"""What several test files share: the command, real processes, models that are broken on purpose."""

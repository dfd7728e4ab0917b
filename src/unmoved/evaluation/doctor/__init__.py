"""Check whether a measured robust accuracy can be believed: each check looks for one reason not to."""

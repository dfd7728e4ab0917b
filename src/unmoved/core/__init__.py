"""Define what other packages build on: batches, views, protocols, threat models, noise, precision, errors, files."""

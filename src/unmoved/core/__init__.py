"""The language and the ground: batches, views, protocols, threat models, noise, precision, errors, files."""

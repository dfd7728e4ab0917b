"""One run: its folder and its recipe, and how it is trained, evaluated and examined; runs of one recipe together."""

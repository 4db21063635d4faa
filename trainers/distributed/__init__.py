"""The processes of a run, and how a model is distributed over them."""

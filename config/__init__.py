"""Settings, their checks, and the way from a command line to them."""

"""Settings, their checks, and the code that reads them from a command line."""

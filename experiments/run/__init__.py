"""The command line, the runner of one cell, and what a command ends with."""

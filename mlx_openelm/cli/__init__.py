"""The command line: one module a command, which parses and prints and decides nothing."""

from .. import console as console  # what the commands show, and functions called from Python too

"""The command line: flags in, calls, what is printed."""

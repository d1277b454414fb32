"""The command line: flags in, calls, what is printed; `prompt_lab.__main__` has the table.

A command refuses what lacks or is wrong by an ``OSError`` or a ``ValueError`` of one sentence.
"""

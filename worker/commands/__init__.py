"""The command line's commands, one module each; ``cli.py`` parses and prints, these do."""

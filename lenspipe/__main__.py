"""`python -m lenspipe` is the command `lenspipe`."""

from lenspipe.cli import app

app(prog_name="lenspipe")

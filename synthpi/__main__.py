"`python -m synthpi` is the `synthpi` command."
from synthpi.cli import main

main()

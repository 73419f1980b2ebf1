"""`python -m msmoe.cli`"""

from msmoe.cli import main

main()

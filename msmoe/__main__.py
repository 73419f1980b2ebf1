"""`python -m msmoe`"""

from msmoe.cli import main

if __name__ == "__main__":
    main()

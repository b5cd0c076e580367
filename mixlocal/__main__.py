"""python -m mixlocal"""

from mixlocal.cli import main

if __name__ == "__main__":
    main()

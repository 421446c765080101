"""Speed and memory beside plain implementations of the same; see --help."""

from bench.compare import main

from erase.commandline import reporting

if __name__ == "__main__":
    with reporting("speed.py"):
        main()

"""A plot of how time and memory grow with weights, density and images; see --help."""

from bench.growth import main

from erase.commandline import reporting

if __name__ == "__main__":
    with reporting("growth.py"):
        main()

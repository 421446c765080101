"""A plot of how time and memory grow with weights, density and images; see --help."""

from bench.growth import main

if __name__ == "__main__":
    main()

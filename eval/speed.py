"""Speed and memory beside plain implementations of the same; see --help."""

from bench.compare import main

if __name__ == "__main__":
    main()

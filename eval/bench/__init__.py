"""Side-by-side benches: ours beside plain implementations of the same."""

"""The benchmarks users run, and the demo. Nothing in the library imports this package."""

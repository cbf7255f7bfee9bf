"""Speed, measured so that another machine can repeat it: `python -m benchmarks [name ...]`."""

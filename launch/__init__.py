"""Command-line programs: python -m launch.train, launch.evaluate."""

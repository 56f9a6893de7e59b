"""The parts of benchmarks/accelerator.py, each a function `measure(keep)`.

`keep` takes what has been found so far, for JSON, so that a part that is cut off
leaves that. `report` of each tells its result in Markdown.
"""

"""The parts of ``make chip``: what is measured on a GPU, and what has to be right there.

A part is a function from a :class:`~benchmarks.on_chip.gpu.Gpu` to rows, which are written as they come. A
row that says ``failed`` is a failure, and why.
"""
